"""Worked examples from a YAML file, as the messages that a skill is made of."""

from pathlib import Path

from ..reading import load_yaml
from .batch import FIELDS, check_entry, find_file, read_media_of
from .session import make_message


_LISTS = ("examples", "messages")
_ROLES = ("system", "user", "assistant")
# how a part of a message names its file, and the field of an entry that reads it
_SOURCES = {"image": "image_path", "video": "video_path"}


def read_examples(path: str | Path, num_frames: int = 16) -> list[dict]:
    """
    The messages of a YAML file.

    Args:
        path: of a list of examples, each `{question, answer, image_path, video_path}` like the entries of a list of
            questions (`read_questions`), or of `{system: text, examples: [...]}`, or of `{messages: [...]}` with a
            text or parts as content: `{type: text, text}`, `{type: image, path}`, `{type: video, path}`. Paths are
            looked for in the working directory and beside the YAML file.
        num_frames: read of a film.

    Raises:
        ValueError: naming the entry, for anything else, and for files that do not exist or cannot be read.
        OSError: if there is no such file.
    """
    content = load_yaml(path)
    content = {"examples": content} if isinstance(content, list) else content
    given = [name for name in _LISTS if isinstance(content, dict) and isinstance(content.get(name), list)]
    if len(given) != 1 or not content[given[0]] or content.keys() - {"system", given[0]}:
        raise ValueError(
            f"{path} must hold a list of examples with question, answer and image_path, or system with examples, or "
            "messages."
        )
    system = content.get("system")
    if not isinstance(system, (str, type(None))):
        raise ValueError(f"{path}: system is {system!r:.80}; write it in words.")
    messages = [] if system is None else [make_message("system", system)]
    read, folder = _example if given[0] == "examples" else _message, Path(path).parent
    for index, entry in enumerate(content[given[0]]):
        messages += read(entry, f"{path}, {given[0]}[{index}]", num_frames, folder)
    return messages


def _example(entry, place: str, num_frames: int, folder: Path) -> list[dict]:
    entry = check_entry(entry, place, (*FIELDS, "answer"), folder)
    answer = entry.get("answer")
    # YAML reads yes, no and 3 as what they are
    if isinstance(answer, bool):
        raise ValueError(f"{place}: YAML reads its answer as {str(answer).lower()}; put it in quotes.")
    if not isinstance(answer, (str, int, float)):
        raise ValueError(f"{place}: give it an answer in words.")
    return [
        make_message("user", entry["question"], read_media_of(entry, num_frames)),
        make_message("assistant", str(answer)),
    ]


def _message(message, place: str, num_frames: int, folder: Path) -> list[dict]:
    if not isinstance(message, dict) or message.keys() != {"role", "content"} or message["role"] not in _ROLES:
        raise ValueError(f"{place}: a message is {{role, content}} with one of the roles {', '.join(_ROLES)}.")
    content = message["content"]
    if isinstance(content, str):
        return [make_message(message["role"], content)]
    if not isinstance(content, list):
        raise ValueError(f"{place}: content is {content!r:.80}; write a text or a list of parts.")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and part.keys() == {"type", "text"} and isinstance(part["text"], str):
            parts.append(part)
        elif str(kind) in _SOURCES and len(part) == 2 and part.keys() & {"path", "url"}:
            file = find_file(part.get("path", part.get("url")), place, folder)
            parts += read_media_of({_SOURCES[kind]: file}, num_frames)
        else:
            raise ValueError(
                f"{place}: {part!r:.80} is none of {{type: text, text}}, {{type: image, path}}, {{type: video, path}}."
            )
    return [{"role": message["role"], "content": parts}]
