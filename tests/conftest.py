"""Shared by all tests: no network, a tiny Otter, and the numbers of the original code where they are at hand."""

import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# models this small only wait for a second thread
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from otter_tiny import tiny_model, tiny_processor
from PIL import Image, ImageFile

from otter_hf import OtterForConditionalGeneration, OtterProcessor


# importing lmms-eval, as a test module does, switches it on for every test in the process
@pytest.fixture(autouse=True)
def pillow_refuses_truncated_pictures(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


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
    return tiny_processor()


@pytest.fixture
def model(processor) -> OtterForConditionalGeneration:
    """A random Otter with open gates (two of four layers gated) for `processor`."""
    return tiny_model(processor)


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Four plain pictures of different colours and sizes."""
    colours = ["red", "green", "blue", "yellow"]
    return [Image.new("RGB", (20 + 8 * i, 40), colour) for i, colour in enumerate(colours)]
