"""Questions from a YAML file, answered into a JSON file, as the demo of 2023 did (`pipeline/demos/inference.py`)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from ..evaluation.model import ConversationModel
from ..evaluation.replies import ReplyLog, answer_all
from ..files import claim, remove, write_json
from ..made_from import state
from ..reading import load_yaml
from .media import fit_media, image_part, is_url, local_path, local_source, open_image, read_frames, video_part
from .session import make_message


FIELDS = ("image_path", "video_path", "question")


def read_questions(path: str | Path) -> list[dict]:
    """
    The entries of a YAML file: a list of `{question, image_path, video_path}`. `image_path` is a path or
    http(s) address, a list of them or empty, `video_path` one or empty; an entry with neither is a question about text
    alone. Paths are looked for in the working directory and beside the YAML file.

    Raises:
        ValueError: naming the entry, for anything else, and for files that do not exist.
        OSError: if there is no such file.
    """
    entries = load_yaml(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a list of entries with question and image_path.")
    folder = Path(path).parent
    return [check_entry(entry, f"{path}, entry {index}", FIELDS, folder) for index, entry in enumerate(entries)]


def check_entry(entry, place: str, fields: tuple[str, ...], folder: Path) -> dict:
    """
    The entry, with the paths of its files; ValueError, calling it `place`, unless it is a question with files that are
    there, and no other fields.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("question"), str):
        raise ValueError(f"{place}: give it a question in words.")
    if unknown := set(entry) - set(fields):
        raise ValueError(f"{place}: unknown {', '.join(sorted(map(str, unknown)))}; use {', '.join(fields)}.")
    found = dict(entry)
    for name in ("image_path", "video_path"):
        if isinstance(entry.get(name), list) and name == "image_path":
            found[name] = [find_file(file, place, folder) for file in entry[name]]
        elif entry.get(name):
            found[name] = find_file(entry[name], place, folder)
    return found


def find_file(file, place: str, folder: Path) -> str:
    """A file that a YAML file in a folder names: an address, or where it is; ValueError, calling it `place`."""
    if isinstance(file, str):
        if is_url(file) or local_path(file).is_file():
            return file
        if (folder / file).is_file():
            return str(folder / file)
    raise ValueError(f"{place}: there is no file {file}.")


def read_media_of(entry: dict, num_frames: int) -> list[dict]:
    """The pictures and the film of an entry as parts of a message."""
    media = [image_part(open_image(local_source(file), file)) for file in _image_paths(entry)]
    if file := entry.get("video_path"):
        media.append(video_part(read_frames(local_source(file), file, num_frames)))
    return media


def answer_questions(
    model: ConversationModel,
    entries: list[dict],
    num_frames: int,
    batch_size: int,
    replies: ReplyLog | None = None,
    until: Sequence[str] = (),
    examples: Sequence[dict] = (),
    seed: int | None = None,
    **generation,
) -> Iterator[tuple[dict, str]]:
    """
    Each entry with its answer, a conversation of its own; under a progress bar, where somebody looks at a terminal.

    Args:
        entries: of `read_questions`.
        num_frames: read of a film.
        batch_size: questions per forward pass.
        replies: answers of before, which are not asked for again, and where new ones are kept.
        until: an answer ends before the first of these.
        examples: messages in front of each question, which are read once.
        seed: of what is drawn, see [`ConversationModel.answers`].
        generation: see [`ConversationModel.generate`].
    """

    def conversation(entry: dict) -> list[dict]:
        media = read_media_of(entry, num_frames)
        return fit_media([make_message("user", entry["question"], media)], model.processor)

    def question(item: tuple[int, dict]) -> Any:
        """What its answer depends on, told without reading a picture: one would be read again to be asked about."""
        _, entry = item
        return [entry, [state(local_path(file)) for file in _files_of(entry) if not is_url(file)]]

    def ask(window: list[tuple[int, dict]], wanted: set[int]) -> Iterator[dict[int, str]]:
        conversations = ([*examples, *conversation(entry)] for _, entry in window)
        # who asks the same again and again gets other draws
        own_seed = None if seed is None else seed + window[0][0]
        return model.answers(conversations, until, None, batch_size, wanted, own_seed, **generation)

    items = list(enumerate(entries))
    yield from zip(entries, answer_all(items, question, ask, 4 * batch_size, replies, disable=None), strict=True)


def write_log(
    folder: str | Path, model_name: str, checkpoint: str, answered: Iterator[tuple[dict, str]], report: Callable
) -> Path:
    """
    Write `inference_log_{time}.json` with `model_name`, `checkpoint` and `results`: `"000"`, `"001"`, ... to the entry
    and its `answer`. The file is there when all are answered.

    Args:
        report: called with the entry and its answer as each comes.

    Returns:
        its path.
    """
    path = Path(folder) / f"inference_log_{datetime.now():%Y-%m-%d_%H-%M-%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {}
    for index, (entry, answer) in enumerate(answered):
        results[f"{index:03d}"] = {"image_path": "", **entry, "answer": answer}
        report(entry, answer)
    log = {"model_name": model_name, "checkpoint": checkpoint, "results": results}
    write_json(path, log, indent=4)
    return path


@contextmanager
def kept_replies(folder: str | Path, context: Any) -> Iterator[ReplyLog]:
    """
    The answers of a run that was interrupted, in `folder/replies`; deleted when the block ends well, as the next run
    is another one.

    Args:
        context: what all answers depend on, see [`ReplyLog`].

    Raises:
        OSError: if another process answers into the folder.
    """
    with claim(Path(folder, ".lock"), folder):
        replies = ReplyLog(Path(folder, "replies"), context=context)
        try:
            yield replies
        finally:
            replies.close()
        remove(Path(folder, "replies"))


def _files_of(entry: dict) -> list:
    return [*_image_paths(entry), *([entry["video_path"]] if entry.get("video_path") else [])]


def _image_paths(entry: dict) -> list:
    paths = entry.get("image_path") or []
    return paths if isinstance(paths, list) else [paths]
