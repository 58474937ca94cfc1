"""What the processors do to a picture, against the recipes of 2023 written with Pillow and numpy alone."""

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, IdeficsImageProcessorPil

from otter_hf import OtterHDImageProcessor, OtterProcessor
from otter_hf.data.collator import OtterCollator
from otter_hf.testing.otter import build_tokenizer


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# the rounded ones of the training script
MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


@pytest.fixture(scope="module")
def picture():
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    return Image.fromarray(noise).resize((300, 200), Image.Resampling.BICUBIC)


def normalized(picture, mean, std):
    pixels = np.asarray(picture, np.float32) / 255  # (H, W, C)
    return ((pixels - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)


def square(picture, size):
    return picture.resize((size, size), Image.Resampling.BICUBIC)


def test_training_square(picture):
    """A square of `patch_image_size`, bicubic, the sides not in proportion, the rounded constants."""
    image_processor = CLIPImageProcessorPil(
        size={"height": 224, "width": 224}, do_center_crop=False, image_mean=MEAN, image_std=STD
    )
    processor = OtterProcessor(image_processor, OtterProcessor.prepare_tokenizer(build_tokenizer()))
    sample = {"id": "a", "turns": [("Q", "A")], "media_per_turn": [1], "media": [[picture]]}
    pixels = OtterCollator(processor)([sample])["pixel_values"]
    assert pixels.shape == (1, 1, 1, 3, 224, 224)
    np.testing.assert_allclose(pixels[0, 0, 0].numpy(), normalized(square(picture, 224), MEAN, STD), atol=2e-6)


def test_inference_crop(picture):
    """CLIP's: the shorter side to 224, and the middle of it."""
    pixels = CLIPImageProcessorPil()(picture, return_tensors="np")["pixel_values"][0]
    resized = picture.resize((336, 224), Image.Resampling.BICUBIC).crop((56, 0, 280, 224))
    np.testing.assert_allclose(pixels, normalized(resized, CLIP_MEAN, CLIP_STD), atol=2e-6)


def test_idefics(picture):
    pixels = IdeficsImageProcessorPil()(picture, return_tensors="np")
    np.testing.assert_allclose(
        np.asarray(pixels).reshape(3, 224, 224), normalized(square(picture, 224), CLIP_MEAN, CLIP_STD), atol=2e-6
    )


@pytest.mark.parametrize("side", [224, 448])
def test_otterhd_resolution(picture, side):
    """A square of the resolution, bicubic, scaled to [-1, 1], cut into patches."""
    processor = OtterHDImageProcessor(patch_size={"height": 30, "width": 30})
    output = processor(picture, resolution=(side, side), return_tensors="np")
    grid = -(-side // 30)
    # patches row by row, pixels of a patch as height, width, colour
    patches = np.asarray(output["pixel_values"]).reshape(grid, grid, 30, 30, 3)
    pixels = patches.transpose(0, 2, 1, 3, 4).reshape(grid * 30, grid * 30, 3)
    expected = np.asarray(square(picture, side), np.float32) / 127.5 - 1
    np.testing.assert_allclose(pixels[:side, :side], expected, atol=2e-6)
