"""Parquet files with a page for each picture, so that a reader can fetch any of them on its own."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, Value

from ..files import is_disk_full, move, replacing, write_text
from ..storage import AnyPath, to_path
from .images import encode_base64, image_bytes
from .parquet_pages import is_of_disk


# Two encodings of pictures. Bytes as they are, which `datasets.load_dataset` shows as pictures; and the base64 text of
# MIMIC-IT, with the ids as pandas index.
PICTURES = Features({"id": Value("string"), "image": Image()})
_SCHEMAS = {
    "bytes": PICTURES.arrow_schema,
    "base64": pa.Schema.from_pandas(pd.DataFrame({"base64": [""]}, index=["id"], dtype="object")),
}
_ID_COLUMNS = {"bytes": "id", "base64": "__index_level_0__"}
# A page is closed behind each picture. Pictures do not repeat, and their smallest and largest are of no use.
_PAGES = {"use_dictionary": False, "write_batch_size": 1, "data_page_size": 4 << 10, "write_statistics": False}
_ROWS = 100
_BATCH_BYTES = 64 << 20
PART_BYTES = 256 << 20


def write_rows(path: Path, schema: pa.Schema, rows: Iterable[Mapping[str, Any]]):
    """Writes rows to a parquet file, as they come."""
    # encoded pictures do not get smaller, but zstd takes back what base64 adds
    compression = "none" if "image" in schema.names else "zstd"
    with pq.ParquetWriter(path, schema, compression=compression, **_PAGES) as writer:
        for batch in _batches(rows):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


def _batches(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """A hundred rows at a time, or fewer where they hold films: no column of Arrow's takes more than 2 GiB."""
    batch: list[Mapping[str, Any]] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len((row.get("image") or {}).get("bytes") or row.get("base64") or "")
        if len(batch) == _ROWS or size > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_images(path: Path, images: Iterable[tuple[str, Any]], encoding: str = "bytes") -> set[str]:
    """Writes `(id, picture)` pairs to one parquet file; returns the ids.

    Args:
        path: the file.
        images: pictures are encoded bytes, files, or PIL pictures, which become PNG.
        encoding: `"bytes"` as they are, or `"base64"`, the text that the loader of 2023 needs.

    Raises:
        ValueError: for another encoding, or if an id is given twice.
    """
    ids: set[str] = set()
    write_rows(path, _schema(encoding), (_row(id, image_bytes(image), encoding) for id, image in _unique(images, ids)))
    return ids


def write_image_parts(folder: Path, images: Iterable[tuple[str, Any]], encoding: str = "bytes") -> set[str]:
    """Like `write_images`, to `part.0.parquet`, `part.1.parquet`, ... of about 256 MB each in `folder`.

    Parts that an earlier run has completed there, before it was killed, are kept as long as they hold what would be
    written: the same ids in the same order, and the same bytes, or the same files, unchanged since. Which files a part
    was made of stands beside it, in `sources.0.json`, until `move_image_parts`.
    """
    _schema(encoding)
    ids: set[str] = set()
    images = _unique(images, ids)
    folder.mkdir(parents=True, exist_ok=True)
    number, taken = 0, []
    while (part := folder / f"part.{number}.parquet").exists():
        try:
            taken = list(islice(images, pq.read_metadata(part).num_rows))
            if not _holds(part, _sources(folder, number), taken, encoding):
                break
        except (pa.ArrowException, OSError) as error:
            if is_of_disk(error):
                raise
            break  # the part is damaged
        number, taken = number + 1, []
    kept = {path for other in range(number) for path in (folder / f"part.{other}.parquet", _sources(folder, other))}
    for path in set(folder.iterdir()) - kept:
        path.unlink()
    _write_parts(folder, number, chain(taken, images), encoding)
    return ids


def join_parts(parts: Iterable[AnyPath], path: Path) -> None:
    """Writes the rows of parquet files of one encoding to one."""
    paths = list(parts)
    with paths[0].open("rb") as file:
        schema = pq.read_schema(file)

    def rows() -> Iterator[dict[str, Any]]:
        for part in paths:
            with part.open("rb") as file, pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(_ROWS):
                    yield from batch.to_pylist()

    write_rows(path, schema, rows())


def check_encoding(encoding: str) -> None:
    """`ValueError` if there is no such encoding of pictures."""
    _schema(encoding)


@contextmanager
def kept_for_next_run(folder: Path):
    """Parts outlive a kill, Ctrl-C or a full disk in this block; a mistake in the data needs no memory of them."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def refuse_other_folder(path: AnyPath):
    """`FileExistsError` if an image store of this name would replace a folder that holds anything but parts of one."""
    path = to_path(path)
    others = sorted(other for other in path.iterdir() if other.suffix != ".parquet") if path.is_dir() else []
    if others:
        raise FileExistsError(f"The output {path} is a folder with {others[0].name} in it: name another one.")


def move_image_parts(folder: Path, path: Path):
    """
    Gives what `write_image_parts` wrote its final name: one part becomes a file, several a folder.

    Raises:
        FileExistsError: as `refuse_other_folder`.
    """
    refuse_other_folder(path)
    parts = list(folder.glob("part.*"))
    for sources in folder.glob("sources.*"):
        sources.unlink()
    move(parts[0] if len(parts) == 1 else folder, path, known_folder=True)
    shutil.rmtree(folder, ignore_errors=True)


def _write_parts(folder: Path, number: int, images: Iterator[tuple[str, Any]], encoding: str):
    for image in images:
        _write_part(folder, number, chain([image], images), encoding)
        number += 1
    if not number:
        _write_part(folder, number, (), encoding)


def _write_part(folder: Path, number: int, images: Iterable[tuple[str, Any]], encoding: str):
    sources = []
    with replacing(folder / f"part.{number}.parquet") as written:
        write_rows(written, _schema(encoding), _rows_of_part(images, encoding, sources))
        write_text(_sources(folder, number), json.dumps(sources))


def _sources(folder: Path, number: int) -> Path:
    """The file that says of which files a part was made."""
    return folder / f"sources.{number}.json"


def _source_of(image: Any) -> list | None:
    """What tells whether a file is still the same: path, size and time. None for what is no file."""
    if not isinstance(image, (str, Path)):
        return None
    stat = os.stat(image)
    return [os.path.abspath(image), stat.st_size, stat.st_mtime_ns]


def _rows_of_part(images: Iterable[tuple[str, Any]], encoding: str, sources: list) -> Iterator[dict[str, Any]]:
    """Rows up to the size of a part; adds the source of each to `sources`."""
    size = 0
    for id, image in images:
        sources.append(_source_of(image))
        data = image_bytes(image)
        yield _row(id, data, encoding)
        size += len(data)
        if size >= PART_BYTES:
            return


def _holds(part: Path, sources: Path, images: list[tuple[str, Any]], encoding: str) -> bool:
    """Whether a part holds these pictures; files are not read again, but must be those it was made of, unchanged."""
    id_column = _ID_COLUMNS[encoding]
    only_files = all(isinstance(image, (str, Path)) for _, image in images)
    try:
        made_of = json.loads(sources.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if made_of != [_source_of(image) for _, image in images]:
        return False
    with pq.ParquetFile(part) as file:
        if file.schema_arrow != _SCHEMAS[encoding] or file.metadata.num_rows != len(images):
            return False
        batches = file.iter_batches(_ROWS, columns=[id_column] if only_files else None)
        for (id, image), row in zip(images, (row for batch in batches for row in batch.to_pylist()), strict=True):
            if isinstance(image, (str, Path)):
                same = row[id_column] == id
            else:
                same = row == _row(id, image_bytes(image), encoding)
            if not same:
                return False
    return True


def _row(id: str, data: bytes, encoding: str) -> dict[str, Any]:
    if encoding == "bytes":
        return {"id": id, "image": {"bytes": data, "path": None}}
    return {"base64": encode_base64(data), _ID_COLUMNS[encoding]: id}


def _schema(encoding: str) -> pa.Schema:
    if encoding not in _SCHEMAS:
        raise ValueError(f"The encoding of pictures must be {' or '.join(map(repr, _SCHEMAS))}, got {encoding!r}.")
    return _SCHEMAS[encoding]


def _unique(images: Iterable[tuple[str, Any]], ids: set[str]) -> Iterator[tuple[str, Any]]:
    for id, image in images:
        if id in ids:
            raise ValueError(f"Image id {id!r} is given twice: ids must be unique.")
        ids.add(id)
        yield id, image
