"""Which attention is chosen: of what is installed, what the GPU runs and the model can be computed with."""

import pytest
import torch
from tiny_flamingo import tiny_config

from otter_hf import OtterHDConfig
from otter_hf.models import attention_choice
from otter_hf.models.attention_choice import best_varlen_attention, fits, tell_choice, why_not
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
    assert torch_varlen_kernel() is not None
    assert not has_varlen_kernel(CPU, HALF)
    machine([], (8, 0))
    assert has_varlen_kernel(CUDA, HALF) and not has_varlen_kernel(CUDA, torch.float32)
    machine([], (7, 5))
    assert not has_varlen_kernel(CUDA, HALF)
