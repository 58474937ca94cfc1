"""Pictures in parquet files: read page by page, at random, lazily."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from otter_hf.data import arrow_cache, parquet_pages, parquet_store, parquet_writer
from otter_hf.data.image_store import ImageStore
from otter_hf.data.images import encode_base64
from otter_hf.data.parquet_pages import PlainPages
from otter_hf.data.parquet_writer import write_image_parts, write_images
from otter_hf.data.to_parquet import store_to_parquet


def values(count, nulls):
    source = random.Random(0)
    same = source.randbytes(50)
    data = [same if i % 7 == 0 else source.randbytes(source.randrange(200)) for i in range(count)]
    return [None if nulls and i % 5 == 0 else value for i, value in enumerate(data)]


def paged(path, leaf):
    with pq.ParquetFile(path) as file:
        return PlainPages(path, file.metadata, file.schema, leaf)


LAYOUTS = list(
    product((False, True), (False, True), ("none", "snappy", "zstd", "gzip"), ("1.0", "2.0"), (False, True))
)


@pytest.mark.parametrize("nulls, nested, compression, version, dictionary", LAYOUTS)
def test_pages_hold_what_pyarrow_reads(tmp_path, nulls, nested, compression, version, dictionary):
    column = values(700, nulls)
    if nested:
        rows = [None if value is None and i % 2 else {"bytes": value, "path": None} for i, value in enumerate(column)]
        table, leaf = pa.table({"id": range(700), "image": rows}), "image.bytes"
    else:
        table, leaf = pa.table({"id": range(700), "image": pa.array(column, pa.binary())}), "image"
    layout = {"row_group_size": 400, "write_batch_size": 50, "data_page_size": 2000, "dictionary_pagesize_limit": 3000}
    options = {"compression": compression, "data_page_version": version, "use_dictionary": dictionary}
    pq.write_table(table, tmp_path / "x.parquet", **layout, **options)
    pages = paged(tmp_path / "x.parquet", leaf)
    every = [page for group in range(pages.num_groups) for page in pages.pages(group)]
    assert [page.first_row for page in every] == np.cumsum([0, *(page.num_rows for page in every)])[:-1].tolist()
    assert sum(page.num_rows for page in every) == 700
    plain = [page for page in every if page.is_plain]
    assert bool(plain) == (version == "1.0") and (dictionary or len(plain) in (0, len(every)))
    for page in plain:
        assert list(pages.values(page)) == column[page.first_row : page.first_row + page.num_rows]
    store = ImageStore(tmp_path / "x.parquet", tmp_path / "cache")
    pictures = store._parts[0][0]
    order = random.Random(0).sample(range(700), 12)
    assert list(pictures) == column and list(pictures.rows(130, 450)) == column[130:580]
    assert [pictures[row] for row in order] == [column[row] for row in order]


def test_other_layouts_are_left_to_pyarrow(tmp_path, by_colour):
    table = pa.table({"id": ["a", "b"], "image": pa.array([b"1", b"2"], pa.binary())})
    options = {"use_dictionary": False, "column_encoding": {"image": "DELTA_LENGTH_BYTE_ARRAY", "id": "PLAIN"}}
    pq.write_table(table, tmp_path / "delta.parquet", **options)
    pq.write_table(table, tmp_path / "lz4.parquet", compression="lz4")
    for name in ("delta", "lz4"):
        path = tmp_path / f"{name}.parquet"
        assert [page.is_plain for page in paged(path, "image").pages(0)] == [False]
        store = ImageStore(path, tmp_path / "cache")
        assert [store.read_bytes(id) for id in "ab"] == [b"1", b"2"]


def test_pyarrow_is_asked_for_no_statistics(tmp_path):
    """Which come with `RowGroupMetaData.column`: where they are damaged it ends the process."""
    path = tmp_path / "x.parquet"
    write_images(path, [(f"I{i}", bytes([i]) * 300) for i in range(200)])
    with pq.ParquetFile(path) as file:
        groups = [file.metadata.row_group(number) for number in range(2)]
        known = [SimpleNamespace(num_rows=one.num_rows, total_byte_size=one.total_byte_size) for one in groups]
        metadata = SimpleNamespace(num_row_groups=2, row_group=known.__getitem__)
        pages = PlainPages(path, metadata, file.schema, "image.bytes")
    assert pages.plain_bytes == sum(group.column(1).total_uncompressed_size for group in groups)
    page = pages.find(150)
    assert list(pages.values(page))[150 - page.first_row] == bytes([150]) * 300


@pytest.mark.parametrize(
    "footer",
    [
        {},
        {4: 1},
        {4: [{1: []}]},
        {4: [{1: [None, {3: {}}]}]},
        {4: [{1: [None, {3: {4: [], 6: 1, 9: 4}}]}]},
        {4: [{1: [None, {3: {4: 0, 6: -1, 9: 4}}]}]},
        {4: [{1: [None, {3: {4: 0, 6: 1 << 70, 9: 4}}]}]},
        {4: [{1: [None, {3: {4: 0, 6: 1, 9: {}}}]}]},
        {4: [{1: [None, {3: {4: 0, 6: 1, 9: 1 << 70}}]}]},
        {4: [{1: [None, {3: {4: 0, 6: 1, 9: -4}}]}]},
    ],
)
def test_a_footer_that_is_not_understood_is_left_to_pyarrow(tmp_path, monkeypatch, footer):
    write_images(tmp_path / "x.parquet", [("a", b"1"), ("b", b"2")])
    monkeypatch.setattr(parquet_pages, "_read_footer", lambda file: footer)
    assert [page.is_plain for page in paged(tmp_path / "x.parquet", "image.bytes").pages(0)] == [False]
    store = ImageStore(tmp_path / "x.parquet", tmp_path / "cache")
    assert [store.read_bytes(id) for id in "ab"] == [b"1", b"2"]


def test_a_file_that_ends_before_its_rows(tmp_path, monkeypatch):
    write_images(tmp_path / "x.parquet", [("a", b"1"), ("b", b"2")])
    store = ImageStore(tmp_path / "x.parquet", tmp_path / "cache")
    monkeypatch.setattr(parquet_store.ParquetPictures, "_read", lambda self, page: iter(()))
    with pytest.raises(OSError, match="damaged file .*x.parquet: it ends before row 1"):
        store.read_bytes("b")
    assert list(store.rows(0, 2)) == [("a", None), ("b", None)]


@pytest.mark.parametrize("start", [0, 4])
def test_a_damaged_part_is_written_again(tmp_path, monkeypatch, start):
    monkeypatch.setattr(parquet_writer, "PART_BYTES", 1000)
    images = [(f"I{i}", bytes([i]) * 400) for i in range(10)]
    write_image_parts(tmp_path / "whole", images)
    write_image_parts(tmp_path / "parts", images)
    damaged = tmp_path / "parts" / "part.1.parquet"
    damaged.write_bytes(bytes(len(damaged.read_bytes()) - start) + damaged.read_bytes()[:start])
    assert write_image_parts(tmp_path / "parts", images) == {id for id, _ in images}
    whole, parts = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "parts")
    )
    assert parts == whole and len(whole) > 4


def big_store(path, count=3000):
    """As pandas writes it: one row group, pages of 1024 rows."""
    data = {f"I{i}": np.random.default_rng(i).bytes(1000 + i % 50) for i in range(count)}
    pd.DataFrame({"base64": [encode_base64(one) for one in data.values()]}, index=list(data)).to_parquet(path)
    return data


def copies(cache):
    return sorted(path.name for path in cache.glob("*-images-*.arrow"))


def test_a_store_of_large_pages_is_copied_when_that_is_cheaper(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(arrow_cache, "_TOLD_BYTES", 1_000_000)
    data = big_store(tmp_path / "X.parquet")
    store = ImageStore(tmp_path / "X.parquet", tmp_path / "cache")
    assert list(store) == list(data) and not copies(tmp_path / "cache")
    monkeypatch.setattr("otter_hf.data.to_parquet.PART_BYTES", 700_000)
    with pytest.raises(ValueError, match="no picture in .* that can be decoded"):
        store_to_parquet(tmp_path / "X.parquet", tmp_path / "Y.parquet", cache_dir=tmp_path / "cache")
    assert not copies(tmp_path / "cache")  # it was read in its order, whatever the parts
    # three pages, of 1024, 1024 and 952 pictures
    assert all(store.read_bytes(id) == data[id] for id in ("I2500", "I1500", "I1501"))
    assert not copies(tmp_path / "cache")
    assert store.read_bytes("I2501") == data["I2501"]
    (copy,) = (tmp_path / "cache").glob("*-images-*.arrow")
    assert f"A copy of 0.0 GB is made in {tmp_path / 'cache'}, once" in caplog.text
    assert Dataset.from_file(str(copy))[2500] == {"id": "I2500", "image": data["I2500"]}
    again = ImageStore(tmp_path / "X.parquet", tmp_path / "cache")
    order = random.Random(0).sample(list(data), len(data))
    for opened in (store, again, ImageStore(copy, tmp_path / "cache")):
        assert all(opened.read_bytes(id) == data[id] for id in order)
    assert [path.name for path in (tmp_path / "cache").glob("*-images-????????????????????.arrow")] == [copy.name]


def test_without_room_for_a_copy(tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(arrow_cache.shutil, "disk_usage", lambda path: usage)
    data = big_store(tmp_path / "X.parquet", 40)
    store = ImageStore(tmp_path / "X.parquet", tmp_path / "cache")
    assert {id: store.read_bytes(id) for id in data} == data and not copies(tmp_path / "cache")
    assert caplog.text.count("does not fit in the 0.0 GB that are free") == 1
    (tmp_path / "X.json").write_text(json.dumps({id: encode_base64(one) for id, one in data.items()}))
    with pytest.raises(OSError, match="a copy of 0.0 GB does not fit .*cache"):
        ImageStore(tmp_path / "X.json", tmp_path / "cache")


def test_a_damaged_page_costs_itself_only(tmp_path):
    data = big_store(tmp_path / "X.parquet")
    page = paged(tmp_path / "X.parquet", "base64").find(1500)
    content = bytearray((tmp_path / "X.parquet").read_bytes())
    content[page.offset : page.offset + page.stored_bytes] = bytes(page.stored_bytes)
    (tmp_path / "X.parquet").write_bytes(content)
    store = ImageStore(tmp_path / "X.parquet", tmp_path / "cache")
    for _ in range(2):  # where they are, and copied
        bad = []
        for id in data:
            try:
                assert store.read_bytes(id) == data[id]
            except OSError as error:
                assert "damaged" in str(error)
                bad.append(id)
        assert bad == [f"I{i}" for i in range(1024, 2048)]
    assert copies(tmp_path / "cache")


def test_a_disk_that_fails_is_no_damage(tmp_path, monkeypatch, caplog):
    """Neither is a picture left out for it, nor does a copy hold none in its place."""
    data = {f"I{i}": random.Random(i).randbytes(2000) for i in range(300)}
    table = pa.table({"id": list(data), "image": pa.array(list(data.values()), pa.binary())})
    pq.write_table(table, tmp_path / "X.parquet", use_dictionary=False)
    store = ImageStore(tmp_path / "X.parquet", tmp_path / "cache")

    def fail(pages, page):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(PlainPages, "_unpacked", fail)
        for _ in range(3):
            with pytest.raises(OSError, match="Input/output error") as raised:
                store.read_bytes("I150")
            assert raised.value.errno == errno.EIO
        with pytest.raises(OSError, match="Input/output error"):
            store_to_parquet(tmp_path / "X.parquet", tmp_path / "Y.parquet", cache_dir=tmp_path / "cache")
    assert "X.parquet is read without a copy" in caplog.text and not copies(tmp_path / "cache")
    assert {id: store.read_bytes(id) for id in data} == data


def test_headers_that_state_more_than_a_page_can_have(tmp_path):
    write_images(tmp_path / "X.parquet", [("a", bytes(100))])
    column = pq.read_metadata(tmp_path / "X.parquet").row_group(0).column(1)
    content = bytearray((tmp_path / "X.parquet").read_bytes())
    # a dictionary of 0 bytes, and of 2 to the power of 69 as they are stored
    header = bytes([0x15, 4, 0x15, 0, 0x15, 254, *8 * [255], 127, 0])
    content[column.data_page_offset : column.data_page_offset + len(header)] = header
    (tmp_path / "X.parquet").write_bytes(content)
    assert [page.is_plain for page in paged(tmp_path / "X.parquet", "image.bytes").pages(0)] == [False]


def test_ids_of_one_checksum_are_told_apart_unread(tmp_path, monkeypatch):
    assert zlib.crc32(b"plumless") == zlib.crc32(b"buckeroo")
    write_images(tmp_path / "X.parquet", [("plumless", b"1"), ("buckeroo", b"2")])
    read = []
    monkeypatch.setattr(parquet_store.ParquetPictures, "__getitem__", lambda self, row: read.append(row))
    assert list(ImageStore(tmp_path / "X.parquet", tmp_path / "cache")) == ["plumless", "buckeroo"] and not read


@pytest.mark.parametrize("encoding", ["bytes", "base64", "bytes, as Windows reads them"])
def test_our_stores_are_read_where_they_are(tmp_path, monkeypatch, encoding):
    encoding, windows, _ = encoding.partition(", as Windows")
    if windows:
        monkeypatch.setattr(parquet_pages, "os", SimpleNamespace())  # which has no pread there
    data = {f"I{i}": os.urandom(5000) for i in range(250)}
    write_images(tmp_path / "X.parquet", data.items(), encoding)
    store = ImageStore(tmp_path / "X.parquet", tmp_path / "cache")
    assert {id: store.read_bytes(id) for id in reversed(data)} == data
    assert not copies(tmp_path / "cache")
    assert list(store._parts[0][0]) == list(data.values())


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_places_of_pages_are_kept(tmp_path, monkeypatch, version, dictionary):
    monkeypatch.setattr(parquet_store, "_SCANNED_GROUPS", 2)
    data = {f"I{i}": value or b"" for i, value in enumerate(values(500, nulls=True))}
    table = pa.table({"id": list(data), "image": pa.array(list(data.values()), pa.binary())})
    layout = {"row_group_size": 50, "write_batch_size": 5, "data_page_size": 500}
    pq.write_table(
        table,
        tmp_path / "X.parquet",
        data_page_version=version,
        use_dictionary=dictionary,
        compression="zstd",
        **layout,
    )
    order = random.Random(0).sample(list(data), len(data))
    for _ in range(2):
        store = ImageStore(tmp_path / "X.parquet", tmp_path / "cache")
        assert all(store.read_bytes(id) == data[id] for id in order[:3])
        assert all(store.read_bytes(id) == data[id] for id in order)
        assert len(list((tmp_path / "cache").glob("*-pages-*.arrow"))) == 1


def read_slowly(path, cache, order, started):
    store = ImageStore(path, cache)
    for id in order:
        store.read_bytes(id)
        started.set()
        time.sleep(0.001)


def test_killed_readers_leave_copies_that_are_whole(tmp_path):
    data = big_store(tmp_path / "X.parquet")
    context = multiprocessing.get_context("fork")
    for attempt in range(4):
        started = context.Event()
        order = random.Random(attempt).sample(list(data), 200)
        arguments = (tmp_path / "X.parquet", tmp_path / "cache", order, started)
        process = context.Process(target=read_slowly, args=arguments)
        process.start()
        if attempt:
            started.wait(20)
        time.sleep(0.01 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    after = ImageStore(tmp_path / "X.parquet", tmp_path / "cache")
    assert {id: after.read_bytes(id) for id in data} == data
    fresh = ImageStore(tmp_path / "X.parquet", tmp_path / "fresh")
    assert {id: fresh.read_bytes(id) for id in data} == data
    for name in copies(tmp_path / "fresh"):
        assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def digest(path, cache, order, results):
    store = ImageStore(path, cache)
    results.put(sum(store.read_bytes(id)[0] for id in order))


def test_several_processes_share_the_copies(tmp_path):
    data = big_store(tmp_path / "X.parquet")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = []
    for seed in range(3):
        order = random.Random(seed).sample(list(data), len(data))
        arguments = (tmp_path / "X.parquet", tmp_path / "cache", order, results)
        processes.append(context.Process(target=digest, args=arguments))
        processes[-1].start()
    assert {results.get(timeout=60) for _ in processes} == {sum(one[0] for one in data.values())}
    for process in processes:
        process.join()
    assert not list((tmp_path / "cache").glob("*.incomplete"))


def test_damage_is_met_where_it_is(tmp_path):
    data = {f"I{i}": os.urandom(5000) for i in range(50)}
    path = tmp_path / "X.parquet"
    write_images(path, data.items())
    content = bytearray(path.read_bytes())
    content[100_000:106_000] = bytes(6000)
    path.write_bytes(content)
    store = ImageStore(path, tmp_path / "cache")
    bad = []
    for id in data:
        try:
            assert store.read_bytes(id) == data[id]
        except OSError as error:
            assert "damaged" in str(error)
            bad.append(id)
    assert bad


READ_SOME = """
import sys, zlib
from pathlib import Path
from otter_hf.data.image_store import ImageStore
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if "VmHWM" in line)
before = peak()
store = ImageStore(sys.argv[1], sys.argv[2])
for number in range(0, 10_000, 20):
    print(zlib.crc32(store.read_bytes(f"I{number}")))
print((peak() - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak of memory from /proc")
def test_a_large_store_needs_little_memory(tmp_path):
    def pictures():
        for number in range(10_000):
            yield f"I{number}", random.Random(number).randbytes(50_000)

    write_images(tmp_path / "X.parquet", pictures())
    assert (tmp_path / "X.parquet").stat().st_size > 500_000_000
    command = [sys.executable, "-c", READ_SOME, str(tmp_path / "X.parquet"), str(tmp_path / "cache")]
    *found, peak_mb = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert found == [zlib.crc32(data) for number, (_, data) in enumerate(pictures()) if number % 20 == 0]
    assert peak_mb < 60
