"""kill -9 at any moment: the next run finishes, its files are those of an undisturbed one, and none is read half."""

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from otter_hf.cli import main
from otter_hf.data import parquet_store, parquet_writer
from otter_hf.data.formats import load_mimicit, write_mimicit
from otter_hf.data.image_store import ImageStore
from otter_hf.data.images import encode_base64, image_bytes
from otter_hf.data.sources import Conversation, write_conversations


# a clean process to fork from: this one has threads, whose locks a child would inherit
PROCESSES = multiprocessing.get_context("forkserver")


def kill_when(ready, work, *arguments, sizes=()):
    """Runs `work` in a process, sends it SIGKILL as soon as `ready()`, and fails if it came to its end before."""
    process = PROCESSES.Process(target=to_be_killed, args=(sizes, work, *arguments))
    process.start()
    deadline = time.monotonic() + 120
    while process.is_alive() and not ready():
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def to_be_killed(sizes, work, *arguments):
    for module, name, value in sizes:
        setattr(sys.modules[module], name, value)
    # on a busy machine, it must not be done before it is seen to have begun
    rename = os.replace
    os.replace = lambda *paths: (time.sleep(0.1), rename(*paths))
    work(*arguments)


def grown(folder, pattern, size):
    """Whether a file of this name has so many bytes."""
    for path in Path(folder).glob(pattern):
        try:
            if path.stat().st_size >= size:
                return True
        except FileNotFoundError:  # it has just got its name
            return False
    return False


def contents(folder, pattern="**/*"):
    """Names and bytes of the files, locks aside."""
    paths = (path for path in Path(folder).glob(pattern) if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def without_keys(files):
    """The name of a cached file holds a digest of the time at which the one it is made from was written."""
    return {re.sub("-[0-9a-f]{20}", "", name): content for name, content in files.items()}


# the index of instructions and images


@pytest.fixture
def dataset(tmp_path, by_colour):
    """12,000 records, a train config of half of them, and a JSON store of 1,500 pictures."""
    records = {
        f"R{i}": {"instruction": f"Question {i}?", "answer": "yes " * 10, "image_ids": [f"I{i % 1500}"]}
        for i in range(12_000)
    }
    paths = [tmp_path / name for name in ("X_instructions.json", "X.json", "X_train.json")]
    paths[0].write_text(json.dumps({"data": records}))
    red = image_bytes(by_colour["red"].resize((300, 300)))
    paths[1].write_text(json.dumps({f"I{i}": encode_base64(red + i.to_bytes(2, "big")) for i in range(1500)}))
    paths[2].write_text(json.dumps({f"R{i}": [f"R{i - 1}"] for i in range(1, 12_000, 2)}))
    return paths


def build_index(instructions, images, train_config, cache):
    load_mimicit(instructions, images, train_config, cache_dir=cache)


@pytest.mark.parametrize("kind", ["records", "examples", "images"])
@pytest.mark.parametrize("share", [0.0, 0.8])
def test_killed_while_building_an_index(tmp_path, dataset, monkeypatch, kind, share):
    sizes = [(parquet_store.__name__, "_BATCH_BYTES", 50_000)]
    monkeypatch.setattr(parquet_store, "_BATCH_BYTES", 50_000)
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    load_mimicit(*dataset, cache_dir=whole)
    final = next(path for path in whole.glob("*.arrow") if path.name.split("-")[1] == kind)
    half = share * final.stat().st_size
    kill_when(lambda: grown(cache, f"*-{kind}-*.incomplete", half), build_index, *dataset, cache, sizes=sizes)
    assert not (cache / final.name).exists()
    table, store = load_mimicit(*dataset, cache_dir=cache)
    assert len(table) == 6_000 and table[-1]["context"][0]["id"] == "R11998" and len(store) == 1500
    assert without_keys(contents(cache)) == without_keys(contents(whole))


# to-parquet


def to_parquet(store, output, cache):
    main(["data", "to-parquet", str(store), "--output", str(output), "--cache-dir", str(cache)])


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("share", [0.1, 0.8])
def test_killed_to_parquet(tmp_path, by_colour, kind, share):
    pictures = {f"I{i}": image_bytes(by_colour["red"]) + random.Random(i).randbytes(5000) for i in range(1500)}
    texts = {id: encode_base64(data) for id, data in pictures.items()}
    source = tmp_path / f"X.{kind}"
    if kind == "json":
        source.write_text(json.dumps(texts))
    else:
        pd.DataFrame({"base64": list(texts.values())}, index=list(texts)).to_parquet(source)
    to_parquet(source, tmp_path / "whole.parquet", tmp_path / "cache")
    size = share * (tmp_path / "whole.parquet").stat().st_size
    output = tmp_path / "out" / "X.parquet"
    ready = lambda: grown(output.parent, ".*.incomplete", size)  # noqa: E731
    kill_when(ready, to_parquet, source, output, tmp_path / "killed")
    assert not output.exists()
    to_parquet(source, output, tmp_path / "killed")
    assert contents(output.parent) == {"X.parquet": (tmp_path / "whole.parquet").read_bytes()}
    store = ImageStore(output, tmp_path / "cache")
    assert {id: store.read_bytes(id) for id in store} == pictures


# conversion


@pytest.fixture
def llava(tmp_path, monkeypatch):
    """A LLaVA file of 400 conversations about 200 pictures, of which a part holds about 20."""
    monkeypatch.setattr(parquet_writer, "_PART_BYTES", 200_000)
    (tmp_path / "pictures").mkdir()
    for i in range(200):
        Image.effect_noise((100, 100), i + 1).save(tmp_path / "pictures" / f"{i}.png")
    rows = [
        {
            "id": f"c{i}",
            "image": f"{i // 2}.png",
            "conversations": [{"from": "human", "value": f"Q{i}"}, {"from": "gpt", "value": f"A{i}"}],
        }
        for i in range(400)
    ]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    return tmp_path


def convert(folder, output):
    paths = ["--images", str(folder / "pictures"), "--name", "S", "--output", str(folder / output)]
    assert main(["data", "from-llava", str(folder / "llava.json"), *paths]) == 0


def parts(folder):
    """The complete parts with what tells a file from one that was written again."""
    found = sorted((folder / ".S.parquet.parts").glob("part.*.parquet"), key=lambda path: int(path.suffixes[0][1:]))
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


@pytest.mark.parametrize("complete", [0, 1, 6])
def test_killed_conversion_goes_on_where_it_was(llava, capsys, complete):
    convert(llava, "whole")
    out = llava / "out"
    sizes = [(parquet_writer.__name__, "_PART_BYTES", 200_000)]
    kill_when(lambda: len(list(out.glob(".S.parquet.parts/part.*"))) >= complete, convert, llava, "out", sizes=sizes)
    assert not list(out.glob("S*"))
    before = parts(out)
    assert len(before) >= complete
    convert(llava, "out")
    assert contents(out) == contents(llava / "whole") and not list(out.glob(".*"))
    kept = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (out / "S.parquet").iterdir()}
    assert len(kept) > 8 and before.items() <= kept.items()
    table, store = load_mimicit(out / "S_instructions.json", out / "S.parquet", cache_dir=llava / "cache")
    assert len(table) == 400
    assert store.read_bytes("S_IMG_150") == (llava / "pictures" / "150.png").read_bytes()


def interrupted(conversations, after):
    """Opens the source; what it gives ends in Ctrl-C."""
    yield from conversations[:after]
    raise KeyboardInterrupt


def test_what_has_changed_since_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_writer, "_PART_BYTES", 1000)
    files = [tmp_path / f"{i}.bin" for i in range(5)]
    for path in files:
        path.write_bytes(os.urandom(500))
    in_memory = [os.urandom(500) for _ in range(5)]

    def conversations():
        return [
            *(Conversation(path.stem, [("Q", "A")], [(path.stem, path)]) for path in files),
            *(Conversation(f"m{i}", [("Q", "A")], [(f"m{i}", data)]) for i, data in enumerate(in_memory)),
        ]

    def stop_then_finish(change):
        with pytest.raises(KeyboardInterrupt):
            write_conversations(tmp_path / "out", "S", lambda: interrupted(conversations(), 9))
        before = parts(tmp_path / "out")
        assert len(before) == 4 and not list((tmp_path / "out").glob("S*"))
        change()
        read = []
        with monkeypatch.context() as patch:
            patch.setattr(
                parquet_writer, "image_bytes", lambda picture: (read.append(picture), image_bytes(picture))[1]
            )
            write_conversations(tmp_path / "out", "S", lambda: iter(conversations()))
        write_conversations(tmp_path / "new", "S", lambda: iter(conversations()))
        assert contents(tmp_path / "out") == contents(tmp_path / "new")
        for path in sorted((tmp_path / "out").glob("**/*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        return sum(isinstance(picture, Path) for picture in read)

    assert stop_then_finish(lambda: None) == 0  # no file is read again
    later = time.time_ns() + 10**9
    assert stop_then_finish(lambda: os.utime(files[3], ns=(later, later))) == 3  # 2 and 3 of its part, and 4
    os.utime(files[3], ns=(0, 0))

    def change_one_in_memory():
        in_memory[2] = os.urandom(500)

    assert stop_then_finish(change_one_in_memory) == 0
    assert stop_then_finish(files.reverse) == 5


def test_one_part_is_a_file_and_several_are_a_folder(tmp_path, monkeypatch, by_colour):
    records = {"a": {"instruction": "Q", "answer": "A", "image_ids": ["red", "blue"]}}
    for part_bytes, is_folder in ((1, True), (10**6, False), (1, True), (1, True)):
        monkeypatch.setattr(parquet_writer, "_PART_BYTES", part_bytes)
        files = write_mimicit(tmp_path / "out", "S", records, by_colour)
        assert files.images_path.is_dir() == is_folder
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["S.parquet", "S_instructions.json"]
        store = load_mimicit(*files, cache_dir=tmp_path / "cache")[1]
        assert list(store) == list(by_colour) and store["blue"].getpixel((0, 0)) == (0, 0, 255)
    broken = {"a": {"instruction": "Q", "answer": "A", "image_ids": ["pink"]}}
    with pytest.raises(ValueError, match="'pink'"):
        write_mimicit(tmp_path / "out", "S", broken, by_colour)
    assert not list((tmp_path / "out").glob(".*")) and files.images_path.is_dir()
