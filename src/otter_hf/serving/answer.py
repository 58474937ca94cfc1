"""The text of an answer, from its tokens up to its first stop string."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from .logprobs import TokenLogprobs
from .stop import StopFilter
from .streamer import AnswerStreamer


class Answer:
    """
    Hands on the text of an answer while it is generated.

    Args:
        tokenizer: of the model.
        stops: the answer ends before the first of them.
        streamed: whether pieces are wanted as they come. Otherwise, and without stop strings, it is decoded once.
        emit: called with pieces of text, none of them empty, in the thread that calls `add`.
        logprobs: is told the tokens, too.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: list[str],
        streamed: bool,
        emit: Callable[[str], None],
        logprobs: TokenLogprobs | None = None,
    ):
        self._emit, self._logprobs = emit, logprobs
        self._at_once = streamed or bool(stops)
        self._held: list[int] = []
        self._filter = StopFilter(stops)
        self._streamer = AnswerStreamer(tokenizer, self._take)
        self._streamer.put(torch.empty(0))  # the prompt

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._filter.stopped

    def add(self, tokens: Sequence[int]) -> bool:
        """Take new token ids; whether the answer ends here."""
        self._held += tokens
        if self._logprobs is not None and tokens:
            self._logprobs.take(tokens[-1])  # it knows those in front of it
        if self._at_once:
            self._decode()
        return self.stopped

    def end(self) -> None:
        """Hand on what was held back."""
        self._decode()
        self._streamer.end()

    def _decode(self) -> None:
        if self._held:
            self._streamer.put(torch.tensor(self._held))
            self._held = []

    def _take(self, text: str | None) -> None:
        text = self._filter.flush() if text is None else self._filter.feed(text)
        if text:
            self._emit(text)
