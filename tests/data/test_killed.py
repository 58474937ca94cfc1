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
from otter_hf.data import parquet_store, parquet_writer, to_parquet
from otter_hf.data.engine import Engine, read_records
from otter_hf.data.formats import load_mimicit, write_mimicit
from otter_hf.data.image_store import ImageStore
from otter_hf.data.images import decode_image, encode_base64, image_bytes
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


@pytest.mark.parametrize(
    "kind, share",
    [
        ("records", 0.8),
        pytest.param("examples", 0.0, marks=pytest.mark.slow),
        pytest.param("images", 0.0, marks=pytest.mark.slow),
        pytest.param("images", 0.8, marks=pytest.mark.slow),
        pytest.param("index", 0.0, marks=pytest.mark.slow),
    ],
)
def test_killed_while_building_an_index(tmp_path, dataset, monkeypatch, kind, share):
    sizes = [(parquet_store.__name__, "_BATCH_BYTES", 50_000)]
    monkeypatch.setattr(parquet_store, "_BATCH_BYTES", 50_000)
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    load_mimicit(*dataset, cache_dir=whole)
    # the index of a file is named after it
    name = f"{'*-records-*' if kind == 'index' else '*.json'}-{kind}-{20 * '?'}.arrow"
    (final,) = whole.glob(name)
    size = share * final.stat().st_size
    kill_when(lambda: grown(cache, f"{name}.incomplete", size), build_index, *dataset, cache, sizes=sizes)
    assert not list(cache.glob(name))
    table, store = load_mimicit(*dataset, cache_dir=cache)
    assert len(table) == 6_000 and table[-1]["context"][0]["id"] == "R11998" and len(store) == 1500
    assert without_keys(contents(cache)) == without_keys(contents(whole))


# to-parquet


TO_PARQUET = [(to_parquet.__name__, "PART_BYTES", 1_000_000)]


def convert_store(source, output, *options):
    paths = ["--output", str(output), "--cache-dir", str(output.parent.parent / "cache")]
    assert main(["data", "to-parquet", str(source), *paths, *options]) == 0


@pytest.fixture
def pictures(by_colour):
    """1,500 pictures, of which a part holds about 200; the tenth is none."""
    red = image_bytes(by_colour["red"])
    return {f"I{i}": b"none" if i == 9 else red + random.Random(i).randbytes(5000) for i in range(1500)}


def write_store(folder, kind, pictures):
    texts = {id: encode_base64(data) for id, data in pictures.items()}
    path = folder / f"X.{kind}"
    if kind == "json":
        path.write_text(json.dumps(texts))
    else:
        pd.DataFrame({"base64": list(texts.values())}, index=list(texts)).to_parquet(path)
    return path


def complete_parts(folder):
    """The complete parts with what tells a file from one that was written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path(folder).glob("part.*.parquet")}


@pytest.mark.parametrize(
    "kind, complete",
    [pytest.param("json", 0, marks=pytest.mark.slow), pytest.param("json", 3, marks=pytest.mark.slow), ("parquet", 3)],
)
def test_killed_to_parquet_goes_on_where_it_was(tmp_path, pictures, monkeypatch, capsys, kind, complete):
    monkeypatch.setattr(to_parquet, "PART_BYTES", 1_000_000)
    source, output = write_store(tmp_path, kind, pictures), tmp_path / "out" / "X.parquet"
    convert_store(source, tmp_path / "whole" / "X.parquet")
    told = capsys.readouterr().out.replace("whole", "out")

    def ready():
        done = len(list(output.parent.glob(".X.*.parts/records/*.json")))
        return done >= complete and any(output.parent.glob(".X.*.parts/store/*"))

    kill_when(ready, convert_store, source, output, sizes=TO_PARQUET)
    assert not output.exists()
    (folder,) = output.parent.glob(".X.*.parts")
    records = read_records(folder / "records")
    parts = complete_parts(folder / "store")
    before = {name: parts[name] for name in (f"part.{int(number)}.parquet" for number in records)}
    assert len(before) >= complete
    decoded = []
    monkeypatch.setattr(to_parquet, "decode_image", lambda data: (decoded.append(data), decode_image(data))[1])
    convert_store(source, output)
    assert capsys.readouterr().out == told and "1,499 pictures" in told and "1 left out" in told
    assert contents(output.parent) == contents(tmp_path / "whole") and not list(output.parent.glob(".*"))
    after = complete_parts(output)
    assert len(after) > 8 and before.items() <= after.items()
    # what is there is not decoded again
    assert len(decoded) == 1500 - sum(record["pictures"] + len(record["left_out"]) for record in records.values())
    store = ImageStore(output, tmp_path / "cache")
    assert {id: store.read_bytes(id) for id in store} == {id: pictures[id] for id in pictures if id != "I9"}


def test_killed_to_base64(tmp_path, pictures):
    source, output = write_store(tmp_path, "json", pictures), tmp_path / "out" / "X.parquet"
    convert_store(source, tmp_path / "whole" / "X.parquet", "--base64")
    kill_when(
        lambda: grown(output.parent, ".X.*/store/.*.incomplete", 1_000_000), convert_store, source, output, "--base64"
    )
    assert not output.exists()
    convert_store(source, output, "--base64")
    assert contents(output.parent) == contents(tmp_path / "whole")


def test_parts_of_another_source_or_size_are_not_used(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(to_parquet, "PART_BYTES", 1_000_000)
    source, output = write_store(tmp_path, "json", pictures), tmp_path / "out" / "X.parquet"

    def stop(data):
        if data == pictures["I900"]:
            raise KeyboardInterrupt
        return decode_image(data)

    def interrupted(**options):
        with monkeypatch.context() as patch:
            patch.setattr(to_parquet, "decode_image", stop)
            with pytest.raises(KeyboardInterrupt):
                # one part after the other, or with more processors none is complete
                to_parquet.store_to_parquet(source, output, engine=Engine(), **options)
        (folder,) = output.parent.glob(".X.*.parts")
        assert complete_parts(folder / "store")
        return folder

    first = interrupted()
    pictures["I5"] = pictures["I6"]
    write_store(tmp_path, "json", pictures)
    second = interrupted()
    assert second != first
    assert interrupted(resize=40) != second
    assert to_parquet.store_to_parquet(source, output) == (1499, ["I9"])
    assert ImageStore(output, tmp_path / "cache").read_bytes("I5") == pictures["I6"]
    assert list(output.parent.iterdir()) == [output]
    # an id that is there twice is a mistake
    source.write_text(source.read_text()[:-1] + f', "I7": "{encode_base64(pictures["I7"])}"' + "}")
    with pytest.raises(ValueError, match="Image id 'I7' is given twice"):
        to_parquet.store_to_parquet(source, tmp_path / "twice" / "X.parquet")
    assert not (tmp_path / "twice").exists()


# conversion


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """400 conversations, in two of the forms about 200 pictures, of which a part holds about 20."""
    monkeypatch.setattr(parquet_writer, "PART_BYTES", 200_000)
    (tmp_path / "pictures").mkdir()
    for i in range(200):
        Image.effect_noise((100, 100), i + 1).save(tmp_path / "pictures" / f"{i}.png")
    encoded = [encode_base64((tmp_path / "pictures" / f"{i}.png").read_bytes()) for i in range(200)]
    rows = {"llava": [], "m3it": [], "alpaca": []}
    for i in range(400):
        talk = [{"from": "human", "value": f"Q{i}"}, {"from": "gpt", "value": f"A{i}"}]
        rows["llava"].append({"id": f"c{i}", "image": f"{i // 2}.png", "conversations": talk})
        rows["m3it"].append({"instruction": "Q", "outputs": f"A{i}", "image_base64_str": [encoded[i // 2]]})
        rows["alpaca"].append({"instruction": "Q " * 200, "output": f"A{i}"})
    for name, content in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def convert(folder, kind, output):
    images = ["--images", str(folder / "pictures")] if kind == "llava" else []
    paths = [str(folder / f"{kind}.json"), "--name", "S", "--output", str(folder / output)]
    assert main(["data", f"from-{kind}", *paths, *images]) == 0


@pytest.mark.parametrize(
    "kind, complete",
    [
        pytest.param("llava", 0, marks=pytest.mark.slow),
        ("llava", 6),
        pytest.param("m3it", 2, marks=pytest.mark.slow),
        pytest.param("alpaca", 0, marks=pytest.mark.slow),
    ],
)
def test_killed_conversion_goes_on_where_it_was(sources, kind, complete):
    convert(sources, kind, "whole")
    out = sources / "out"
    sizes = [(parquet_writer.__name__, "PART_BYTES", 200_000)]
    begun = ".S_instructions.json.incomplete" if kind == "alpaca" else ".S.parquet.parts/*.parquet*"
    kill_when(lambda: len(list(out.glob(begun))) > complete, convert, sources, kind, "out", sizes=sizes)
    assert not list(out.glob("S*"))
    before = complete_parts(out / ".S.parquet.parts")
    assert len(before) >= complete
    convert(sources, kind, "out")
    assert contents(out) == contents(sources / "whole") and not list(out.glob(".*"))
    images = () if kind == "alpaca" else out / "S.parquet"
    table, store = load_mimicit(out / "S_instructions.json", images, cache_dir=sources / "cache")
    assert len(table) == 400
    if images:
        kept = complete_parts(images)
        assert len(kept) > 8 and before.items() <= kept.items()
        (picture,) = table[-1]["image_ids"]
        assert store.read_bytes(picture) == (sources / "pictures" / "199.png").read_bytes()


def interrupted(conversations, after):
    """Opens the source; what it gives ends in Ctrl-C."""
    yield from conversations[:after]
    raise KeyboardInterrupt


def test_what_has_changed_since_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_writer, "PART_BYTES", 1000)
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
        before = complete_parts(tmp_path / "out" / ".S.parquet.parts")
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
    # other files, older than what was written of the first ones
    other = tmp_path / "other"
    other.mkdir()
    for path in files:
        (other / path.name).write_bytes(path.read_bytes())
        os.utime(other / path.name, (1, 1))

    def move():
        files[:] = [other / path.name for path in files]

    assert stop_then_finish(move) == len(files)
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
        monkeypatch.setattr(parquet_writer, "PART_BYTES", part_bytes)
        files = write_mimicit(tmp_path / "out", "S", records, by_colour)
        assert files.images_path.is_dir() == is_folder
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["S.parquet", "S_instructions.json"]
        store = load_mimicit(*files, cache_dir=tmp_path / "cache")[1]
        assert list(store) == list(by_colour) and store["blue"].getpixel((0, 0)) == (0, 0, 255)
    broken = {"a": {"instruction": "Q", "answer": "A", "image_ids": ["pink"]}}
    with pytest.raises(ValueError, match="'pink'"):
        write_mimicit(tmp_path / "out", "S", broken, by_colour)
    assert not list((tmp_path / "out").glob(".*")) and files.images_path.is_dir()
