"""Model folders whose weights are cut off, pointers or not all there are refused in one sentence, by name."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaConfig, LlavaProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_flash_attn_3_available

from otter_hf import loading
from otter_hf.conversion.tensors import ConversionError, open_checkpoint
from otter_hf.loading import load, load_model, read_config, read_model, read_processor


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture(scope="module")
def whole(folders):
    return Path(folders["otter"])


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "damaged")


def change(folder, make, file="model.safetensors"):
    tensors = load_file(folder / file)
    make(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def cut(folder, share):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def set_text(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


def escape(folder):
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(["a"], "../other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: cut(folder, 0.9), r"model.safetensors is damaged: it has \d+ bytes where its header says \d+"),
        (lambda folder: cut(folder, 0.01), "model.safetensors is damaged: its safetensors header cannot be read"),
        (lambda folder: cut(folder, 0), "model.safetensors is damaged: its safetensors header cannot be read"),
        (
            lambda folder: (folder / "model.safetensors").write_text(POINTER),
            "model.safetensors is a Git LFS pointer, not the file itself: download it with git lfs pull",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text(POINTER), "tokenizer.json is a Git LFS pointer"),
        (
            lambda folder: set_text(folder, hidden_size=35),
            "damaged cannot be used, a value in its config.json is wrong: .*hidden size .* is not a multiple",
        ),
        (lambda folder: set_text(folder, initializer_range=3.0), "config.json is wrong: .*'initializer_range'"),
        (lambda folder: set_text(folder, hidden_act="gelo"), "config.json is wrong: KeyError.*gelo"),
        (lambda folder: set_field(folder, "dtype", 64), "config.json is wrong: AttributeError.*is_floating_point"),
        (
            lambda folder: set_field(folder, "text_config.rms_norm_eps", float("nan")),
            "text_config.rms_norm_eps is nan in",
        ),
        (lambda folder: set_field(folder, "dtype", 1e30), "config.json is wrong: IndexError"),
        (lambda folder: set_field(folder, "perceiver_num_latents", -1), "config.json is wrong: .*negative dimension"),
        (escape, "index.json names '../other.safetensors', which is no file beside it"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
            "index.json is damaged: it names no weight files",
        ),
        (
            lambda folder: change(folder, lambda tensors: tensors.pop("model.perceiver.latents")),
            "damaged lacks model.perceiver.latents, which would be random numbers",
        ),
        (
            lambda folder: change(folder, lambda tensors: [tensors.pop(name) for name in sorted(tensors)[:9]]),
            "damaged lacks .*, .*, .* and 6 more, which would be random numbers",
        ),
        (
            lambda folder: change(folder, lambda tensors: tensors.update({"model.perceiver.latents": torch.ones(3)})),
            r"damaged holds model.perceiver.latents as \[3\] for \[.*\], which would be random numbers",
        ),
        (
            lambda folder: change(folder, lambda tensors: tensors["model.perceiver.latents"].fill_(torch.inf)),
            "damaged has values that are NaN or infinite in model.perceiver.latents: fetch or convert it again",
        ),
        (
            lambda folder: change(
                folder, lambda t: t.update({"model.perceiver.latents": t["model.perceiver.latents"].to(torch.int64)})
            ),
            "model.safetensors holds model.perceiver.latents as I64, where the model has floating-point numbers",
        ),
    ],
)
def test_a_damaged_folder_is_refused(folder, damage, told):
    damage(folder)
    with pytest.raises(ValueError, match=told) as error:
        read_model(str(folder))
    assert "\n" not in str(error.value)


def set_field(folder, field, value, file="config.json"):
    config = json.loads((folder / file).read_text())
    *parts, last = field.split(".")
    inner = config
    for part in parts:
        inner = inner[part]
    inner[last] = value
    (folder / file).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("family", "field", "value", "held"),
    [
        ("otter", "text_config.vocab_size", 2**28, r"the weights hold .*weight as \[\d+, 32\] and not as"),
        ("otter", "text_config.intermediate_size", 2**28, "the weights hold .*proj.weight as "),
        ("otter", "text_config.num_hidden_layers", 10**10, r"its weights are \d+ tensors in all"),
        ("otter", "perceiver_num_latents", 2**28, r"the weights hold model.perceiver.latents as \["),
        (
            "otter",
            "max_num_frames",
            2**28,
            r"that is .* GB which the weights do not hold, such as model.perceiver.frame_embs of \[",
        ),
        ("flamingo", "cross_attn_num_heads", 10**8, "the weights hold .*gated_cross_attn_layer.*weight as "),
        ("flamingo", "vision_config.image_size", 10**6, "the weights hold .*position_embedding.weight as "),
        ("flamingo", "perceiver_depth", 10**10, r"its weights are \d+ tensors in all"),
        ("otterhd", "text_config.rope_parameters.partial_rotary_factor", 2**40, "such as .*inv_freq of "),
        ("otterhd", "text_config.hidden_size", 2**28, "the weights hold .* as "),
        (
            "otterhd",
            "text_config.hidden_size",
            10**30,
            r"268435456 is the most that can be; its weights are \d+ tensors",
        ),
        ("otterhd", "patch_size", 10**6, "the weights hold .*vision_embed_tokens.weight as "),
        ("otterhd", "text_config.num_hidden_layers", 10**10, r"its weights are \d+ tensors in all"),
    ],
)
def test_sizes_beyond_the_weights_are_refused_before_they_take_memory(folders, tmp_path, family, field, value, held):
    """No machine has that much: anything but a refusal beforehand would end in another error."""
    folder = shutil.copytree(folders[family], tmp_path / "large")
    set_field(folder, field, value)
    told = f"large cannot be used: {field} is {value}.*{held}.*: write"
    for read in (read_model, AutoModelForImageTextToText.from_pretrained):
        with pytest.raises(ValueError, match=told) as error:
            read(str(folder))
        assert "\n" not in str(error.value)


def test_zero3_takes_memory_before_a_model_compares(folders, tmp_path, monkeypatch):
    """Each parameter is shared out as it is made, so that sizes are compared before `from_pretrained` is called."""
    folder = shutil.copytree(folders["otter"], tmp_path / "large")
    set_field(folder, "text_config.vocab_size", 2**28)
    loading._refuse_sizes(str(folder))
    monkeypatch.setattr(loading, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="large cannot be used: text_config.vocab_size is 268435456"):
        loading._refuse_sizes(str(folder))


def test_layers_that_the_weights_lack(whole, folder, monkeypatch):
    """Up to 256 MB they are told of by `refuse_incomplete`."""
    monkeypatch.setattr("otter_hf.models.stored_sizes._SLACK_BYTES", 0)
    AutoModelForImageTextToText.from_pretrained(folder)
    set_field(folder, "text_config.num_hidden_layers", 40)
    told = r"text_config.num_hidden_layers is 40 in its config.json, but that is .* GB which the weights do not"
    with pytest.raises(ValueError, match=told):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_sizes_are_compared_with_weights_of_every_form(whole, tmp_path):
    """Shards, files of `torch.save`, names of 2023 and quantisation change neither what is refused nor what loads."""
    model = AutoModelForImageTextToText.from_pretrained(whole)
    for form in ("shards", "names", "bin"):
        folder = tmp_path / form
        options = {"max_shard_size": "50kB"} if form == "shards" else {"save_original_format": form == "names"}
        model.save_pretrained(folder, **options)
        if form == "bin":
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        loaded = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
        for field, held in (("vocab_size", "the weights hold "), ("num_hidden_layers", r"its weights are \d+ ten")):
            config = (folder / "config.json").read_text()
            set_field(folder, f"text_config.{field}", 2**28)
            with pytest.raises(ValueError, match=f"text_config.{field} is {2**28}.*{held}"):
                AutoModelForImageTextToText.from_pretrained(folder)
            (folder / "config.json").write_text(config)


@pytest.mark.parametrize(
    ("file", "field"),
    [("processor_config.json", "image_processor.image_processor_type"), ("tokenizer_config.json", "tokenizer_class")],
)
def test_a_damaged_processor_is_refused(folder, file, field):
    set_field(folder, field, 3, file)
    with pytest.raises(
        ValueError, match="damaged cannot be used, a value in its .*tokenizer_config.json.* is wrong: Attr"
    ):
        read_processor(str(folder))


def test_a_processor_of_huge_pictures_is_refused(folder):
    path = folder / "processor_config.json"
    changed = json.loads(path.read_text())
    changed["image_processor"]["size"] = {"height": 10**6, "width": 10**6}
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="damaged cannot be used: size is 1000000 in its processor_config.json"):
        read_processor(str(folder))


def test_sizes_of_other_families_are_theirs(folder):
    """Qwen2-VL's say how many pixels a picture has, which is what evaluations compare with."""
    tokenizer = read_processor(str(folder)).tokenizer
    processor = LlavaProcessor(Qwen2VLImageProcessorPil(), tokenizer, vision_feature_select_strategy="default")
    assert max(dict(processor.image_processor.size).values()) > 10**5
    LlavaConfig().save_pretrained(folder)
    processor.save_pretrained(folder)
    assert isinstance(read_processor(str(folder)), LlavaProcessor)


@pytest.fixture(scope="module")
def adapter(whole, tmp_path_factory):
    """A folder of updates of attention and a whole resampler, for the model in `whole`."""
    model = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(whole),
        LoraConfig(r=2, target_modules=r"model\.language_model\..*\.q_proj", modules_to_save=["perceiver"]),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def test_a_whole_adapter_loads(adapter):
    """As `from_pretrained` does it."""
    for dtype in ("auto", "bfloat16"):
        expected = AutoModelForImageTextToText.from_pretrained(adapter, dtype=dtype).state_dict()
        loaded = read_model(str(adapter), dtype=dtype).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_an_adapter_is_no_whole_model(whole, adapter):
    """Its processor is its base's; its configuration would be that of a training on the base alone."""
    assert read_processor(str(adapter)).tokenizer.get_vocab() == read_processor(str(whole)).tokenizer.get_vocab()
    with pytest.raises(ValueError, match=f"{adapter} is an adapter for {whole}, no whole model: merge the two first"):
        read_config(str(adapter))


def test_an_adapter_for_a_model_of_2023_without_tokenizer(golden, tmp_path):
    """As a training writes it: with the processor that it had. By itself the base asks for a tokenizer."""
    base = shutil.copytree(golden / "otter" / "otter_llama_image", tmp_path / "base")
    processor = AutoProcessor.from_pretrained(base)
    for file in [*base.glob("tokenizer*"), *base.glob("*tokens*")]:
        file.unlink()
    with pytest.raises(OSError, match="holds no tokenizer"):
        read_model(str(base))
    model = AutoModelForImageTextToText.from_pretrained(base, tokenizer=processor.tokenizer)
    config = LoraConfig(r=2, target_modules=r"model\.language_model\..*\.q_proj")
    for part in (get_peft_model(model, config), processor):
        part.save_pretrained(tmp_path / "adapter")
    for options in ({}, {"tokenizer": str(tmp_path / "adapter")}):
        loaded, asked = load(str(tmp_path / "adapter"), device_map="cpu", **options)
        assert loaded.config.image_token_id == asked.image_token_id == processor.image_token_id


def test_an_adapter_of_dora_loads(whole, tmp_path):
    """`from_pretrained` of transformers 5.23 finds no place for its magnitudes."""
    config = LoraConfig(r=2, target_modules=r"model\.language_model\..*\.q_proj", use_dora=True)
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(whole), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.1)
    model.save_pretrained(tmp_path)
    expected = {name.removeprefix("base_model.model."): value for name, value in model.state_dict().items()}
    loaded = read_model(str(tmp_path)).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


LORA_A = "base_model.model.model.language_model.layers.0.decoder_layer.self_attn.q_proj.lora_A.weight"
LATENTS = "base_model.model.model.perceiver.latents"


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (drop(LORA_A), "damaged lacks .*q_proj.lora_A.default.weight, which would be random numbers"),
        (drop(LATENTS), "damaged lacks model.perceiver.modules_to_save.default.latents, which would be random"),
        (put(LORA_A, torch.ones(3, 3)), r"holds .*lora_A.default.weight as \[3, 3\] for \[2, 32\], which would"),
        (put(LORA_A, torch.full((2, 32), torch.nan)), "NaN or infinite in .*lora_A.default.weight"),
        (put(LORA_A, torch.ones(2, 32, dtype=torch.int32)), "holds .*lora_A.weight as I32, where the model has float"),
        (put(LORA_A.replace("layers.0", "layers.9"), torch.ones(2, 32)), "is an adapter with .*layers.9.*, for which"),
    ],
)
def test_a_damaged_adapter_is_refused(adapter, tmp_path, make, told):
    folder = shutil.copytree(adapter, tmp_path / "damaged")
    change(folder, make, "adapter_model.safetensors")
    with pytest.raises(ValueError, match=told) as error:
        read_model(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (None, "its adapter_config.json is damaged, it names no base model"),
        (
            {"base_model_name_or_path": None},
            "an adapter whose adapter_config.json has the base_model_name_or_path None",
        ),
        ({"base_model_name_or_path": "./gone"}, "'./gone' is neither a folder here nor a Hub id"),
        ({"peft_type": "OTHER"}, r"its adapter_config.json is damaged \(KeyError\('OTHER'\)\)"),
        ({"r": "two"}, "its adapter_config.json is damaged"),
        ({"lora_alpha": float("nan")}, "has the lora_alpha nan in its adapter_config.json: copy it again"),
        ({"r": 10**10}, r"has the rank \(r\) 10000000000 in its adapter_config.json, but no size above \d+ in its"),
    ],
)
def test_a_damaged_adapter_configuration_is_refused(adapter, tmp_path, fields, told):
    folder = shutil.copytree(adapter, tmp_path / "damaged")
    path = folder / "adapter_config.json"
    path.write_text("{" if fields is None else json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=told):
        read_model(str(folder))


def test_the_base_of_an_adapter_is_looked_at(adapter, folder, tmp_path):
    """`from_pretrained` tells of what the adapter lacks, and no longer of what its base does."""
    change(folder, drop("model.perceiver.norm.bias"))
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((copy / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(folder)}
    (copy / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="damaged lacks model.perceiver.norm.bias, which would be random numbers"):
        read_model(str(copy))


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "is neither a folder here nor a Hub id"), ("{", "base/config.json' is not a valid JSON file")],
)
def test_an_adapter_of_a_base_that_is_not_there(adapter, tmp_path, content, told):
    """Whether or not the adapter has a tokenizer, which one for a model of 2023 may be asked for."""
    folder, base = shutil.copytree(adapter, tmp_path / "adapter"), tmp_path / "base"
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if content is not None:
        base.mkdir()
        (base / "config.json").write_text(content)
        save_file({"a": torch.zeros(1)}, base / "model.safetensors")
    told_of = []
    for _ in range(2):
        with pytest.raises((ValueError, OSError), match=told) as refusal:
            read_model(str(folder))
        told_of.append(str(refusal.value))
        (folder / "tokenizer.json").write_text("{}")
    assert told_of[0] == told_of[1] and str(base) in told_of[0]


def test_weights_in_eight_bits_are_whole(folder):
    change(folder, lambda tensors: tensors.update({"a": torch.ones(2, 2, dtype=torch.float8_e4m3fn)}))
    assert open_checkpoint(folder)["a"].load().dtype == torch.float8_e4m3fn


def test_a_whole_folder_loads(whole):
    expected = load_file(whole / "model.safetensors")
    loaded = load_model(str(whole), device_map="cpu", dtype=torch.float32)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dtype": "float8"}, "dtype 'float8' is unknown: use auto, float32, bfloat16 or float16"),
        ({"device_map": "cuda:99"}, "The device 'cuda:99' cannot be used here: .*CUDA"),
        ({"device_map": "gpu"}, "The device 'gpu' cannot be used here: Expected one of cpu, cuda"),
        pytest.param(
            {"attn_implementation": "flash_attention_3"},
            "cannot be loaded: FlashAttention3 .*be installed",
            marks=pytest.mark.skipif(is_flash_attn_3_available(), reason="it is installed"),
        ),
    ],
)
def test_what_there_is_not_is_not_blamed_on_the_folder(whole, options, told):
    with pytest.raises(ValueError, match=told) as error:
        load_model(str(whole), **options)
    assert "\n" not in str(error.value) and "config.json" not in str(error.value)


def test_a_processor_that_needs_another_package_is_told(whole, monkeypatch):
    def needs_torchvision(*args, **kwargs):
        raise ImportError("\nQwen2VLVideoProcessor requires the Torchvision library\n but it was not found")

    monkeypatch.setattr("otter_hf.loading.AutoProcessor.from_pretrained", needs_torchvision)
    with pytest.raises(
        ValueError, match="cannot be loaded: Qwen2VLVideoProcessor requires the Torchvision library but"
    ):
        read_processor(str(whole))


def write_header(path, entries, size=16):
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


def entry(start, stop, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "the bytes of b overlap others or leave a gap"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, "the bytes of b overlap others or leave a gap"),
        ({"a": entry(-8, 0)}, r"a has shape \[2\] at bytes -8 to 0"),
        ({"a": entry(0, 8, shape=(-2,))}, r"a has shape \[-2\] at bytes 0 to 8"),
        ({"a": entry(0, 8, shape=(3,))}, r"a has 8 bytes, which shape \[3\] in F32 has not"),
        ({"a": entry(0, 8, "X7")}, "a has dtype 'X7', which is none of BOOL, "),
        ({"a": entry(0, 8.0)}, "a has shape"),
        ({"a": 3}, "its header does not say where a is"),
        ({"a": {"dtype": "F32"}}, "its header does not say where a is"),
        ([], "its safetensors header cannot be read"),
    ],
)
def test_a_header_is_checked(tmp_path, entries, told):
    path = tmp_path / "model.safetensors"
    write_header(path, entries)
    with pytest.raises(ConversionError, match=f"model.safetensors is damaged: {told}"):
        open_checkpoint(path)


def test_other_checkpoints_that_are_none(tmp_path):
    content = {"x": torch.ones(2)}
    content["model"] = content
    torch.save(content, tmp_path / "cyclic.pt")
    with pytest.raises(ConversionError, match="cyclic.pt is not a state dict: its 'model' contains itself"):
        open_checkpoint(tmp_path / "cyclic.pt")
    (tmp_path / "pointer.pt").write_text(POINTER)
    with pytest.raises(ConversionError, match="pointer.pt is a Git LFS pointer"):
        open_checkpoint(tmp_path / "pointer.pt")
    torch.save({"x": torch.ones(1000)}, tmp_path / "cut.pt")
    data = (tmp_path / "cut.pt").read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 5):
        (tmp_path / "cut.pt").write_bytes(data[:size])
        with pytest.raises(ConversionError, match="cut.pt is damaged or is no file of torch.save"):
            open_checkpoint(tmp_path / "cut.pt")
