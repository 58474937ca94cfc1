"""Image stores: pictures found by id, memory-mapped, decoded one at a time when they are used."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from transformers.utils import logging

from .arrow_cache import IdIndex, cached_arrow_file, open_arrow_file
from .images import decode_base64, decode_image
from .json_stream import iter_json_object


logger = logging.get_logger(__name__)

SUFFIXES = (".parquet", ".json", ".arrow")
_SCHEMA = pa.schema({"id": pa.string(), "image": pa.binary()})
_BATCH_BYTES = 16 << 20
# without a buffer, a row group is read whole, and pandas writes files of one row group
_READ_BYTES = 4 << 20


class ImageStore:
    """Pictures by id, from any of the files that MIMIC-IT images come in.

    * `.parquet`: one row per picture. The id is the pandas index (also `__index_level_0__`, `__null_dask_index__`) or
      a column `id` or `image_id`. The picture is a column `base64` of text, or a column `image` of bytes or of the
      `datasets` library's `Image` feature. A folder of such files is one store.
    * `.json`: an object from id to base64 text, or to a list with one such text.
    * `.arrow`: columns `id` and `image` (bytes), used in place.

    Parquet and JSON files cannot be read at random: on first use they are copied to an Arrow file of the pictures'
    own bytes in the cache (see `cached_arrow_file`), one batch in memory at a time. Later uses start at once.

    `store[id]` is the RGB picture: `KeyError` if there is no such id, `OSError` if it cannot be decoded. Instances
    can be pickled and forked into data loader workers; they carry paths, not pictures.

    Args:
        paths: a file, a folder of parquet files, or a list of them; none for an empty store. The first file that has
            an id provides its picture.
        cache_dir: where the Arrow copies are kept; default: `otter_hf` in the cache of the `datasets` library.

    Raises:
        ValueError: if a file is of an unknown kind, unreadable, or one id has two different pictures.
        FileNotFoundError: if a path does not exist.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path] = (), cache_dir: str | Path | None = None):
        paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
        self._files = []
        for path in _expand(paths):
            arrow = (
                path if path.suffix == ".arrow" else cached_arrow_file([path], "images", _Converter(path), cache_dir)
            )
            ids = _open_images(arrow)["id"]
            index = cached_arrow_file([arrow], "index", lambda ids=ids: IdIndex.build(ids), cache_dir)
            self._files.append((path, arrow, index))
        self._open()
        self._refuse_conflicts()

    def _open(self):
        self._parts = []
        for _, arrow, index in self._files:
            table = _open_images(arrow)
            self._parts.append((table["image"], IdIndex(index, table["id"])))

    def __getstate__(self):
        return self._files

    def __setstate__(self, files):
        self._files = files
        self._open()

    def __len__(self) -> int:
        """The number of rows; identical copies of a picture count each."""
        return sum(len(images) for images, _ in self._parts)

    def __contains__(self, id: str) -> bool:
        return any(index.find(id) >= 0 for _, index in self._parts)

    def __iter__(self) -> Iterator[str]:
        for _, index in self._parts:
            for chunk in index.ids.chunks:
                yield from chunk.to_pylist()

    def __getitem__(self, id: str) -> Image.Image:
        return decode_image(self.read_bytes(id))

    def read_bytes(self, id: str) -> bytes:
        """The encoded picture as it is stored; `KeyError` if there is none, `OSError` if its base64 was damaged."""
        for images, index in self._parts:
            row = index.find(id)
            if row >= 0:
                data = images[row].as_py()
                if data is None:
                    raise OSError("damaged base64")
                return data
        raise KeyError(id)

    def _refuse_conflicts(self):
        for number, (images, index) in enumerate(self._parts):
            for first, later in index.duplicates():
                self._refuse_conflict(index.ids[first].as_py(), number, images[first], number, images[later])
            for other, (other_images, other_index) in enumerate(self._parts[:number]):
                for row in _common_rows(index, other_index):
                    id = index.ids[row].as_py()
                    self._refuse_conflict(id, other, other_images[other_index.find(id)], number, images[row])

    def _refuse_conflict(self, id: str, file: int, image: pa.Scalar, other_file: int, other_image: pa.Scalar):
        if image != other_image:
            raise ValueError(
                f"Image id {id!r} stands for two different pictures, in {self._files[file][0]} and "
                f"{self._files[other_file][0]}: rename or remove one."
            )


def _expand(paths: Iterable[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            parts = sorted(path.glob("*.parquet"), key=_natural_order)
            if not parts:
                raise ValueError(f"The image store {path} is a folder without .parquet files.")
            yield from parts
        elif path.suffix not in SUFFIXES:
            raise ValueError(f"The image store {path} is of no known kind: use {', '.join(SUFFIXES)} or a folder.")
        elif not path.exists():
            raise FileNotFoundError(f"The image store {path} does not exist.")
        else:
            yield path


def _natural_order(path: Path) -> list:
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", path.name)]


def _open_images(path: Path) -> pa.Table:
    try:
        table = open_arrow_file(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"The image store {path} cannot be read as Arrow ({error}).") from None
    if table.schema.names != _SCHEMA.names or table.schema.types != _SCHEMA.types:
        raise ValueError(f"The image store {path} must have the columns id (string) and image (binary).")
    return table


def _common_rows(index: IdIndex, other: IdIndex) -> Iterator[int]:
    """Rows of `index` whose ids are also in `other`."""
    for position in np.flatnonzero(np.isin(index.hashes, other.hashes)):
        row = int(index.rows[position])
        if other.find(index.ids[row].as_py()) >= 0:
            yield row


class _Converter:
    """Reads a parquet or JSON store as batches of ids and picture bytes, for `cached_arrow_file`."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        return _SCHEMA, self._batches()

    def _batches(self) -> Iterator[pa.RecordBatch]:
        rows = self._parquet_rows() if self.path.suffix == ".parquet" else self._json_rows()
        ids, images, size = [], [], 0
        for id, image in rows:
            ids.append(id)
            images.append(image)
            size += len(image or b"")
            if size > _BATCH_BYTES:
                yield pa.RecordBatch.from_arrays([ids, images], schema=_SCHEMA)
                ids, images, size = [], [], 0
        yield pa.RecordBatch.from_arrays([ids, images], schema=_SCHEMA)

    def _json_rows(self) -> Iterator[tuple[str, bytes | None]]:
        progress = logging.tqdm(desc=f"Indexing {self.path.name}", unit=" images")
        for id, value in iter_json_object(self.path):
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            yield id, _bytes_or_none(value)
            progress.update()
        progress.close()

    def _parquet_rows(self) -> Iterator[tuple[str, bytes | None]]:
        try:
            with pq.ParquetFile(self.path, buffer_size=_READ_BYTES, pre_buffer=False) as file:
                id_column, image_column = self._columns(file.schema_arrow)
                progress = logging.tqdm(
                    desc=f"Indexing {self.path.name}", total=file.metadata.num_rows, unit=" images"
                )
                for batch in file.iter_batches(batch_size=64, columns=[id_column, image_column], use_threads=False):
                    ids = batch.column(batch.schema.get_field_index(id_column)).to_pylist()
                    values = batch.column(batch.schema.get_field_index(image_column)).to_pylist()
                    for id, value in zip(ids, values, strict=True):
                        if id is None:
                            raise ValueError(f"The image store {self.path} has a row without an id.")
                        yield str(id), _bytes_or_none(value["bytes"] if isinstance(value, dict) else value)
                    progress.update(len(ids))
                progress.close()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"The image store {self.path} cannot be read as parquet ({error}).") from None

    def _columns(self, schema: pa.Schema) -> tuple[str, str]:
        pandas = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
        indices = [name for name in pandas.get("index_columns", []) if isinstance(name, str)]
        id_names = [*indices, "__index_level_0__", "__null_dask_index__", "id", "image_id"]
        id_column = next((name for name in id_names if name in schema.names), None)
        image_column = next((name for name in ("base64", "image") if name in schema.names), None)
        if id_column is None or image_column is None:
            raise ValueError(
                f"The image store {self.path} has the columns {', '.join(schema.names)}: it needs the image ids as "
                "pandas index or column id, and the pictures as column base64 or image."
            )
        return id_column, image_column


def _bytes_or_none(value: object) -> bytes | None:
    """The picture's bytes; None, which is reported when the picture is used, if there are none."""
    if isinstance(value, bytes):
        return value
    try:
        return decode_base64(value) if isinstance(value, str) else None
    except ValueError:
        return None
