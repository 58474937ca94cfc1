"""Samples to training batches for a Flamingo without `<answer>`."""

import copy
from dataclasses import dataclass

from ..prompts import ANSWER_TOKEN, get_format
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

    @property
    def answer_lead(self) -> str:
        """
        What has to stand in front of an answer in the text of a chat, for earlier answers to have the tokens of
        training: LLaMA's tokenizer puts a blank in front of what follows `<answer>`, which a chat does not have.
        """
        pieces = get_format(self.format)

        def ids(text: str) -> list[int]:
            tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            return [token for token in tokens if token != self._answer_id]

        trained = ids(f"{pieces.reply}{pieces.answer_lead}A")
        asked = pieces.reply.replace(ANSWER_TOKEN, "")
        leads = (pieces.answer_lead, f"{pieces.answer_lead} ")
        return next((lead for lead in leads if ids(f"{asked}{lead}A") == trained), pieces.answer_lead)
