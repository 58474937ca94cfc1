"""Conversations of any source, and how they become MIMIC-IT records."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..formats import MimicitFiles, write_mimicit
from ..images import image_bytes


logger = logging.get_logger(__name__)


@dataclass
class Conversation:
    """One conversation of a source.

    Args:
        id: its id in the source; need not be unique.
        turns: `(instruction, answer)` pairs, oldest first.
        pictures: `(id in the source, file or encoded bytes)` of the pictures that it is about.
    """

    id: str
    turns: Sequence[tuple[str, str]]
    pictures: Sequence[tuple[str, Path | bytes]] = ()


@dataclass
class ConversionCounts:
    """What a conversion wrote and left out."""

    files: MimicitFiles
    conversations: int = 0
    records: int = 0
    images: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


def write_conversations(
    folder: str | Path,
    name: str,
    read: Callable[[], Iterable[Conversation]],
    *,
    max_tokens: int | None = None,
    tokenizer: Any = None,
    on_error: str = "raise",
) -> ConversionCounts:
    """Writes conversations as the MIMIC-IT dataset `name` in `folder`, see `write_mimicit`.

    Each turn is a record `<name>_<id>_<number>_CONV<turn>`, whose `rel_ins_ids` are the turns in front of it; the
    train config holds the last turns, with all in front of them as context. Pictures are kept byte by byte under
    `<name>_IMG_<id>`. The files appear when all are complete; a run that was killed is simply run again, and goes on
    where it was among the pictures.

    Args:
        read: opens the source; called twice, for the pictures and for the records.
        max_tokens: leaves out conversations whose texts have more tokens.
        tokenizer: a transformers tokenizer that counts them.
        on_error: `"raise"`, or `"skip"` conversations whose picture file is missing, and count them.

    Raises:
        ValueError: if nothing is left, or an id stands for two different pictures.
        FileNotFoundError: if a picture file is missing.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}.")
    if max_tokens is not None and tokenizer is None:
        raise ValueError(f"max_tokens={max_tokens} needs a tokenizer to count with.")
    left_out = Counter()

    def reason_to_leave_out(conversation: Conversation) -> str | None:
        if not conversation.turns:
            return "no complete turn"
        if max_tokens is not None:
            texts = [text for turn in conversation.turns for text in turn]
            if sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])) > max_tokens:
                return f"more than {max_tokens} tokens"
        for _, picture in conversation.pictures:
            if isinstance(picture, Path) and not picture.is_file():
                if on_error == "raise":
                    raise FileNotFoundError(
                        f"Conversation {conversation.id!r} needs the picture {picture}, which is not there: correct "
                        "the image folder, or skip such conversations."
                    )
                return "missing picture"
        return None

    kept = set()
    first: dict[str, Path | bytes] = {}  # id -> the first picture that has it: its file, or the digest of its bytes

    def pictures() -> Iterator[tuple[str, Path | bytes]]:
        for number, conversation in enumerate(logging.tqdm(read(), desc=f"Pictures of {name}")):
            reason = reason_to_leave_out(conversation)
            if reason:
                left_out[reason] += 1
                continue
            kept.add(number)
            for id, picture in conversation.pictures:
                if id not in first:
                    first[id] = picture if isinstance(picture, Path) else _digest(picture)
                    yield f"{name}_IMG_{id}", picture
                elif not _same(picture, first[id]):
                    raise ValueError(f"Image id {id!r} of {name} stands for two different pictures: rename one.")

    train_config, counts = {}, Counter()

    def records() -> Iterator[tuple[str, dict[str, Any]]]:
        for number, conversation in enumerate(logging.tqdm(read(), desc=f"Records of {name}")):
            if number not in kept:
                continue
            counts["conversations"] += 1
            earlier = []
            for turn, (instruction, answer) in enumerate(conversation.turns):
                counts["records"] += 1
                id = f"{name}_{conversation.id}_{number}_CONV{turn:02d}"
                yield (
                    id,
                    {
                        "instruction": instruction,
                        "answer": answer,
                        "image_ids": [f"{name}_IMG_{picture_id}" for picture_id, _ in conversation.pictures],
                        "rel_ins_ids": list(earlier),
                    },
                )
                earlier.append(id)
            train_config[earlier[-1]] = earlier[:-1]
        if not counts:
            raise ValueError(f"Nothing of {name} can be used; left out: {dict(left_out)}.")

    has_pictures = any(conversation.pictures for conversation in read())
    files = write_mimicit(folder, name, records(), pictures() if has_pictures else _run(pictures()), train_config)
    if left_out:
        logger.warning(f"Left out of {name}: {dict(left_out)}.")
    return ConversionCounts(files, **counts, images=len(first), left_out=dict(left_out))


def _digest(picture: Path | bytes) -> bytes:
    return blake2b(image_bytes(picture), digest_size=16).digest()


def _same(picture: Path | bytes, first: Path | bytes) -> bool:
    """Whether a picture is the one that a file, or a digest, stands for."""
    return picture == first or _digest(picture) == (_digest(first) if isinstance(first, Path) else first)


def _run(pictures: Iterator) -> None:
    """Decides what is kept where there are no pictures to write."""
    for _ in pictures:
        pass


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON file that holds a list of them, or of a file with one per line.

    Raises:
        ValueError: naming the file and the line or the record that is no JSON object.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            start = file.read(64).lstrip()
            file.seek(0)
            if start.startswith("["):
                rows = json.load(file)
                yield from (_object(row, f"Record {number} of {path}") for number, row in enumerate(rows))
                return
            for number, line in enumerate(file):
                if line.strip():
                    yield _object(json.loads(line), f"Line {number + 1} of {path}")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither a JSON list nor JSON lines: {error}.") from None


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, got {repr(row)[:60]}.")
    return row


def text_of(row: dict[str, Any], key: str, where: str, default: str | None = None) -> str:
    """The text under a key; `ValueError` if there is none or it is no text."""
    value = row.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be a text, got {repr(value)[:60]}.")
    return value


_ASKING = ("human", "user")
_ANSWERING = ("gpt", "assistant", "chatgpt", "bard", "bing")


def pair_turns(messages: Any, where: str) -> list[tuple[str, str]]:
    """`(instruction, answer)` pairs of messages `{"from", "value"}`.

    Starts at the first message of the user, joins neighbouring messages of one speaker by an empty line, and drops
    system messages and a question without answer at the end.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: the conversation must be a list of messages, got {repr(messages)[:60]}.")
    runs: list[tuple[bool, str]] = []
    for message in messages:
        speaker, text = message.get("from"), text_of(message, "value", where)
        if speaker not in (*_ASKING, *_ANSWERING, "system"):
            raise ValueError(f"{where}: unknown speaker {speaker!r}, expected {', '.join((*_ASKING, *_ANSWERING))}.")
        asks = speaker in _ASKING
        if speaker == "system" or (not runs and not asks):
            continue
        if runs and runs[-1][0] == asks:
            runs[-1] = (asks, f"{runs[-1][1]}\n\n{text}")
        else:
            runs.append((asks, text))
    texts = [text for _, text in runs]
    return list(zip(texts[::2], texts[1::2], strict=False))
