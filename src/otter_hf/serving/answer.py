"""The text of an answer, from its tokens up to its first stop string."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from .stop import StopFilter
from .streamer import AnswerStreamer


class Answer:
    """
    Hands on the text of an answer while it is generated.

    Args:
        tokenizer: of the model.
        stops: the answer ends before the first of them.
        emit: called with pieces of text, none of them empty, in the thread that calls `add`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[str], emit: Callable[[str], None]):
        self._emit = emit
        self._filter = StopFilter(stops)
        self._streamer = AnswerStreamer(tokenizer, self._take)
        self._streamer.put(torch.empty(0))  # the prompt

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._filter.stopped

    def add(self, tokens: Sequence[int]) -> bool:
        """Take new token ids; whether the answer ends here."""
        self._streamer.put(torch.tensor(tokens))
        return self.stopped

    def end(self) -> None:
        """Hand on what was held back."""
        self._streamer.end()

    def _take(self, text: str | None) -> None:
        text = self._filter.flush() if text is None else self._filter.feed(text)
        if text:
            self._emit(text)
