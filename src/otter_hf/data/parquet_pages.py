"""Random access to one binary column of a parquet file, page by page.

A parquet column is a chain of pages, each compressed on its own: https://parquet.apache.org/docs/file-format/. pyarrow
reads no less than a row group, and pandas writes up to a million rows as one, of gigabytes; its pages are of 1024 rows
at most.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


_HEADER_BYTES = 256
_LARGEST_HEADER = 1 << 20
_LARGEST_READ = 1 << 20
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
# "LZ4" stands for two different formats
_CODECS = ("uncompressed", "snappy", "gzip", "zstd", "brotli")
_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY = 0, 2, 8


class Page(NamedTuple):
    """A data page: `num_rows` rows from `first_row` of the file; the rest is where and how they are stored."""

    first_row: int
    num_rows: int
    offset: int
    stored_bytes: int
    plain_bytes: int
    codec: str
    dictionary: tuple["Page"] | None
    # bytes of the definition levels, which a page of version 2 holds uncompressed in front; None in version 1
    level_bytes: int | None
    is_compressed: bool = True

    @property
    def cost(self) -> int:
        """Bytes to unpack for one of its values."""
        return self.plain_bytes + (self.dictionary[0].plain_bytes if self.dictionary else 0)


INDEX_SCHEMA = pa.schema({"first_row": pa.int64(), "page": pa.list_(pa.int64(), 7)})


class PageIndex:
    """Finds the page of a row, memory-mapped: a large store has too many pages to keep an object for each.

    Args:
        table: of `INDEX_SCHEMA`, as `PagedColumn.index` makes it.
    """

    def __init__(self, table: pa.Table):
        # it is made as one batch, so these are views of the memory map
        first_rows, pages = (column.chunk(0) for column in table.columns)
        self._first_rows = first_rows.to_numpy()  # (P,) int64
        self._pages = pages.flatten().to_numpy().reshape(-1, 7)  # (P, 7) int64

    def find(self, row: int) -> Page | None:
        """The page that holds a row of the file; None if it is in a row group that the index leaves out."""
        number = int(self._first_rows.searchsorted(row, side="right")) - 1
        if number < 0:
            return None
        num_rows, offset, stored, plain, codec, levels, compressed = self._pages[number].tolist()
        first_row = int(self._first_rows[number])
        if row >= first_row + num_rows:
            return None
        level_bytes = None if levels < 0 else levels
        return Page(first_row, num_rows, offset, stored, plain, _CODECS[codec], None, level_bytes, bool(compressed))


class PagedColumn:
    """A flat column of text or bytes, read one page at a time; needs no more memory than a page takes.

    Args:
        path: a parquet file.
        metadata: its metadata.
        schema: its parquet schema.
        column: path of the column's leaf, such as `base64` or `image.bytes`.
    """

    def __init__(self, path: str | Path, metadata: pq.FileMetaData, schema: pq.ParquetSchema, column: str):
        self.path = path
        self._metadata = metadata
        # one for all reads and all forked processes, which read at places of their own
        self._file = open(path, "rb", buffering=0)
        names = [schema.column(number).path for number in range(len(schema.names))]
        self._number = names.index(column) if column in names else None
        self._leaf = None if self._number is None else schema.column(self._number)
        self._ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])

    def row_group_rows(self, group: int) -> tuple[int, int]:
        """First row of a row group and the row behind its last."""
        return int(self._ends[group - 1]) if group else 0, int(self._ends[group])

    def row_group_of(self, row: int) -> int:
        """The row group that holds a row of the file."""
        return int(np.searchsorted(self._ends, row, side="right"))

    def pages(self, group: int) -> list[Page]:
        """The data pages of a row group, found by reading their headers only.

        Raises:
            UnsupportedLayout: if a page is stored in a way that `values` cannot read.
            ValueError: if the file is damaged.
        """
        if self._leaf is None or self._leaf.physical_type != "BYTE_ARRAY" or self._leaf.max_repetition_level:
            raise UnsupportedLayout("not a flat column of text or bytes")
        chunk = self._metadata.row_group(group).column(self._number)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        end = start + chunk.total_compressed_size
        codec = chunk.compression.lower()
        if codec not in _CODECS:
            raise UnsupportedLayout(f"compression {codec}")
        row, last_row = self.row_group_rows(group)
        pages, dictionary = [], None
        while row < last_row:
            if start >= end:
                raise ValueError("pages hold fewer rows than the file says")
            header, header_bytes = _read_header(self._file.fileno(), start)
            kind, plain_bytes, stored_bytes = (header.get(field) for field in (1, 2, 3))
            if not all(isinstance(size, int) and size >= 0 for size in (kind, plain_bytes, stored_bytes)):
                raise ValueError("damaged page header")
            common = (start + header_bytes, stored_bytes, plain_bytes, codec)
            start += header_bytes + stored_bytes
            if kind == _DICTIONARY_PAGE:
                dictionary = (Page(0, _count(header, 7, 1), *common, None, None),)
            elif kind == _DATA_PAGE:
                num_rows, encoding = _count(header, 5, 1), _count(header, 5, 2)
                pages.append(Page(row, num_rows, *common, _dictionary(encoding, dictionary), None))
                row += num_rows
            elif kind == _DATA_PAGE_V2:
                num_rows, encoding = _count(header, 8, 1), _count(header, 8, 4)
                compressed = header[8].get(7, True)
                page = Page(row, num_rows, *common, _dictionary(encoding, dictionary), _count(header, 8, 5))
                pages.append(page._replace(is_compressed=bool(compressed)))
                row += num_rows
        if row != last_row:
            raise ValueError("pages hold more rows than the file says")
        return pages

    def index(self) -> pa.RecordBatch:
        """What `PageIndex` finds pages in: of all row groups but those with dictionaries or damage.

        Reading headers takes long compared with reading a small page, so it is worth to keep this.
        """
        groups = [np.empty((0, 8), np.int64)]
        for group in range(self._metadata.num_row_groups):
            try:
                pages = self.pages(group)
            except (UnsupportedLayout, ValueError, OSError):
                continue
            if not any(page.dictionary for page in pages):
                groups.append(np.array([_numbers(page) for page in pages], np.int64).reshape(-1, 8))
        table = np.concatenate(groups)  # (P, 8)
        pages = pa.FixedSizeListArray.from_arrays(table[:, 1:].ravel(), type=INDEX_SCHEMA.field("page").type)
        return pa.RecordBatch.from_arrays([pa.array(table[:, 0]), pages], schema=INDEX_SCHEMA)

    def values(self, page: Page) -> Iterator[bytes | None]:
        """Yields the values of a page one by one; `ValueError` if it is damaged."""
        try:
            yield from self._values(page)
        except (pa.ArrowException, OSError, IndexError, TypeError, OverflowError) as error:
            raise ValueError(f"damaged page at byte {page.offset}: {error}") from None

    def _values(self, page: Page) -> Iterator[bytes | None]:
        levels, data = self._payload(page)
        is_there = [level == self._leaf.max_definition_level for level in levels]
        count = sum(is_there)
        if page.dictionary is None:
            values = _plain(data, count)
        else:
            (dictionary_page,) = page.dictionary
            dictionary = list(_plain(self._payload(dictionary_page, has_levels=False)[1], dictionary_page.num_rows))
            values = (dictionary[index] for index in _hybrid(data[1:], count, data[0]))
        for there in is_there:
            yield next(values) if there else None

    def _payload(self, page: Page, has_levels: bool = True) -> tuple[list[int], memoryview]:
        """Definition levels, the highest for values that are there, and the encoded values of a page."""
        if page.stored_bytes <= _LARGEST_READ:
            stored = memoryview(os.pread(self._file.fileno(), page.stored_bytes, page.offset))
        else:
            # mapped, because reading dozens of megabytes into new memory takes longer than unpacking them
            with pa.memory_map(str(self.path)) as file:
                file.seek(page.offset)
                stored = memoryview(file.read_buffer(page.stored_bytes)).cast("B")
        if len(stored) != page.stored_bytes:
            raise ValueError(f"the file ends inside the page at byte {page.offset}")
        levels = [self._leaf.max_definition_level] * page.num_rows
        bit_width = self._leaf.max_definition_level.bit_length()
        in_front = page.level_bytes or 0
        if page.level_bytes is not None and bit_width:
            levels = _hybrid(stored[:in_front], page.num_rows, bit_width)
        data = stored[in_front:]
        if page.codec != "uncompressed" and page.is_compressed:
            # Arrow's buffers are views of signed bytes
            data = memoryview(pa.decompress(data, page.plain_bytes - in_front, codec=page.codec)).cast("B")
        if has_levels and page.level_bytes is None and bit_width:
            length = int.from_bytes(data[:4], "little")
            levels = _hybrid(data[4 : 4 + length], page.num_rows, bit_width)
            data = data[4 + length :]
        return levels, data


class UnsupportedLayout(Exception):
    """A column that is stored in a way which only pyarrow reads."""


def _dictionary(encoding: int, dictionary: tuple[Page] | None) -> tuple[Page] | None:
    if encoding == _PLAIN:
        return None
    if encoding in (_RLE_DICTIONARY, _PLAIN_DICTIONARY) and dictionary is not None:
        return dictionary
    raise UnsupportedLayout(f"encoding {encoding}")


def _numbers(page: Page) -> tuple[int, ...]:
    """A page without dictionary as the index has it."""
    levels = -1 if page.level_bytes is None else page.level_bytes
    codec = _CODECS.index(page.codec)
    return *page[:2], page.offset, page.stored_bytes, page.plain_bytes, codec, levels, page.is_compressed


def _count(header: dict, field: int, key: int) -> int:
    value = header[field].get(key) if isinstance(header.get(field), dict) else None
    if not isinstance(value, int) or value < 0:
        raise ValueError("damaged page header")
    return value


def _plain(data: memoryview, count: int) -> Iterator[bytes]:
    """Byte arrays with their lengths in front, as PLAIN stores them."""
    position = 0
    for _ in range(count):
        start = position + 4
        position = start + int.from_bytes(data[start - 4 : start], "little")
        if position > len(data):
            raise ValueError("a value goes on behind its page")
        yield bytes(data[start:position])


def _hybrid(data: memoryview, count: int, bit_width: int) -> list[int]:
    """Decodes `count` integers of parquet's mix of run-length encoding and bit packing."""
    # in a page of one picture this is a single run, so numpy would only cost
    numbers, position = [0] * count if not bit_width else [], 0
    value_bytes = (bit_width + 7) // 8
    while len(numbers) < count:
        header, position = _varint(data, position)
        if header & 1:
            size = (header >> 1) * bit_width
            if position + size > len(data):
                raise ValueError("packed numbers go on behind their page")
            bits = np.unpackbits(np.frombuffer(data[position : position + size], np.uint8), bitorder="little")
            numbers += (bits.reshape(-1, bit_width).astype(np.int64) @ (1 << np.arange(bit_width))).tolist()
            position += size
        else:
            value = int.from_bytes(data[position : position + value_bytes], "little")
            numbers += [value] * min(header >> 1, count - len(numbers))
            position += value_bytes
    return numbers[:count]


# Page headers are structs in the compact protocol of Apache Thrift:
# https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md


def _read_header(file: int, offset: int) -> tuple[dict, int]:
    size = _HEADER_BYTES
    while True:
        data = os.pread(file, size, offset)
        try:
            return _struct(data, 0)
        except IndexError:
            if len(data) < size or size > _LARGEST_HEADER:
                raise ValueError("damaged page header") from None
        size *= 4


def _struct(data: bytes, position: int, depth: int = 0) -> tuple[dict, int]:
    """Field number -> value of a struct: integers, truth values and structs; others are passed over."""
    if depth > 8:
        raise ValueError("damaged page header")
    fields, number = {}, 0
    while data[position]:
        kind, step = data[position] & 15, data[position] >> 4
        position += 1
        if step:
            number += step
        else:
            number, position = _zigzag(data, position)
        if 4 <= kind <= 6:
            # most of a header; without a call, because opening a file for random access reads thousands of headers
            value, shift = 0, 0
            while data[position] > 127 and shift < 63:
                value |= (data[position] & 127) << shift
                shift += 7
                position += 1
            value |= data[position] << shift
            position += 1
            fields[number] = (value >> 1) ^ -(value & 1)
        else:
            fields[number], position = _value(data, position, kind, depth)
    return fields, position + 1


def _value(data: bytes, position: int, kind: int, depth: int) -> tuple[object, int]:
    if kind in (1, 2):
        return kind == 1, position
    if kind == 3:
        return data[position], position + 1
    if kind == 7:
        return None, position + 8
    if kind == 8:
        size, position = _varint(data, position)
        if position + size > len(data):
            raise IndexError
        return None, position + size
    if kind == 12:
        return _struct(data, position, depth + 1)
    raise ValueError("damaged page header")


def _zigzag(data: bytes, position: int) -> tuple[int, int]:
    value, position = _varint(data, position)
    return (value >> 1) ^ -(value & 1), position


def _varint(data: bytes | memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("damaged number")
