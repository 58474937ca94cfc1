"""Rows of messages as a training YAML, made in the cache once for each state of them."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from ...files import write_json
from ...reading import parse_json
from ...storage import AnyPath, is_remote
from ..arrow_cache import cache_folder, cached_arrow_file, local_copy, open_arrow_file
from ..image_store import ImageStore
from .common import Conversation, name_in_folder, tell_left_out, write_conversations, write_mixture
from .messages import read_chats
from .rows import files_of_rows, state_of_files


def chats_as_mixture(
    path: AnyPath,
    cache_dir: str | Path | None = None,
    *,
    image_folder: str | Path | None = None,
    allow_outside: bool = False,
    on_error: str = "raise",
) -> Path:
    """
    The training YAML of rows of messages, written as MIMIC-IT files to the cache when there are none of this file yet.

    Media that are files of the folder stay where they are. What is not used of the rows is told each time.

    Args:
        on_error: `"raise"`, or `"skip"` rows that no record can keep, or whose pictures are not there.

    Raises:
        ValueError, OSError: as `read_chats` and `write_conversations`.
    """
    given, path = path, local_copy(path, cache_dir)
    how = {"image_folder": image_folder and str(Path(image_folder).resolve()), "on_invalid": on_error}
    how["allow_outside"] = allow_outside

    def read() -> Iterator[Conversation]:
        return read_chats(path, **how)

    named, all_are_files = _named_files(path, read, cache_dir, how)
    if named and image_folder is None and is_remote(given):
        raise ValueError(f"{given} names {named[0].name}: media of rows at an address must be in the rows, as bytes.")
    state = state_of_files([*files_of_rows(path), *named], on_error)
    folder, name = cache_folder(cache_dir) / f"messages-{state}", path.resolve().stem
    mixture, told = folder / "mixture.yaml", folder / "left_out.json"
    if not mixture.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not mixture.exists():
                # an image store follows no link that leads out of its folder
                in_place = all_are_files and not allow_outside
                place = _place_of(named) if in_place else None
                counts = write_conversations(folder, name, read, on_error=on_error, media_folder=place)
                write_json(told, [counts.left_out, counts.unused])
                write_mixture(mixture, counts.files)
                return mixture
    tell_left_out(name, *parse_json(told.read_text(encoding="utf-8")))
    return mixture


def _named_files(
    path: Path, read: Callable[[], Iterable[Conversation]], cache_dir: str | Path | None, how: dict[str, Any]
) -> tuple[list[Path], bool]:
    """
    The files that rows name, and whether all media are some, looked for once: rows may hold gigabytes of pictures.
    """

    def build() -> tuple[pa.Schema, list[pa.RecordBatch]]:
        media = (medium for one in read() for _, medium in one.pictures)
        names = dict.fromkeys(os.fsencode(medium) if isinstance(medium, Path) else None for medium in media)
        batch = pa.RecordBatch.from_pydict({"name": pa.array(names, pa.large_binary())})
        return batch.schema, [batch]

    # of a folder the rows alone, not the pictures beside them
    sources = files_of_rows(path) or [path]
    names = open_arrow_file(cached_arrow_file(sources, "names", build, cache_dir, **how))["name"].to_pylist()
    named = [Path(os.fsdecode(name)) for name in names if name is not None]
    return named, bool(named) and None not in names


def _place_of(files: Sequence[Path]) -> Path | None:
    """
    The folder of all of these files, where an image store of it has those that are there; else None. What lies beside
    it is no part of the store, which lists all that it holds at each start.
    """
    try:
        folder = Path(os.path.commonpath([file.parent for file in files]))
        store, whole = ImageStore(folder), folder.resolve()
        there = all(
            name_in_folder(file, folder) in store and file.resolve().is_relative_to(whole)
            for file in files
            if file.is_file()
        )
    except (ValueError, OSError):  # of a folder without pictures, or names of which some are absolute
        return None
    return folder if there else None
