"""Readers of instruction sets without pictures: ShareGPT, LIMA and Alpaca."""

from collections.abc import Iterator
from pathlib import Path

from .common import Conversation, pair_turns, read_rows, text_of


def read_sharegpt(path: str | Path) -> Iterator[Conversation]:
    """ShareGPT dumps: a list of `{"id", "conversations": [{"from": "human" | "gpt" | ..., "value"}]}`."""
    for number, row in enumerate(read_rows(path)):
        turns = pair_turns(row.get("conversations"), f"Record {number} of {path}")
        yield Conversation(str(row.get("id", number)), turns)


def read_lima(path: str | Path) -> Iterator[Conversation]:
    """LIMA (https://huggingface.co/papers/2305.11206): lines of `{"conversations": [text, ...]}`, user first."""
    for number, row in enumerate(read_rows(path)):
        texts = row.get("conversations")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"Record {number} of {path}: conversations must be a list of texts.")
        yield Conversation(str(number), list(zip(texts[::2], texts[1::2], strict=False)))


def read_alpaca(path: str | Path) -> Iterator[Conversation]:
    """Alpaca: a list of `{"instruction", "input", "output"}`; a non-empty input follows on a new line."""
    for number, row in enumerate(read_rows(path)):
        where = f"Record {number} of {path}"
        question, given = text_of(row, "instruction", where), text_of(row, "input", where, default="")
        answer = text_of(row, "output", where)
        yield Conversation(str(number), [(f"{question}\n{given}" if given else question, answer)])
