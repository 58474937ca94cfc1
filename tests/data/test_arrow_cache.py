import multiprocessing
import os
import signal
import time

import numpy as np
import pyarrow as pa
import pytest

from otter_hf.data.arrow_cache import IdIndex, cached_arrow_file, open_arrow_file


SCHEMA = pa.schema({"id": pa.string()})


def build(ids, then=lambda: None):
    def batches():
        for id in ids:
            yield pa.RecordBatch.from_pydict({"id": [id]}, schema=SCHEMA)
            then()

    return lambda: (SCHEMA, batches())


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.json"
    path.write_text("1")
    return path


def read(path):
    return open_arrow_file(path)["id"].to_pylist()


def test_files_are_built_once_per_content(source, tmp_path):
    first = cached_arrow_file([source], "ids", build(["a", "b"]), tmp_path / "cache")
    assert read(first) == ["a", "b"]
    again = cached_arrow_file([source], "ids", build(["not", "used"]), tmp_path / "cache")
    assert again == first and read(again) == ["a", "b"]
    assert cached_arrow_file([source], "ids", build(["c"]), tmp_path / "cache", option=1) != first
    source.write_text("22")
    assert read(cached_arrow_file([source], "ids", build(["d"]), tmp_path / "cache")) == ["d"]


def test_files_of_an_earlier_format_are_deleted(source, tmp_path, monkeypatch):
    other = tmp_path / "other.json"
    other.write_text("1")
    with monkeypatch.context() as patch:
        patch.setattr("otter_hf.data.arrow_cache._FORMAT_VERSION", 1)
        old = cached_arrow_file([source], "ids", build(["a"]), tmp_path / "cache")
        of_old = cached_arrow_file([old], "index", build(["i"]), tmp_path / "cache")
        kept = cached_arrow_file([other], "ids", build(["b"]), tmp_path / "cache")
    new = cached_arrow_file([source], "ids", build(["c"]), tmp_path / "cache")
    assert read(new) == ["c"] and kept.exists() and not old.exists() and not of_old.exists()


def killed_while_building(source, cache):
    cached_arrow_file([source], "ids", build(["half"], then=lambda: os.kill(os.getpid(), signal.SIGKILL)), cache)


def test_a_killed_process_leaves_nothing_that_is_read(source, tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=killed_while_building, args=(source, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(list(tmp_path.glob("*.incomplete"))) == 1
    assert read(cached_arrow_file([source], "ids", build(["a", "b"]), tmp_path)) == ["a", "b"]
    assert not list(tmp_path.glob("*.incomplete"))


def test_an_error_leaves_nothing_behind(source, tmp_path):
    def fail():
        raise ValueError("broken source")

    with pytest.raises(ValueError, match="broken source"):
        cached_arrow_file([source], "ids", build(["a"], then=fail), tmp_path)
    assert not list(tmp_path.glob("*.arrow*complete")) and not list(tmp_path.glob("*.arrow"))


def text(data):
    offsets = pa.py_buffer(np.array([0, len(data)], np.int32))
    return pa.StringArray.from_buffers(1, offsets, pa.py_buffer(data))


@pytest.mark.parametrize(
    "wrapped",
    [lambda text: pa.StructArray.from_arrays([text], ["x"]), lambda text: pa.ListArray.from_arrays([0, 1], text)],
)
def test_lists_and_structs_are_looked_through(tmp_path, wrapped):
    """What pyarrow says of damage in them is said at once."""
    for name, data in (("good", b"abcd"), ("bad", b"ab\xff\xff")):
        table = pa.table({"x": wrapped(text(data))})
        with pa.OSFile(str(tmp_path / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    assert len(open_arrow_file(tmp_path / "good")) == 1
    with pytest.raises(pa.ArrowInvalid, match="UTF8"):
        open_arrow_file(tmp_path / "bad")


def build_slowly(source, cache, log):
    def note():
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.3)

    path = cached_arrow_file([source], "ids", build(["a"], then=note), cache)
    assert read(path) == ["a"]


@pytest.mark.slow
def test_several_processes_build_one_file(source, tmp_path):
    context = multiprocessing.get_context("forkserver")
    arguments = (source, tmp_path / "cache", tmp_path / "log")
    processes = [context.Process(target=build_slowly, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def index_of(tmp_path, *chunks):
    ids = pa.chunked_array([pa.array(chunk, pa.string()) for chunk in chunks], pa.string())
    source = tmp_path / "ids"
    source.write_text(repr(chunks))
    return IdIndex(cached_arrow_file([source], "index", lambda: IdIndex.build(ids), tmp_path), ids)


def test_index_finds_first_rows(tmp_path):
    index = index_of(tmp_path, [f"id{i}" for i in range(500)], ["é", "id7", "é"])
    assert [index.find(id) for id in ("id0", "id499", "é", "id7", "none")] == [0, 499, 500, 7, -1]
    assert sorted(index.duplicates()) == [(7, 501), (500, 502)]
    assert index_of(tmp_path).find("a") == -1


def test_equal_hashes_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("otter_hf.data.arrow_cache._hash", lambda id: len(id))
    index = index_of(tmp_path, ["aa", "bb", "c", "bb", "aa"])
    assert [index.find(id) for id in ("aa", "bb", "c", "d", "ee")] == [0, 1, 2, -1, -1]
    assert sorted(index.duplicates()) == [(0, 4), (1, 3)]
