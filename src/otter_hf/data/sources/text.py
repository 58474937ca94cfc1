"""Readers of instruction sets without pictures: ShareGPT, LIMA and Alpaca; rows with pictures are refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .common import Conversation, check_keys, conversations_of, read_messages, system_text, text_of


def read_sharegpt(path: str | Path, on_invalid: str = "raise") -> Iterator[Conversation]:
    """ShareGPT dumps: a list of `{"id", "conversations": [{"from": "human" | "gpt" | ..., "value"}], "system"}`."""

    def read(where: str, number: int, row: dict[str, Any]) -> Iterator[Conversation]:
        unused = check_keys(row, ("id", "conversations", "system"), where)
        turns, system, unused_messages = read_messages(row.get("conversations"), where)
        system = system_text(row, system, where)
        yield Conversation(str(row.get("id", number)), turns, system=system, unused=unused + unused_messages)

    return conversations_of(path, read, on_invalid)


def read_lima(path: str | Path, on_invalid: str = "raise") -> Iterator[Conversation]:
    """LIMA (https://huggingface.co/papers/2305.11206): lines of `{"conversations": [text, ...]}`, user first."""

    def read(where: str, number: int, row: dict[str, Any]) -> Iterator[Conversation]:
        unused = check_keys(row, ("conversations", "source"), where)
        texts = row.get("conversations")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}: conversations must be a list of texts.")
        if len(texts) % 2:
            unused.append("question without answer at the end")
        yield Conversation(str(number), list(zip(texts[::2], texts[1::2], strict=False)), unused=unused)

    return conversations_of(path, read, on_invalid)


def read_alpaca(path: str | Path, on_invalid: str = "raise") -> Iterator[Conversation]:
    """Alpaca: `{"instruction", "input", "output"}`; a non-empty input follows on a new line.

    Also `system`, and `history`, the earlier turns as `[[instruction, answer], ...]`, as LLaMA-Factory has them.
    """

    def read(where: str, number: int, row: dict[str, Any]) -> Iterator[Conversation]:
        unused = check_keys(row, ("id", "instruction", "input", "output", "history", "system"), where)
        question, given = text_of(row, "instruction", where), text_of(row, "input", where, default="")
        answer = text_of(row, "output", where)
        history = row.get("history") or []
        if not isinstance(history, list) or not all(
            isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
            for turn in history
        ):
            raise ValueError(f"{where}: history must be a list of [instruction, answer], got {repr(history)[:60]}.")
        turns = [*map(tuple, history), (f"{question}\n{given}" if given else question, answer)]
        system = system_text(row, None, where)
        yield Conversation(str(row.get("id", number)), turns, system=system, unused=unused)

    return conversations_of(path, read, on_invalid)
