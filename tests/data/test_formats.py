import base64
import io
import json
import pickle
import random
import re

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from otter_hf.data.formats import load_mimicit, make_train_config, write_mimicit
from otter_hf.data.image_store import ImageStore
from otter_hf.data.images import decode_base64, decode_image, encode_base64, image_bytes
from otter_hf.data.json_stream import iter_json_object


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def encoded(by_colour):
    return {f"X_IMG_{name}": image_bytes(picture) for name, picture in by_colour.items()}


RECORDS = {
    "X_INS_2": {"instruction": "Colour?", "answer": "red", "image_ids": ["X_IMG_red"], "rel_ins_ids": ["X_INS_1"]},
    "X_INS_1": {"instruction": "Sky?", "answer": "blue", "image_ids": "X_IMG_blue", "extra": {"ignored": 1}},
    "X_INS_3": {"instruction": "Hello", "answer": "Hi", "image_ids": None, "rel_ins_ids": ["X_INS_2", "X_INS_1"]},
    "X_INS_0": {"instruction": "Two?", "answer": "yes", "image_ids": ["X_IMG_white", "X_IMG_green"]},
    "X_INS_4": {"instruction": "None", "answer": "ok", "rel_ins_ids": None},
}


def write_json(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def instructions(tmp_path):
    return write_json(tmp_path / "X_instructions.json", {"meta": {"version": "0.0.1"}, "data": RECORDS})


# instructions and train config


def test_instructions_keep_order_and_types(instructions):
    dataset, store = load_mimicit(instructions)
    assert dataset["id"] == list(RECORDS)
    assert list(dataset["image_ids"]) == [["X_IMG_red"], ["X_IMG_blue"], [], ["X_IMG_white", "X_IMG_green"], []]
    assert dataset[0]["answer"] == "red" and dataset[0]["context"] == []
    assert len(store) == 0


def test_train_config_chooses_examples_and_context(instructions, tmp_path):
    config = write_json(tmp_path / "X_train.json", {"X_INS_3": ["X_INS_0", "X_INS_2"], "X_INS_2": []})
    dataset, _ = load_mimicit(instructions, train_config_path=config, populate_rel_ins=True)
    assert dataset["id"] == ["X_INS_3", "X_INS_2"]
    assert [turn["answer"] for turn in dataset[0]["context"]] == ["yes", "red"]
    assert dataset[0]["context"][0]["image_ids"] == ["X_IMG_white", "X_IMG_green"]
    assert dataset[1]["context"] == []


def test_context_from_rel_ins_ids(instructions):
    dataset, _ = load_mimicit(instructions, populate_rel_ins=True)
    assert dataset["id"] == list(RECORDS)
    assert [[turn["id"] for turn in row] for row in dataset["context"]] == [
        ["X_INS_1"],
        [],
        ["X_INS_2", "X_INS_1"],
        [],
        [],
    ]


def test_more_examples_than_one_batch(tmp_path):
    records = {
        f"R{i}": {"instruction": f"Q{i}", "answer": f"A{i}", "rel_ins_ids": [f"R{i // 2}"]} for i in range(2500)
    }
    path = write_json(tmp_path / "big.json", {"data": records})
    dataset, _ = load_mimicit(path, populate_rel_ins=True)
    assert len(dataset) == 2500
    assert [dataset[i]["context"][0]["answer"] for i in (0, 999, 1000, 2499)] == ["A0", "A499", "A500", "A1249"]


def test_a_changed_file_is_read_again(instructions):
    assert len(load_mimicit(instructions)[0]) == 5
    write_json(instructions, {"data": {"only": {"instruction": "a", "answer": "b"}}})
    assert load_mimicit(instructions)[0]["id"] == ["only"]


@pytest.mark.parametrize(
    "content, message",
    [
        ({"meta": {}}, 'X.json cannot be read as JSON.* there is no "data" in it'),
        ({"data": []}, "expected '{', found '\\['"),
        ("", "ended before '{'"),
        ('{"data": {"a": {"instruction": "x"', "X.json cannot be read as JSON"),
        ('{"data": {"a": {} "b": {}}}', "expected ',', found '\"'"),
        ('{"data": {"\\ud800": {}}}', "not valid Unicode"),
        ({"data": {"R7": "text"}}, "Record 'R7' of .* must be an object, got 'text'"),
        ({"data": {"R7": {"image_ids": [1]}}}, "image_ids of record 'R7' .* got \\[1\\]"),
        ({"data": {"R7": {"rel_ins_ids": {"a": 1}}}}, "rel_ins_ids of record 'R7'"),
        ('{"data": {"R7": {}, "R8": {}, "R7": {}}}', "Record 'R7' is in .* twice"),
    ],
)
def test_broken_instructions_are_named(tmp_path, content, message):
    path = write_json(tmp_path / "X.json", content)
    with pytest.raises(ValueError, match=message):
        load_mimicit(path)
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_text_that_is_missing_waits_until_it_is_used(tmp_path):
    path = write_json(tmp_path / "X.json", '{"data": {"a": {"answer": 5}, "b": {"instruction": "\\ud800?"}}}')
    dataset, _ = load_mimicit(path)
    assert dataset["instruction"] == [None, "??"] and dataset["answer"] == [None, None]


@pytest.mark.parametrize(
    "config, message",
    [
        ({"nope": []}, "Id 'nope' is a key in .*X_train.json"),
        ({"X_INS_1": ["gone"]}, "Id 'gone' is in the context of 'X_INS_1'"),
        ({"X_INS_1": 3}, "context of 'X_INS_1' in .* got 3"),
    ],
)
def test_broken_train_configs_are_named(instructions, tmp_path, config, message):
    path = write_json(tmp_path / "X_train.json", config)
    with pytest.raises(ValueError, match=message):
        load_mimicit(instructions, train_config_path=path)


def test_unknown_contexts_can_be_skipped(instructions, tmp_path):
    path = write_json(tmp_path / "X_train.json", {"nope": [], "X_INS_1": ["gone", "X_INS_0"]})
    dataset, _ = load_mimicit(instructions, train_config_path=path, on_error="skip")
    assert dataset["id"] == ["X_INS_1"]
    assert [turn["id"] for turn in dataset[0]["context"]] == ["X_INS_0"]


def test_train_config_tool():
    related = {"a": ["b", "c", "zz"], "b": ["a", "c"], "c": [], "d": ["a"], "e": None}
    records = {id: {"rel_ins_ids": ids} for id, ids in related.items()}
    assert make_train_config(records) == {"a": ["b", "c"], "d": ["a"]}


def test_long_json_is_read_in_pieces(tmp_path):
    # values cross the borders of the reading window everywhere
    content = {f"k{i}": ["é" * (i % 50), i, {"x": [i * 1.5, None, True]}] for i in range(10_000)}
    content["long"] = "y" * 3_000_000
    path = write_json(tmp_path / "long.json", content)
    assert dict(iter_json_object(path)) == content
    write_json(path, {"first": 1, "data": content})
    assert dict(iter_json_object(path, "data")) == content


# image stores


def frame(encoded):
    return pd.DataFrame({"base64": [encode_base64(data) for data in encoded.values()]}, index=list(encoded))


def pandas_store(tmp_path, encoded):
    frame(encoded).to_parquet(tmp_path / "X.parquet")
    return tmp_path / "X.parquet"


def dask_store(tmp_path, encoded):
    # dask writes one file per partition and names the index __null_dask_index__
    (tmp_path / "X.parquet").mkdir()
    for number, rows in enumerate((frame(encoded)[:3], frame(encoded)[3:])):
        rows.rename_axis("__null_dask_index__").to_parquet(tmp_path / "X.parquet" / f"part.{number}.parquet")
    return tmp_path / "X.parquet"


def column_store(tmp_path, encoded):
    frame(encoded).rename_axis("image_id").reset_index().to_parquet(tmp_path / "X.parquet", index=False)
    return tmp_path / "X.parquet"


def no_metadata_store(tmp_path, encoded):
    table = pa.Table.from_pandas(frame(encoded)).replace_schema_metadata(None)
    pq.write_table(table, tmp_path / "X.parquet")
    return tmp_path / "X.parquet"


def image_feature_store(tmp_path, encoded):
    rows = [{"id": id, "image": {"bytes": data, "path": None}} for id, data in encoded.items()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "X.parquet")
    return tmp_path / "X.parquet"


def list_store(tmp_path, encoded):
    frame(encoded)[:2].to_parquet(tmp_path / "1.parquet")
    frame(encoded)[2:].to_parquet(tmp_path / "2.parquet")
    return [tmp_path / "1.parquet", str(tmp_path / "2.parquet")]


def json_store(tmp_path, encoded):
    return write_json(tmp_path / "X.json", {id: encode_base64(data) for id, data in encoded.items()})


def json_list_store(tmp_path, encoded):
    return write_json(tmp_path / "X.json", {id: [encode_base64(data)] for id, data in encoded.items()})


def arrow_store(tmp_path, encoded):
    table = pa.table({"id": list(encoded), "image": pa.array(list(encoded.values()), pa.binary())})
    with pa.ipc.new_file(tmp_path / "X.arrow", table.schema) as writer:
        writer.write_table(table)
    return tmp_path / "X.arrow"


STORES = [
    pandas_store,
    dask_store,
    column_store,
    no_metadata_store,
    image_feature_store,
    list_store,
    json_store,
    json_list_store,
    arrow_store,
]


@pytest.mark.parametrize("write", STORES, ids=lambda write: write.__name__)
def test_every_kind_of_store(tmp_path, encoded, by_colour, write):
    path = write(tmp_path, encoded)
    for store in (ImageStore(path), ImageStore(path), pickle.loads(pickle.dumps(ImageStore(path)))):
        assert list(store) == list(encoded) and len(store) == 4
        assert "X_IMG_red" in store and "red" not in store
        for name, picture in by_colour.items():
            assert store.read_bytes(f"X_IMG_{name}") == encoded[f"X_IMG_{name}"]
            image = store[f"X_IMG_{name}"]
            assert image.mode == "RGB" and image.tobytes() == picture.tobytes()
        with pytest.raises(KeyError, match="X_IMG_pink"):
            store["X_IMG_pink"]


def test_pickled_stores_carry_no_pictures(tmp_path):
    path = arrow_store(tmp_path, {f"I{i}": bytes(10_000) for i in range(100)})
    assert len(pickle.dumps(ImageStore(path))) < 1000


def test_same_id_in_two_stores(tmp_path, encoded):
    first = pandas_store(tmp_path, encoded)
    same = write_json(tmp_path / "same.json", {"X_IMG_red": encode_base64(encoded["X_IMG_red"])})
    assert ImageStore([first, same]).read_bytes("X_IMG_red") == encoded["X_IMG_red"]
    other = write_json(tmp_path / "other.json", {"X_IMG_red": encode_base64(encoded["X_IMG_blue"])})
    with pytest.raises(ValueError, match="'X_IMG_red' stands for two different pictures, in .*X.parquet and .*other"):
        ImageStore([first, other])


def test_damaged_pictures_fail_when_used(tmp_path, encoded):
    good = encode_base64(encoded["X_IMG_red"])
    path = write_json(tmp_path / "X.json", {"good": good, "text": "AAAA", "base64": "!!!", "null": None, "empty": ""})
    store = ImageStore(path)
    assert store["good"].size == (5, 4)
    for id in ("text", "base64", "null", "empty"):
        with pytest.raises(OSError, match="damaged base64|the picture cannot be read"):
            store[id]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("X.parquet", "not parquet", "X.parquet cannot be read as parquet"),
        ("X.arrow", "not arrow", "X.arrow cannot be read as Arrow"),
        ("X.json", "[1]", "X.json cannot be read as JSON"),
        ("X.zip", "", "X.zip is of no known kind"),
    ],
)
def test_broken_stores_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        ImageStore(write_json(tmp_path / name, content))


def test_stores_without_the_right_columns(tmp_path, encoded):
    frame(encoded).reset_index(drop=True).to_parquet(tmp_path / "ids.parquet")
    with pytest.raises(ValueError, match="ids.parquet has the columns base64: it needs the image ids"):
        ImageStore(tmp_path / "ids.parquet")
    with pytest.raises(FileNotFoundError, match="gone.parquet does not exist"):
        ImageStore(tmp_path / "gone.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="folder without .parquet files"):
        ImageStore(tmp_path / "empty")


# base64 and pictures


def test_five_spellings_of_base64(encoded):
    data = encoded["X_IMG_red"] + b"\xfb\xff\xfe"  # makes both special characters appear
    text = encode_base64(data)
    spellings = [
        text,
        text.replace("+", "-").replace("/", "_"),
        text.rstrip("="),
        "\n " + "\n".join(text[i : i + 60] for i in range(0, len(text), 60)) + " \n",
        "data:image/png;base64," + text,
    ]
    assert "+" in text or "/" in text
    assert {decode_base64(spelling) for spelling in spellings} == {data}


def test_random_blobs_survive_both_alphabets():
    source = random.Random(0)
    for _ in range(1000):
        data = source.randbytes(source.randrange(1, 300))
        assert re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", encode_base64(data))
        assert decode_base64(encode_base64(data)) == data
        assert decode_base64(base64.urlsafe_b64encode(data).decode().rstrip("=")) == data


@pytest.mark.parametrize("text", ["A", "AAAA!", "é", "AA=A", "data:image/png;base64"])
def test_wrong_base64_is_refused(text):
    with pytest.raises(ValueError):
        decode_base64(text)


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_pictures_of_all_kinds_become_rgb(by_colour):
    gradient = Image.radial_gradient("L").resize((64, 64))
    red = by_colour["red"].resize((64, 64))
    assert decode_image(saved(red.convert("P"), "PNG")).tobytes() == red.tobytes()
    assert decode_image(saved(red.convert("RGBA"), "PNG")).tobytes() == red.tobytes()
    assert decode_image(saved(gradient, "PNG")).tobytes() == gradient.convert("RGB").tobytes()
    assert decode_image(saved(red.convert("CMYK"), "JPEG")).mode == "RGB"


def test_truncated_and_huge_pictures(monkeypatch):
    data = saved(Image.radial_gradient("L").convert("RGB"), "JPEG")
    whole, cut = decode_image(data), decode_image(data[: len(data) // 2])
    assert cut.size == whole.size and cut.crop((0, 0, 256, 64)).tobytes() == whole.crop((0, 0, 256, 64)).tobytes()
    # what a file declares is looked at before memory is taken for it
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match="the picture is too large"):
        decode_image(data)


# writer


def test_written_files_can_be_read_back(tmp_path, by_colour):
    images = {f"X_IMG_{name}": picture for name, picture in by_colour.items()}
    files = write_mimicit(tmp_path / "X", "X", RECORDS, images, {"X_INS_3": ["X_INS_2"]})
    assert [path.name for path in files] == ["X_instructions.json", "X.parquet", "X_train.json"]
    assert sorted(path.name for path in (tmp_path / "X").iterdir()) == sorted(path.name for path in files)
    dataset, store = load_mimicit(*files)
    assert dataset["id"] == ["X_INS_3"] and dataset[0]["context"][0]["answer"] == "red"
    assert store["X_IMG_green"].tobytes() == by_colour["green"].tobytes()
    # by the datasets library alone, which shows pictures
    table = load_dataset("parquet", data_files=str(files.images_path), cache_dir=str(tmp_path / "c"), split="train")
    assert table["id"] == list(images)
    assert [picture.tobytes() for picture in table["image"]] == [picture.tobytes() for picture in images.values()]
    data = json.loads(files.instructions_path.read_text(encoding="utf-8"))["data"]
    assert list(data) == list(RECORDS) and data["X_INS_1"]["image_ids"] == ["X_IMG_blue"]


def test_base64_stores_are_those_of_the_original(tmp_path, encoded):
    records = {"a": {"instruction": "q", "answer": "a", "image_ids": list(encoded)}}
    files = write_mimicit(tmp_path, "X", records, encoded, image_encoding="base64")
    # as the loader of 2023 read them
    frame = pd.read_parquet(files.images_path)
    assert list(frame.index) == list(encoded) and list(frame.columns) == ["base64"]
    assert all(re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", text) for text in frame["base64"])
    assert [base64.urlsafe_b64decode(text) for text in frame["base64"]] == list(encoded.values())
    assert {id: ImageStore(files.images_path).read_bytes(id) for id in encoded} == encoded
    with pytest.raises(ValueError, match="must be 'bytes' or 'base64', got 'hex'"):
        write_mimicit(tmp_path, "Y", records, encoded, image_encoding="hex")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == [
        "X.parquet",
        "X_instructions.json",
    ]


def test_writing_keeps_bytes_and_needs_no_images(tmp_path, encoded):
    files = write_mimicit(tmp_path, "Y", [("a", {"instruction": "q", "answer": "é"})])
    assert files[1:] == ((), None)
    assert load_mimicit(*files)[0][0]["answer"] == "é"
    picture = tmp_path / "red.png"
    picture.write_bytes(encoded["X_IMG_red"])
    files = write_mimicit(tmp_path, "Z", {}, ((id, picture) for id in ["r"]))
    store = ImageStore(files.images_path)
    assert store.read_bytes("r") == encoded["X_IMG_red"]
    files = write_mimicit(tmp_path, "Z2", {"a": {"instruction": "q", "answer": "a", "image_ids": ["r"]}}, store)
    assert files.images_path == ()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"X_INS_2": {"instruction": "no answer"}}, "answer of record 'X_INS_2' must be a string, got None"),
        ({"X_INS_9": {"instruction": "q", "answer": "a", "image_ids": ["gone"]}}, "'X_INS_9' needs image 'gone'"),
        ({"X_INS_9": {"instruction": "q", "answer": "a", "rel_ins_ids": ["gone"]}}, "'X_INS_9' has 'gone' as context"),
    ],
)
def test_broken_records_leave_the_old_files(tmp_path, encoded, change, message):
    files = write_mimicit(tmp_path, "X", RECORDS, encoded)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("X*")}
    with pytest.raises(ValueError, match=message):
        write_mimicit(tmp_path, "X", {**RECORDS, **change}, {**encoded, "more": encoded["X_IMG_red"]})
    assert {path.name: path.read_bytes() for path in tmp_path.glob("X*")} == before
    assert not list(tmp_path.glob(".*"))
    assert files.train_config_path is None


# damaged files


def damage(data, source):
    data = bytearray(data)
    for _ in range(source.choice([1, 1, 2, 5])):
        place = source.randrange(max(1, len(data)))
        kind = source.randrange(4)
        if kind == 0:
            data[place : place + 1] = source.randbytes(1)
        elif kind == 1:
            del data[place : place + source.randrange(1, 20)]
        elif kind == 2:
            data[place:place] = source.randbytes(3)
        else:
            del data[place:]
    return bytes(data)


@pytest.mark.parametrize("seed", range(20))
def test_damaged_files_give_clear_errors_or_pictures(tmp_path, encoded, seed):
    source = random.Random(seed)
    files = write_mimicit(tmp_path, "X", RECORDS, encoded)
    stores = [files.images_path, json_store(tmp_path, encoded)]
    for path in (files.instructions_path, *stores):
        path.write_bytes(damage(path.read_bytes(), source))
    try:
        load_mimicit(files.instructions_path, populate_rel_ins=True)
    except ValueError as error:
        assert "X_instructions.json" in str(error)
    for path in stores:
        try:
            store = ImageStore(path)
        except ValueError as error:
            assert path.name in str(error)
            continue
        for id in store:
            try:
                assert store[id].mode == "RGB"
            except OSError as error:
                assert "damaged" in str(error) or "the picture cannot be read" in str(error)
