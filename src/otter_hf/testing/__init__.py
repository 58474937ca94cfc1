"""Tiny models with random weights, for tests: no download, milliseconds for a forward pass.

    from otter_hf.testing import tiny, write_tiny

    model, processor = tiny("otter")
    folder = write_tiny("otterhd", tmp_path / "model")  # for what takes a path

Their answers mean nothing, but depend on text and pictures as those of trained models do: gates are open and weights
large. The modules of this package make the parts by themselves, and take changes of a configuration.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..models import FlamingoForConditionalGeneration, FlamingoProcessor
from . import idefics, otter, otterhd


# by family the module, and the classes of processor and model where it has several
_MAKERS = {
    "flamingo": (otter, (FlamingoProcessor,), (FlamingoForConditionalGeneration,)),
    "otter": (otter, (), ()),
    "otterhd": (otterhd, (), ()),
    "idefics": (idefics, (), ()),
}


def tiny(family: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    A model in evaluation mode and its processor; the same weights each time.

    Args:
        family: `flamingo`, `otter`, `otterhd` or `idefics`.

    Raises:
        ValueError: for another name.
    """
    if family not in _MAKERS:
        raise ValueError(f"There is no tiny model of the family {family!r}: use one of {', '.join(_MAKERS)}.")
    module, processor_class, model_class = _MAKERS[family]
    processor = module.tiny_processor(*processor_class)
    with torch.random.fork_rng(devices=[]):  # the seed is of the weights alone
        return module.tiny_model(processor, *model_class), processor


def write_tiny(family: str, folder: str | Path) -> Path:
    """As [`tiny`], saved in `folder`, which is returned."""
    for part in tiny(family):
        part.save_pretrained(folder)
    return Path(folder)


__all__ = ["tiny", "write_tiny"]
