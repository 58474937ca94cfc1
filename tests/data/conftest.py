import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from otter_hf import OtterProcessor
from otter_hf.testing.otter import byte_tokenizer


def make_processor(**special_tokens) -> OtterProcessor:
    """A processor with one token per byte, so that tests can count, and 2x2 pixels in [0, 1]."""
    image_processor = CLIPImageProcessorPil(
        size={"height": 2, "width": 2}, do_center_crop=False, do_normalize=False, resample=Image.Resampling.NEAREST
    )
    return OtterProcessor(image_processor, OtterProcessor.prepare_tokenizer(byte_tokenizer(**special_tokens)))


@pytest.fixture(scope="session")
def tiny_processor():
    return make_processor(bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_processor_padding_with_eos():
    return make_processor(bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def tiny_processor_without_bos():
    return make_processor(eos_token="</s>")


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


@pytest.fixture(scope="session")
def by_colour():
    return {name: Image.new("RGB", (5, 4), colour) for name, colour in COLOURS.items()}
