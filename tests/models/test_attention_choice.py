"""Which attention is chosen: of what is installed, what the GPU runs and the model can be computed with."""

import pytest
import torch
from tiny_flamingo import DECODERS, tiny_config
from transformers import AutoConfig, AutoModelForImageTextToText

from otter_hf import OtterHDConfig
from otter_hf.models import attention_choice
from otter_hf.models.attention_choice import best_varlen_attention, fits, read_attention, tell_choice, why_not
from otter_hf.models.varlen_attention import has_varlen_kernel, torch_varlen_kernel


CUDA, CPU, HALF = torch.device("cuda"), torch.device("cpu"), torch.bfloat16
F2, F3, F4, TORCH = "flash_attention_2", "flash_attention_3", "flash_attention_4", "varlen_sdpa"


@pytest.fixture
def machine(monkeypatch):
    """Sets what is installed and the GPU's compute capability."""

    def having(installed, capability):
        monkeypatch.setattr(attention_choice, "_is_installed", lambda name: name in installed)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return having


@pytest.mark.parametrize(
    ("installed", "capability", "llama", "mpt"),
    [
        ([], (9, 0), TORCH, TORCH),
        ([F2], (8, 0), F2, F2),
        ([F3, F4], (8, 9), TORCH, TORCH),
        ([F2, F3], (9, 0), F3, F2),
        ([F2, F3, F4], (9, 0), F4, F2),
        ([F3, F4], (9, 0), F4, TORCH),
        ([F3], (10, 0), TORCH, TORCH),
        ([F4], (10, 0), F4, TORCH),
        ([F2, F4], (12, 0), F2, F2),
    ],
)
def test_the_best_that_is_at_hand(machine, installed, capability, llama, mpt):
    machine(installed, capability)
    for config, expected in ((tiny_config("llama"), llama), (OtterHDConfig(), llama), (tiny_config("otter_mpt"), mpt)):
        assert best_varlen_attention(config, CUDA, HALF) == expected
        assert best_varlen_attention(config, CUDA, torch.float32) == TORCH
        assert best_varlen_attention(config, CPU, HALF) == TORCH


def test_wide_heads_and_dropout(machine):
    machine([F3, F4], (9, 0))
    assert best_varlen_attention(tiny_config("gemma", text={"head_dim": 256}), CUDA, HALF) == F3
    config = tiny_config("llama", text={"attention_dropout": 0.1})
    assert best_varlen_attention(config, CUDA, HALF) == TORCH and fits(F2, config)


def test_reasons(machine):
    machine([F3], (10, 0))
    assert why_not(F2, CPU, HALF) == "needs CUDA"
    assert why_not(F2, CUDA, torch.float32) == "needs bfloat16 or float16"
    assert why_not(F4, CUDA, HALF) == "not installed: pip install flash-attn-4"
    assert why_not(F3, CUDA, HALF) == "not made for a GPU of compute capability 10.x"
    assert tell_choice({TORCH}, CPU, HALF) == ""
    told = tell_choice({TORCH, "sdpa"}, CUDA, HALF)
    assert told.startswith("varlen_sdpa is ") and "flash_attention_4: not installed: pip install flash-attn-4" in told


def test_torch_has_the_kernel_in_this_version_and_not_for_a_cpu(machine):
    """Its signature is what our call relies on."""
    pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.9 has none")
    assert torch_varlen_kernel() is not None
    assert not has_varlen_kernel(CPU, HALF)
    machine([], (8, 0))
    assert has_varlen_kernel(CUDA, HALF) and not has_varlen_kernel(CUDA, torch.float32)
    machine([], (7, 5))
    assert not has_varlen_kernel(CUDA, HALF)


RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}


def build(config, attention):
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, attn_implementation=attention)


def chosen(model) -> list:
    parts = (model.config, model.config.vision_config, model.config.text_config)
    return [part._attn_implementation for part in parts]


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_is_asked_for_is_set_on_the_parts_that_have_it(decoder, caplog):
    """A convolutional tower has none but `eager`; which part that is is said."""
    config = tiny_config(decoder)
    config.vision_config = AutoConfig.for_model(**RESNET)
    if decoder == "falcon":  # in whose layers it is not
        assert chosen(build(config, "varlen_sdpa")) == ["varlen_sdpa", "eager", "sdpa"]
        return
    model = build(config, None)
    for attention in ("eager", "sdpa", "varlen_sdpa"):
        assert chosen(build(config, attention)) == [attention, "eager", attention]
        model.set_attn_implementation(attention)
        assert chosen(model) == [attention, "eager", attention]
    model.set_attn_implementation({"text_config": "eager"})
    assert chosen(model) == ["varlen_sdpa", "eager", "eager"]
    by_part = {"vision_config": "sdpa", "text_config": "eager", "": "sdpa"}
    assert chosen(build(config, by_part)) == ["sdpa", "eager", "eager"]


def test_which_part_has_it_not_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(attention_choice.logger, "warning_once", said.append)
    build(tiny_config(), "sdpa")
    config = tiny_config()
    config.vision_config = AutoConfig.for_model(**RESNET)
    build(config, {"text_config": "sdpa"})
    build(config, "eager")
    assert not said
    build(config, "sdpa")
    assert len(said) == 1 and "ResNetModel (vision_config) has not, and takes 'eager'" in said[0]


@pytest.mark.parametrize("config", [tiny_config(), OtterHDConfig()], ids=["flamingo", "otterhd"])
def test_a_part_that_there_is_not_is_refused(config):
    with pytest.raises(ValueError, match="has no part 'text'; did you mean 'text_config'"):
        config._attn_implementation = {"text": "sdpa"}
    with pytest.raises(ValueError, match="has no part 'text'; did you mean 'text_config'"):
        build(config, {"text": "sdpa"})


def test_a_part_that_there_is_not_is_refused_later_too():
    model = build(tiny_config(), None)
    with pytest.raises(ValueError, match="has no part 'vision'; did you mean 'vision_config'"):
        model.set_attn_implementation({"vision": "sdpa"})


def test_attention_as_typed():
    parts = {"text_config": "sdpa", "vision_config": "eager"}
    for given in ("text_config=sdpa, vision_config=eager", '{"text_config": "sdpa", "vision_config": "eager"}', parts):
        assert read_attention(given) == parts
    assert read_attention("sdpa") == "sdpa" and read_attention(None) is None
    with pytest.raises(ValueError, match="cannot be read"):
        read_attention("{text_config: sdpa")
