"""Samples to training batches for a Flamingo without `<answer>`."""

import copy
from dataclasses import dataclass

from ..prompts import ANSWER_TOKEN
from .collator import OtterCollator


@dataclass
class FlamingoCollator(OtterCollator):
    """
    An `OtterCollator` for a Flamingo, whose tokenizer stays as it is.

    `<answer>` only tells what is to be learned, and is not in the batches: a turn is `User:{q} GPT:{a}<|endofchunk|>`,
    with the tokens that the model is asked with, up to `GPT:`, in front of those of the answer.

    Args:
        processor: a `FlamingoProcessor`; the options are those of `OtterCollator`.

    Raises:
        ValueError: if `<answer>` is to stay, for which the model has no row.
    """

    remove_answer_token: bool = True

    def __post_init__(self) -> None:
        if not self.remove_answer_token:
            raise ValueError("remove_answer_token is False, but a Flamingo has no <answer> token: leave it out.")
        tokenizer = copy.deepcopy(self.processor.tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": [ANSWER_TOKEN]}, replace_extra_special_tokens=False)
        self._set_up(tokenizer, self.processor.image_token, ANSWER_TOKEN)
