"""Pictures in parquet files, by row: read where they are, or from an Arrow copy of the whole file in the cache."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers.utils import logging

from ..progress import with_progress
from ..reading import refuse_lfs_pointer
from .arrow_cache import cached_arrow_file, cached_arrow_path, open_arrow_file
from .images import decode_base64
from .parquet_pages import PAGE_SCHEMA, Page, PlainPages, is_of_disk


logger = logging.get_logger(__name__)

ID_SCHEMA = pa.schema({"id": pa.string()})
PICTURE_SCHEMA = pa.schema({"id": pa.string(), "image": pa.binary()})
_BATCH_BYTES = 16 << 20
# up to this size, unpacking a page costs less than decoding the picture that is wanted from it
_DIRECT_BYTES = 256 << 10
# who reads more row groups than this gets the places of all pages from the cache
_SCANNED_GROUPS = 16
# without a buffer, a row group is read whole, and pandas writes files of one row group
_READ_BYTES = 4 << 20


class ParquetPictures:
    """Pictures of a parquet file by row; `ids` are their ids, kept in `id_file` of the cache.

    Opening reads the ids only. A picture in a small page is read from there; where all pages are is kept in the cache
    when pictures of many row groups are read. A picture in a larger page is, too, until so much has been unpacked for
    nothing that a copy would have been cheaper: then the file is copied to the cache, as Arrow, once.

    Args:
        path: the parquet file, see `ImageStore` for its columns.
        cache_dir: see `cached_arrow_file`.

    Raises:
        ValueError: if it is not parquet, or lacks an id or picture column.
    """

    def __init__(self, path: Path, cache_dir: str | Path | None):
        self._path, self._cache_dir = path, cache_dir
        refuse_lfs_pointer(path)
        try:
            with pq.ParquetFile(path) as file:
                metadata, parquet_schema, schema = file.metadata, file.schema, file.schema_arrow
                id_column, self._picture_column = _columns(path, schema)
                _check_types(path, schema, id_column, self._picture_column)
                self.id_file = cached_arrow_file(
                    [path], "ids", lambda: (ID_SCHEMA, self._id_batches(file, id_column)), cache_dir
                )
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"The image store {path} cannot be read as parquet ({error}).") from None
        self.ids = open_arrow_file(self.id_file)["id"]
        kind = schema.field(self._picture_column).type
        # the image feature of the datasets library has its bytes in a struct
        leaf = f"{self._picture_column}.bytes" if pa.types.is_struct(kind) else self._picture_column
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        self._is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        self._pages = PlainPages(path, metadata, parquet_schema, leaf)
        self._page_columns: list[np.ndarray] | None = None
        copy = cached_arrow_path([path], "images", cache_dir)
        self._copy: pa.ChunkedArray | None = open_arrow_file(copy)["image"] if copy.exists() else None
        self._unpacked_bytes = 0

    def __getitem__(self, row: int) -> bytes | None:
        """The picture's bytes, None if there are none; `OSError` if the file is damaged there."""
        if self._copy is None:
            page = self._page_of(row)
            small = page.is_plain and page.plain_bytes <= _DIRECT_BYTES
            # a first batch should not wait for a copy of all that is not in it
            if small or not self._is_worth_a_copy(page):
                for picture in islice(self._read(page), row - page.first_row, None):
                    return picture
                raise OSError(f"damaged file {self._path}: it ends before row {row}")
        return self._copy[row].as_py()

    def __iter__(self) -> Iterator[bytes | None]:
        """All pictures in the order of the file, see `rows`."""
        return self.rows(0, len(self.ids))

    def rows(self, first: int, count: int) -> Iterator[bytes | None]:
        """Pictures in the order of the file, None for those that are damaged, each page unpacked once.

        `OSError` if the disk fails.
        """
        last = first + count
        for group in range(self._pages.group_of(first)[0], self._pages.group_of(last - 1)[0] + 1) if count else ():
            for page in self._pages.pages(group):
                start, end = max(first, page.first_row), min(last, page.first_row + page.num_rows)
                left = end - start
                if left <= 0:
                    continue
                # pyarrow unpacks what comes before in its row group, too
                if start > page.first_row and not page.is_plain and self._is_worth_a_copy(page):
                    yield from (self._copy[row].as_py() for row in range(start, end))
                    continue
                try:
                    for picture in islice(self._read(page), start - page.first_row, end - page.first_row):
                        yield picture
                        left -= 1
                except OSError as error:
                    if is_of_disk(error):
                        raise
                    logger.warning(f"{left} pictures cannot be read, {error}.")
                yield from [None] * left

    def _page_of(self, row: int) -> Page:
        if self._page_columns is None and self._pages.num_scanned >= _SCANNED_GROUPS:
            path = cached_arrow_file(
                [self._path], "pages", lambda: (PAGE_SCHEMA, [self._pages.batch()]), self._cache_dir
            )
            # made as one batch, so these are views of the memory map
            self._page_columns = [column.chunk(0).to_numpy() for column in open_arrow_file(path).columns]
        return self._pages.find(row, self._page_columns)

    def _is_worth_a_copy(self, page: Page) -> bool:
        """Counts what reading this page unpacks; makes the copy when that is more than all of the file."""
        self._unpacked_bytes += page.plain_bytes
        if self._unpacked_bytes <= self._pages.plain_bytes:
            return False
        size = self._pages.plain_bytes * (3 if self._is_text else 4) // 4
        try:
            copy = cached_arrow_file([self._path], "images", self._copied, self._cache_dir, num_bytes=size)
        except OSError as error:  # no room, or a disk that fails, which a copy would keep as damaged pictures
            logger.warning(f"{error}. {self._path} is read without a copy in the cache, which takes longer.")
            self._unpacked_bytes = -(1 << 62)
            return False
        self._copy = open_arrow_file(copy)["image"]
        return True

    def _copied(self) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        ids = (id for chunk in self.ids.chunks for id in chunk.to_pylist())
        bar = with_progress(self, desc=f"Copying {self._path.name}", unit=" images", total=len(self.ids))
        return PICTURE_SCHEMA, picture_batches(zip(ids, bar, strict=True))

    def _read(self, page: Page) -> Iterator[bytes | None]:
        """The pictures of a page; `OSError` if it is damaged, with a number if the disk is."""
        try:
            for value in self._pages.values(page) if page.is_plain else self._read_with_pyarrow(page):
                yield text_picture(value) if self._is_text and value is not None else value
        except (ValueError, pa.ArrowException, OSError) as error:
            if is_of_disk(error):
                raise
            raise OSError(f"damaged file {self._path}: {error}") from None

    def _read_with_pyarrow(self, page: Page) -> Iterator[str | bytes | None]:
        group, first_row = self._pages.group_of(page.first_row)
        start = page.first_row - first_row

        def values() -> Iterator[str | bytes | None]:
            # opened again, because other threads may be reading
            with pq.ParquetFile(self._path, buffer_size=_READ_BYTES, pre_buffer=False) as file:
                options = {"row_groups": [group], "columns": [self._picture_column], "use_threads": False}
                for batch in file.iter_batches(batch_size=64, **options):
                    for value in batch.column(0).to_pylist():
                        yield value.get("bytes") if isinstance(value, dict) else value

        return islice(values(), start, start + page.num_rows)

    def _id_batches(self, file: pq.ParquetFile, id_column: str) -> Iterator[pa.RecordBatch]:
        for batch in file.iter_batches(batch_size=1 << 16, columns=[id_column], use_threads=False):
            if batch.column(0).null_count:
                raise ValueError(f"The image store {self._path} has a row without an id.")
            ids = batch.column(0).cast(pa.string())
            ids.validate(full=True)  # that they are UTF-8
            yield pa.RecordBatch.from_arrays([ids], schema=ID_SCHEMA)


def text_picture(text: str | bytes) -> bytes | None:
    """Decodes base64; None, which is reported when the picture is used, if it is damaged."""
    try:
        return decode_base64(text if isinstance(text, str) else text.decode())
    except ValueError:
        return None


def picture_batches(pictures: Iterable[tuple[str, bytes | None]]) -> Iterator[pa.RecordBatch]:
    """Batches of at most about 16 MB of `PICTURE_SCHEMA`."""
    rows, size = [], 0
    for row in pictures:
        rows.append(row)
        size += len(row[-1] or b"")
        if size > _BATCH_BYTES:
            yield pa.RecordBatch.from_arrays(list(map(list, zip(*rows, strict=True))), schema=PICTURE_SCHEMA)
            rows, size = [], 0
    if rows:
        yield pa.RecordBatch.from_arrays(list(map(list, zip(*rows, strict=True))), schema=PICTURE_SCHEMA)


def _columns(path: Path, schema: pa.Schema) -> tuple[str, str]:
    """Names of the id and the picture column."""
    try:
        pandas = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
        indices = [name for name in pandas.get("index_columns", []) if isinstance(name, str)]
    except (ValueError, AttributeError, TypeError):
        indices = []  # the literal names are known
    id_names = [*indices, "__index_level_0__", "__null_dask_index__", "id", "image_id"]
    id_column = next((name for name in id_names if name in schema.names), None)
    picture_column = next((name for name in ("base64", "image") if name in schema.names), None)
    if id_column is None or picture_column is None:
        raise ValueError(
            f"The image store {path} has the columns {', '.join(schema.names)}: it needs the image ids as "
            "pandas index or column id, and the pictures as column base64 or image."
        )
    return id_column, picture_column


def _check_types(path: Path, schema: pa.Schema, id_column: str, picture_column: str) -> None:
    """Raise ValueError for columns that hold something else than ids and pictures."""
    kind = schema.field(id_column).type
    if not (_is_text_or_bytes(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise ValueError(f"The image store {path} has ids of type {kind} in its column {id_column}: make them texts.")
    kind = schema.field(picture_column).type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (_is_text_or_bytes(kind) or pa.types.is_null(kind)):
        raise ValueError(
            f"The image store {path} has pictures of type {kind} in its column {picture_column}: it must hold bytes, "
            "base64 text, or the Image feature of datasets."
        )


def _is_text_or_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(kind) for test in (*tests, pa.types.is_fixed_size_binary))
