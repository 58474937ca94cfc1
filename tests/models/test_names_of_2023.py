"""Lines of 2023's notebooks: what is the same under another name works, what is gone says today's line."""

import importlib

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_flamingo import tiny_config
from transformers import AutoModelForImageTextToText

from otter_hf import FlamingoForConditionalGeneration, FlamingoProcessor, OtterForConditionalGeneration
from otter_hf.testing.otter import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def flamingo():
    return tiny_model(tiny_processor(FlamingoProcessor), FlamingoForConditionalGeneration)


@pytest.fixture(scope="module")
def asked(flamingo):
    """Pictures `(B, T, F, C, H, W)`, token ids and their mask."""
    inputs = tiny_processor(FlamingoProcessor)(
        images=[Image.new("RGB", (28, 28), "red")], text="<image>a", return_tensors="pt"
    )
    return inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"]


def names_of_2023(state_dict: dict, decoder: str = "model", head: str = "lm_head") -> dict:
    """As the code of 2023 stored a model, by default on LLaMA."""
    names = {}
    for key, value in state_dict.items():
        key = key.replace("model.vision_tower.", "vision_encoder.vision_model.")
        key = key.removeprefix("model.") if key.startswith("model.perceiver.") else key
        key = key.replace("model.language_model.", f"lang_encoder.{decoder}.")
        names[f"lang_encoder.{head}.weight" if key == "lm_head.weight" else key] = value
    return names


def test_attributes(flamingo):
    assert flamingo.vision_encoder is flamingo.model.vision_tower
    assert flamingo.lang_encoder is flamingo.model.language_model
    assert flamingo.eoc_token_id == flamingo.config.end_of_chunk_token_id is not None
    assert flamingo.media_token_id == flamingo.config.image_token_id is not None
    with pytest.raises(AttributeError, match=r"AutoProcessor.from_pretrained\(.*\).tokenizer"):
        flamingo.text_tokenizer  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'text_tokeniser'"):
        flamingo.text_tokeniser  # noqa: B018


def test_arguments_by_position(flamingo, asked):
    pixel_values, input_ids, mask = asked
    named = {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": mask}
    expected = flamingo.generate(**named, max_new_tokens=3)
    assert torch.equal(flamingo.generate(pixel_values, input_ids, mask, max_new_tokens=3), expected)
    assert torch.equal(flamingo.generate(pixel_values, input_ids, attention_mask=mask, max_new_tokens=3), expected)
    assert torch.equal(flamingo(pixel_values, input_ids, mask).logits, flamingo(**named).logits)
    with pytest.raises(ValueError, match="vision_x is given twice"):
        flamingo.generate(pixel_values, input_ids, vision_x=pixel_values[:0])


def test_weights_by_their_names_of_2023(flamingo):
    stored = names_of_2023(flamingo.state_dict())
    assert any(key.startswith("perceiver.") for key in stored)
    other = tiny_model(tiny_processor(FlamingoProcessor), FlamingoForConditionalGeneration)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    # as the training script stored them: only what was trained, and with DDP's prefix
    trained = {f"module.{key}": value for key, value in stored.items() if "vision" not in key}
    missing, unexpected = other.load_state_dict(trained, strict=False)
    assert not unexpected and all("vision_tower" in key for key in missing)
    for name, value in other.state_dict().items():
        assert "vision_tower" in name or torch.equal(value, flamingo.state_dict()[name]), name
    other.load_state_dict(stored)


def test_weights_by_the_names_of_openflamingo(flamingo):
    stored = {}
    for key, value in names_of_2023(flamingo.state_dict()).items():
        for layer in range(flamingo.config.perceiver_depth):
            key = key.replace(f"perceiver.layers.{layer}.feed_forward", f"perceiver.layers.{layer}.1.")
            start = f"perceiver.layers.{layer}."
            if key.startswith(start) and not key.startswith(f"{start}1."):
                key = key.replace(start, f"{start}0.")
        key = key.replace("..", ".").replace("gated_cross_attn_layer.feed_forward", "gated_cross_attn_layer.ff")
        stored[key] = value
    stored["lang_encoder.gated_cross_attn_layers.1.attn_gate"] = torch.zeros(1)
    stored = {key: value for key, value in stored.items() if "vision" not in key and ".decoder_layer." not in key}
    _, unexpected = flamingo.load_state_dict(stored, strict=False)
    assert not unexpected


MOSAIC_GPT = {"norm_1.": "ln_1.", "norm_2.": "ln_2.", "ffn.": "mlp.mlp_", "_proj.": ".", "norm_f.": "ln_f."}


def as_mosaic_gpt(key: str) -> str:
    if ".blocks." not in key and ".norm_f." not in key or "gated_cross_attn_layer" in key or "out_proj" in key:
        return key
    for new, old in MOSAIC_GPT.items():
        key = key.replace(new, old)
    return key


@pytest.mark.parametrize("kind", [OtterForConditionalGeneration, FlamingoForConditionalGeneration])
@pytest.mark.parametrize("decoder", ["llama", "otter_mpt", "mosaic_gpt", "gpt_neox"])
def test_saved_under_the_names_of_2023(kind, decoder, tmp_path):
    """A new model, and one that was read, under whatever names; and all of them load again."""
    tiny = tiny_config("otter_mpt" if decoder == "mosaic_gpt" else decoder)
    torch.manual_seed(0)
    model = kind(kind.config_class(text_config=tiny.text_config, vision_config=tiny.vision_config, perceiver_depth=1))
    weights, settings = model.state_dict(), {"save_original_format": True}
    if tiny.text_config.tie_word_embeddings:
        del weights["lm_head.weight"]
    roots = {"llama": ("model",), "gpt_neox": ("gpt_neox", "embed_out")}
    stored = names_of_2023(weights, *roots.get(decoder, ("transformer",)))
    if decoder == "mosaic_gpt":
        stored = {as_mosaic_gpt(key): value for key, value in stored.items()}
        assert any(key.endswith(".mlp.mlp_down.weight") for key in stored)
        model.config.save_pretrained(tmp_path)
        save_file({key: value.contiguous() for key, value in stored.items()}, tmp_path / "model.safetensors")
        model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for options, expected in ((settings, stored), ({}, weights), (settings, stored)):
        if decoder == "mosaic_gpt" and options == {}:
            continue  # of today's names nobody can say that they were once others
        model.save_pretrained(tmp_path / "saved", **options)
        assert load_file(tmp_path / "saved" / "model.safetensors").keys() == expected.keys()
        model, told = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert type(model) is kind and not any(told.values())
        for name, value in weights.items():
            assert torch.equal(model.state_dict()[name], value), name


def test_a_checkpoint_that_fits_nothing_is_refused(flamingo):
    with pytest.raises(ValueError, match="None of 2 entries, .* load its 'model_state_dict'"):
        flamingo.load_state_dict({"epoch": 1, "model_state_dict": {"perceiver.latents": 0}}, strict=False)
    with pytest.raises(ValueError, match="None of 1 entries, such as 'encoder.x'.*`otter-hf convert`"):
        flamingo.load_state_dict({"encoder.x": torch.zeros(1)}, strict=False)
    flamingo.load_state_dict({}, strict=False)


@pytest.mark.parametrize("argument", ["load_in_8bit", "load_in_4bit"])
def test_quantisation(flamingo, tmp_path, argument):
    flamingo.config.save_pretrained(tmp_path)
    line = rf"quantization_config=BitsAndBytesConfig\({argument}=True\)"
    with pytest.raises(ValueError, match=line):
        FlamingoForConditionalGeneration.from_pretrained(tmp_path, **{argument: True})
    with pytest.raises(ValueError, match=line):
        AutoModelForImageTextToText.from_pretrained(tmp_path, **{argument: True})


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("otter_ai", "from otter_hf import OtterForConditionalGeneration"),
        ("otter_ai.models.otter.modeling_otter", "from otter_hf import OtterForConditionalGeneration"),
        ("flamingo.modeling_flamingo", "from otter_hf import FlamingoForConditionalGeneration"),
    ],
)
def test_modules(module, line):
    with pytest.raises(ModuleNotFoundError, match=line):
        importlib.import_module(module)
