"""What readers make of files that are damaged, of another kind, or name what is not theirs."""

import io
import json
import random
import tarfile
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz.reader_targets import PlainEncoder, picture
from PIL import Image

from otter_hf.data.formats import write_mimicit
from otter_hf.data.image_store import ImageStore
from otter_hf.data.images import encode_base64
from otter_hf.data.json_stream import iter_json_object
from otter_hf.data.mixture import MimicitMixture, MixtureEntry, read_mixture
from otter_hf.data.pretraining.converters import laion_to_tar, mmc4_to_tar
from otter_hf.data.pretraining.samples import InterleavedDocuments
from otter_hf.data.pretraining.sets import read_pretraining_sets
from otter_hf.data.pretraining.shards import index_shard
from otter_hf.data.samples import SampleOptions
from otter_hf.data.sources import read_llava
from otter_hf.data.validate import check_mixture
from otter_hf.films import read_video
from otter_hf.pictures import read_image
from otter_hf.reading import lines_of, load_yaml
from otter_hf.serving.batch import read_questions
from otter_hf.training.arguments import parse_arguments


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
LFS = "Git LFS pointer.*git lfs pull"


def tar_of(path, names, header=lambda data: data):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    path.write_bytes(header(bytearray(path.read_bytes())))
    return path


def with_size(number, size: bytes):
    """A tar whose member of this number has another size in its header, with a checksum that agrees."""

    def change(data):
        start = number * 1024
        data[start + 124 : start + 136] = size.ljust(12, b"\0")
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        return data

    return change


@pytest.mark.parametrize("size", [b"-0000001000", b"\xff" * 12, b"-1", b"77777777777"])
def test_sizes_of_members_lead_nowhere_back(size, tmp_path):
    path = tar_of(tmp_path / "x.tar", ["a.txt", "b.txt", "c.txt"], with_size(1, size))
    assert [sample.key for sample in index_shard(path)] == ["a"]
    if size != b"77777777777":  # that one is only cut off
        with pytest.raises(ValueError, match="no plain tar"):
            index_shard(tar_of(tmp_path / "y.tar", ["a.txt"], with_size(0, size)))


@pytest.mark.parametrize("end", [100, 512 + 2, 1024 + 100, 1024 + 512])
def test_cut_headers(end, tmp_path):
    path = tar_of(tmp_path / "x.tar", ["a.txt", "b.txt"], lambda data: data[:end])
    try:
        assert [sample.key for sample in index_shard(path)] in ([], ["a"])
    except ValueError as error:
        assert "no plain tar" in str(error)


def test_names_in_a_tar_are_names_only(tmp_path):
    """Nothing is unpacked: a name that leads elsewhere is a key like others."""
    path = tar_of(tmp_path / "x.tar", ["../../a.txt", "/etc/b.txt"])
    assert [sample.key for sample in index_shard(path)] == ["../../a", "/etc/b"]


def test_something_behind_the_end_of_json(tmp_path):
    path = tmp_path / "x.json"
    for key, text in ((None, '{"a": 1} x'), ("data", '{"data": {"a": 1}} {}'), ("data", '{"data": {}, "data": {}}')):
        path.write_text(text)
        with pytest.raises(ValueError, match="x.json cannot be read as JSON, .*(end of the file|there twice)"):
            list(iter_json_object(path, key))
    path.write_text('{"data": {"a": 1}, "meta": {}}\n')
    assert list(iter_json_object(path, "data")) == [("a", 1)]


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + last] * 10)}]\n" for last, name in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [ALIASES, "a: &a [*a]", "a: " + "[" * 3000, "a: !!int ''", "a: !!timestamp x", "? {a: b}\n: c", "\0", "a: b: c"],
)
def test_yaml_ends_in_a_sentence(text, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    recipe = lambda path: parse_arguments([str(path)])  # noqa: E731
    for read in (load_yaml, read_mixture, read_pretraining_sets, read_questions, recipe):
        with pytest.raises(ValueError, match="x.yaml cannot be parsed, it is not YAML") as refused:
            read(path)
        assert len(str(refused.value)) < 1000


def test_aliases_may_be_used(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {b: 1}\nc: {<<: *a, d: *a}\n")
    assert load_yaml(path) == {"a": {"b": 1}, "c": {"b": 1, "d": {"b": 1}}}


def test_pointers_of_git_lfs_are_named(tmp_path):
    for name, read in (
        ("x.json", ImageStore),
        ("x.parquet", ImageStore),
        ("x.arrow", ImageStore),
        ("x.json", lambda path: list(iter_json_object(path, "data"))),
        ("x.json", lambda path: list(read_llava(path))),
        ("x.parquet", lambda path: list(read_llava(path))),
        ("x.yaml", read_mixture),
        ("x.tar", index_shard),
        ("x.png", read_image),
        ("x.mp4", read_video),
        ("x.png", lambda path: read_image(path.read_bytes())),
    ):
        path = tmp_path / name
        path.write_bytes(POINTER)
        with pytest.raises(ValueError, match=LFS):
            read(path)


@pytest.mark.parametrize(
    "table, message",
    [
        ({"id": [["a"]], "image": [b"x"]}, "ids of type list"),
        ({"id": [1.5], "image": [b"x"]}, "ids of type double"),
        ({"id": ["a"], "image": [5]}, "pictures of type int64"),
        ({"id": ["a"], "image": [[b"x"]]}, "pictures of type list"),
        ({"id": ["a"], "image": [{"path": "x"}]}, "pictures of type struct"),
        ({"id": ["a"], "base64": [True]}, "pictures of type bool"),
        ({"id": [None], "image": [b"x"]}, "a row without an id"),
        ({"ids": ["a"], "image": [b"x"]}, "has the columns ids, image"),
    ],
)
def test_parquet_of_wrong_types(table, message, tmp_path):
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=f"x.parquet .*{message}"):
        ImageStore(tmp_path / "x.parquet", tmp_path / "cache")


def test_bad_documents_and_pictures_of_mmc4_cost_themselves_only(tmp_path):
    good = {"text_list": ["A."], "image_info": [{"image_name": "a.txt", "matched_text_index": 0, "matched_sim": 1}]}
    bad = [
        b"[" * 5000,
        b"\xff{",
        b"5",
        json.dumps({**good, "text_list": [5]}).encode(),
        json.dumps({**good, "image_info": [5]}).encode(),
        json.dumps({"image_info": good["image_info"]}).encode(),
    ]
    odd_names = {**good, "image_info": [{**good["image_info"][0], "image_name": name} for name in ([], None, "a.txt")]}
    lines = [json.dumps(good).encode(), *bad, json.dumps(odd_names).encode(), json.dumps(good).encode()]
    (tmp_path / "docs_0.jsonl").write_bytes(b"\n".join(lines))
    tar_of(tmp_path / "0.tar", ["a.txt"])
    counts = mmc4_to_tar(str(tmp_path / "docs_{0..0}.jsonl"), str(tmp_path / "{0..0}.tar"), tmp_path / "out")
    assert (counts.samples, counts.images) == (3, 3)
    assert counts.left_out == {"line that is no document": len(bad), "picture not in its tar": 2}


def test_a_bad_entry_of_a_document_costs_that_picture():
    info = {"image_base64": encode_base64(picture()), "matched_text_index": 0, "matched_sim": 1.0}
    bad = [5, None, {**info, "matched_text_index": None}, {**info, "matched_text_index": float("inf")}]
    bad += [{**info, "image_base64": 5}, {**info, "matched_sim": "x"}, {"image_base64": "a"}]
    document = json.dumps({"text_list": ["A.", "B."], "image_info": [*bad, info, info]}).encode()
    build = InterleavedDocuments(min_image_bytes=0, keep_single=1)
    sample = build("x", {"json": document}, PlainEncoder(), random.Random(0))
    assert (len(sample.images), sample.num_unreadable) == (2, len(bad))


def test_bad_rows_of_laion_cost_themselves_only(tmp_path):
    pictures = [f"{i}\t{encode_base64(picture())}" for i in range(6)]
    captions = [f'{i}\t{{"captions": ["a {i}"]}}' for i in range(6)]
    pictures[1] = "1"  # no picture
    captions[2] = "two\t{}"  # another key
    (tmp_path / "image.tsv").write_text("\n".join(pictures) + "\n")
    (tmp_path / "text.tsv").write_bytes("\n".join(captions).encode().replace(b"3\t{", b"3\t\xff{") + b"\n")
    counts = laion_to_tar(tmp_path, tmp_path / "out")
    assert counts.samples == 3
    assert counts.left_out == {"row whose key or columns are damaged": 2, "no caption": 1}


def test_pictures_outside_of_their_folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in (tmp_path / "a.png", folder / "in.png"):
        path.write_bytes(picture())
    (folder / "link.png").symlink_to(tmp_path / "a.png")
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = tmp_path / "rows.json"
    for name in ("../a.png", str(tmp_path / "a.png"), "link.png", "../pictures/../a.png"):
        rows.write_text(json.dumps([{"id": "1", "image": name, "conversations": turns}]))
        with pytest.raises(ValueError, match="Record 0 of .*leads out of .*--allow-outside"):
            list(read_llava(rows, folder))
        (skipped,) = read_llava(rows, folder, "skip")
        assert skipped.left_out == "picture outside of its folder"
        (kept,) = read_llava(rows, folder, allow_outside=True)
        assert kept.pictures[0][1].read_bytes() == picture()
    rows.write_text(json.dumps([{"id": "1", "image": "sub/../in.png", "conversations": turns}]))
    assert len(list(read_llava(rows, folder))) == 1


def test_declared_sizes_are_limited_before_decoding(tmp_path):
    """A few bytes that state a hundred million pixels cost nothing but themselves, in training as in its check."""
    data = bytearray(picture())
    data[16:24] = (10_000).to_bytes(4, "big") * 2  # width and height of IHDR
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    records = {name: {"instruction": "q", "answer": "a", "image_ids": [name]} for name in ("large", "small", "narrow")}
    narrow = io.BytesIO()
    Image.new("L", (3000, 2)).save(narrow, "PNG")
    images = {"large": bytes(data), "small": picture(), "narrow": narrow.getvalue()}
    files = write_mimicit(tmp_path, "X", records, images)
    entry = MixtureEntry("IMAGE_TEXT", "X", str(files.instructions_path), str(files.images_path))
    mixture = MimicitMixture([entry], on_error="skip", cache_dir=tmp_path / "cache")
    assert [mixture[index]["id"] for index in range(3)] == ["small"] * 3
    assert mixture.skipped == {"unreadable image": 3}
    report = check_mixture([entry], cache_dir=tmp_path / "cache")
    (finding,) = report.findings
    assert finding.ids == ["large", "narrow"] and "more than the limit of 89478485" in finding.message
    options = SampleOptions(max_image_pixels=100)
    with pytest.raises(ValueError, match="24 x 16 pixels are more than the limit of 100"):
        MimicitMixture([entry], options, cache_dir=tmp_path / "cache")[1]
    assert len(check_mixture([entry], cache_dir=tmp_path / "cache", max_image_pixels=100).findings[0].ids) == 3


def test_a_line_that_is_too_long_costs_that_one():
    file = io.BytesIO(b"ab\n" + b"x" * 11 + b"\n\nabcd\n" + b"y" * 5)
    assert list(lines_of(file, 5)) == [b"ab\n", b"\n", b"\n", b"abcd\n", b"\n"]
