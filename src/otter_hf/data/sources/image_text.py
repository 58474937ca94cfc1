"""Readers of instruction sets about pictures: LLaVA, LLaVAR, LRV, SVIT and M3IT."""

from collections.abc import Iterator
from hashlib import sha1
from pathlib import Path
from typing import Any

from ..images import decode_base64
from .common import Conversation, pair_turns, read_rows, text_of


_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def read_llava(path: str | Path, image_folder: str | Path) -> Iterator[Conversation]:
    """LLaVA-Instruct (https://huggingface.co/papers/2304.08485) and all that took over its format, as LLaVAR did.

    A list of `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}`; `image` may be missing, or a
    list. `<image>` is deleted from the texts. A picture's id is its file name without suffix.
    """
    for number, row in enumerate(read_rows(path)):
        where = f"Record {number} of {path}"
        turns = [
            (_without_placeholder(question), answer)
            for question, answer in pair_turns(row.get("conversations"), where)
        ]
        images = _list(row.get("image") or [], "image", where)
        if not all(isinstance(image, str) for image in images):
            raise ValueError(f"{where}: image must be a file name, got {repr(images)[:60]}.")
        pictures = [(str(Path(image).with_suffix("")), Path(image_folder, image)) for image in images]
        yield Conversation(str(row.get("id", number)), turns, pictures)


def _without_placeholder(text: str) -> str:
    return text.replace("<image>\n", "").replace("<image>", "").strip()


def read_lrv(path: str | Path, image_folder: str | Path) -> Iterator[Conversation]:
    """LRV-Instruction (https://huggingface.co/papers/2306.14565), positive and negative instructions alike.

    `{"image_id", "question", "answer"}` in a list or one per line; the pictures are those of Visual Genome.
    """
    for number, row in enumerate(read_rows(path)):
        where = f"Record {number} of {path}"
        turn = (text_of(row, "question", where), text_of(row, "answer", where))
        picture = str(_needed(row, "image_id", where))
        yield Conversation(picture, [turn], [(picture, _find_image(image_folder, picture))])


def read_svit(path: str | Path, image_folder: str | Path) -> Iterator[Conversation]:
    """SVIT (https://huggingface.co/papers/2307.04087): one conversation for each `content` list of a picture.

    A list of `{"image_id", "conversations": [{"content": [{"from": "user" | "gpt", "value"}]}]}`.
    """
    for number, row in enumerate(read_rows(path)):
        where = f"Record {number} of {path}"
        picture = str(_needed(row, "image_id", where))
        for conversation in _list(_needed(row, "conversations", where), "conversations", where):
            content = conversation.get("content") if isinstance(conversation, dict) else None
            pictures = [(picture, _find_image(image_folder, picture))]
            yield Conversation(picture, pair_turns(content, where), pictures)


def read_m3it(path: str | Path) -> Iterator[Conversation]:
    """One set of M3IT (https://huggingface.co/papers/2306.04387).

    `{"instruction", "inputs", "image_base64_str": [text], "outputs"}`. `inputs` follow `instruction` on a new line;
    several pictures stay in order; equal pictures are stored once, under a hash of their bytes. Rows without outputs,
    as test splits have them, have no turn and are left out.
    """
    for number, row in enumerate(read_rows(path)):
        where = f"Record {number} of {path}"
        question = text_of(row, "instruction", where)
        inputs = text_of(row, "inputs", where, default="")
        answer = text_of(row, "outputs", where, default="")
        pictures = []
        for text in _list(row.get("image_base64_str") or [], "image_base64_str", where):
            try:
                data = decode_base64(text)
            except (ValueError, TypeError, AttributeError):
                raise ValueError(f"{where}: image_base64_str holds damaged base64.") from None
            pictures.append((sha1(data).hexdigest()[:16], data))
        turns = [(f"{question}\n{inputs}" if inputs else question, answer)] if answer else []
        yield Conversation(str(number), turns, pictures)


def _list(value: Any, key: str, where: str) -> list:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list):
        raise ValueError(f"{where}: {key} must be a list, got {repr(value)[:60]}.")
    return value


def _needed(row: dict, key: str, where: str):
    if row.get(key) in (None, ""):
        raise ValueError(f"{where} has no {key}.")
    return row[key]


def _find_image(folder: str | Path, name: str) -> Path:
    """The picture of this name in a folder, whatever its suffix; if there is none, where it should be."""
    candidates = [Path(folder, name), *(Path(folder, name + suffix) for suffix in _SUFFIXES)]
    return next((path for path in candidates if path.is_file()), candidates[1])
