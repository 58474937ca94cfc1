"""Image stores: pictures found by id, memory-mapped, decoded one at a time when they are used."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from transformers.utils import logging

from ..films import FILM_SUFFIXES
from ..progress import with_progress
from ..reading import path_inside, refuse_lfs_pointer
from ..storage import AnyPath, is_one_path
from .arrow_cache import MEDIA_SUFFIXES, IdIndex, cached_arrow_file, local_copy, open_arrow_file
from .images import decode_image
from .json_stream import iter_json_object
from .parquet_store import PICTURE_SCHEMA, ParquetPictures, picture_batches, text_picture


logger = logging.get_logger(__name__)

SUFFIXES = (".parquet", ".json", ".arrow")


class ImageStore:
    """Pictures by id, from any of the files that MIMIC-IT images come in.

    * `.parquet`: one row per picture. The id is the pandas index (also `__index_level_0__`, `__null_dask_index__`) or
      a column `id` or `image_id`. The picture is a column `base64` of text, or a column `image` of bytes or of the
      `datasets` library's `Image` feature. A folder of such files is one store.
    * `.json`: an object from id to base64 text, or to a list with one such text.
    * `.arrow`: columns `id` and `image` (bytes), used in place.
    * A folder of pictures and films without parquet files: the ids are the names of its files, as `sub/a.jpg`.

    A medium may be an encoded film in any of these; `medium` gives it as it lies, `store[id]` pictures only.

    A parquet store opens at once: only its ids are read, and kept with an index in the cache (see
    `cached_arrow_file`). Pictures in small pages, as `write_mimicit` stores them, are read where they are. pandas
    packs them in pages of dozens of megabytes: once reading has unpacked as much as the whole file, it is copied to
    the cache as a memory-mapped Arrow file of the pictures' own bytes, in whatever order and by however many
    processes it is read. JSON files are copied so on first use. A large copy is told with its size.

    `store[id]` is the picture in RGB, read as `otter_hf.pictures` says: `KeyError` if there is no such id, `OSError`
    if it cannot be decoded. Instances can be pickled and forked into data loader workers; they carry paths, not
    pictures.

    Args:
        paths: a file, a folder of parquet files, or a list of them; none for an empty store. The first file that has
            an id provides its picture. What is at an address (`s3://bucket/x.parquet`) is copied to the cache first.
        cache_dir: where the Arrow copies are kept; default: `otter_hf` in the cache of the `datasets` library.
        legacy_pictures: read pictures as the code of 2023 did, without orientation and with transparency dropped.
        max_pixels: of a picture, see `decode_image`.

    Raises:
        ValueError: if a file is of an unknown kind, unreadable, or one id has two different pictures.
        FileNotFoundError: if a path does not exist.
    """

    def __init__(
        self,
        paths: AnyPath | Sequence[AnyPath] = (),
        cache_dir: str | Path | None = None,
        legacy_pictures: bool = False,
        max_pixels: int | None = None,
    ):
        paths = [paths] if is_one_path(paths) else list(paths)
        self._legacy_pictures, self._max_pixels = legacy_pictures, max_pixels
        self._cache_dir = cache_dir
        self._paths = list(store_files(paths, cache_dir))
        self._open()
        self._refuse_conflicts()

    @property
    def max_pixels(self) -> int | None:
        """Largest number of pixels of a picture that is read; None for no limit."""
        return Image.MAX_IMAGE_PIXELS if self._max_pixels is None else self._max_pixels

    def _open(self):
        self._parts = []
        for path in self._paths:
            if path.is_dir():
                self._parts.append((media := _MediaFolder(path), media))
                continue
            if path.suffix == ".parquet":
                pictures = ParquetPictures(path, self._cache_dir)
            else:
                pictures = _ArrowPictures(path, self._cache_dir)
            index = cached_arrow_file(
                [pictures.id_file], "index", lambda ids=pictures.ids: IdIndex.build(ids), self._cache_dir
            )
            self._parts.append((pictures, IdIndex(index, pictures.ids)))

    def __getstate__(self):
        return self._paths, self._cache_dir, self._legacy_pictures, self._max_pixels

    def __setstate__(self, state):
        self._paths, self._cache_dir, self._legacy_pictures, self._max_pixels = state
        self._open()

    def __len__(self) -> int:
        """The number of rows; identical copies of a picture count each."""
        return sum(len(index.ids) for _, index in self._parts)

    def __contains__(self, id: str) -> bool:
        return self._place(id) is not None

    def __iter__(self) -> Iterator[str]:
        for _, index in self._parts:
            for chunk in index.ids.chunks:
                yield from chunk.to_pylist()

    def __getitem__(self, id: str) -> Image.Image:
        return self.decode(self.read_bytes(id))

    def decode(self, data: bytes) -> Image.Image:
        """An encoded picture as `store[id]` gives it; `OSError` if it cannot be decoded."""
        return decode_image(data, self._legacy_pictures, self._max_pixels)

    def read_bytes(self, id: str) -> bytes:
        """The encoded picture as it is stored; `KeyError` if there is none, `OSError` if what holds it is damaged."""
        place = self._place(id)
        if place is None:
            raise KeyError(id)
        number, row = place
        data = self._parts[number][0][row]
        if data is None:
            raise OSError("damaged base64")
        return data

    def rows(self, first: int, count: int) -> Iterator[tuple[str, bytes | None]]:
        """
        Ids and encoded pictures in the order of `iter(store)`, read as they lie, with None for what is damaged.

        Raises:
            OSError: with a number, if the disk fails.
        """
        for pictures, index in self._parts:
            start, end = min(first, len(index.ids)), min(first + count, len(index.ids))
            found = pictures.rows(start, end - start) if end > start else ()
            yield from zip(index.ids[start:end].to_pylist(), found, strict=True)
            first, count = first - start, count - (end - start)

    def medium(self, id: str) -> bytes | Path:
        """As `read_bytes`, but the path of a film that is a file of its own."""
        place = self._place(id)
        if place is not None and isinstance(self._parts[place[0]][0], _MediaFolder):
            path = self._parts[place[0]][0].path_of(place[1])
            return path if path.suffix.lower() in FILM_SUFFIXES else path.read_bytes()
        return self.read_bytes(id)

    def _refuse_conflicts(self):
        """Refuses an id with two different pictures; the same one may be there more than once."""
        if not self._parts or any(isinstance(pictures, _MediaFolder) for pictures, _ in self._parts):
            return  # names of files in a folder differ; the first part that has an id provides it
        hashes = np.concatenate([index.hashes for _, index in self._parts])
        numbers = np.repeat(np.arange(len(self._parts)), [len(index.hashes) for _, index in self._parts])
        rows = np.concatenate([index.rows for _, index in self._parts])
        # equal ids become neighbours, in their order in the files
        order = np.argsort(hashes, kind="stable")
        for later in order[1:][hashes[order[1:]] == hashes[order[:-1]]]:
            number, row = int(numbers[later]), int(rows[later])
            id = self._parts[number][1].ids[row].as_py()
            first_number, first_row = self._place(id)
            if (first_number, first_row) == (number, row):
                continue  # two ids of one checksum
            if self._parts[first_number][0][first_row] != self._parts[number][0][row]:
                raise ValueError(
                    f"Image id {id!r} stands for two different pictures, in {self._paths[first_number]} and "
                    f"{self._paths[number]}: rename or remove one."
                )

    def _place(self, id: str) -> tuple[int, int] | None:
        """The number of the first part that has an id, and its row there."""
        for number, (_, index) in enumerate(self._parts):
            row = index.find(id)
            if row >= 0:
                return number, row
        return None


def store_files(paths: Iterable[AnyPath], cache_dir: str | Path | None = None) -> Iterator[Path]:
    """The files of image stores, or their copies in the cache, those of a folder in their order; see `ImageStore`."""
    for path in (local_copy(path, cache_dir) for path in paths):
        if path.is_dir():
            parts = sorted(path.glob("*.parquet"), key=natural_order)
            if not parts and next(_media_in(path), None) is None:
                raise ValueError(f"The image store {path} is a folder without .parquet files, pictures or films.")
            yield from parts or [path]
        elif path.suffix not in SUFFIXES:
            raise ValueError(f"The image store {path} is of no known kind: use {', '.join(SUFFIXES)} or a folder.")
        elif not path.exists():
            raise FileNotFoundError(f"The image store {path} does not exist.")
        else:
            yield path


def _media_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in MEDIA_SUFFIXES)


class _MediaFolder:
    """The pictures and films of a folder by their names in it; index and pictures of a store in one."""

    def __init__(self, folder: Path):
        self.folder = folder
        names = sorted(path.relative_to(folder).as_posix() for path in _media_in(folder))
        self.ids = pa.chunked_array([pa.array(names, pa.string())])
        self._rows = {name: row for row, name in enumerate(names)}

    def find(self, id: str) -> int:
        return self._rows.get(id, -1)

    def path_of(self, row: int) -> Path:
        try:
            return path_inside(self.folder, self.ids[row].as_py())
        except ValueError as error:
            raise OSError(str(error)) from None

    def __getitem__(self, row: int) -> bytes:
        return self.path_of(row).read_bytes()

    def rows(self, first: int, count: int) -> Iterator[bytes | None]:
        for row in range(first, first + count):
            try:
                path = self.path_of(row)
            except OSError as error:
                logger.warning(f"{error}.")
                yield None
            else:
                yield path.read_bytes()


def natural_order(name: str | Path) -> list:
    """Sorting key of names, of a path its last, in which numbers count as numbers: `2.jpg` comes before `10.jpg`."""
    pieces = re.split(r"(\d+)", name if isinstance(name, str) else name.name)
    return [int(piece) if piece.isdigit() else piece for piece in pieces]


def _open_images(path: Path) -> pa.Table:
    refuse_lfs_pointer(path)
    try:
        table = open_arrow_file(path)
        if table.schema.names == PICTURE_SCHEMA.names and table.schema.types == PICTURE_SCHEMA.types:
            table["id"].validate(full=True)  # that it is UTF-8
            return table
    except pa.ArrowInvalid as error:
        raise ValueError(f"The image store {path} cannot be read as Arrow ({error}).") from None
    raise ValueError(f"The image store {path} must have the columns id (string) and image (binary).")


class _ArrowPictures:
    """Pictures by row of an Arrow file, or of the Arrow copy of a JSON file."""

    def __init__(self, path: Path, cache_dir: str | Path | None):
        self.id_file = path
        if path.suffix == ".json":
            self.id_file = cached_arrow_file(
                [path],
                "images",
                lambda: (PICTURE_SCHEMA, picture_batches(_json_rows(path))),
                cache_dir,
                num_bytes=path.stat().st_size * 3 // 4,
            )
        table = _open_images(self.id_file)
        self.ids, self._images = table["id"], table["image"]

    def __getitem__(self, row: int) -> bytes | None:
        return self._images[row].as_py()

    def rows(self, first: int, count: int) -> Iterator[bytes | None]:
        return (self[row] for row in range(first, first + count))


def _json_rows(path: Path) -> Iterator[tuple[str, bytes | None]]:
    for id, value in with_progress(iter_json_object(path), desc=f"Copying {path.name} to the cache", unit=" images"):
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        yield id, text_picture(value) if isinstance(value, str) else None
