"""The text of an answer, piece by piece while it is generated."""

from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .logprobs import BYTE


class AnswerStreamer(BaseStreamer):
    """
    Hands on the text of new tokens.

    The answer is decoded as a whole at each step: unlike tokenizers' `DecodeStream`, which transformers' own server
    uses, that is the text of `decode` also where the bytes of a model are no text, and for every tokenizer. Characters
    go out when all of their bytes are there; bytes at the end that are none do not. LLaMA's byte tokens go out as a
    run, since one that is no text spoils the characters in front of it.

    Args:
        tokenizer: of the model.
        emit: called with the pieces, `str`, and with None behind the last one; in the thread of `generate`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str | None], None]):
        self._tokenizer, self._emit = tokenizer, emit
        self._ids: list[int] | None = None
        self._sent = 0  # characters

    def put(self, value: torch.Tensor) -> None:
        """Takes new token ids, `(1,)` or `(1, L)`; the first call has the prompt, which is no answer."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        if not BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(self._ids[-1]) or ""):
            self._send()

    def end(self) -> None:
        """Sends what is left, and None behind it."""
        self._send()
        self._emit(None)

    def _send(self) -> None:
        text = self._tokenizer.decode(self._ids or [], skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
        if len(text) > self._sent:
            self._emit(text[self._sent :])
            self._sent = len(text)
