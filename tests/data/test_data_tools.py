"""The tools of `otter-hf data` on whole files, and what makes samples visible."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from otter_hf import FlamingoProcessor
from otter_hf.cli import main
from otter_hf.data.formats import load_mimicit, write_mimicit
from otter_hf.data.image_store import ImageStore
from otter_hf.data.images import encode_base64, image_bytes
from otter_hf.data.mixture import MimicitMixture
from otter_hf.data.preview import contact_sheet, describe_sample
from otter_hf.data.to_parquet import store_to_parquet
from otter_hf.files import claim, remove
from otter_hf.testing import idefics, otterhd
from otter_hf.testing.otter import byte_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


RECORDS = {
    "red": {"instruction": "Colour?", "answer": "red", "image_ids": ["red"], "rel_ins_ids": []},
    "both": {"instruction": "Two?", "answer": "yes", "image_ids": ["blue", "green"], "rel_ins_ids": ["red"]},
}


@pytest.fixture
def encoded(by_colour):
    return {name: image_bytes(picture) for name, picture in by_colour.items()}


@pytest.fixture
def mixture(tmp_path, by_colour):
    files = write_mimicit(tmp_path, "X", RECORDS, by_colour, {"both": ["red"]})
    settings = dict(zip(("mimicit_path", "images_path", "train_config_path"), map(str, files), strict=True))
    (tmp_path / "mix.yaml").write_text(json.dumps({"IMAGE_TEXT_IN_CONTEXT": {"X": settings}}))
    return tmp_path / "mix.yaml"


def test_json_store_to_parquet(tmp_path, encoded, capsys):
    content = {id: encode_base64(data).rstrip("=") for id, data in encoded.items()}
    (tmp_path / "X.json").write_text(json.dumps({**content, "bad": "!", "text": "AAAA", "list": [content["red"]]}))
    output = tmp_path / "new" / "X.parquet"
    assert main(["data", "to-parquet", str(tmp_path / "X.json"), "--output", str(output)]) == 0
    assert "5 pictures in" in capsys.readouterr().out
    store = ImageStore(output)
    assert {id: store.read_bytes(id) for id in store} == {**encoded, "list": encoded["red"]}
    written, left_out = store_to_parquet(tmp_path / "X.json", tmp_path / "small.parquet", resize=3)
    assert (written, left_out) == (5, ["bad", "text"])
    assert ImageStore(tmp_path / "small.parquet")["red"].size == (3, 3)


@pytest.mark.parametrize("encoding", ["bytes", "base64"])
def test_parquet_at_addresses(tmp_path, encoded, monkeypatch, encoding):
    """From and to an address, in one part and in several: the pictures, and the bytes, of local files."""
    pytest.importorskip("upath", reason="universal-pathlib is not installed: the extra scale")
    import fsspec

    memory, root = fsspec.filesystem("memory"), f"memory://{tmp_path.name}"
    (tmp_path / "X.json").write_text(json.dumps({id: encode_base64(data) for id, data in encoded.items()}))
    memory.makedirs(f"/{tmp_path.name}")
    memory.put_file(str(tmp_path / "X.json"), f"/{tmp_path.name}/X.json")
    for size in (1, 1 << 20, 100):
        monkeypatch.setattr("otter_hf.data.to_parquet.PART_BYTES", size)
        result = store_to_parquet(f"{root}/X.json", f"{root}/Y.parquet", encoding=encoding)
        assert result == (4, []) == store_to_parquet(tmp_path / "X.json", tmp_path / "Y.parquet", encoding=encoding)
        assert set(memory.ls(f"/{tmp_path.name}", detail=False)) == {f"/{tmp_path.name}/{n}" for n in NAMES}
        several = encoding == "bytes" and size < 1 << 20
        parts = sorted(path.name for path in (tmp_path / "Y.parquet").iterdir()) if several else [""]
        assert len(parts) == (4 if several else 1)
        for name in parts:
            place = f"/{tmp_path.name}/Y.parquet/{name}".rstrip("/")
            assert memory.cat_file(place) == (tmp_path / "Y.parquet" / name).read_bytes()
    assert store_to_parquet(f"{root}/Y.parquet", tmp_path / "Z.parquet") == (4, [])
    assert {id: ImageStore(tmp_path / "Z.parquet").read_bytes(id) for id in encoded} == encoded
    with pytest.raises(FileNotFoundError, match="gone.json does not exist"):
        store_to_parquet(f"{root}/gone.json", tmp_path / "Z.parquet")
    with pytest.raises(ValueError, match="would replace its input"):
        store_to_parquet(f"{root}/Y.parquet", f"{root}/Y.parquet")


NAMES = ("X.json", "Y.parquet")


@pytest.mark.parametrize("encoding", ["bytes", "base64"])
def test_killed_while_parts_get_their_names(tmp_path, encoded, monkeypatch, encoding):
    """Copied to an address part by part, or joined and deleted part by part: the next call has all of them."""
    pytest.importorskip("upath", reason="universal-pathlib is not installed: the extra scale")
    from fsspec.implementations.memory import MemoryFileSystem

    (tmp_path / "X.json").write_text(json.dumps({id: encode_base64(data) for id, data in encoded.items()}))
    monkeypatch.setattr("otter_hf.data.to_parquet.PART_BYTES", 100)
    output = f"memory://{tmp_path.name}/Y.parquet" if encoding == "bytes" else tmp_path / "Y.parquet"
    copy, copied = MemoryFileSystem.cp_file, []

    def copy_one(system, *paths):
        if copied:
            raise KeyboardInterrupt
        copied.append(paths)
        copy(system, *paths)

    def remove_one(path):
        if path.name != "store":
            return remove(path)
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cp_file", copy_one)
        patch.setattr("otter_hf.data.to_parquet.remove", remove if encoding == "bytes" else remove_one)
        with pytest.raises(KeyboardInterrupt):
            store_to_parquet(tmp_path / "X.json", output, encoding=encoding)
    assert store_to_parquet(tmp_path / "X.json", output, encoding=encoding) == (4, [])
    store = ImageStore(output)
    assert {id: store.read_bytes(id) for id in store} == encoded


def test_parts_that_another_call_has_taken(tmp_path, encoded, monkeypatch):
    (tmp_path / "X.json").write_text(json.dumps({id: encode_base64(data) for id, data in encoded.items()}))
    monkeypatch.setattr("otter_hf.data.to_parquet.run", lambda *args, **options: True)
    with pytest.raises(OSError, match="Parts of .*Y.parquet are gone: another call has finished it"):
        store_to_parquet(tmp_path / "X.json", tmp_path / "Y.parquet")
    assert not (tmp_path / "Y.parquet").exists()


def test_a_store_takes_no_folder_of_something_else(tmp_path, encoded):
    (tmp_path / "X.json").write_text(json.dumps({id: encode_base64(data) for id, data in encoded.items()}))
    (tmp_path / "mine.parquet").mkdir()
    (tmp_path / "mine.parquet" / "photo.jpg").write_bytes(b"1")
    with pytest.raises(FileExistsError, match="mine.parquet is a folder with photo.jpg in it: name another one"):
        store_to_parquet(tmp_path / "X.json", tmp_path / "mine.parquet")
    assert (tmp_path / "mine.parquet" / "photo.jpg").is_file()
    # parts of a store before are replaced
    (tmp_path / "mine.parquet" / "photo.jpg").rename(tmp_path / "mine.parquet" / "part.7.parquet")
    store_to_parquet(tmp_path / "X.json", tmp_path / "mine.parquet")
    assert (tmp_path / "mine.parquet").is_file() and ImageStore(tmp_path / "mine.parquet")["red"].size


def test_two_at_one_parquet(tmp_path, encoded):
    (tmp_path / "X.json").write_text(json.dumps({id: encode_base64(data) for id, data in encoded.items()}))
    with claim(tmp_path / ".X.parquet.lock", "it"), ThreadPoolExecutor(1) as other:
        second = other.submit(store_to_parquet, tmp_path / "X.json", tmp_path / "X.parquet")
        with pytest.raises(OSError, match="X.parquet is in use by process .* since .*: wait until it ends"):
            second.result()
    assert not (tmp_path / "X.parquet").exists()


def test_broken_stores_leave_no_parquet(tmp_path, encoded):
    (tmp_path / "X.json").write_text('{"red": "AAAA", ')
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        store_to_parquet(tmp_path / "X.json", tmp_path / "X.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["X.json", "cache"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["to-parquet", "X.json", "--output", "X.json"], "The output must end in .parquet, got X.json"),
        (["to-parquet", "P.parquet", "--output", "P.parquet"], "would replace its input P.parquet: name another one"),
        (["to-parquet", "F.parquet", "--output", "F.parquet"], "would replace its input F.parquet/1.parquet"),
        (
            ["to-parquet", "I.json", "--output", "Y.parquet"],
            "I.json that can be decoded: is it an image store?",
        ),
        (["to-parquet", "I.json", "--output", "Y.parquet", "--base64"], "no picture in I.json that can be decoded"),
        (["to-parquet", "gone.json", "--output", "Y.parquet"], "The image store gone.json does not exist"),
        (["make-train-config", "I.json", "--output", "I.json"], "would replace its input I.json"),
        (["make-train-config", "gone.json", "--output", "t.json"], "No such file or directory: gone.json"),
        (["merge", "--name", "a/b", "--output", "m", "--dataset", "I.json"], "file names, got 'a/b': leave out"),
        (
            ["merge", "--name", "I", "--output", ".", "--dataset", "I.json", "X.json", "I_train.json"],
            "its input I_train",
        ),
        (
            ["neighbours", "I_instructions.json", "--output", "I", "--encoder", "e", "--k", "1", "--context", "1"],
            "would",
        ),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, encoded, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "X.json").write_text(json.dumps({"red": encode_base64(encoded["red"])}))
    (tmp_path / "I.json").write_text(json.dumps({"meta": {}, "data": {"a": {"instruction": "q", "answer": "a"}}}))
    (tmp_path / "I_instructions.json").write_text((tmp_path / "I.json").read_text())
    store_to_parquet("X.json", "P.parquet")
    (tmp_path / "F.parquet").mkdir()
    store_to_parquet("X.json", "F.parquet/1.parquet")

    def files():
        paths = (path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts)
        return {path: path.read_bytes() for path in paths}

    before = files()
    capsys.readouterr()
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("otter-hf: ")
    assert files() == before


def test_train_config_command(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("otter_hf.data.formats.logger.warning", messages.append)
    related = {"a": ["b", "c", "zz"], "b": ["a", "c"], "c": [], "d": ["a"]}
    records = {id: {"instruction": "q", "answer": "a", "rel_ins_ids": ids} for id, ids in related.items()}
    (tmp_path / "X.json").write_text(json.dumps({"data": {**records, "e": {"instruction": "q", "answer": "a"}}}))
    command = ["data", "make-train-config", str(tmp_path / "X.json"), "--output", str(tmp_path / "train.json")]
    assert main(command) == 0
    assert json.loads((tmp_path / "train.json").read_text()) == {"a": ["b", "c"], "d": ["a"]}
    assert messages == ["1 records have no rel_ins_ids and are left out, the first is 'e'."]
    assert main([*command, "--remove-rel-ins-ids"]) == 0
    assert json.loads((tmp_path / "train.json").read_text()) == {"a": [], "d": []}


def test_merge(tmp_path, by_colour, encoded, capsys):
    first = write_mimicit(tmp_path / "1", "A", RECORDS, by_colour, {"both": ["red"]})
    more = {"white": {"instruction": "q", "answer": "a", "image_ids": ["white"]}}
    second = write_mimicit(tmp_path / "2", "B", more, {"white": by_colour["white"]})
    text = write_mimicit(tmp_path / "3", "C", {"t": {"instruction": "q", "answer": "a"}})
    datasets = [[*map(str, first)], [*map(str, second[:2])], [str(text.instructions_path)]]
    arguments = [part for paths in datasets for part in ("--dataset", *paths)]
    assert main(["data", "merge", "--name", "M", "--output", str(tmp_path / "M"), *arguments]) == 0
    out = tmp_path / "M"
    table, store = load_mimicit(out / "M_instructions.json", out / "M.parquet", out / "M_train.json")
    assert table["id"] == ["both", "white", "t"] and table[0]["context"][0]["id"] == "red"
    assert {id: store.read_bytes(id) for id in store} == encoded
    assert main(["data", "merge", "--name", "N", "--output", str(tmp_path), *arguments[-2:], *arguments[-2:]]) == 2
    assert "Record 't' is given twice" in capsys.readouterr().err
    assert main(["data", "merge", "--name", "N", "--output", str(tmp_path), "--dataset", "-"]) == 2


def test_a_sample_is_described(mixture, tiny_processor):
    (sample,) = MimicitMixture(mixture)
    text = describe_sample(sample, tiny_processor, colour=False)
    assert "2 media" in text and "[1]<image>User:Colour? GPT:<answer>{red<|endofchunk|>}" in text
    assert "[2]<image>User:Two? GPT:<answer>{yes<|endofchunk|></s>}" in text
    coloured = describe_sample(sample, tiny_processor)
    assert "\x1b[44;4mred<|endofchunk|>\x1b[0m" in coloured and "\x1b[42m<image>User:Two?" in coloured
    sheet = contact_sheet(sample)
    assert sheet.size == (320, 320)
    # red above; blue and green beside each other below
    assert [sheet.getpixel(place) for place in ((3, 3), (3, 163), (163, 163), (163, 3))] == [
        (255, 0, 0),
        (0, 0, 255),
        (0, 255, 0),
        (255, 255, 255),
    ]


@pytest.mark.parametrize("family", ["flamingo", "otterhd", "idefics"])
def test_a_sample_is_described_for_every_family(mixture, tiny_processor, family):
    (sample,) = MimicitMixture(mixture)
    if family == "flamingo":
        processor = FlamingoProcessor(
            tiny_processor.image_processor, FlamingoProcessor.prepare_tokenizer(byte_tokenizer())
        )
        expected = ["[1]<image>User:Colour? GPT:{red<|endofchunk|>}[2]<image>User:Two? GPT:{yes<|endofchunk|>"]
    elif family == "otterhd":
        processor = otterhd.tiny_processor()
        expected = ["[2 image tokens]<s> User:Colour? Assistant:\x04{red}[4 image tokens]", ":\x04{yes|ENDOFTEXT|}"]
    else:
        processor = idefics.tiny_processor()
        expected = ["[1]<image>", "Assistant:{red<end_of_utterance>}", "[2]<image>", "{yes<end_of_utterance>"]
    text = describe_sample(sample, processor, colour=False)
    assert all(piece in text for piece in expected), text
    if family != "flamingo":
        with pytest.raises(ValueError, match="leave it out"):
            describe_sample(sample, processor, "llama2")


def test_show_and_stats_commands(tmp_path, mixture, tiny_processor, capsys):
    png = tmp_path / "new" / "sheet.png"
    assert main(["data", "show", str(mixture), "--png", str(png)]) == 0
    assert capsys.readouterr().out.startswith("<image>User:Colour? GPT:<answer>red<|endofchunk|><image>User:Two?")
    assert Image.open(png).format == "PNG"
    assert main(["data", "show", str(mixture), "7"]) == 2
    assert "sample 7 does not exist" in capsys.readouterr().err
    tiny_processor.save_pretrained(tmp_path / "model")
    assert main(["data", "show", str(mixture), "--processor", str(tmp_path / "model"), "--no-colour"]) == 0
    assert "{yes<|endofchunk|></s>}" in capsys.readouterr().out
    assert main(["data", "stats", str(mixture), "--tokenizer", str(tmp_path / "model"), "--png", str(png)]) == 0
    out = capsys.readouterr().out
    assert "IMAGE_TEXT_IN_CONTEXT" in out and "turns (of a sample)      1    2       2    2    2" in out
    assert "length (tokens of a sample's text)" in out and "width (of a picture, pixels)" in out
    assert Image.open(png).format == "PNG"
