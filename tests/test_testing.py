"""The tiny models that the package ships for tests."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from otter_hf.testing import tiny, write_tiny


TEXTS = {
    "flamingo": "<image>a",
    "otter": "<image>User: a GPT:<answer>",
    "otterhd": "User: a Assistant:",
    "idefics": "<fake_token_around_image><image><fake_token_around_image>a",
}


@pytest.mark.parametrize("family", TEXTS)
def test_pictures_matter_and_folders_load(family, tmp_path):
    folder = write_tiny(family, tmp_path / "model")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)

    def logits(colour):
        picture = Image.new("RGB", (30, 20), colour)
        inputs = processor(text=[TEXTS[family]], images=[picture], return_tensors="pt")
        with torch.no_grad():
            return model(**inputs).logits[0, -1]

    assert torch.equal(logits("red"), logits("red"))
    assert not torch.allclose(logits("red"), logits("blue"), atol=1e-3)


@pytest.mark.parametrize("family", TEXTS)
def test_random_numbers_of_the_caller_go_on(family):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    tiny(family)
    assert torch.equal(torch.rand(3), expected)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="no tiny model of the family 'gpt': use one of flamingo, otter, otterhd, id"):
        tiny("gpt")
