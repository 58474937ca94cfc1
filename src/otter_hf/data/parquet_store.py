"""Pictures in parquet files, by row: read where they are, or copied page by page to the cache when they are used."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..reading import refuse_lfs_pointer
from .arrow_cache import cached_arrow_file, open_arrow_file
from .images import decode_base64
from .parquet_pages import INDEX_SCHEMA, Page, PagedColumn, PageIndex, UnsupportedLayout


ID_SCHEMA = pa.schema({"id": pa.string()})
_PICTURE_SCHEMA = pa.schema({"image": pa.binary()})
_BATCH_BYTES = 16 << 20
# up to this size, unpacking a page costs less than decoding the picture that is wanted from it
_DIRECT_BYTES = 256 << 10
_SEGMENT_BYTES = 32 << 20
# who reads more row groups than this gets the places of all pages from the cache
_SCANNED_GROUPS = 16
# without a buffer, a row group is read whole, and pandas writes files of one row group
_READ_BYTES = 4 << 20


class ParquetPictures:
    """Pictures of a parquet file by row; `ids` are their ids, kept in `id_file` of the cache.

    Opening reads the ids only. A picture in a small page is read from there; where all pages are is kept in the cache
    when pictures of many row groups are read. Larger pages are copied to Arrow files of the pictures' own bytes,
    `_SEGMENT_BYTES` at a time, when a second of their pictures is asked for.

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
        self._is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        self._column = PagedColumn(path, metadata, parquet_schema, leaf)
        self._page_index: PageIndex | None = None
        self._layouts: dict[int, tuple[np.ndarray, list[list[Page]]]] = {}
        self._segments: dict[int, pa.ChunkedArray] = {}
        self._asked: set[int] = set()

    def __getitem__(self, row: int) -> bytes | None:
        """The picture's bytes, None if there are none; `OSError` if the file is damaged there."""
        try:
            page = self._indexed_page(row)
            if page is not None and page.cost <= _DIRECT_BYTES:
                return self._read_one([page], row)
            group = self._column.row_group_of(row)
            if group not in self._layouts:
                self._layouts[group] = self._segment_layout(group)
            starts, segments = self._layouts[group]
            number = int(starts.searchsorted(row, side="right")) - 1
            start, pages = int(starts[number]), segments[number]
            small = len(pages) == 1 and pages[0].cost <= _DIRECT_BYTES
            if small or (pages and start not in self._asked):
                # a first batch should not wait for copies of all the places that it touches
                self._asked.add(start)
                return self._read_one(pages, row)
            if start not in self._segments:
                self._segments[start] = self._copy_segment(group, start, pages)
            return self._segments[start][row - start].as_py()
        except (ValueError, IndexError, pa.ArrowException) as error:
            raise OSError(f"damaged file {self._path}: {error}") from None

    def _indexed_page(self, row: int) -> Page | None:
        if self._page_index is None:
            if len(self._layouts) < _SCANNED_GROUPS:
                return None
            index = cached_arrow_file(
                [self._path], "pages", lambda: (INDEX_SCHEMA, [self._column.index()]), self._cache_dir
            )
            self._page_index = PageIndex(open_arrow_file(index))
        return self._page_index.find(row)

    def _segment_layout(self, group: int) -> tuple[np.ndarray, list[list[Page]]]:
        """First rows of the segments of a row group, and their pages; none for what pyarrow has to read."""
        try:
            pages = self._column.pages(group)
        except UnsupportedLayout:
            return np.array([self._column.row_group_rows(group)[0]]), [[]]
        segments, cost = [], _SEGMENT_BYTES
        for page in pages:
            # a page to be read where it is stays alone
            page_cost = page.cost
            if cost >= _SEGMENT_BYTES or page_cost <= _DIRECT_BYTES:
                segments.append([])
                cost = 0
            segments[-1].append(page)
            cost += page_cost if page_cost > _DIRECT_BYTES else _SEGMENT_BYTES
        return np.array([segment[0].first_row for segment in segments]), segments

    def _copy_segment(self, group: int, start: int, pages: list[Page]) -> pa.ChunkedArray:
        pictures = self._read_pages(pages) if pages else self._read_row_group(group)
        path = cached_arrow_file(
            [self._path], "images", lambda: (_PICTURE_SCHEMA, _picture_batches(pictures)), self._cache_dir, row=start
        )
        return open_arrow_file(path)["image"]

    def _read_one(self, pages: list[Page], row: int) -> bytes | None:
        page = next(page for page in pages if row < page.first_row + page.num_rows)
        value = next(islice(self._column.values(page), row - page.first_row, None))
        return text_picture(value) if self._is_text and value is not None else value

    def _read_pages(self, pages: list[Page]) -> Iterator[bytes | None]:
        for page in pages:
            for value in self._column.values(page):
                yield text_picture(value) if self._is_text and value is not None else value

    def _read_row_group(self, group: int) -> Iterator[bytes | None]:
        options = {"row_groups": [group], "columns": [self._picture_column], "use_threads": False}
        # opened again, because other threads may be reading
        with pq.ParquetFile(self._path, buffer_size=_READ_BYTES, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=64, **options):
                for value in batch.column(0).to_pylist():
                    value = value.get("bytes") if isinstance(value, dict) else value
                    yield text_picture(value) if isinstance(value, str) else value

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


def picture_batches(pictures: Iterable[tuple], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Batches of at most about 16 MB of rows whose last value is a picture or None."""
    rows, size = [], 0
    for row in pictures:
        rows.append(row)
        size += len(row[-1] or b"")
        if size > _BATCH_BYTES:
            yield pa.RecordBatch.from_arrays(list(map(list, zip(*rows, strict=True))), schema=schema)
            rows, size = [], 0
    if rows:
        yield pa.RecordBatch.from_arrays(list(map(list, zip(*rows, strict=True))), schema=schema)


def _picture_batches(pictures: Iterable[bytes | None]) -> Iterator[pa.RecordBatch]:
    return picture_batches(((picture,) for picture in pictures), _PICTURE_SCHEMA)


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
