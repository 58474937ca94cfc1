"""Models that the tests on a card share, made once for each module."""

import copy
import functools

import pytest
import torch
from card_models import CARD, make


@pytest.fixture(scope="module")
def convolutions_in_float32():
    """cudnn rounds the patches of a float32 tower to TF32 by default, which no CPU does."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def made():
    """`made(family)`: model and processor, on the CPU and only to be read."""
    return functools.cache(make)


@pytest.fixture(scope="module")
def folder_of(made, tmp_path_factory):
    """`folder_of(family)`: these two, saved."""

    @functools.cache
    def write(family):
        folder = tmp_path_factory.mktemp(family)
        for part in made(family):
            part.save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture(scope="module")
def on_card(made):
    """`on_card(family)`: a float32 copy on the card, only to be read, and its processor."""

    @functools.cache
    def move(family):
        model, processor = made(family)
        return copy.deepcopy(model).to(CARD), processor

    return move
