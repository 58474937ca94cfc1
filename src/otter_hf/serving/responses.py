"""What the OpenAI API writes: a completion, and the chunks of a stream."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from openai.types.completion_usage import CompletionUsage


@dataclass(frozen=True)
class Piece:
    """What there is to say of one of the answers of a request; the last one of all has the `usage`."""

    choice: int
    text: str = ""
    logprobs: list[dict] = field(default_factory=list)
    finish: str | None = None
    usage: CompletionUsage | None = None


def completion(id: str, model: str, pieces: Iterable[Piece], with_logprobs: bool) -> dict:
    """The whole answers of a request."""
    pieces = list(pieces)
    choices = []
    for number in range(max(piece.choice for piece in pieces) + 1):
        own = [piece for piece in pieces if piece.choice == number]
        choice = {
            "index": number,
            "message": {"role": "assistant", "content": "".join(piece.text for piece in own)},
            "finish_reason": own[-1].finish,
        }
        if with_logprobs:
            choice["logprobs"] = {"content": [token for piece in own for token in piece.logprobs]}
        choices.append(choice)
    return {**_head(id, model, "chat.completion"), "choices": choices, "usage": _numbers(pieces[-1].usage)}


def chunk(id: str, model: str, *choices: dict, usage: CompletionUsage | None = None) -> str:
    """A server-sent event of a stream."""
    said = {**_head(id, model, "chat.completion.chunk"), "choices": choices}
    return event(said if usage is None else {**said, "usage": _numbers(usage)})


def event(content: dict) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def first_choice(number: int) -> dict:
    """What a stream says of an answer in front of it."""
    return {"index": number, "delta": {"role": "assistant"}, "finish_reason": None}


def choice_of(piece: Piece) -> dict:
    """What a stream says of an answer."""
    delta = {"content": piece.text} if piece.text else {}
    told = {"logprobs": {"content": piece.logprobs}} if piece.logprobs else {}
    return {"index": piece.choice, "delta": delta, **told, "finish_reason": piece.finish}


def _head(id: str, model: str, kind: str) -> dict:
    return {"id": id, "object": kind, "created": int(time.time()), "model": model}


def _numbers(usage: CompletionUsage) -> dict:
    return usage.model_dump(exclude_none=True)
