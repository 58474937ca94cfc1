"""Public instruction sets to MIMIC-IT files."""

import json

import pytest

from otter_hf.cli import main
from otter_hf.data.formats import load_mimicit
from otter_hf.data.images import encode_base64, image_bytes
from otter_hf.data.mixture import MixtureEntry
from otter_hf.data.sources.common import pair_turns, read_rows
from otter_hf.data.validate import check_mixture


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def pictures(tmp_path, by_colour):
    """A folder with the pictures 1.jpg and 2.png in it, and their bytes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    by_colour["red"].save(folder / "1.jpg")
    by_colour["blue"].save(folder / "2.png")
    return {"1": (folder / "1.jpg").read_bytes(), "2": (folder / "2.png").read_bytes()}


def talk(*texts, asks="human"):
    return [{"from": "gpt" if i % 2 else asks, "value": text} for i, text in enumerate(texts)]


LLAVA = [
    {"id": "1", "image": "1.jpg", "conversations": talk("<image>\nWhat?", "A dog.", "Sure?\n<image>", "Yes.")},
    {"id": "2", "image": "2.png", "conversations": talk("Colour?", "Blue.")},
]
SVIT = [
    {
        "image_id": 1,
        "conversations": [
            {"content": talk("What?", "A dog.", asks="user")},
            {"content": talk("Why?", "It barks.", "Loud?", "Yes.", asks="user")},
        ],
    },
    {"image_id": 2, "conversations": [{"content": talk("Colour?", "Blue.", asks="user")}]},
]
LRV = [
    {"image_id": "1", "question": "Is there a dog?", "answer": "Yes.", "task": "positive"},
    {"image_id": "1", "question": "Is there a cat?", "answer": "No.", "task": "negative"},
]
SHAREGPT = [
    {"id": "s1", "conversations": [{"from": "gpt", "value": "lost"}, *talk("Hi", "Hello", "Bye", "Good bye", "?")]},
    {"id": "s2", "conversations": [*talk("One"), *talk("Two", "Both")]},
]
LIMA = [{"conversations": ["Q", "A"], "source": "x"}, {"conversations": ["Q1", "A1", "Q2", "A2"]}]
ALPACA = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Name a colour.", "input": "", "output": "Red"},
]


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def m3it(pictures):
    one, two = (encode_base64(data) for data in pictures.values())
    return [
        {"instruction": "What is it?", "inputs": "", "image_base64_str": [one], "outputs": "A dog."},
        {"instruction": "Compare.", "inputs": "left, right", "image_base64_str": [one, two], "outputs": "No."},
        {"instruction": "Test.", "inputs": "", "image_base64_str": [two], "outputs": ""},
    ]


EXPECTED = {
    "llava": [[("What?", "A dog."), ("Sure?", "Yes.")], [("Colour?", "Blue.")]],
    "llavar": [[("What?", "A dog."), ("Sure?", "Yes.")], [("Colour?", "Blue.")]],
    "lrv": [[("Is there a dog?", "Yes.")], [("Is there a cat?", "No.")]],
    "svit": [[("What?", "A dog.")], [("Why?", "It barks."), ("Loud?", "Yes.")], [("Colour?", "Blue.")]],
    "m3it": [[("What is it?", "A dog.")], [("Compare.\nleft, right", "No.")]],
    "sharegpt": [[("Hi", "Hello"), ("Bye", "Good bye")], [("One\n\nTwo", "Both")]],
    "lima": [[("Q", "A")], [("Q1", "A1"), ("Q2", "A2")]],
    "alpaca": [[("Add.\n1 2", "3")], [("Name a colour.", "Red")]],
}
ROWS = {
    "llava": LLAVA,
    "llavar": LLAVA,
    "svit": SVIT,
    "lrv": LRV,
    "sharegpt": SHAREGPT,
    "lima": LIMA,
    "alpaca": ALPACA,
}


def convert(tmp_path, name, rows, *options, lines=False):
    path = tmp_path / "source.json"
    write_lines(path, rows) if lines else path.write_text(json.dumps(rows))
    images = ["--images", str(tmp_path / "pictures")] if name in ("llava", "llavar", "lrv", "svit") else []
    return main(
        ["data", f"from-{name}", str(path), "--name", "S", "--output", str(tmp_path / "out"), *images, *options]
    )


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("lines", [False, True])
def test_every_source_passes_the_validator(tmp_path, pictures, name, lines):
    rows = m3it(pictures) if name == "m3it" else ROWS[name]
    assert convert(tmp_path, name, rows, lines=lines) == 0
    out = tmp_path / "out"
    has_images = name in ("llava", "llavar", "lrv", "svit", "m3it")
    images = str(out / "S.parquet") if has_images else ()
    table, store = load_mimicit(out / "S_instructions.json", images, out / "S_train.json")
    turns = [[(turn["instruction"], turn["answer"]) for turn in (*row["context"], row)] for row in table]
    assert turns == EXPECTED[name]
    assert all(row["id"].startswith("S_") and row["id"].endswith(f"_CONV{len(row['context']):02d}") for row in table)
    group = "IMAGE_TEXT" if has_images else "TEXT_ONLY"
    entry = MixtureEntry(group, "S", str(out / "S_instructions.json"), images, str(out / "S_train.json"))
    report = check_mixture([entry])
    assert report.ok(strict=True), report.table()
    assert {store.read_bytes(id) for id in store} <= set(pictures.values()) and bool(len(store)) == has_images


def test_image_ids_follow_their_source(tmp_path, pictures):
    convert(tmp_path, "llava", LLAVA)
    table, store = load_mimicit(tmp_path / "out" / "S_instructions.json", tmp_path / "out" / "S.parquet")
    assert table["id"] == ["S_1_0_CONV00", "S_1_0_CONV01", "S_2_1_CONV00"]
    assert list(table["image_ids"]) == [["S_IMG_1"], ["S_IMG_1"], ["S_IMG_2"]]
    assert store.read_bytes("S_IMG_1") == pictures["1"]


def test_missing_pictures(tmp_path, pictures, capsys):
    rows = [*LLAVA, {"id": "3", "image": "gone.jpg", "conversations": talk("Q", "A")}]
    assert convert(tmp_path, "llava", rows) == 2
    assert "Conversation '3' needs the picture" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert convert(tmp_path, "llava", rows, "--skip-missing") == 0
    assert "left out: 1 (missing picture)" in capsys.readouterr().out


def test_finished_output_is_kept(tmp_path, capsys):
    convert(tmp_path, "lima", LIMA)
    before = (tmp_path / "out" / "S_instructions.json").read_bytes()
    assert convert(tmp_path, "lima", LIMA[:1]) == 0
    assert "is complete" in capsys.readouterr().out
    assert (tmp_path / "out" / "S_instructions.json").read_bytes() == before
    convert(tmp_path, "lima", LIMA[:1], "--overwrite")
    assert (tmp_path / "out" / "S_instructions.json").read_bytes() != before


def test_token_limit(tmp_path, tiny_processor, capsys):
    tiny_processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    limit = ["--tokenizer", str(tmp_path / "tokenizer"), "--max-tokens"]
    # one token per byte: the second conversation has 8
    assert convert(tmp_path, "lima", LIMA, *limit, "7") == 0
    assert "left out: 1 (more than 7 tokens)" in capsys.readouterr().out
    assert convert(tmp_path, "lima", LIMA, *limit, "8", "--overwrite") == 0
    assert "left out" not in capsys.readouterr().out
    assert convert(tmp_path, "lima", LIMA, *limit, "1", "--overwrite") == 2
    assert "Nothing of S can be used" in capsys.readouterr().err
    assert convert(tmp_path, "lima", LIMA, "--max-tokens", "1", "--overwrite") == 2


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("llava", {"conversations": "x"}, "Record 0 of .* must be a list of messages"),
        ("llava", {"conversations": talk("a", "b"), "image": 3}, "image must be a list, got 3"),
        ("llava", {"conversations": talk("a", "b"), "image": [3]}, "image must be a file name"),
        ("svit", {"image_id": 1, "conversations": True}, "conversations must be a list, got True"),
        (
            "m3it",
            {"instruction": "a", "outputs": "b", "image_base64_str": 3},
            "image_base64_str must be a list",
        ),
        ("llava", {"conversations": [{"from": "cat", "value": "x"}]}, "unknown speaker 'cat'"),
        ("lrv", {"question": "a", "answer": "b"}, "has no image_id"),
        ("lrv", {"question": "a", "answer": 1, "image_id": 1}, "answer must be a text, got 1"),
        ("m3it", {"instruction": "a", "outputs": "b", "image_base64_str": ["!"]}, "damaged base64"),
        ("lima", {"conversations": [1]}, "must be a list of texts"),
        ("alpaca", {"instruction": "a"}, "output must be a text, got None"),
        ("alpaca", ["x"], "Record 0 of .* must be an object"),
    ],
)
def test_broken_rows_are_named(tmp_path, pictures, capsys, name, row, message):
    import re

    assert convert(tmp_path, name, [row]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match="neither a JSON list nor JSON lines"):
        list(read_rows(path))


def test_turns_begin_with_the_user():
    assert pair_turns([{"from": "system", "value": "x"}, *talk("a", "b")], "here") == [("a", "b")]
    assert pair_turns([], "here") == []


def test_one_id_for_two_pictures(tmp_path, pictures, by_colour, capsys):
    (tmp_path / "pictures" / "1.png").write_bytes(image_bytes(by_colour["green"]))
    rows = [LLAVA[0], {**LLAVA[1], "image": "1.png"}]
    assert convert(tmp_path, "llava", rows) == 2
    assert "Image id '1' of S stands for two different pictures" in capsys.readouterr().err
