"""The cache: Arrow files, built once from other files and memory-mapped ever after, and copies of addresses."""

import contextlib
import errno
import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from glob import escape
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock
from transformers.utils import logging

from ..files import replacing
from ..films import FILM_SUFFIXES
from ..made_from import state
from ..pictures import PICTURE_SUFFIXES
from ..storage import AnyPath, full_name, is_remote, to_path


logger = logging.get_logger(__name__)

# of the files in a folder that is an image store
MEDIA_SUFFIXES = (*PICTURE_SUFFIXES, *FILM_SUFFIXES)
_TOLD_BYTES = 100_000_000
_FORMAT_VERSION = 7  # raise it when the content of cached files changes


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Where all of it is kept: `otter_hf` in the cache of the `datasets` library, unless another folder is given."""
    return Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "otter_hf")


def local_copy(path: AnyPath, cache_dir: str | Path | None = None) -> Path:
    """
    The path itself, or for an address its copy in the cache: of a file, or of a folder's parquet files, or else of its
    pictures and films.

    A copy is made once for each state of what is there; several processes may ask for it at a time.

    Raises:
        FileNotFoundError: if nothing is there.
    """
    path = to_path(path)
    if not is_remote(path):
        return Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.parquet"), key=str) or sorted(
            (file for file in path.rglob("*") if file.suffix.lower() in MEDIA_SUFFIXES), key=str
        )
    if not files or not files[0].exists():
        raise FileNotFoundError(f"{path} does not exist, or is a folder without .parquet files, pictures or films.")
    folder = cache_folder(cache_dir) / f"{path.name}-{_digest([_named_state(file) for file in files])}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    whole = folder / path.name
    if not whole.exists():
        with FileLock(f"{folder}.lock"):
            if not whole.exists():
                with replacing(whole) as written:
                    for file in files:
                        copy = written if file is path else written / file.path.removeprefix(path.path).lstrip("/")
                        copy.parent.mkdir(parents=True, exist_ok=True)
                        file.fs.get_file(file.path, str(copy))
    return whole


def _named_state(path: AnyPath) -> tuple:
    """A file's full name and state; FileNotFoundError if it is not there."""
    path = to_path(path)
    if (now := state(path)) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return (full_name(path), *now)


def _digest(key: Any) -> str:
    return hashlib.sha256(repr(key).encode("utf-8", "surrogateescape")).hexdigest()[:20]


def cached_arrow_path(
    sources: Sequence[AnyPath], purpose: str, cache_dir: str | Path | None = None, **parameters: Any
) -> Path:
    """Where `cached_arrow_file` keeps what it builds of these."""
    return _paths(sources, purpose, cache_dir, parameters)[-1]


def _paths(
    sources: Sequence[AnyPath], purpose: str, cache_dir: str | Path | None, parameters: Mapping[str, Any]
) -> list[Path]:
    """The path of each format there has been, the last that of today."""
    made_from = purpose, [_named_state(source) for source in sources], sorted(parameters.items())
    digests = [_digest((version, *made_from)) for version in range(1, _FORMAT_VERSION + 1)]
    return [cache_folder(cache_dir) / f"{to_path(sources[0]).name}-{purpose}-{digest}.arrow" for digest in digests]


def cached_arrow_file(
    sources: Sequence[AnyPath],
    purpose: str,
    build: Callable[[], tuple[pa.Schema, Iterable[pa.RecordBatch]]],
    cache_dir: str | Path | None = None,
    *,
    num_bytes: int = 0,
    **parameters: Any,
) -> Path:
    """The path of an Arrow stream file made by `build` from `sources`, built now unless it exists.

    The file is named after the paths, sizes and modification times of the sources, `purpose` and `parameters`, so a
    changed source is never served from an old file. Several processes may ask for the same file: one builds it, the
    others wait. It gets its name only when it is complete, so a process that is killed leaves nothing that is read.
    What an earlier format made of the same sources is deleted then.

    Args:
        sources: files that the result depends on, also at addresses.
        purpose: what is built, also part of the name.
        build: returns the schema and the batches to write.
        cache_dir: where to keep the file; default: `otter_hf` in the cache of the `datasets` library.
        num_bytes: about how many bytes a large one takes, which is told and looked for before it is built.
        parameters: anything else that the result depends on; must have a faithful `repr`.

    Raises:
        OSError: if there is no room for it.
    """
    *outdated, path = _paths(sources, purpose, cache_dir, parameters)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            if num_bytes:
                _tell_size(path, num_bytes)
            schema, batches = build()
            with (
                replacing(path) as written,
                pa.OSFile(str(written), "wb") as file,
                pa.ipc.new_stream(file, schema) as writer,
            ):
                for batch in batches:
                    writer.write_batch(batch)
            for old in outdated:
                for file in path.parent.glob(f"{escape(old.stem)}*.arrow"):  # and indices of it
                    with contextlib.suppress(OSError):  # Windows keeps what is open
                        file.unlink()
    return path


def _tell_size(path: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        message = f"a copy of {num_bytes / 1e9:.1f} GB does not fit in the {free / 1e9:.1f} GB that are free"
        raise OSError(errno.ENOSPC, message, str(path.parent))
    if num_bytes > _TOLD_BYTES:
        logger.warning(f"A copy of {num_bytes / 1e9:.1f} GB is made in {path.parent}, once, for reading at random.")


def open_arrow_file(path: str | Path) -> pa.Table:
    """
    Memory-maps an Arrow stream or Arrow (Feather v2) file. Of texts and bytes it reads where each begins, once: with
    damaged places pyarrow would end the process. The rest is read when it is used, but for texts in lists and structs.

    Raises:
        pa.ArrowInvalid: for a file that is damaged there.
    """
    file = pa.memory_map(str(path))
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    table = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file).read_all()
    for column in table.columns:
        column.validate()
        # as bytes, of which places alone are looked at: whether texts are UTF-8 is seen when they are read
        if pa.types.is_string(column.type):
            column = column.cast(pa.binary())
        elif pa.types.is_large_string(column.type):
            column = column.cast(pa.large_binary())
        column.validate(full=True)
    return table


class IdIndex:
    """Finds the row of an id in a table, memory-mapped and without a dictionary of all ids.

    The index holds checksums of the ids in sorted order, and their rows; a hit is confirmed in the id column, so that
    ids of equal checksums are told apart.

    Args:
        path: an Arrow file of `IdIndex.build`.
        ids: the id column that the index was built from.
    """

    def __init__(self, path: str | Path, ids: pa.ChunkedArray):
        table = open_arrow_file(path)
        self.ids = ids
        self.hashes = _as_numpy(table["hash"])  # (N,) uint32, sorted
        self.rows = _as_numpy(table["row"])  # (N,) int64

    @staticmethod
    def build(ids: pa.ChunkedArray) -> tuple[pa.Schema, Iterable[pa.RecordBatch]]:
        """Schema and batches of the index of an id column, for `cached_arrow_file`."""
        hashes = np.fromiter(
            map(_hash, chain.from_iterable(chunk.to_pylist() for chunk in ids.chunks)), np.uint32, len(ids)
        )
        rows = np.argsort(hashes, kind="stable")
        batch = pa.RecordBatch.from_arrays([pa.array(hashes[rows]), pa.array(rows)], names=["hash", "row"])
        return batch.schema, [batch]

    def find(self, id: str) -> int:
        """The first row with this id, or -1."""
        wanted = np.uint32(_hash(id))
        position = int(self.hashes.searchsorted(wanted))
        while position < len(self.hashes) and self.hashes[position] == wanted:
            row = int(self.rows[position])
            if self.ids[row].as_py() == id:
                return row
            position += 1
        return -1

    def duplicates(self) -> Iterable[tuple[int, int]]:
        """Pairs `(first row, later row)` that have the same id."""
        for position in np.flatnonzero(self.hashes[1:] == self.hashes[:-1]):
            later = int(self.rows[position + 1])
            first = self.find(self.ids[later].as_py())
            if first != later:
                yield first, later


def _as_numpy(column: pa.ChunkedArray) -> np.ndarray:
    # the index is written as one batch, so this is a view of the memory map
    return column.chunk(0).to_numpy(zero_copy_only=True) if column.num_chunks else column.to_numpy()


def _hash(id: str) -> int:
    return zlib.crc32(id.encode())
