"""Random access to one binary column of a parquet file, page by page.

A parquet column is a chain of pages, each compressed on its own: https://parquet.apache.org/docs/file-format/. pyarrow
reads no less than a row group from its beginning, and pandas writes up to a million rows as one, of gigabytes; its
pages are of 1024 rows. Only pages as pandas and `write_images` make them are read here: version 1, plain encoding. All
others are left to pyarrow.
"""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


_HEADER_BYTES = 256
_LARGEST_HEADER = 1 << 20
_LARGEST_READ = 1 << 20
_DEEPEST = 12
_LARGEST_PAGE = (1 << 31) - 1
_MOST_BYTES = 1 << 50
# what reading thrift that is damaged may end in
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, OSError)
_DATA_PAGE, _DICTIONARY_PAGE, _PLAIN = 0, 2, 0
# by their numbers in the format; "LZ4" stands for two different ones
_CODECS = {0: "uncompressed", 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd"}


class Page(NamedTuple):
    """`num_rows` rows from `first_row` of the file: where they lie, and their bytes unpacked.

    Rows that are left to pyarrow are one page of -1 `stored_bytes`, whose `plain_bytes` are all from the beginning of
    the row group: pyarrow unpacks them before.
    """

    first_row: int
    num_rows: int
    offset: int
    stored_bytes: int
    plain_bytes: int

    @property
    def is_plain(self) -> bool:
        return self.stored_bytes >= 0


class _Chunk(NamedTuple):
    """What the footer tells of the column in a row group; `codec` is None where it tells nothing of use."""

    start: int
    codec: str | None
    plain_bytes: int


PAGE_SCHEMA = pa.schema([(name, pa.int64()) for name in Page._fields])


class PlainPages:
    """The pages of a flat column of text or bytes; needs no more memory than one takes.

    Args:
        path: a parquet file.
        metadata: its metadata.
        schema: its parquet schema.
        column: path of the column's leaf, such as `base64` or `image.bytes`.
    """

    def __init__(self, path: str | Path, metadata: pq.FileMetaData, schema: pq.ParquetSchema, column: str):
        self.path = path
        # one for all reads and all forked processes, which read at places of their own
        self._file = open(path, "rb", buffering=0)
        self._number = [schema.column(number).path for number in range(len(schema.names))].index(column)
        leaf = schema.column(self._number)
        self._is_flat = leaf.physical_type == "BYTE_ARRAY" and not leaf.max_repetition_level
        self._level = leaf.max_definition_level
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *(group.num_rows for group in groups)])  # (G + 1,), the last the end
        self._group_bytes = [min(max(group.total_byte_size, 0), _MOST_BYTES) for group in groups]
        # columns of `Page` by row group
        self._groups: dict[int, np.ndarray] = {}

    @cached_property
    def _chunks(self) -> list[_Chunk]:
        """
        By row group. Not with pyarrow's `RowGroupMetaData.column`, which looks into the statistics, too, and ends the
        process where they are damaged.
        """
        read: list[dict] = []
        # of damage, which may reach farther than it shows, pyarrow tells when it reads the row group
        with contextlib.suppress(*_DAMAGE):
            read = _read_footer(self._file)[4]
        chunks = []
        for number, group_bytes in enumerate(self._group_bytes):
            chunk = _Chunk(0, None, group_bytes)
            with contextlib.suppress(*_DAMAGE):
                column = read[number][1][self._number][3]
                if 0 <= column[6] <= _MOST_BYTES:
                    chunk = _Chunk(column.get(11) or column[9], _CODECS.get(column[4]), column[6])
            chunks.append(chunk)
        return chunks

    @cached_property
    def plain_bytes(self) -> int:
        """How many bytes the column has when it is unpacked."""
        return sum(chunk.plain_bytes for chunk in self._chunks)

    @property
    def _codec(self) -> str | None:
        return self._chunks[0].codec

    @property
    def num_groups(self) -> int:
        """Row groups of the file."""
        return len(self._starts) - 1

    @property
    def num_scanned(self) -> int:
        """How many row groups have been looked into."""
        return len(self._groups)

    def group_of(self, row: int) -> tuple[int, int]:
        """The row group that holds a row of the file, and its first row."""
        group = int(self._starts.searchsorted(row, side="right")) - 1
        return group, int(self._starts[group])

    def find(self, row: int, columns: Sequence[np.ndarray] | None = None) -> Page:
        """The page that holds a row of the file, by the columns of `Page` of all row groups where they are given."""
        if columns is None:
            group, _ = self.group_of(row)
            if group not in self._groups:
                self._groups[group] = np.array(self.pages(group), np.int64).T  # (5, P)
            columns = self._groups[group]
        number = int(columns[0].searchsorted(row, side="right")) - 1
        return Page(*(int(column[number]) for column in columns))

    def batch(self) -> pa.RecordBatch:
        """All pages: reading their headers takes long compared with reading a small one, so it is worth to keep."""
        pages = [page for group in range(self.num_groups) for page in self.pages(group)]
        columns = np.array(pages, np.int64).reshape(-1, len(PAGE_SCHEMA)).T
        return pa.RecordBatch.from_arrays([pa.array(column) for column in columns], schema=PAGE_SCHEMA)

    def pages(self, group: int) -> list[Page]:
        """The pages of a row group, found by reading their headers only."""
        start_row, end_row = map(int, self._starts[group : group + 2])
        chunk = self._chunks[group]
        plain: list[Page] = []
        if self._is_flat and chunk.codec is not None and chunk.codec == self._codec:
            with contextlib.suppress(*_DAMAGE):
                plain = list(self._plain_pages(start_row, end_row, chunk.start))
        pages, row = [], start_row
        for page in (*plain, Page(end_row, 0, 0, 0, 0)):
            if page.first_row > row:
                share = (page.first_row - start_row) / (end_row - start_row)
                unpacked_bytes = int(chunk.plain_bytes * share)
                pages.append(Page(row, page.first_row - row, 0, -1, unpacked_bytes))
            pages.append(page)
            row = page.first_row + page.num_rows
        return pages[:-1]

    def _plain_pages(self, row: int, end_row: int, start: int) -> Iterator[Page]:
        while row < end_row:
            header, size = _read_header(self._file, start)
            kind, plain_bytes, stored_bytes = header[1], header[2], header[3]
            start += size
            num_rows, encoding = (header[5][1], header[5][2]) if kind == _DATA_PAGE else (0, None)
            sizes = (num_rows, plain_bytes, stored_bytes)
            if min(sizes) < 0 or max(sizes) > _LARGEST_PAGE or row + num_rows > end_row:
                raise ValueError("damaged page header")
            if kind == _DATA_PAGE:
                if encoding == _PLAIN:
                    yield Page(row, num_rows, start, stored_bytes, plain_bytes)
                row += num_rows
            elif kind != _DICTIONARY_PAGE:
                return
            start += stored_bytes

    def values(self, page: Page) -> Iterator[bytes | None]:
        """Yields the values of a plain page one by one; `ValueError` if it is damaged, `OSError` if the disk is."""
        try:
            data, present = self._unpacked(page), [True] * page.num_rows
            if self._level:
                end = 4 + int.from_bytes(data[:4], "little")
                present, data = _present(data[4:end], page.num_rows, self._level), data[end:]
            position = 0
            for is_there in present:
                if not is_there:
                    yield None
                    continue
                start = position + 4
                position = start + int.from_bytes(data[start - 4 : start], "little")
                if position > len(data):
                    raise IndexError("a value goes on behind it")
                yield bytes(data[start:position])
        except (pa.ArrowException, OSError, IndexError) as error:
            if is_of_disk(error):
                raise
            raise ValueError(f"damaged page at byte {page.offset}: {error}") from None

    def _unpacked(self, page: Page) -> memoryview:
        if page.stored_bytes <= _LARGEST_READ:
            stored = memoryview(_read_at(self._file, page.stored_bytes, page.offset))
        else:
            # mapped, because reading dozens of megabytes into new memory takes longer than unpacking them
            with pa.memory_map(str(self.path)) as file:
                file.seek(page.offset)
                stored = memoryview(file.read_buffer(page.stored_bytes)).cast("B")
        if len(stored) != page.stored_bytes:
            raise OSError("the file ends in it")
        if self._codec == "uncompressed":
            return stored
        # Arrow's buffers are views of signed bytes
        return memoryview(pa.decompress(stored, page.plain_bytes, codec=self._codec)).cast("B")


def is_of_disk(error: BaseException) -> bool:
    """Whether an error has a number of the operating system, and so says nothing of what is in the file."""
    # a place that cannot be, of which damaged headers tell, is invalid
    return getattr(error, "errno", None) not in (None, errno.EINVAL)


def _read_at(file: FileIO, size: int, offset: int) -> bytes:
    """Bytes of a place, whoever else is reading."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, offset)
    with open(file.name, "rb", buffering=0) as own:  # on Windows
        own.seek(offset)
        return own.read(size)


def _present(data: memoryview, count: int, highest: int) -> list[bool]:
    """Which values are there: those of the highest definition level, in the mix of runs and packed bits."""
    levels: list[bool] = []
    position, width = 0, highest.bit_length()
    while len(levels) < count:
        header, position = _varint(data, position)
        if header & 1:
            size = (header >> 1) * width
            bits = np.unpackbits(np.frombuffer(data[position : position + size], np.uint8), bitorder="little")
            levels += (bits.reshape(-1, width) @ (1 << np.arange(width)) == highest).tolist()
            position += size
        else:
            levels += [data[position] == highest] * min(header >> 1, count - len(levels))
            position += 1
        if position > len(data):
            raise IndexError("its levels go on behind it")
    return levels[:count]


# Footers and page headers are structs in the compact protocol of Apache Thrift,
# https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md


def _read_footer(file: FileIO) -> dict:
    """Field number -> value of the file's metadata."""
    end = file.seek(0, 2) - 8
    size = int.from_bytes(_read_at(file, 4, end), "little")
    return _struct(_read_at(file, size, end - size), 0)[0]


def _read_header(file: FileIO, offset: int) -> tuple[dict, int]:
    """Field number -> value of the header there, and its size."""
    size = _HEADER_BYTES
    while True:
        data = _read_at(file, size, offset)
        try:
            return _struct(data, 0)
        except IndexError:
            if len(data) < size or size > _LARGEST_HEADER:
                raise ValueError("damaged page header") from None
        size *= 4


def _struct(data: bytes, position: int, depth: int = 0) -> tuple[dict, int]:
    """The values of fields by their numbers, as `_value`, and the end."""
    fields, number = {}, 0
    while data[position]:
        kind, step = data[position] & 15, data[position] >> 4
        position += 1
        if step:
            number += step
        else:
            number, position = _integer(data, position)
        # a truth value is in its kind
        if kind > 2:
            fields[number], position = _value(data, position, kind, depth)
    return fields, position + 1


def _value(data: bytes, position: int, kind: int, depth: int) -> tuple[int | dict | list | None, int]:
    """An integer, a struct or a list, and its end; truth values, doubles and bytes are passed, and are None."""
    if 4 <= kind <= 6:
        return _integer(data, position)
    if kind == 8:
        size, position = _varint(data, position)
        return None, position + size
    if kind == 12 and depth < _DEEPEST:
        return _struct(data, position, depth + 1)
    if kind == 9 and depth < _DEEPEST:
        size, kind = data[position] >> 4, data[position] & 15
        position += 1
        if size == 15:
            size, position = _varint(data, position)
        values = []
        for _ in range(size):
            value, position = _value(data, position, kind, depth + 1)
            values.append(value)
        return values, position
    if kind in (1, 2, 3, 7):
        return None, position + (8 if kind == 7 else 1)
    raise ValueError("damaged header")


def _integer(data: bytes, position: int) -> tuple[int, int]:
    value, position = _varint(data, position)
    return (value >> 1) ^ -(value & 1), position


def _varint(data: bytes | memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while data[position] > 127 and shift < 63:
        value |= (data[position] & 127) << shift
        shift += 7
        position += 1
    return value | data[position] << shift, position + 1
