"""Readers of instruction sets about pictures: LLaVA, LLaVAR, LRV, SVIT and M3IT.

What a record cannot keep is an [`UnusableConversation`], or with `on_invalid="skip"` left out and counted; keys that
change nothing are named under `unused`.
"""

import re
from collections.abc import Iterator
from hashlib import sha1
from pathlib import Path
from typing import Any

from ...films import is_film
from ...prompts import IMAGE_TOKEN
from ...reading import path_inside
from ..images import decode_base64
from .common import (
    NAMED_IN_TEXT,
    Conversation,
    UnusableConversation,
    check_keys,
    check_media_marks,
    conversations_of,
    place_pictures,
    read_messages,
    system_text,
    text_of,
)


_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# of file systems
_LONGEST_NAME = 255
# id, and file or bytes of a picture or film
_Picture = tuple[str, Path | bytes]
# a film may be its frames
Medium = _Picture | list[_Picture]


def read_llava(
    path: str | Path,
    image_folder: str | Path | None = None,
    on_invalid: str = "raise",
    allow_outside: bool = False,
) -> Iterator[Conversation]:
    """LLaVA-Instruct (https://huggingface.co/papers/2304.08485) and all that took over its format, as LLaVAR did.

    `{"id", "image", "conversations": [{"from": "human" | "gpt" | "system", "value"}], "system"}` in a JSON list, JSON
    lines or parquet. `image` (also `images`) may be missing, a file name, `{"bytes", "path"}` as parquet holds it, or
    a list of these, one for each `<image>` in the texts. Where these stand is kept: one in front of the first
    question, or on a line behind it, is the record's picture as 2023 had it, all others are marked
    (`images_in_text`). Without any `<image>` the pictures stand in front. Qwen-VL's `<img>name</img>` in a text is a
    picture and its place in one. A picture's id is its file name without
    suffix. `image_folder` is not needed where the rows hold the pictures themselves. A name that leads out of it is
    refused unless `allow_outside`, as in the other readers.
    """

    def read(where: str, number: int, row: dict[str, Any]) -> Iterator[Conversation]:
        unused = check_keys(row, ("id", "image", "images", "video", "videos", "conversations", "system"), where)
        turns, system, unused_messages = read_messages(row.get("conversations"), where)
        pictures = media_of_row(row, where, image_folder, allow_outside)
        films = media_of_row(row, where, image_folder, allow_outside, "video")
        turns, named = take_named(turns, pictures, where, image_folder, allow_outside)
        turns, pictures = join_media(turns, pictures + named, films, where)
        turns, per_turn = place_pictures(turns, pictures, where, marked=True)
        system = system_text(row, system, where)
        unused += unused_messages
        yield Conversation(str(row.get("id", number)), turns, pictures, per_turn, system, unused=unused)

    return conversations_of(path, read, on_invalid)


def media_of_row(
    row: dict[str, Any], where: str, folder: str | Path | None, allow_outside: bool, kind: str = "image"
) -> list[Medium]:
    """What a row has under `image` or `images`, likewise of another kind."""
    if row.get(kind) and row.get(f"{kind}s"):
        raise ValueError(f"{where} has both {kind} and {kind}s: give its {kind}s under one of them.")
    key = f"{kind}s" if row.get(f"{kind}s") else kind
    media = row.get(key) or []
    media = media if isinstance(media, list) else [media]
    return [medium_of(medium, key, folder, where, allow_outside) for medium in media if is_there(medium)]


def is_there(medium: Any) -> bool:
    """Whether a medium is given: tables have null for what is not there, also in each field of it."""
    return medium is not None and medium != {"bytes": None, "path": None}


def take_named(
    turns: list[tuple[str, str]],
    pictures: list[Medium],
    where: str,
    folder: str | Path | None,
    allow_outside: bool,
) -> tuple[list[tuple[str, str]], list[Medium]]:
    """
    The turns with `<image>` in place of each `<img>name</img>`, as Qwen-VL's data have it, and these pictures.

    Raises:
        UnusableConversation: for one in an answer, or beside others.
    """
    names = [name for question, _ in turns for name in NAMED_IN_TEXT.findall(question)]
    in_answers = any(NAMED_IN_TEXT.search(answer) for _, answer in turns)
    if in_answers or (names and (pictures or any(IMAGE_TOKEN in question for question, _ in turns))):
        raise UnusableConversation(
            f"{where}: the texts name a picture in <img></img> in an answer or beside others; name all of them under "
            "image and write <image>, or leave such conversations out (--skip-invalid).",
            "picture named in the text",
        )
    media = [medium_of(name, "image", folder, where, allow_outside) for name in names]
    return [(NAMED_IN_TEXT.sub(IMAGE_TOKEN, question), answer) for question, answer in turns], media


def join_media(
    turns: list[tuple[str, str]], pictures: list[Medium], films: list[Medium], where: str
) -> tuple[list[tuple[str, str]], list[Medium]]:
    """
    The turns with `<image>` in place of each `<video>`, and pictures and films in their order there.

    Raises:
        UnusableConversation: if the numbers of `<video>` and films differ, where there are both, or films and pictures
            are not all marked.
    """
    check_media_marks(turns, where, () if films else ("<video>",))
    marks = [mark for question, _ in turns for mark in MARKS.findall(question)]
    videos = marks.count("<video>")
    if films and (videos or pictures) and (videos, len(marks) - videos) != (len(films), len(pictures)):
        raise UnusableConversation(
            f"{where}: the texts hold {videos} <video> and {len(marks) - videos} <image> for {len(films)} films and "
            f"{len(pictures)} pictures; name one for each, or leave such conversations out (--skip-invalid).",
            "<video> and films differ in number",
        )
    if not videos:
        return turns, [*pictures, *films]
    rest = {"<image>": iter(pictures), "<video>": iter(films)}
    joined = [next(rest[mark]) for mark in marks]
    return [(question.replace("<video>", IMAGE_TOKEN), answer) for question, answer in turns], joined


MARKS = re.compile("<image>|<video>")


def medium_of(image: Any, key: str, folder: str | Path | None, where: str, allow_outside: bool) -> Medium:
    """
    Id and file or bytes of a picture or film: a file name, bytes, or `{"bytes", "path"}`; of a film that is a list of
    frames those of each.

    Raises:
        ValueError: for anything else, and where `key` is of films, for what is none: an animated picture would be
            trained as its first frame.
    """
    if isinstance(image, list) and image and key.startswith("video"):
        return [medium_of(frame, f"a frame of {key}", folder, where, allow_outside) for frame in image]
    image = {"path": image} if isinstance(image, str) else {"bytes": image} if isinstance(image, bytes) else image
    data, file = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (None, None)
    name = str(Path(file).with_suffix("")) if isinstance(file, str) and Path(file).name else None
    if isinstance(data, bytes):
        if key.startswith("video") and not is_film(data[:12]):
            raise _no_film(file or "its video", where)
        return name or _hash(data), data
    if name is not None and max(map(len, Path(file).parts)) > _LONGEST_NAME:
        raise ValueError(f"{where}: {key} must be a file name, got {file[:40]!r}...; base64 stands behind data:,.")
    if name is None:
        raise ValueError(f"{where}: {key} must be a file name, got {repr(image if file is None else file)[:60]}.")
    if folder is None:
        raise ValueError(f"{where}: the picture {file!r} is a file; give the folder it is in (--images).")
    path = _inside(folder, file, where, allow_outside)
    if key.startswith("video") and path.is_file():
        with path.open("rb") as opened:
            if not is_film(opened.read(12)):
                raise _no_film(file, where)
    return name, path


def _no_film(name: str, where: str) -> UnusableConversation:
    return UnusableConversation(
        f"{where}: {name:.80} is no film, and animated pictures are films in VIDEO_TEXT datasets alone: convert it to "
        "mp4, or leave such conversations out (--skip-invalid).",
        "video that is no film",
    )


def _inside(folder: str | Path, name: str, where: str, allow_outside: bool) -> Path:
    try:
        return path_inside(folder, name, allow_outside=allow_outside)
    except ValueError as error:
        raise UnusableConversation(f"{where}: {error}.", "picture outside of its folder") from None


def _hash(data: bytes) -> str:
    return sha1(data).hexdigest()[:16]


def read_lrv(
    path: str | Path, image_folder: str | Path, on_invalid: str = "raise", allow_outside: bool = False
) -> Iterator[Conversation]:
    """LRV-Instruction (https://huggingface.co/papers/2306.14565), positive and negative instructions alike.

    `{"image_id", "question", "answer"}` in a list or one per line; the pictures are those of Visual Genome.
    """

    def read(where: str, number: int, row: dict[str, Any]) -> Iterator[Conversation]:
        unused = check_keys(row, ("image_id", "question", "answer", "task"), where)
        picture = str(_needed(row, "image_id", where))
        pictures = [(picture, _find_image(image_folder, picture, where, allow_outside))]
        turn = (text_of(row, "question", where), text_of(row, "answer", where))
        turns, per_turn = place_pictures([turn], pictures, where, marked=False)
        yield Conversation(picture, turns, pictures, per_turn, unused=unused)

    return conversations_of(path, read, on_invalid)


def read_svit(
    path: str | Path, image_folder: str | Path, on_invalid: str = "raise", allow_outside: bool = False
) -> Iterator[Conversation]:
    """SVIT (https://huggingface.co/papers/2307.04087): one conversation for each `content` list of a picture.

    A list of `{"image_id", "conversations": [{"content": [{"from": "user" | "gpt", "value"}]}]}`.
    """

    def read(where: str, number: int, row: dict[str, Any]) -> Iterator[Conversation]:
        unused = check_keys(row, ("image_id", "conversations"), where)
        picture = str(_needed(row, "image_id", where))
        pictures = [(picture, _find_image(image_folder, picture, where, allow_outside))]
        for conversation in _list(_needed(row, "conversations", where), "conversations", where):
            content = conversation.get("content") if isinstance(conversation, dict) else None
            turns, system, unused_messages = read_messages(content, where)
            turns, per_turn = place_pictures(turns, pictures, where, marked=False)
            unused += check_keys(conversation, ("content",), where) + unused_messages
            yield Conversation(picture, turns, pictures, per_turn, system, unused=unused)
            unused = []

    return conversations_of(path, read, on_invalid)


def read_m3it(path: str | Path, on_invalid: str = "raise") -> Iterator[Conversation]:
    """One set of M3IT (https://huggingface.co/papers/2306.04387).

    `{"instruction", "inputs", "image_base64_str": [text], "outputs"}`. `inputs` follow `instruction` on a new line;
    several pictures stay in order, in front; equal pictures are stored once, under a hash of their bytes. Rows without
    outputs, as test splits have them, have no turn and are left out.
    """

    def read(where: str, number: int, row: dict[str, Any]) -> Iterator[Conversation]:
        unused = check_keys(row, ("instruction", "inputs", "image_base64_str", "outputs"), where)
        question = text_of(row, "instruction", where)
        inputs = text_of(row, "inputs", where, default="")
        answer = text_of(row, "outputs", where, default="")
        pictures = []
        for text in _list(row.get("image_base64_str") or [], "image_base64_str", where):
            try:
                data = decode_base64(text)
            except (ValueError, TypeError, AttributeError):
                raise ValueError(f"{where}: image_base64_str holds damaged base64.") from None
            pictures.append((_hash(data), data))
        turns = [(f"{question}\n{inputs}" if inputs else question, answer)] if answer else []
        turns, per_turn = place_pictures(turns, pictures, where, marked=False)
        yield Conversation(str(number), turns, pictures, per_turn, unused=unused)

    return conversations_of(path, read, on_invalid)


def _list(value: Any, key: str, where: str) -> list:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list):
        raise ValueError(f"{where}: {key} must be a list, got {repr(value)[:60]}.")
    return value


def _needed(row: dict, key: str, where: str):
    if row.get(key) in (None, ""):
        raise ValueError(f"{where} has no {key}.")
    return row[key]


def _find_image(folder: str | Path, name: str, where: str, allow_outside: bool) -> Path:
    """The picture of this name in a folder, whatever its suffix; if there is none, where it should be."""
    candidates = [_inside(folder, name + suffix, where, allow_outside) for suffix in ("", *_SUFFIXES)]
    return next((path for path in candidates if path.is_file()), candidates[1])
