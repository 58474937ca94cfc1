"""Records whose medium is a film: decoded when they are used, from files or from a store."""

import io
import json
import pickle

import av
import numpy as np
import pytest
from PIL import Image

from otter_hf.data import OtterCollator
from otter_hf.data.formats import write_mimicit
from otter_hf.data.image_store import ImageStore
from otter_hf.data.mixture import MimicitMixture, MixtureEntry
from otter_hf.data.samples import SampleOptions
from otter_hf.data.validate import check_mixture


def film(count=20, size=(48, 32), container="mp4") -> bytes:
    """Frame `i` is grey of `8 i`."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream("mpeg4", rate=5, options={"qscale": "1"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 2_000_000
        for number in range(count):
            out.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", size, (number * 8,) * 3))))
        out.mux(stream.encode())
    return buffer.getvalue()


def numbers(frames) -> list[int]:
    return [round(np.asarray(frame.convert("L")).mean() / 8) for frame in frames]


def record(*ids, **more):
    return {"instruction": "what happens?", "answer": "it brightens", "image_ids": [*ids], **more}


@pytest.fixture
def from_store(tmp_path):
    records = {"one": record("a"), "two": record("a", "b")}
    files = write_mimicit(tmp_path / "store", "X", records, {"a": film(), "b": film(4)})
    return str(files.instructions_path), str(files.images_path)


@pytest.fixture
def from_files(tmp_path):
    folder = tmp_path / "films"
    (folder / "b").mkdir(parents=True)
    (folder / "a.mp4").write_bytes(film())
    (folder / "b" / "b.mkv").write_bytes(film(4, container="matroska"))
    records = {"one": record("a.mp4"), "two": record("a.mp4", "b/b.mkv")}
    instructions = tmp_path / "X_instructions.json"
    instructions.write_text(json.dumps({"data": records}))
    return str(instructions), str(folder)


@pytest.mark.parametrize("source", ["from_store", "from_files"])
@pytest.mark.parametrize("group", ["VIDEO_TEXT", "IMAGE_TEXT", "IMAGE_TEXT_IN_CONTEXT"])
def test_only_frames_asked_for(source, group, request, tmp_path, processor):
    entry = MixtureEntry(group, "X", *request.getfixturevalue(source))
    options = SampleOptions(num_frames=5, frame_side=16)
    mixture = pickle.loads(pickle.dumps(MimicitMixture([entry], options, cache_dir=tmp_path / "cache")))
    one, two = mixture[0], mixture[1]
    assert [numbers(medium) for medium in one["media"]] == [[0, 4, 8, 12, 16]]
    # a film with fewer frames shows some of them again
    assert [numbers(medium) for medium in two["media"]] == [[0, 4, 8, 12, 16], [0, 0, 1, 2, 3]]
    assert {frame.size for medium in two["media"] for frame in medium} == {(24, 16)}
    batch = OtterCollator(processor)([one, two])
    assert batch["pixel_values"].shape[2] == 5
    assert check_mixture([entry], cache_dir=tmp_path / "cache").ok(strict=True)


def test_a_damaged_film_is_skipped_and_found(tmp_path):
    data = film()
    records = {"bad": record("bad"), "good": record("good")}
    files = write_mimicit(tmp_path, "X", records, {"bad": data[: len(data) // 2], "good": data})
    entry = MixtureEntry("VIDEO_TEXT", "X", str(files.instructions_path), str(files.images_path))
    mixture = MimicitMixture([entry], SampleOptions(num_frames=2), on_error="skip", cache_dir=tmp_path / "cache")
    assert mixture[0]["id"] == "good" and mixture.skipped == {"unreadable film": 1}
    (finding,) = check_mixture([entry], cache_dir=tmp_path / "cache").findings
    assert (finding.rule, finding.ids) == ("unreadable film", ["bad"])
    small = SampleOptions(num_frames=2, max_image_pixels=100)
    with pytest.raises(ValueError, match="needs film 'good', which cannot be decoded"):
        MimicitMixture([entry], small, cache_dir=tmp_path / "cache")[1]


def test_a_link_out_of_a_folder_of_films_is_refused(tmp_path):
    (tmp_path / "other.mp4").write_bytes(film(2))
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.mp4").symlink_to(tmp_path / "other.mp4")
    store = ImageStore(tmp_path / "films")
    with pytest.raises(OSError, match="leads out of"):
        store.medium("a.mp4")


def test_a_folder_of_pictures_and_films(tmp_path):
    (tmp_path / "media" / "sub").mkdir(parents=True)
    (tmp_path / "media" / "a.mp4").write_bytes(film())
    Image.new("RGB", (48, 32), "white").save(tmp_path / "media" / "sub" / "b.JPG", "JPEG")
    (tmp_path / "media" / "notes.txt").write_text("no medium")
    store = ImageStore(tmp_path / "media")
    assert [*store] == ["a.mp4", "sub/b.JPG"] and store["sub/b.JPG"].size == (48, 32)
    instructions = tmp_path / "X_instructions.json"
    instructions.write_text(json.dumps({"data": {"one": record("sub/b.JPG"), "two": record("a.mp4")}}))
    entry = MixtureEntry("IMAGE_TEXT", "X", str(instructions), str(tmp_path / "media"))
    one, two = MimicitMixture([entry], SampleOptions(num_frames=2), cache_dir=tmp_path / "cache")
    assert [numbers(one["media"][0]), numbers(two["media"][0])] == [[32], [0, 10]]
    assert check_mixture([entry], cache_dir=tmp_path / "cache").ok(strict=True)


def test_llava_rows_with_films(tmp_path):
    from otter_hf.data.sources import read_llava, write_conversations, write_mixture

    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(film())
    Image.new("RGB", (48, 32), "white").save(folder / "b.png")

    def row(text, **media):
        return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}], **media}

    rows = [
        row("<video>\nWhat?", video="a.mp4"),
        row("What now?", videos=["a.mp4"]),
        row("After <image> comes <video>?", image="b.png", video=["a.mp4"]),
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    files = write_conversations(tmp_path / "out", "X", lambda: read_llava(path, folder)).files
    write_mixture(tmp_path / "out" / "x.yaml", files)
    assert check_mixture(tmp_path / "out" / "x.yaml", cache_dir=tmp_path / "cache").ok(strict=True)
    mixture = MimicitMixture(tmp_path / "out" / "x.yaml", SampleOptions(num_frames=2), cache_dir=tmp_path / "cache")
    shown = [[numbers(medium) for medium in mixture[index]["media"]] for index in range(3)]
    assert shown == [[[0, 10]], [[0, 10]], [[32], [0, 10]]]
    assert [mixture[index]["turns"][0][0] for index in range(3)] == ["What?", "What now?", "After  comes ?"]
    assert mixture.shows_films()
    for wrong, message in (
        (row("<video><video>", video="a.mp4"), "2 <video> and 0 <image> for 1 films"),
        (row("<video>", image="b.png"), "hold <video>, which"),
        (row("<audio>", video="a.mp4"), "hold <audio>, which"),
    ):
        path.write_text(json.dumps([wrong]))
        with pytest.raises(ValueError, match=message):
            list(read_llava(path, folder))
