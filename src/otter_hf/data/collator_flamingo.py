"""Samples to training batches for a Flamingo without `<answer>`."""

import copy
from typing import TYPE_CHECKING

from ..prompts import ANSWER_TOKEN
from .collator import OtterCollator


if TYPE_CHECKING:
    from ..models.flamingo import FlamingoProcessor


def flamingo_collator(processor: "FlamingoProcessor", **options) -> OtterCollator:
    """
    An `OtterCollator` for a Flamingo, whose tokenizer stays as it is.

    `<answer>` only tells what is to be learned, and is not in the batches: a turn is `User:{q} GPT:{a}<|endofchunk|>`,
    with the tokens that the model is asked with, up to `GPT:`, in front of those of the answer.

    Args:
        options: those of `OtterCollator` but `remove_answer_token`.
    """
    return OtterCollator(_WithAnswerToken(processor), remove_answer_token=True, **options)


class _WithAnswerToken:
    """What `OtterCollator` needs of a processor, with one token more."""

    answer_token = ANSWER_TOKEN

    def __init__(self, processor: "FlamingoProcessor"):
        self.tokenizer = copy.deepcopy(processor.tokenizer)
        self.tokenizer.add_special_tokens(
            {"additional_special_tokens": [ANSWER_TOKEN]}, replace_extra_special_tokens=False
        )
        self.answer_token_id = self.tokenizer.convert_tokens_to_ids(ANSWER_TOKEN)
        self.image_token, self.image_token_id = processor.image_token, processor.image_token_id
        self.pack_media = processor.pack_media
