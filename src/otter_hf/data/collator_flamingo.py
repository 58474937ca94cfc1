"""Samples to training batches for a Flamingo without `<answer>`."""

import copy
from typing import TYPE_CHECKING

from ..prompts import ANSWER_TOKEN
from .collator import OtterCollator


if TYPE_CHECKING:
    from ..models.flamingo import FlamingoProcessor


class FlamingoCollator(OtterCollator):
    """
    An `OtterCollator` for a Flamingo, whose tokenizer stays as it is.

    `<answer>` only tells what is to be learned, and is not in the batches: a turn is `User:{q} GPT:{a}<|endofchunk|>`,
    with the tokens that the model is asked with, up to `GPT:`, in front of those of the answer.
    """

    def __post_init__(self) -> None:
        tokenizer = copy.deepcopy(self.processor.tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": [ANSWER_TOKEN]}, replace_extra_special_tokens=False)
        self._set_up(tokenizer, self.processor.image_token, ANSWER_TOKEN)


def flamingo_collator(processor: "FlamingoProcessor", **options) -> FlamingoCollator:
    """The collator of a Flamingo; `options` are those of `OtterCollator` but `remove_answer_token`."""
    return FlamingoCollator(processor, remove_answer_token=True, **options)
