import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from otter_hf import OtterProcessor


def make_processor(**special_tokens) -> OtterProcessor:
    """A processor with one token per byte, so that tests can count, and 2x2 pixels in [0, 1]."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)
    image_processor = CLIPImageProcessorPil(
        size={"height": 2, "width": 2}, do_center_crop=False, do_normalize=False, resample=Image.Resampling.NEAREST
    )
    return OtterProcessor(image_processor, OtterProcessor.prepare_tokenizer(tokenizer))


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
