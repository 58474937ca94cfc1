"""MMC4 and LAION as they are published, to shards that the stream reads."""

import base64
import io
import json
import tarfile
import zipfile

import pytest
from pretraining_shards import padded, picture

from otter_hf.cli import main
from otter_hf.data.pretraining import PretrainingSet, PretrainingStream, expand_shards
from otter_hf.data.pretraining.converters import laion_to_tar, mmc4_to_tar
from otter_hf.data.pretraining.shards import ShardReader, index_shard


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_mmc4(folder, shards=2, zipped=False):
    """Per shard 3 documents of two pictures each: `images/S_D_I.png`."""
    for shard in range(shards):
        lines = []
        with tarfile.open(folder / f"shard_{shard}_images_v2.tar", "w") as tar:
            directory = tarfile.TarInfo("images")
            directory.type = tarfile.DIRTYPE
            tar.addfile(directory)
            for document in range(3):
                names = [f"{shard}_{document}_{image}.png" for image in range(2)]
                for image, name in enumerate(names):
                    add(tar, f"images/{name}", padded(picture(10 * document + image), 11_000))
                info = [
                    {"image_name": name, "raw_url": "http://x", "matched_text_index": 1 - image, "matched_sim": 0.5}
                    for image, name in enumerate(names)
                ]
                lines.append(json.dumps({"text_list": ["A.", "B."], "url": f"u{document}", "image_info": info}))
        text = "\n".join(lines) + "\n"
        name = f"docs_shard_{shard}_v2.jsonl"
        if zipped:
            with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
                archive.writestr(name, text)
        else:
            (folder / name).write_text(text)


def read_all(folder):
    reader = ShardReader(100)
    return [reader.read(path, sample) for path in expand_shards(folder) for sample in index_shard(path)]


@pytest.mark.parametrize("zipped", [False, True])
def test_mmc4_to_tar(tmp_path, zipped, tiny_processor):
    write_mmc4(tmp_path, zipped=zipped)
    suffix = ".zip" if zipped else ""
    docs, images = f"{tmp_path}/docs_shard_{{0..1}}_v2.jsonl{suffix}", f"{tmp_path}/shard_{{0..1}}_images_v2.tar"
    counts = mmc4_to_tar(docs, images, tmp_path / "out", max_samples=2)
    assert (counts.samples, counts.images, dict(counts.left_out)) == (6, 12, {})
    names = [f"docs_shard_{shard}_v2.{part:03d}.tar" for shard in range(2) for part in range(2)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".made_from.json", *names, "sizes.json"]
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == dict(zip(names, [2, 1, 2, 1], strict=True))
    documents = [json.loads(parts["json"]) for parts in read_all(tmp_path / "out")]
    assert [document["url"] for document in documents] == ["u0", "u1", "u2"] * 2
    data = base64.b64decode(documents[1]["image_info"][1]["image_base64"], validate=True)
    assert data == padded(picture(11), 11_000)
    assert documents[1]["image_info"][1]["raw_url"] == "http://x"

    stream = PretrainingStream([PretrainingSet("mmc4", "interleaved", tmp_path / "out", batch_size=3)], tiny_processor)
    batch = next(stream.track(stream.dataloader()))["mmc4"]
    assert batch["pixel_values"].shape == (3, 2, 1, 3, 2, 2)
    # image_info has the picture of the second sentence first
    reds = (batch["pixel_values"][:, :, 0, 0, 0, 0] * 255).round()
    assert (reds[:, 0] - reds[:, 1]).tolist() == [1, 1, 1]
    # what is complete stays
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert mmc4_to_tar(docs, images, tmp_path / "out", max_samples=2).samples == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")} == before


def test_what_changed_is_converted_again(tmp_path, caplog):
    write_mmc4(tmp_path)
    docs, images = f"{tmp_path}/docs_shard_{{0..1}}_v2.jsonl", f"{tmp_path}/shard_{{0..1}}_images_v2.tar"
    mmc4_to_tar(docs, images, tmp_path / "out", max_samples=1)
    lines = (tmp_path / "docs_shard_0_v2.jsonl").read_text().splitlines()
    (tmp_path / "docs_shard_0_v2.jsonl").write_text(lines[1] + "\n")
    assert mmc4_to_tar(docs, images, tmp_path / "out", max_samples=1).samples == 1
    assert "docs_shard_0_v2.*.tar" in caplog.text and "docs_shard_0_v2.jsonl has changed since" in caplog.text
    assert [json.loads(parts["json"])["url"] for parts in read_all(tmp_path / "out")] == ["u1", "u0", "u1", "u2"]
    assert sum(json.loads((tmp_path / "out" / "sizes.json").read_text()).values()) == 4
    caplog.clear()
    assert mmc4_to_tar(docs, images, tmp_path / "out").samples == 4
    assert "max_samples was 1 and is 30000" in caplog.text
    (tmp_path / "other").mkdir()
    write_mmc4(tmp_path / "other")
    with pytest.raises(ValueError, match="of another file .*: choose another output"):
        mmc4_to_tar(docs.replace("docs_shard", "other/docs_shard"), images, tmp_path / "out")
    with pytest.raises(ValueError, match="would both become docs_shard_0_v2.*: rename one"):
        mmc4_to_tar([docs, docs.replace("docs_shard", "other/docs_shard")], [images, images], tmp_path / "both")


def test_a_missing_picture_drops_only_that_picture(tmp_path):
    write_mmc4(tmp_path, shards=1)
    path = tmp_path / "docs_shard_0_v2.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["image_info"][0]["image_name"] = "gone.png"
    for info in lines[1]["image_info"]:
        info["image_name"] = "gone.png"
    path.write_text("\n".join([*map(json.dumps, lines), "{broken"]))
    counts = mmc4_to_tar(str(path), str(tmp_path / "shard_0_images_v2.tar"), tmp_path / "out")
    assert (counts.samples, counts.images) == (2, 3)
    assert counts.left_out == {
        "picture not in its tar": 3,
        "document without pictures": 1,
        "line that is no document": 1,
    }
    names = [[info["image_name"] for info in json.loads(p["json"])["image_info"]] for p in read_all(tmp_path / "out")]
    assert names == [["0_0_1.png"], ["0_2_0.png", "0_2_1.png"]]


def test_a_truncated_tar_of_pictures_keeps_what_is_in_front(tmp_path):
    write_mmc4(tmp_path, shards=1)
    path = tmp_path / "shard_0_images_v2.tar"
    path.write_bytes(path.read_bytes()[: 512 + 2 * (512 + 11_264) + 700])  # within the third picture
    counts = mmc4_to_tar(str(tmp_path / "docs_shard_0_v2.jsonl"), str(path), tmp_path / "out")
    assert (counts.samples, counts.images) == (1, 2)


@pytest.mark.parametrize(
    "numbers",
    ["{0..3}", "{0,2,3}", "*", ["0", "1", "2", "3"], ["{0..1}", "{2..3}"], "{000..003}"],
)
def test_mmc4_with_its_holes(tmp_path, numbers, caplog):
    """Of 4 numbers, 1 was never published, and 3 has no pictures; both are named, the others converted."""
    write_mmc4(tmp_path, shards=4)
    (tmp_path / "docs_shard_1_v2.jsonl").unlink()
    (tmp_path / "shard_1_images_v2.tar").unlink()
    (tmp_path / "shard_3_images_v2.tar").unlink()
    width = 3 if numbers == "{000..003}" else 1
    for number in (0, 2, 3):  # docs with leading zeros belong to pictures without
        path = tmp_path / f"docs_shard_{number}_v2.jsonl"
        path.rename(path.with_name(f"docs_shard_{number:0{width}d}_v2.jsonl"))
    texts = [numbers] if isinstance(numbers, str) else numbers
    docs = [f"{tmp_path}/docs_shard_{one}_v2.jsonl" for one in texts]
    images = [f"{tmp_path}/shard_{one.replace('00', '')}_images_v2.tar" for one in texts]
    counts = mmc4_to_tar(*((docs[0], images[0]) if isinstance(numbers, str) else (docs, images)), tmp_path / "out")
    assert (counts.samples, counts.images) == (6, 12)
    left_out = 1 if numbers in ("*", "{0,2,3}") else 2  # a star does not know of 1
    assert counts.left_out == {"number without documents or pictures": left_out}
    assert "pictures of" in caplog.text or "shard_3_images_v2.tar" in caplog.text
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [
        f"docs_shard_{number:0{width}d}_v2.000.tar" for number in (0, 2)
    ]


def test_a_lost_picture_leaves_the_similarity_matrix_too(tmp_path):
    write_mmc4(tmp_path, shards=1)
    path = tmp_path / "docs_shard_0_v2.jsonl"
    document = json.loads(path.read_text().splitlines()[0])
    document["image_info"][0]["image_name"] = "gone.png"
    path.write_text(json.dumps({**document, "similarity_matrix": [[0.1, 0.2], [0.3, 0.4]]}))
    mmc4_to_tar(str(path), str(tmp_path / "shard_0_images_v2.tar"), tmp_path / "out")
    (kept,) = [json.loads(parts["json"]) for parts in read_all(tmp_path / "out")]
    assert [info["image_name"] for info in kept["image_info"]] == ["0_0_1.png"]
    assert kept["similarity_matrix"] == [[0.3, 0.4]]


def test_mmc4_patterns(tmp_path):
    write_mmc4(tmp_path, shards=1)
    docs, images = str(tmp_path / "docs_shard_0_v2.jsonl"), str(tmp_path / "shard_0_images_v2.tar")
    with pytest.raises(ValueError, match="names 1 files or patterns and image_shards 2"):
        mmc4_to_tar(docs, [images, images], tmp_path / "out")
    with pytest.raises(ValueError, match="no number of which both files are there"):
        mmc4_to_tar(docs.replace("_0_", "_1_"), images, tmp_path / "out")
    (tmp_path / "broken.tar").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match="broken.tar is no plain tar"):
        mmc4_to_tar(docs, str(tmp_path / "broken.tar"), tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def write_tsv(folder, rows):
    """`rows` of `(key, picture text, caption text)` with the .lineidx files of the original."""
    for name, column in (("train-image-00.tsv", 1), ("train-text-00.tsv", 2)):
        offsets, data = [], b""
        for row in rows:
            offsets.append(str(len(data)))
            data += f"{row[0]}\t{row[column]}\n".encode()
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".lineidx").write_text("\n".join(offsets) + "\n")


def row(number, caption=None, kind="PNG"):
    caption = json.dumps({"captions": [f"caption {number}" if caption is None else caption, "other"]})
    return str(number), base64.b64encode(picture(number, kind=kind)).decode(), caption


def test_laion_to_tar(tmp_path, tiny_processor):
    rows = [row(0), row(1, kind="JPEG"), row(2), row(3)]
    rows[2] = (*rows[2][:2], json.dumps({"captions": [None]}))
    rows[3] = ("3", "no picture", rows[3][2])
    write_tsv(tmp_path, rows)
    counts = laion_to_tar(tmp_path, tmp_path / "out")
    assert (counts.samples, counts.left_out) == (2, {"no caption": 1, "no picture": 1})
    assert read_all(tmp_path / "out") == [
        {"png": picture(0), "txt": b"caption 0"},
        {"jpg": picture(1, kind="JPEG"), "txt": b"caption 1"},
    ]
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {"train-image-00.000.tar": 2}
    stream = PretrainingStream([PretrainingSet("laion", "pairs", tmp_path / "out", batch_size=2)], tiny_processor)
    (batches,) = stream.track(stream.dataloader())
    texts = tiny_processor.tokenizer.batch_decode(batches["laion"]["input_ids"])
    assert sorted(texts) == [f"<image>caption {n}<|endofchunk|></s>" for n in (0, 1)]


def test_laion_files_that_do_not_belong_together(tmp_path):
    write_tsv(tmp_path, [row(0), row(1)])
    text = tmp_path / "train-text-00.tsv"
    lines = text.read_text().splitlines(keepends=True)
    for content, message in (
        ("".join(reversed(lines)), "Row 1 .* the key '0' and that of train-text-00.tsv '1'"),
        (lines[0], "Row 2 .* the key '1' and that of train-text-00.tsv ''"),
    ):
        text.write_text(content)
        with pytest.raises(ValueError, match=message):
            laion_to_tar(tmp_path, tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())
    text.unlink()
    with pytest.raises(ValueError, match="train-text-00.tsv does not exist"):
        laion_to_tar(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"no \*image\*.tsv"):
        laion_to_tar(tmp_path / "out", tmp_path / "out2")


def test_obelics_to_tar(tmp_path, tiny_processor, capsys):
    """Rows as they are published, pictures as img2dataset writes them; one was not downloaded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"images": ["u1", None, "gone", None, "u2"], "texts": [None, "A.", None, "B.", None], "metadata": "[]"},
        {"images": [None, "gone"], "texts": ["C.", None], "metadata": "[]"},
        {"images": [None, "u3", "u1"], "texts": ["D.", None, None], "metadata": "[]"},
        {"images": ["u1", None, "u2"], "texts": [None, "E."], "metadata": "[]"},
    ]
    (tmp_path / "obelics").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "obelics" / "train-0.parquet")
    (tmp_path / "images").mkdir()
    with tarfile.open(tmp_path / "images" / "00000.tar", "w") as tar:
        for number in (1, 2, 3):
            add(tar, f"{number:09d}.jpg", padded(picture(number), 11_000))
            add(tar, f"{number:09d}.json", json.dumps({"url": f"u{number}", "status": "success"}).encode())
        add(tar, "000000004.json", json.dumps({"url": "gone", "status": "failed_to_download"}).encode())
    command = ["data", "obelics-to-tar", str(tmp_path / "obelics"), "--image-shards", str(tmp_path / "images")]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "2 samples with 4 pictures" in out and "left out: 2 (picture that was not downloaded)" in out
    assert "left out: 1 (document without pictures)" in out
    assert "left out: 1 (document whose images and texts differ in number)" in out
    documents = [json.loads(parts["json"]) for parts in read_all(tmp_path / "out")]
    places = [[info["matched_text_index"] for info in document["image_info"]] for document in documents]
    assert ([document["text_list"] for document in documents], places) == (
        [["A.", "B.", ""], ["D.", ""]],
        [[0, 2], [1, 1]],
    )
    options = {"keep_single": 1}
    sets = [PretrainingSet("obelics", "interleaved", tmp_path / "out", batch_size=2, options=options)]
    stream = PretrainingStream(sets, tiny_processor)
    batch = next(stream.track(stream.dataloader()))["obelics"]
    texts = tiny_processor.tokenizer.batch_decode(batch["input_ids"])
    assert any("<image>A. B.<|endofchunk|><image>" in text for text in texts)
    assert any("D.<image><image><|endofchunk|>" in text for text in texts)
    pq.write_table(pa.Table.from_pylist([{"a": 1}]), tmp_path / "obelics" / "train-0.parquet")
    assert main([*command, "--output", str(tmp_path / "other")]) == 2
    assert "has no column images or texts" in capsys.readouterr().err


def test_commands(tmp_path, capsys):
    write_mmc4(tmp_path)
    arguments = ["--doc-shards", f"{tmp_path}/docs_shard_{{0..1}}_v2.jsonl"]
    arguments += ["--image-shards", f"{tmp_path}/shard_{{0..1}}_images_v2.tar"]
    assert main(["data", "mmc4-to-tar", *arguments, "--output", str(tmp_path / "mmc4")]) == 0
    assert "6 samples with 12 pictures" in capsys.readouterr().out
    write_tsv(tmp_path, [row(0), (*row(1)[:2], "null")])
    assert main(["data", "laion-to-tar", str(tmp_path), "--output", str(tmp_path / "laion")]) == 0
    assert "1 samples with 1 pictures" in (out := capsys.readouterr().out) and "left out: 1 (no caption)" in out
    assert main(["data", "laion-to-tar", str(tmp_path / "mmc4"), "--output", str(tmp_path / "laion")]) == 2
