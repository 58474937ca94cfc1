"""
Fine-tuning with a recipe, and with augmentation of this data set.

    python examples/easy_vqa/train.py examples/easy_vqa/recipe.yaml [--num_train_epochs 1 ...]
"""

from random import Random

from PIL import Image, ImageOps

from otter_hf.data import Sample
from otter_hf.training.run import main


MAX_TURNS = 3
MAX_SHIFT = 12  # pixels


def augment(sample: Sample, generator: Random) -> Sample:
    """
    Other questions, in another order, about pictures that are mirrored and shifted: all at random.

    Of all questions about a picture a few are asked at a time. From many earlier answers the model would guess the
    next one, and not look at the picture.
    """
    turns, media_per_turn = sample["turns"], sample["media_per_turn"]
    if sample["task_group"] == "IMAGE_TEXT":
        turns = generator.sample(turns, min(len(turns), MAX_TURNS))
        media_per_turn = [1] + [0] * (len(turns) - 1)
    media = [[jitter(picture, generator) for picture in medium] for medium in sample["media"]]
    return {**sample, "turns": turns, "media_per_turn": media_per_turn, "media": media}


def jitter(picture: Image.Image, generator: Random) -> Image.Image:
    """The picture mirrored with a chance of one half, and shifted; its own background fills the border."""
    if generator.random() < 0.5:
        picture = ImageOps.mirror(picture)
    _, background = max(picture.getcolors(picture.width * picture.height))
    shift = (generator.randint(-MAX_SHIFT, MAX_SHIFT), generator.randint(-MAX_SHIFT, MAX_SHIFT))
    shifted = Image.new("RGB", picture.size, background)
    shifted.paste(picture, shift)
    return shifted


if __name__ == "__main__":
    main(transform=augment)
