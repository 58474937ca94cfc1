"""Conversations of any source, and how they become MIMIC-IT records."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging

from ...files import write_text
from ...prompts import IMAGE_TOKEN, escape_reserved_tokens
from ..formats import MimicitFiles, write_mimicit
from ..image_store import ImageStore
from ..images import image_bytes
from ..samples import IMAGE_TEXT, TEXT_ONLY
from .rows import read_named_rows


logger = logging.get_logger(__name__)


@dataclass
class Conversation:
    """One conversation of a source.

    Args:
        id: its id in the source; need not be unique.
        turns: `(instruction, answer)` pairs, oldest first.
        pictures: `(id in the source, file or encoded bytes)` of the pictures and films that it is about, in their
            order; of a film that is given as its frames a list of these, which come apart here (see `frames`).
        pictures_per_turn: how many media belong to each turn, whose instruction has an `<image>` where each stands.
            None: one medium or none, in front of the first turn.
        system: the text in front of everything, of a system message.
        left_out: why it cannot be used, for a reader that was told to skip such conversations.
        unused: names of what the source has and a record cannot keep, such as unknown keys.

    Attributes:
        frames: of how many of the pictures each medium is made; None where each is one.
    """

    id: str
    turns: Sequence[tuple[str, str]]
    pictures: Sequence[tuple[str, Path | bytes]] = ()
    pictures_per_turn: Sequence[int] | None = None
    system: str | None = None
    left_out: str | None = None
    unused: Sequence[str] = ()

    def __post_init__(self):
        media = [medium if isinstance(medium, list) else [medium] for medium in self.pictures]
        self.frames = [len(medium) for medium in media] if any(len(medium) > 1 for medium in media) else None
        self.pictures = [picture for medium in media for picture in medium]


class UnusableConversation(ValueError):
    """A conversation that no record can keep as it is. `reason` is the short name under which such are counted."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


@dataclass
class ConversionCounts:
    """What a conversion wrote, the conversations that it left out, and what it did not use of the others."""

    files: MimicitFiles
    conversations: int = 0
    records: int = 0
    images: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)


def write_conversations(
    folder: str | Path,
    name: str,
    read: Callable[[], Iterable[Conversation]],
    *,
    max_tokens: int | None = None,
    tokenizer: Any = None,
    on_error: str = "raise",
    made_from: Any = None,
    media_folder: Path | None = None,
) -> ConversionCounts:
    """Writes conversations as the MIMIC-IT dataset `name` in `folder`, see `write_mimicit`.

    Each turn is a record `<name>_<id>_<number>_CONV<turn>`, whose `rel_ins_ids` are the turns in front of it; the
    train config holds the last turns, with all in front of them as context. Pictures are kept byte by byte under
    `<name>_IMG_<id>`, a second picture with the id of another one under its name with suffix, or with a hash if it is
    no file. Pictures that do not all stand in front are marked in the text (`images_in_text`). The files appear when
    all are complete; a run that was killed is simply run again, and goes on where it was among the pictures.

    Args:
        read: opens the source; called twice, for the pictures and for the records.
        max_tokens: leaves out conversations whose texts have more tokens.
        tokenizer: a transformers tokenizer that counts them.
        on_error: `"raise"`, or `"skip"` conversations whose picture file is missing, and count them.
        made_from: for JSON, kept in the file for `origin_of`.
        media_folder: a folder that holds all pictures and films as files, which records then name in place of copies.

    Raises:
        ValueError: if nothing is left, or an id stands for two different pictures.
        FileNotFoundError: if a picture file is missing.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}.")
    if max_tokens is not None and tokenizer is None:
        raise ValueError(f"max_tokens={max_tokens} needs a tokenizer to count with.")
    left_out = Counter()

    kept = set()
    names = _PictureNames(name) if media_folder is None else _FileNames(media_folder)

    def pictures() -> Iterator[tuple[str, Path | bytes]]:
        for number, conversation in enumerate(logging.tqdm(read(), desc=f"Pictures of {name}")):
            reason = _reason_to_leave_out(conversation, max_tokens, tokenizer, on_error)
            if reason:
                left_out[reason] += 1
                continue
            kept.add(number)
            for id, picture in conversation.pictures:
                image_id, is_new = names.add(id, picture)
                if is_new:
                    yield image_id, picture

    train_config, counts, unused = {}, Counter(), Counter()

    def records() -> Iterator[tuple[str, dict[str, Any]]]:
        for number, conversation in enumerate(logging.tqdm(read(), desc=f"Records of {name}")):
            if number not in kept:
                continue
            counts["conversations"] += 1
            unused.update(conversation.unused)
            image_ids = [names.add(*picture)[0] for picture in conversation.pictures]
            ids = [f"{name}_{conversation.id}_{number}_CONV{turn:02d}" for turn in range(len(conversation.turns))]
            for turn, record in enumerate(_records(conversation, image_ids)):
                counts["records"] += 1
                yield ids[turn], {**record, "rel_ins_ids": ids[:turn]}
            train_config[ids[-1]] = ids[:-1]
        if not counts:
            raise ValueError(f"Nothing of {name} can be used; left out: {dict(left_out)}.")

    meta = {"version": "0.0.1"} | ({} if made_from is None else {"made_from": made_from})
    images = pictures() if media_folder is None and any(one.pictures for one in read()) else _run(pictures())
    if media_folder is None:
        files = write_mimicit(folder, name, records(), images, train_config, meta)
    else:
        files = write_mimicit(folder, name, records(), ImageStore(media_folder), train_config, meta)
        files = files._replace(images_path=media_folder)
    tell_left_out(name, left_out, unused)
    return ConversionCounts(files, **counts, images=len(names), left_out=dict(left_out), unused=dict(unused))


def tell_left_out(name: str, left_out: Mapping[str, int], unused: Mapping[str, int]) -> None:
    """Warns of conversations that a dataset is without, and of what is not used of the others."""
    if left_out:
        logger.warning(f"Left out of {name}: {dict(left_out)}.")
    if unused:
        logger.warning(f"Not used of {name}: {dict(unused)}.")


def _reason_to_leave_out(
    conversation: Conversation, max_tokens: int | None, tokenizer: Any, on_error: str
) -> str | None:
    """Why a conversation becomes no record, if so; arguments and errors as for `write_conversations`."""
    if conversation.left_out:
        return conversation.left_out
    if not conversation.turns:
        return "no complete turn"
    if max_tokens is not None:
        texts = [text for turn in conversation.turns for text in turn] + [conversation.system or ""]
        if sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])) > max_tokens:
            return f"more than {max_tokens} tokens"
    for _, picture in conversation.pictures:
        if isinstance(picture, Path) and not picture.is_file():
            if on_error == "raise":
                raise FileNotFoundError(
                    f"Conversation {conversation.id!r} needs the picture {picture}, which is not there: correct the "
                    "image folder, or skip such conversations (--skip-missing)."
                )
            return "missing picture"
    return None


def origin_of(path: str | Path) -> Any:
    """What `write_conversations` was told that an instructions file was made from; None if it was not."""
    with open(path, encoding="utf-8") as file:
        start = file.readline()  # `write_mimicit` ends the line behind meta
    try:
        return json.loads(start.removesuffix("\n") + "}}")["meta"].get("made_from")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def write_mixture(path: str | Path, files: MimicitFiles) -> None:
    """Writes the training YAML of one dataset: whole conversations, its files beside the YAML, but for media."""
    entry = {"mimicit_path": files.instructions_path.name}
    if files.images_path:
        beside = files.images_path.parent == files.instructions_path.parent
        entry["images_path"] = files.images_path.name if beside else str(files.images_path.resolve())
    if files.train_config_path:
        entry["train_config_path"] = files.train_config_path.name
    name = files.instructions_path.name.removesuffix("_instructions.json")
    group = IMAGE_TEXT if files.images_path else TEXT_ONLY  # in which films are media of their own, too
    text = yaml.safe_dump({group: {name: entry}}, sort_keys=False, allow_unicode=True)
    write_text(path, text)


def _records(conversation: Conversation, image_ids: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The records of the turns, without `rel_ins_ids`."""
    system = {"system": conversation.system} if conversation.system else {}
    frames = [1] * len(image_ids) if conversation.frames is None else conversation.frames
    remaining, media = iter(image_ids), iter(frames)
    for turn, (instruction, answer) in enumerate(conversation.turns):
        if conversation.pictures_per_turn is None:
            of_turn, sizes, placed = list(image_ids), frames, {}
        else:
            sizes = [next(media) for _ in range(conversation.pictures_per_turn[turn])]
            of_turn = [next(remaining) for _ in range(sum(sizes))]
            placed = {"images_in_text": True} if of_turn else {}
        films = {"frames_per_medium": sizes} if len(of_turn) > len(sizes) else {}
        yield {"instruction": instruction, "answer": answer, "image_ids": of_turn, **films, **placed, **system}


class _PictureNames:
    """The image ids of a dataset: one for each different picture."""

    def __init__(self, dataset: str):
        self.dataset = dataset
        self.first: dict[str, Path | bytes] = {}  # id -> the picture that has it: its file, or the digest of its bytes

    def __len__(self) -> int:
        return len(self.first)

    def add(self, id: str, picture: Path | bytes) -> tuple[str, bool]:
        """The image id of a picture, and whether it is new."""
        other = picture.suffix if isinstance(picture, Path) else f"_{_digest(picture).hex()[:16]}"
        candidates = [id, id + other] if other else [id]
        for candidate in candidates:
            image_id = f"{self.dataset}_IMG_{candidate}"
            if candidate not in self.first:
                self.first[candidate] = picture if isinstance(picture, Path) else _digest(picture)
                return image_id, True
            if _same(picture, self.first[candidate]):
                return image_id, False
        raise ValueError(f"Image id {id!r} of {self.dataset} stands for two different pictures: rename one.")


def _run(pictures: Iterator) -> None:
    """Decides what is kept where there are no pictures to write."""
    for _ in pictures:
        pass


class _FileNames:
    """In place of `_PictureNames`: image ids are names of files in a folder, see `ImageStore`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.known: set[str] = set()

    def __len__(self) -> int:
        return len(self.known)

    def add(self, id: str, picture: Path) -> tuple[str, bool]:
        self.known.add(name := name_in_folder(picture, self.folder))
        return name, False


def name_in_folder(file: Path, folder: Path) -> str:
    """The name of a file in a folder; ValueError if it is none by its path."""
    return Path(os.path.normpath(file)).relative_to(os.path.normpath(folder)).as_posix()


def _digest(picture: Path | bytes) -> bytes:
    return blake2b(image_bytes(picture), digest_size=16).digest()


def _same(picture: Path | bytes, first: Path | bytes) -> bool:
    """Whether a picture is the one that a file, or a digest, stands for."""
    return picture == first or _digest(picture) == (_digest(first) if isinstance(first, Path) else first)


def conversations_of(
    path: str | Path, read: Callable[[str, int, dict[str, Any]], Iterable[Conversation]], on_invalid: str
) -> Iterator[Conversation]:
    """The conversations of a file.

    Args:
        path: see `read_rows`.
        read: those of a row, given its place for messages, its number, and itself.
        on_invalid: `"raise"`, or `"skip"` rows that no record can keep or that are malformed: they are yielded as
            `left_out`.
    """
    if on_invalid not in ("raise", "skip"):
        raise ValueError(f"on_invalid must be 'raise' or 'skip', got {on_invalid!r}.")
    for number, (where, row) in enumerate(read_named_rows(path)):
        try:
            yield from read(where, number, row)
        except ValueError as error:
            if on_invalid == "raise":
                raise
            yield Conversation(str(number), (), left_out=getattr(error, "reason", "malformed"))


def place_pictures(
    turns: Sequence[tuple[str, str]], pictures: Sequence, where: str, *, marked: bool
) -> tuple[list[tuple[str, str]], list[int] | None]:
    """Turns and `pictures_per_turn` of a [`Conversation`].

    One picture at the front or, on a line of its own, at the end of the first instruction stands in front of it, as
    LLaVA itself trains both. Pictures without any `<image>` stand in front of the first turn. All others stay where
    their `<image>` is.

    Args:
        turns: `(instruction, answer)` pairs.
        pictures: pictures and films of the conversation.
        where: for messages.
        marked: whether `<image>` in a text marks a place; otherwise it is a word like others.

    Raises:
        UnusableConversation: if the numbers of `<image>` and pictures differ, or an answer has an `<image>`.
    """
    if not marked:
        turns = [(escape_reserved_tokens(question, [IMAGE_TOKEN]), answer) for question, answer in turns]
    counts = [question.count(IMAGE_TOKEN) for question, _ in turns]
    if marked and any(IMAGE_TOKEN in answer for _, answer in turns):
        raise UnusableConversation(
            f"{where}: an answer holds {IMAGE_TOKEN}, but pictures are only given with questions; remove it, or leave "
            "such conversations out (--skip-invalid).",
            f"{IMAGE_TOKEN} in an answer",
        )
    if not sum(counts) and len(pictures) <= 1 or not turns:
        return list(turns), None
    if not sum(counts):
        counts[0] = len(pictures)
        turns = [(IMAGE_TOKEN * len(pictures) + turns[0][0], turns[0][1]), *turns[1:]]
    elif sum(counts) != len(pictures):
        raise UnusableConversation(
            f"{where}: the texts hold {sum(counts)} {IMAGE_TOKEN} for {len(pictures)} pictures; name one for each "
            "under image, or leave such conversations out (--skip-invalid).",
            f"{IMAGE_TOKEN} and pictures differ in number",
        )
    question = turns[0][0].strip()
    if sum(counts) == counts[0] == 1 and (question.startswith(IMAGE_TOKEN) or question.endswith(f"\n{IMAGE_TOKEN}")):
        return [(question.replace(IMAGE_TOKEN, "").strip(), turns[0][1]), *turns[1:]], None
    return list(turns), counts


def text_of(row: dict[str, Any], key: str, where: str, default: str | None = None) -> str:
    """The text under a key; `ValueError` if there is none or it is no text."""
    value = default if row.get(key) is None else row[key]  # tables have null for what is not there
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be a text, got {repr(value)[:60]}.")
    return value


def system_text(row: dict[str, Any], of_messages: str | None, where: str) -> str | None:
    """The text under `system`, in front of that of the messages; None if there is neither."""
    own = text_of(row, "system", where) if row.get("system") else None
    return "\n".join(filter(None, (own, of_messages))) or None


# refused where a reader does not know them
_OTHER_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
NAMED_IN_TEXT = re.compile(r"<img>([^<>\n]+)</img>")
_ASKING = ("human", "user")
_ANSWERING = ("gpt", "assistant", "chatgpt", "bard", "bing")


def check_keys(row: dict[str, Any], known: Sequence[str], where: str) -> list[str]:
    """The keys of a row that are not used, for `Conversation.unused`; keys without a value do not count.

    Raises:
        UnusableConversation: for a key that changes what the row means: other media, places in them, a weight, or that
            a message is not to be learned.
    """
    given = [key for key, value in row.items() if key not in known and not _is_empty(value)]
    for key in given:
        if key in _OTHER_MEDIA:
            raise UnusableConversation(
                f"{where} has the key {key!r}, which this conversion does not read; give pictures under image and "
                "films as frames of a VIDEO_TEXT dataset, or leave such conversations out (--skip-invalid).",
                key.removesuffix("s"),
            )
        if key == "objects":  # of ms-swift, whose texts hold <bbox> and <ref-object> in their place
            raise UnusableConversation(
                f"{where} has objects, whose places this conversion does not write into the texts; write them there, "
                "or leave such conversations out (--skip-invalid).",
                key,
            )
        # OpenAI's weight; ms-swift's and Axolotl's names for a message that is not learned
        if (key == "weight" and row[key] != 1) or (key in ("loss", "train", "training") and row[key] in (False, 0)):
            raise UnusableConversation(
                f"{where} has the {key} {row[key]!r}, and of records every answer counts the same; leave it out, or "
                "leave such conversations out (--skip-invalid).",
                "weight",
            )
    return [f"key {key!r}" for key in given if key != "weight"]


def _is_empty(value: Any) -> bool:
    """Whether nothing is there: tables have null, and structs and lists of it."""
    if isinstance(value, dict):
        return all(map(_is_empty, value.values()))
    return value is None or value == "" or value == []


def check_media_marks(turns: Sequence[tuple[str, str]], where: str, marks: Sequence[str] = ("<video>",)) -> None:
    """
    Raises `UnusableConversation` for a text with a placeholder of sound, in an answer, or one of `marks`.
    """
    for mark in ("<video>", "<audio>"):
        unread = mark in marks or mark == "<audio>"
        if any(mark in text for turn in turns for text in (turn if unread else turn[1:])):
            raise UnusableConversation(
                f"{where}: the texts hold {mark}, which this conversion does not read; leave such conversations out "
                "(--skip-invalid).",
                mark.strip("<>"),
            )


def read_messages(messages: Any, where: str) -> tuple[list[tuple[str, str]], str | None, list[str]]:
    """Turns, system text and what is not used of messages `{"from", "value"}`.

    Neighbouring messages of one speaker are joined by an empty line. What a record cannot hold is named as not used:
    answers in front of the first question, and a question without answer at the end.

    Raises:
        UnusableConversation: for a message with a weight other than 1, a system message behind the first, or a
            question without answer that has a picture, which would go to another question.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(
            f"{where}: conversations must be a list of messages from and value, got {repr(messages)[:60]}."
        )
    runs: list[tuple[bool, str]] = []
    system, unused = [], []
    for message in messages:
        speaker = message.get("from")
        if speaker is None and "role" in message:
            raise ValueError(
                f"{where}: its messages have role and content; this conversion reads from and value, rename them."
            )
        text = text_of(message, "value", where)
        if speaker not in (*_ASKING, *_ANSWERING, "system"):
            raise ValueError(f"{where}: unknown speaker {speaker!r}, expected {', '.join((*_ASKING, *_ANSWERING))}.")
        unused += [f"{name} of a message" for name in check_keys(message, ("from", "value"), where)]
        asks = speaker in _ASKING
        if speaker == "system":
            if runs:
                raise UnusableConversation(
                    f"{where}: a system message stands behind the first turn, where records have none; move it to the "
                    "front, or leave such conversations out (--skip-invalid).",
                    "system message behind the first turn",
                )
            system.append(text)
        elif not runs and not asks:
            unused.append("answer in front of the first question")
        elif runs and runs[-1][0] == asks:
            runs[-1] = (asks, f"{runs[-1][1]}\n\n{text}")
        else:
            runs.append((asks, text))
    if len(runs) % 2:
        unused.append("question without answer at the end")
        if any(mark in runs[-1][1] for mark in (IMAGE_TOKEN, "<video>")):
            raise UnusableConversation(
                f"{where}: the question at its end has a picture or film, and no answer; remove both, or leave such "
                "conversations out (--skip-invalid).",
                "picture of a question without answer",
            )
    if any(IMAGE_TOKEN in text for text in system):
        raise UnusableConversation(
            f"{where}: a system message holds {IMAGE_TOKEN}, but pictures are only given with questions; remove it, "
            "or leave such conversations out (--skip-invalid).",
            f"{IMAGE_TOKEN} in a system message",
        )
    texts = [text for _, text in runs]
    return list(zip(texts[::2], texts[1::2], strict=False)), "\n".join(filter(None, system)) or None, unused
