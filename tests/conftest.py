"""Shared by all tests: no network, a tiny Otter, and the numbers of the original code where they are at hand."""

import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# models this small only wait for a second thread
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from otter_tiny import build_tokenizer
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig

from otter_hf import OtterConfig, OtterForConditionalGeneration, OtterProcessor


GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the numbers computed by the 2023 code; not part of the repository."""
    if not GOLDEN.is_dir():
        pytest.skip("the numbers of the original code (../shared/golden) are not beside this checkout")
    return GOLDEN


@pytest.fixture
def processor() -> OtterProcessor:
    """An Otter processor of 28x28 pictures with a byte tokenizer."""
    size = {"height": 28, "width": 28}
    return OtterProcessor(
        CLIPImageProcessorPil(size=size, do_center_crop=False), OtterProcessor.prepare_tokenizer(build_tokenizer())
    )


@pytest.fixture
def model(processor) -> OtterForConditionalGeneration:
    """A random Otter with open gates (two of four layers gated) for `processor`."""
    torch.manual_seed(0)
    config = OtterConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            image_size=28,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=1,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=4,
            vocab_size=len(processor.tokenizer),
            pad_token_id=processor.tokenizer.pad_token_id,
        ),
        cross_attn_every_n_layers=2,
        cross_attn_num_heads=2,
        cross_attn_head_dim=16,
        cross_attn_gate_init=1.0,
        perceiver_depth=1,
        perceiver_num_latents=4,
        perceiver_num_heads=2,
        perceiver_head_dim=16,
        image_token_id=processor.image_token_id,
        end_of_chunk_token_id=processor.end_of_chunk_token_id,
        answer_token_id=processor.answer_token_id,
        initializer_range=0.2,
    )
    return OtterForConditionalGeneration(config).eval()


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Four plain pictures of different colours and sizes."""
    colours = ["red", "green", "blue", "yellow"]
    return [Image.new("RGB", (20 + 8 * i, 40), colour) for i, colour in enumerate(colours)]
