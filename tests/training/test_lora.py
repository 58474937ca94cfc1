"""LoRA and DoRA on each family: what they touch, and adapters that are saved, loaded, merged and gone on with."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from training_files import command, losses, write_training_files
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.quantizers.quantizers_utils import should_convert_module

from otter_hf import FlamingoForConditionalGeneration, OtterConfig, OtterForConditionalGeneration
from otter_hf.models import quantization
from otter_hf.testing import otter as otter_tiny
from otter_hf.testing import otterhd as otterhd_tiny
from otter_hf.training import lora
from otter_hf.training.arguments import DataArguments, ModelArguments, TrainingArguments
from otter_hf.training.lora import lora_config
from otter_hf.training.plan import make_plan, meta_model
from otter_hf.training.run import run as main


LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PERSIMMON = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def tiny(family: str):
    if family == "otterhd":
        return otterhd_tiny.tiny_model(otterhd_tiny.tiny_processor())
    model_class = FlamingoForConditionalGeneration if family == "flamingo" else OtterForConditionalGeneration
    return otter_tiny.tiny_model(otter_tiny.tiny_processor(), model_class)


def updated_layers(model) -> set[str]:
    return {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_A." in name}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("family", "targets", "layers", "per_layer"),
    [("otter", LLAMA, 4, 7), ("flamingo", LLAMA, 4, 7), ("otterhd", PERSIMMON, 2, 4)],
)
def test_only_layers_of_the_decoder(family, targets, layers, per_layer, dora):
    """Vision tower and gated blocks, which have a `q_proj` or `dense` too, are left alone."""
    arguments = ModelArguments("base/model", lora=True, lora_target_modules=targets, lora_dora=dora, lora_r=2)
    model = tiny(family)
    named = [name for name, _ in model.named_modules() if name.split(".")[-1] in targets]
    model.add_adapter(lora_config(arguments))
    updated = updated_layers(model)
    assert len(updated) == layers * per_layer
    assert all(name.startswith("model.language_model.") for name in updated)
    assert not any("gated_cross_attn_layer" in name for name in updated)
    if family != "otterhd":
        assert len(named) > len(updated)  # there was something to leave alone
    assert any("lora_magnitude_vector" in name for name, _ in model.named_parameters()) == dora


def test_a_name_of_a_gated_block_alone_is_refused():
    arguments = ModelArguments("base/model", lora=True, lora_target_modules=["to_kv"])
    with pytest.raises(ValueError, match="to_kv|[Tt]arget modules"):
        tiny("otter").add_adapter(lora_config(arguments))


def test_a_tied_model(tmp_path):
    """As every MPT is: rows of single tokens are trained in both layers; an update of the head alone is refused."""
    fields = tiny("otter").config.to_dict() | {"tie_word_embeddings": True}
    small = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "vocab_size": 300}
    fields["text_config"] = {"model_type": "otter_mpt", "tie_word_embeddings": True, **small}
    fields["vision_config"] = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    torch.manual_seed(0)
    model = OtterForConditionalGeneration(OtterConfig(**fields)).eval()
    model.save_pretrained(tmp_path)
    common = {"lora": True, "lora_r": 2}
    arguments = ModelArguments(
        str(tmp_path), lora_target_modules=["Wqkv"], train_embedding_rows=["<answer>", "<image>"], **common
    )
    training_args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, activation_checkpointing=True)
    plan = make_plan(meta_model(arguments), arguments, DataArguments("t.yaml", max_length=32), training_args)
    assert plan.flops.per_label == 6 * 32 * 300 and plan.memory["activations"] > 0
    adapted = lora.with_updates(model, arguments, [5, 6]).eval()
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        for _, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        expected = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert merged.lm_head.weight is merged.get_input_embeddings().weight

    head = ModelArguments(str(tmp_path), lora_target_modules=["Wqkv", "lm_head"], **common)
    with pytest.raises(ValueError, match="lm_head, which this model shares with its input embedding"):
        meta_model(head)
    assert lora.with_updates(tiny("otter"), ModelArguments("a/b", lora_target_modules=["lm_head"], **common))


def test_what_is_trained_is_float32_under_autocast():
    arguments = ModelArguments(
        "base/model", lora=True, lora_target_modules=["q_proj"], lora_train_groups=["perceiver", "cross_attention"]
    )
    for autocast in (False, True):
        model = lora.with_updates(tiny("otter").bfloat16(), arguments, autocast=autocast)
        trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        assert trained == ({torch.float32} if autocast else {torch.float32, torch.bfloat16})
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_bfloat16_with_autocast(files):
    """As the recipe for one card has it, on a CPU."""
    settings = {"lora": True, "lora_target_modules": ["q_proj", "v_proj"], "lora_train_groups": ["perceiver"]}
    main(command(files, "half", dtype="bfloat16", bf16=True, activation_checkpointing=True, **settings))
    assert losses(files / "half")[-1] < losses(files / "half")[0]
    saved = load_file(files / "half" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any(".perceiver." in name for name in saved)


@pytest.mark.parametrize("family", ["otter", "otterhd"])
def test_four_bits_are_for_layers_of_the_decoder(family, monkeypatch):
    """What may be trained in full cannot be stored in 4 bits."""
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(quantization, "BitsAndBytesConfig", SimpleNamespace)
    whole = quantization.quantization_config().llm_int8_skip_modules
    linear = [name for name, module in tiny(family).named_modules() if isinstance(module, torch.nn.Linear)]
    stored = {name for name in linear if should_convert_module(name, whole)}
    decoder = {name for name in linear if name.startswith("model.language_model.")}
    assert stored == {name for name in decoder if "gated_cross_attn_layer" not in name}
    assert len(linear) > len(stored) > 0


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_training_files(tmp_path_factory.mktemp("lora"))


@pytest.fixture(autouse=True)
def cache(files, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", files / "cache")


@torch.no_grad()
def logits(model, folder):
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text="<image>User:what color? GPT:<answer>", images=Image.new("RGB", (20, 24), "red"))
    return model.eval()(**inputs.convert_to_tensors("pt")).logits


@pytest.mark.parametrize("groups", [[], ["perceiver", "cross_attention"]])
def test_saved_loaded_merged_and_gone_on_with(files, groups):
    settings = {"lora": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "lora_train_groups": groups}
    settings |= {"save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.1}
    shutil.rmtree(files / "adapters", ignore_errors=True)
    main(command(files, "adapters", **settings))
    out = files / "adapters"
    assert not list(out.rglob("model.safetensors"))
    saved = load_file(out / "adapter_model.safetensors")
    for group, part in (("perceiver", ".perceiver."), ("cross_attention", ".gated_cross_attn_layer.")):
        assert any(part in name for name in saved) == (group in groups)
    if groups:
        assert any(name.endswith("attn_gate") for name in saved)

    base = AutoModelForImageTextToText.from_pretrained(files / "base")
    before = logits(base, out)
    adapted = PeftModel.from_pretrained(base, out)
    expected = logits(adapted, out)
    assert (expected - before).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, out), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(files / "merged")
    whole, info = AutoModelForImageTextToText.from_pretrained(files / "merged", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(whole, out), expected, rtol=1e-4, atol=1e-4)
    # the folder of the adapters loads like any other
    torch.testing.assert_close(
        logits(AutoModelForImageTextToText.from_pretrained(out), out), expected, rtol=1e-5, atol=1e-5
    )

    unbroken = losses(out)
    shutil.rmtree(out / "checkpoint-4")
    main(command(files, "adapters", resume_from_checkpoint="auto", **settings))
    assert losses(out) == unbroken
    again = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())


def test_four_bits(files):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    settings = {"lora": True, "lora_target_modules": ["q_proj", "v_proj"], "lora_train_groups": ["perceiver"]}
    main(command(files, "four", load_in_4bit=True, activation_checkpointing=True, **settings))
    assert losses(files / "four")[-1] < losses(files / "four")[0]
    base = AutoModelForImageTextToText.from_pretrained(files / "base")
    tuned = AutoModelForImageTextToText.from_pretrained(files / "four")
    assert (logits(base, files / "base") - logits(tuned, files / "base")).abs().max() > 1e-3
