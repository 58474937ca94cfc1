"""
Rows of messages, as TRL, LLaMA-Factory and ms-swift have them, and those with a chosen and a rejected answer.

`{"messages": [{"role", "content"}], "images": [...], "videos": [...]}` in JSON lines, a JSON list or parquet; also
`{"conversations": [{"from", "value"}]}`, `{"query", "response", "history": [[query, response]]}`, `{"question",
"answer"}` and the `{"texts": [{"user", "assistant"}]}` of The Cauldron and FineVision. A content is a text, where
`<image>` and `<video>` stand for the next of the row's images and videos, or a list of parts: `{"type": "text",
"text"}`, `{"type": "image"}` likewise for the next one, for that of an `index`, or with one of its own under `image`,
`url`, `path`, `base64` or `image_url`, and so for videos; `<img>name</img>` in a question is a picture, too. Media are
file names, `{"bytes", "path"}`, or addresses of the kinds `data:` and `file:`; a film may be a list of these, its
frames.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from ...pictures import path_of_url
from ...prompts import IMAGE_TOKEN, escape_reserved_tokens
from ...reading import parse_json
from ..images import decode_base64
from .common import (
    Conversation,
    UnusableConversation,
    check_keys,
    conversations_of,
    place_pictures,
    read_messages,
    system_text,
    text_of,
)
from .image_text import MARKS, is_there, join_media, media_of_row, medium_of, take_named
from .rows import files_of_rows, read_named_rows, state_of_files


SUFFIXES = (".jsonl", ".json", ".parquet")
_SPEAKERS = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}
_MEDIA = ("image", "images", "video", "videos")
_CONVERSATIONS = ("messages", "conversations")
_OF_QUERY = ("query", "response", "history")
_ASKED = ("question", "answer")
# beside which these two are not what is learned: a row of LRV names its picture by an id
_NOT_ASKED = (*_CONVERSATIONS, "query", "texts", "completion", "chosen", "instruction", "image_id")
# keys of other forms, and what reads them
_OTHER_FORMS = (
    (("instruction", "output"), "Alpaca's", "otter-hf data from-alpaca"),
    (("image_id", "question", "answer"), "LRV's", "otter-hf data from-lrv"),
    (("meta", "data"), "MIMIC-IT's", "a training YAML, as its mimicit_path (docs/data.md)"),
    (("chosen", "rejected"), "the preferences'", "TRL's DPOTrainer (examples/trl_dpo.py)"),
)
_MARK = {"image": IMAGE_TOKEN, "image_url": IMAGE_TOKEN, "video": "<video>", "video_url": "<video>"}
# what a part of a message may have
_IN_TEXT = ("type", "text")
_IN_MEDIUM = ("type", "index", *_MARK, "url", "path", "base64")


def read_chats(
    path: str | Path,
    image_folder: str | Path | None = None,
    on_invalid: str = "raise",
    allow_outside: bool = False,
) -> Iterator[Conversation]:
    """
    The conversations of rows of messages, see this module; TRL's `prompt` and `completion` are one conversation.

    Args:
        path: a file, or a folder of parquet files.
        image_folder: where media that are file names are; default: the folder of the file.
        on_invalid: `"raise"` for what no record can keep, or `"skip"` and count it.
        allow_outside: read media whose names or links lead out of the folder.
    """
    folder = folder_of_media(path, image_folder)

    def read(where: str, number: int, row: dict[str, Any]) -> Iterator[Conversation]:
        known = ("id", *_CONVERSATIONS, *_OF_QUERY, "texts", "prompt", "completion", "system", *_MEDIA)
        unused = check_keys(row, (*known, *(_ASKED if _is_asked(row) else ())), where)
        messages = _conversation_of(row, where)
        if messages is None and row.get("completion"):
            messages = [*_messages(row.get("prompt"), where), *_messages(row["completion"], where)]
        if messages is None:
            _refuse_other_form(row, where)
        reader = _MediaReader(row, where, folder, allow_outside)
        turns, system, unused_messages = read_messages(reader.texts(_messages(messages, where)), where)
        pictures, films = reader.media()
        turns, named = take_named(turns, pictures, where, folder, allow_outside)
        turns, media = join_media(turns, pictures + named, films, where)
        turns, per_turn = place_pictures(turns, media, where, marked=True)
        system = system_text(row, system, where)
        id = number if row.get("id") is None else row["id"]
        unused += unused_messages + reader.unused
        yield Conversation(str(id), turns, media, per_turn, system, unused=unused)

    return conversations_of(path, read, on_invalid)


def read_preferences(
    path: str | Path, image_folder: str | Path | None = None, allow_outside: bool = False
) -> Iterator[dict[str, Any]]:
    """
    Rows with a chosen and a rejected answer as TRL's `DPOTrainer` takes them.

    `chosen` and `rejected` are messages, one message or a text; with a `prompt` (messages or a text), `messages`,
    `conversations` or a `question` in front, or both whole conversations that begin alike. In place of them ms-swift
    has `messages` with the chosen answer, and `rejected_response`, another last answer, or `rejected_messages`.
    Arguments as for `read_chats`.

    Yields:
        `images`, a list of `{"bytes", "path"}`, and `prompt`, `chosen` and `rejected`, messages whose contents are
        lists of parts with an image where it stands.

    Raises:
        ValueError: naming the row and what is wrong with it.
    """
    for where, row in _preferences(path, image_folder, allow_outside):
        yield {**row, "images": [_encoded(image, where) for image in row["images"]]}


def preferences_as_dataset(
    path: str | Path, image_folder: str | Path | None = None, allow_outside: bool = False
) -> Dataset:
    """
    The rows of `read_preferences` as a dataset in the cache, written again when the file or its pictures change.

    Raises:
        ValueError: as `read_preferences`.
    """
    rows = _preferences(path, image_folder, allow_outside)
    named = [image for _, row in rows for image in row["images"] if isinstance(image, Path)]
    messages = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    features = Features({"images": List(Image()), **dict.fromkeys(("prompt", "chosen", "rejected"), messages)})
    options = {"path": str(path), "image_folder": image_folder, "allow_outside": allow_outside}
    # by itself the cache knows the name of the file alone
    state = state_of_files([*files_of_rows(Path(path)), *named])
    return Dataset.from_generator(read_preferences, features, gen_kwargs=options, fingerprint=state)


def _preferences(
    path: str | Path, image_folder: str | Path | None, allow_outside: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and row as `read_preferences` says; pictures are files or bytes."""
    folder = folder_of_media(path, image_folder)
    for where, row in read_named_rows(path):
        row = _with_chosen_and_rejected(row, where)
        for key in ("chosen", "rejected"):
            if not row.get(key):
                raise ValueError(f"{where} has no {key}: a row of preferences needs chosen and rejected.")
        for key in ("video", "videos", "rejected_images", "rejected_videos"):
            if row.get(key):
                raise ValueError(f"{where} has {key}, which preferences are not read with; give frames as images.")
        check_keys(row, ("image", "images"), where)
        chosen, rejected = (_messages(row[key], where, "assistant") for key in ("chosen", "rejected"))
        prompt = row.get("prompt") or _conversation_of(row, where) or row.get("question")
        if prompt:
            prompt = _messages(prompt, where, "user")
            if chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:  # whole conversations beside it
                chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        else:
            shared = 0
            while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
                shared += 1
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise ValueError(f"{where} has no prompt: chosen and rejected must begin alike, or prompt go with them.")
        if not chosen or not rejected:
            raise ValueError(f"{where}: its chosen and rejected hold nothing behind the prompt.")
        reader = _MediaReader(row, where, folder, allow_outside)
        asked = reader.texts(prompt)
        system = asked.pop(0)["value"] if asked[0]["from"] == "system" else None
        if system := system_text(row, system, where):
            asked.insert(0, {"from": "system", "value": system})
        images, _ = reader.media()
        answers = {
            name: _MediaReader({}, where, folder, allow_outside).texts(messages)
            for name, messages in (("chosen", chosen), ("rejected", rejected))
        }
        _check_preference(asked, answers, len(images), where)
        if images and not any(IMAGE_TOKEN in message["value"] for message in asked):
            first = next(message for message in asked if message["from"] == "human")
            first["value"] = IMAGE_TOKEN * len(images) + first["value"]
        parts = {"prompt": _parts(asked), **{name: _parts(messages) for name, messages in answers.items()}}
        yield where, {"images": [image for _, image in images], **parts}


def _with_chosen_and_rejected(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of ms-swift's form under the names of the others."""
    answer, messages = row.get("rejected_response"), row.get("rejected_messages")
    if not answer and not messages:
        return row
    if row.get("chosen") or row.get("rejected") or (answer and messages):
        names = [name for name in ("chosen", "rejected", "rejected_response", "rejected_messages") if row.get(name)]
        raise ValueError(f"{where} has {', '.join(names)}: give its answers under one pair of names.")
    chosen = _messages(_conversation_of(row, where), where)
    rejected = messages if messages else [*chosen[:-1], *_messages(answer, where, "assistant")]
    whole = dict.fromkeys(("messages", "conversations", "query", "prompt"))
    return {**row, **whole, "chosen": chosen, "rejected": rejected}


def _check_preference(asked: list[dict], answers: dict[str, list[dict]], num_images: int, where: str) -> None:
    """Raises ValueError for what a row of preferences cannot have."""
    if not asked or asked[-1]["from"] != "human":
        raise ValueError(f"{where}: its prompt must end with a message of the user.")
    for name, messages in answers.items():
        if messages[-1]["from"] != "gpt":
            raise ValueError(f"{where}: its {name} must end with an answer of the assistant.")
        if any(IMAGE_TOKEN in message["value"] for message in messages):
            raise ValueError(f"{where}: its {name} holds {IMAGE_TOKEN}, but pictures are only given with the prompt.")
    texts = [message["value"] for messages in (asked, *answers.values()) for message in messages]
    if any("<video>" in text for text in texts):
        raise ValueError(f"{where} holds <video>, which preferences are not read with; give frames as images.")
    marks = sum(message["value"].count(IMAGE_TOKEN) for message in asked)
    if marks and marks != num_images:
        raise ValueError(f"{where}: the prompt holds {marks} {IMAGE_TOKEN} for {num_images} images.")


def folder_of_media(path: str | Path, image_folder: str | Path | None) -> Path:
    """Where media are that rows name, unless it is said."""
    path = Path(path)
    return Path(image_folder) if image_folder is not None else path if path.is_dir() else path.parent


def _conversation_of(row: dict[str, Any], where: str) -> Any:
    """What a row has under one of the names of its messages; None if nothing."""
    given = [name for name in _CONVERSATIONS if row.get(name)]
    given += ["query"] if row.get("query") and row.get("response") else []
    given += ["question"] if _is_asked(row) else []
    given += ["texts"] if _are_turns(row.get("texts")) else []
    if len(given) > 1:
        raise ValueError(f"{where} has both {' and '.join(given)}: give its messages under one of them.")
    if given == ["query"]:
        turns = [*(row.get("history") or []), [row["query"], row["response"]]]
        if not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
            raise ValueError(f"{where}: history must be a list of [query, response], got {row['history']!r:.60}.")
        turns = [{"user": asked, "assistant": said} for asked, said in turns]
    elif given == ["question"]:
        turns = [{"user": row["question"], "assistant": row["answer"]}]
    elif given == ["texts"]:
        turns = row["texts"]
    else:
        return row[given[0]] if given else row.get("messages")
    return [message for turn in turns for message in _messages_of_turn(**turn)]


def _is_asked(row: dict[str, Any]) -> bool:
    """Whether a row is a question and its answer."""
    return all(isinstance(row.get(key), str) for key in _ASKED) and not any(row.get(key) for key in _NOT_ASKED)


def _messages_of_turn(user: Any, assistant: Any, **others: Any) -> list[dict[str, Any]]:
    """What else a turn has stays with its question, for `Conversation.unused`."""
    return [{**others, "role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _are_turns(texts: Any) -> bool:
    """Whether they are the turns of The Cauldron; OBELICS has texts under that name."""
    return (
        isinstance(texts, list)
        and bool(texts)
        and all(isinstance(text, dict) and {"user", "assistant"} <= text.keys() for text in texts)
    )


def _refuse_other_form(row: dict[str, Any], where: str) -> None:
    for keys, name, reader in _OTHER_FORMS:
        if all(key in row for key in keys):
            raise ValueError(
                f"{where} has no messages, but {' and '.join(keys)}: it is {name} form; give it to {reader}."
            )


def _messages(messages: Any, where: str, speaker: str | None = None) -> list[dict[str, Any]]:
    """Messages with role and content; with a speaker, a text or a single message are some too."""
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # tables that hold lists as JSON
        try:
            messages = parse_json(messages)
        except ValueError:
            pass
    if speaker and isinstance(messages, str):
        messages = [{"role": speaker, "content": messages}]
    if isinstance(messages, dict):
        messages = [messages]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: messages must be a list of role and content, got {repr(messages)[:60]}.")
    if not messages:
        raise ValueError(f"{where} has no messages.")
    return messages


class _MediaReader:
    """The media of a row in the order of their places."""

    def __init__(self, row: dict[str, Any], where: str, folder: Path, allow_outside: bool):
        self.where, self.folder, self.allow_outside = where, folder, allow_outside
        self.unused: list[str] = []
        self._of_row = {
            mark: media_of_row(_decoded(row, where), where, folder, allow_outside, kind)
            for kind, mark in (("image", IMAGE_TOKEN), ("video", "<video>"))
        }
        self._waiting = {mark: [*media] for mark, media in self._of_row.items()}
        self._placed: dict[str, list] = {IMAGE_TOKEN: [], "<video>": []}

    def texts(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages as `read_messages` reads them, with a mark where each medium stands."""
        return [self._text(message) for message in messages]

    def media(self) -> tuple[list, list]:
        """Pictures and films; behind those that have a place the others."""
        return tuple(self._placed[mark] + self._waiting[mark] for mark in (IMAGE_TOKEN, "<video>"))

    def _text(self, message: dict[str, Any]) -> dict[str, Any]:
        role, content = message.get("role"), message.get("content")
        if role is None and "from" in message:  # ShareGPT's names for the same
            return self._text({"role": message["from"], "content": message.get("value")})
        speaker = _SPEAKERS.get(role, role) if isinstance(role, str) else None
        if speaker not in ("system", "human", "user", "gpt"):
            raise UnusableConversation(
                f"{self.where}: the role {role!r:.60} is not read; use {', '.join(_SPEAKERS)}, or leave such "
                "conversations out (--skip-invalid).",
                "role",
            )
        unused = {key: value for key, value in message.items() if key not in ("role", "content")}
        if isinstance(content, str):
            for mark in MARKS.findall(content):
                if self._waiting[mark]:
                    self._placed[mark].append(self._waiting[mark].pop(0))
            text = content
        elif isinstance(content, list):
            text = "".join(self._part(part) for part in content)
        else:
            raise ValueError(f"{self.where}: content must be a text or a list of parts, got {repr(content)[:60]}.")
        return {"from": "human" if speaker == "user" else speaker, "value": text, **unused}

    def _part(self, part: Any) -> str:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is None and isinstance(part, dict):  # Qwen's tools need no type
            kind = next((name for name in ("text", *_MARK) if part.get(name) is not None), None)
        if kind == "text":
            self._note_unused(part, _IN_TEXT)
            # in parts a mark is a word like others
            return escape_reserved_tokens(text_of(part, "text", self.where), [IMAGE_TOKEN, "<video>"])
        mark = _MARK.get(kind) if isinstance(kind, str) else None
        if mark is None:
            raise UnusableConversation(
                f"{self.where}: a part of the type {kind!r:.60} is not read; use text, image or video, or leave such "
                "conversations out (--skip-invalid).",
                "part",
            )
        self._note_unused(part, _IN_MEDIUM)
        own = next((part[key] for key in (kind, "image", "video", "url", "path", "base64") if part.get(key)), None)
        own = own.get("url") if isinstance(own, dict) and "url" in own else own
        own = f"data:,{own}" if own is not None and own is part.get("base64") else own
        if is_there(own):
            own = _decoded({"own": own}, self.where)["own"]
            self._placed[mark].append(medium_of(own, kind, self.folder, self.where, self.allow_outside))
        elif part.get("index") is not None:
            self._place_by_index(mark, part["index"])
        elif self._waiting[mark]:
            self._placed[mark].append(self._waiting[mark].pop(0))
        return mark

    def _place_by_index(self, mark: str, index: Any) -> None:
        media = self._of_row[mark]
        if type(index) is not int or not 0 <= index < len(media):
            raise UnusableConversation(
                f"{self.where}: a part has the index {index!r:.60}, and the row {len(media)} media, which are counted "
                "from 0; correct it, or leave such conversations out (--skip-invalid).",
                "index of a part",
            )
        self._placed[mark].append(media[index])
        self._waiting[mark] = [medium for medium in self._waiting[mark] if medium is not media[index]]

    def _note_unused(self, part: dict[str, Any], known: Sequence[str]) -> None:
        self.unused += [f"{name} of a part" for name in check_keys(part, known, self.where)]


def _decoded(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row with the bytes of `data:` addresses and the names of `file:` ones; others are not fetched."""

    def decode(medium: Any) -> Any:
        if isinstance(medium, list):
            return [decode(one) for one in medium]
        if isinstance(medium, str) and medium.startswith("data:"):
            try:
                return decode_base64(medium)
            except ValueError:
                raise ValueError(f"{where}: a data: address holds damaged base64.") from None
        if isinstance(medium, str) and medium.startswith("file://"):
            return path_of_url(medium)
        if isinstance(medium, str) and "://" in medium[:16]:
            raise UnusableConversation(
                f"{where}: {medium!r:.80} is an address, and none are fetched; download it and give its file name, or "
                "leave such conversations out (--skip-invalid).",
                "address",
            )
        return medium

    return {key: decode(value) if key in (*_MEDIA, "own") else value for key, value in row.items()}


def _encoded(medium: Path | bytes, where: str) -> dict[str, Any]:
    if isinstance(medium, Path) and not medium.is_file():
        raise ValueError(f"{where} needs the picture {medium}, which is not there.")
    return {"bytes": medium if isinstance(medium, bytes) else medium.read_bytes(), "path": None}


def _parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of texts with marks as messages of parts."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    parted = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(message["value"].split(IMAGE_TOKEN)):
            parts += [{"type": "image", "text": None}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        parted.append({"role": roles[message["from"]], "content": parts})
    return parted
