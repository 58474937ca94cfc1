"""How likely the tokens of an answer were, as the OpenAI API tells it."""

import re
from collections.abc import Collection

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


# LLaMA's, of one byte
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
# OpenAI's word for never: JSON has no infinity
_NEVER = -9999.0


class TokenLogprobs(LogitsProcessor):
    """
    Notes how likely each token of one answer was among all, and leaves the scores as they are. Probabilities are those
    of the model, behind penalties and `logit_bias`, in front of temperature, top-p and top-k.

    Args:
        tokenizer: of the model.
        top: likeliest tokens that are told beside each.
        ends: ids that end an answer, of which they are no part.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, top: int, ends: Collection[int]):
        self.tokenizer, self.top, self.ends = tokenizer, top, ends
        backend = getattr(tokenizer, "backend_tokenizer", None)  # one that is written in Python has none
        self._is_byte_level = "ByteLevel" in repr(getattr(backend, "decoder", None))
        self._step: torch.Tensor | None = None  # (V,), of the token that is not known yet
        self._tokens: list[dict] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.take(int(input_ids[0, -1]))  # where nobody said which one it became
        self._step = scores[0].log_softmax(dim=-1)
        return scores

    def take(self, token: int) -> None:
        """Say which token was chosen of the last scores."""
        step, self._step = self._step, None
        if step is None or token in self.ends:
            return
        likeliest = step.topk(self.top).indices.tolist()
        told = [self._told(one, step) for one in (token, *likeliest)]
        self._tokens.append({**told[0], "top_logprobs": told[1:]})

    def new(self) -> list[dict]:
        """What there is of tokens taken since the last call: `token`, `logprob`, `bytes`, `top_logprobs`."""
        tokens, self._tokens = self._tokens, []
        return tokens

    def _told(self, token: int, step: torch.Tensor) -> dict:
        data = self._bytes_of(token)
        return {
            "token": data.decode("utf-8", errors="replace"),
            "logprob": max(float(step[token]), _NEVER),
            "bytes": list(data),
        }

    def _bytes_of(self, token: int) -> bytes:
        piece = self.tokenizer.convert_ids_to_tokens(token) or ""
        if byte := BYTE.fullmatch(piece):
            return bytes.fromhex(byte[1])
        if self._is_byte_level and all(letter in _BYTES for letter in piece):
            return bytes(_BYTES[letter] for letter in piece)
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
