"""Public instruction sets to MIMIC-IT files."""

import json

import pytest

from otter_hf.cli import main
from otter_hf.data.formats import load_mimicit
from otter_hf.data.images import encode_base64, image_bytes
from otter_hf.data.mixture import MimicitMixture, MixtureEntry
from otter_hf.data.sources import read_llava
from otter_hf.data.sources.common import read_messages
from otter_hf.data.sources.rows import read_rows
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
    {"id": "1", "image": "1.jpg", "conversations": talk("<image>\nWhat?", "A dog.", "Sure?", "Yes.")},
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
    "m3it": [[("What is it?", "A dog.")], [("<image><image>Compare.\nleft, right", "No.")]],
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


def records(tmp_path):
    return list(json.loads((tmp_path / "out" / "S_instructions.json").read_text())["data"].values())


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
    assert convert(tmp_path, "lima", LIMA[:1]) == 2
    assert "source.json has changed since; --overwrite writes it again" in capsys.readouterr().err
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
        ("llava", {"conversations": talk("a", "b"), "image": 3}, "image must be a file name, got 3"),
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


def test_messages_that_are_no_turns_are_named():
    system = {"from": "system", "value": "x"}
    assert read_messages([system, *talk("a", "b")], "here") == ([("a", "b")], "x", [])
    assert read_messages([], "here") == ([], None, [])
    answer = {"from": "gpt", "value": "lost"}
    turns, _, unused = read_messages([answer, *talk("a", "b", "c")], "here")
    assert turns == [("a", "b")]
    assert unused == ["answer in front of the first question", "question without answer at the end"]


def samples(tmp_path):
    """The samples of what `convert` wrote, read by the YAML that it wrote beside."""
    mixture = MimicitMixture(str(tmp_path / "out" / "S.yaml"))
    return [mixture[index] for index in range(len(mixture))]


@pytest.mark.parametrize(
    ("images", "turns", "expected", "places"),
    [
        # the record's picture in front, as 2023 had it: in front, behind, or not marked at all
        (["1.jpg"], ["<image>\nWhat?", "A dog."], ["What?"], [[0]]),
        (["1.jpg"], ["What?\n<image>", "A dog."], ["What?"], [[0]]),
        (["1.jpg"], ["What?", "A dog.", "Sure?", "Yes."], ["What?", "Sure?"], [[0], []]),
        # between words, in a later turn, several
        (["1.jpg"], ["Is <image> a dog?", "Yes."], ["Is  a dog?"], [[3]]),
        (["1.jpg"], ["Hello", "Hi", "<image>\nWhat?", "A dog."], ["Hello", "What?"], [[], [0]]),
        (["1.jpg", "2.png"], ["Compare <image> with <image>.", "No."], ["Compare  with ."], [[8, 14]]),
        (["1.jpg", "2.png"], ["<image>\nWhat?", "A dog.", "And\n<image>", "Blue"], ["What?", "And"], [[0], [3]]),
        (["1.jpg", "2.png"], ["Compare.", "No."], ["Compare."], [[0, 0]]),
    ],
)
@pytest.mark.parametrize("key", ["image", "images"])
def test_pictures_stand_where_the_source_has_them(tmp_path, pictures, images, turns, expected, places, key):
    images = images[0] if len(images) == 1 and key == "image" else images
    assert convert(tmp_path, "llava", [{"id": "1", key: images, "conversations": talk(*turns)}]) == 0
    (sample,) = samples(tmp_path)
    assert [question for question, _ in sample["turns"]] == expected
    assert sample["media_per_turn"] == [len(of_turn) for of_turn in places]
    assert all(len(frames) == 1 for frames in sample["media"])  # pictures of their own, no frames of one
    assert sample.get("media_places", [[0] * count for count in sample["media_per_turn"]]) == places
    assert main(["data", "check", str(tmp_path / "out" / "S.yaml"), "--strict"]) == 0


INVALID = {
    "placeholder without key": ({}, talk("<image>\nWhat?", "A dog.")),
    "video in the text": ({"image": "1.jpg"}, talk("<image><video>What?", "A dog.")),
    "audio": ({"audio": "a.wav"}, talk("What?", "A bark.")),
    "two for one": ({"image": "1.jpg"}, talk("<image> and <image>?", "A dog.")),
    "one for two": ({"image": ["1.jpg", "2.png"]}, talk("<image>What?", "A dog.")),
    "in an answer": ({"image": "1.jpg"}, talk("Show it.", "<image>")),
    "in a system message": (
        {"image": "1.jpg"},
        [{"from": "system", "value": "See <image>."}, *talk("What?", "A dog.")],
    ),
    "weight": ({"weight": 0.5}, talk("What?", "A dog.")),
    "weight of a message": ({}, [*talk("What?"), {"from": "gpt", "value": "x", "weight": 0}]),
    "late system": ({}, [*talk("What?", "A dog."), {"from": "system", "value": "x"}, *talk("a", "b")]),
}


@pytest.mark.parametrize("kind", INVALID)
def test_what_a_record_cannot_keep_is_refused_or_counted(tmp_path, pictures, kind, capsys):
    keys, conversation = INVALID[kind]
    rows = [{"id": "x", "conversations": conversation, **keys}, LLAVA[1]]
    assert convert(tmp_path, "llava", rows) == 2
    error = capsys.readouterr().err
    assert "Record 0 of" in error and "--skip-invalid" in error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert convert(tmp_path, "llava", rows, "--skip-invalid") == 0
    assert "1 conversations" in (out := capsys.readouterr().out) and "left out: 1 (" in out


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("svit", {"image_id": 1, "videos": ["x.mp4"], "conversations": [{"content": talk("a", "b", asks="user")}]}),
        ("lrv", {"image_id": 1, "question": "a", "answer": "b", "weight": 2}),
        ("m3it", {"instruction": "a", "outputs": "b", "video": "x.mp4"}),
        ("sharegpt", {"conversations": talk("a", "b"), "images": ["1.jpg"]}),
        ("lima", {"conversations": ["a", "b"], "image": "1.jpg"}),
        ("alpaca", {"instruction": "a", "output": "b", "images": ["1.jpg"]}),
    ],
)
def test_other_media_are_refused_by_every_source(tmp_path, pictures, name, row, capsys):
    assert convert(tmp_path, name, [row]) == 2
    assert "--skip-invalid" in capsys.readouterr().err


def test_system_texts_history_and_unknown_keys(tmp_path, pictures, capsys):
    system = {"from": "system", "value": "Answer in French."}
    rows = [
        {"image": "1.jpg", "conversations": [system, *talk("<image>\nq", "rouge", "r", "oui")], "score": 3},
        {"image": "1.jpg", "system": "One word.", "conversations": talk("<image>\nq", "rouge", "tail")},
    ]
    assert convert(tmp_path, "llava", rows) == 0
    out = capsys.readouterr().out
    assert "not used: 1 (key 'score')" in out and "not used: 1 (question without answer at the end)" in out
    assert [sample["task_description"] for sample in samples(tmp_path)] == ["Answer in French.", "One word."]
    rows = [{"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "Be kind."}]
    assert convert(tmp_path, "alpaca", rows, "--overwrite") == 0
    (sample,) = samples(tmp_path)
    assert (sample["turns"], sample["task_description"]) == ([("a", "b"), ("c", "d")], "Be kind.")


@pytest.mark.parametrize("folder", [False, True])
def test_llava_as_parquet(tmp_path, pictures, folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(
        [
            {"id": "1", "image": {"bytes": pictures["1"], "path": "1.jpg"}, "conversations": talk("<image>\nq", "a")},
            {"id": "2", "image": {"bytes": pictures["2"], "path": None}, "conversations": talk("<image>\nq", "b")},
            {"id": "3", "image": None, "conversations": talk("q", "c")},
        ]
    )
    path = tmp_path / ("set" if folder else "set.parquet")
    if folder:
        path.mkdir()
    pq.write_table(table, path / "part-0.parquet" if folder else path)
    conversations = list(read_llava(path, tmp_path))
    assert [[data for _, data in one.pictures] for one in conversations] == [[pictures["1"]], [pictures["2"]], []]
    assert conversations[0].pictures[0][0] == "1"


def test_pictures_in_the_rows_need_no_folder_and_no_names_of_their_own(tmp_path, pictures, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    same = [{"bytes": pictures[name], "path": "image.png"} for name in ("1", "2", "1")]
    pq.write_table(
        pa.Table.from_pylist([{"image": one, "conversations": talk("<image>\nq", "a")} for one in same]),
        tmp_path / "set.parquet",
    )
    arguments = ["data", "from-llava", str(tmp_path / "set.parquet"), "--output", str(tmp_path / "out"), "--name", "S"]
    assert main(arguments) == 0
    assert "3 conversations, 3 records, 2 pictures" in capsys.readouterr().out
    shown = [record["image_ids"][0] for record in records(tmp_path)]
    assert shown[0] == shown[2] == "S_IMG_image" and shown[1].startswith("S_IMG_image_")
    pq.write_table(pa.table({"image": [pictures["1"]], "conversations": [talk("q", "a")]}), tmp_path / "raw.parquet")
    (conversation,) = read_llava(tmp_path / "raw.parquet")
    assert [data for _, data in conversation.pictures] == [pictures["1"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "1.jpg"}, "conversations must be a list"),
        ({"image": 7, "conversations": talk("q", "a")}, "image must be a file name, got 7"),
        ({"image": ".", "conversations": talk("q", "a")}, "image must be a file name, got '.'"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "unknown speaker 'tool'"),
    ],
)
def test_malformed_rows_can_be_skipped(tmp_path, pictures, row, message, capsys):
    assert convert(tmp_path, "llava", [row, LLAVA[1]]) == 2
    assert message in capsys.readouterr().err
    assert convert(tmp_path, "llava", [row, LLAVA[1]], "--skip-invalid") == 0
    assert "left out: 1 (malformed)" in capsys.readouterr().out


def test_null_and_halves_of_surrogate_pairs(tmp_path):
    rows = [{"instruction": "q \ud83d", "input": None, "output": "a", "history": None, "system": None}]
    assert convert(tmp_path, "alpaca", rows) == 0
    assert [(record["instruction"], record["answer"]) for record in records(tmp_path)] == [("q ?", "a")]


def test_lines_are_those_of_the_file(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [json.dumps({"conversations": talk("a", "b")}), "", json.dumps({"conversations": "x"})]
    path.write_text("\n".join(rows))
    with pytest.raises(ValueError, match="Line 3 of .*x.jsonl"):
        list(read_llava(path, tmp_path))
    path.write_text("\n".join([rows[0], "", '{"conv']))
    with pytest.raises(ValueError, match="line 3, column"):
        list(read_llava(path, tmp_path))


def test_a_changed_source_is_not_complete(tmp_path, pictures, capsys):
    assert convert(tmp_path, "llava", LLAVA) == 0
    arguments = ["data", "from-llava", str(tmp_path / "source.json"), "--name", "S", "--output", str(tmp_path / "out")]
    arguments += ["--images", str(tmp_path / "pictures")]
    assert main(arguments) == 0 and "is complete" in capsys.readouterr().out
    assert main([*arguments, "--skip-missing"]) == 2
    assert "--skip-missing was false and is true; --overwrite" in capsys.readouterr().err
    # a picture that is used, and one that is not
    (tmp_path / "pictures" / "unused.png").write_bytes(b"1")
    assert main(arguments) == 0
    picture = next(path for path in (tmp_path / "pictures").rglob("*") if path.name in str(LLAVA))
    picture.write_bytes(picture.read_bytes() + b"0")
    assert main(arguments) == 2 and "pictures has changed since" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    (tmp_path / "out" / "S.parquet").unlink()
    assert main(arguments) == 0 and (tmp_path / "out" / "S.parquet").exists()
    assert convert(tmp_path, "llava", LLAVA) == 2  # the file is another one, with a new time
    assert "source.json has changed since; --overwrite" in capsys.readouterr().err


def test_pictures_that_differ_in_their_suffix(tmp_path, pictures, by_colour):
    green = image_bytes(by_colour["green"])
    (tmp_path / "pictures" / "1.png").write_bytes(green)
    rows = [LLAVA[0], {**LLAVA[1], "image": "1.png"}, LLAVA[0], {**LLAVA[1], "image": "1.png"}]
    assert convert(tmp_path, "llava", rows) == 0
    table, store = load_mimicit(tmp_path / "out" / "S_instructions.json", tmp_path / "out" / "S.parquet")
    ids = [ids for ids, turn in zip(table["image_ids"], table["id"], strict=True) if turn.endswith("CONV00")]
    assert ids == [["S_IMG_1"], ["S_IMG_1.png"]] * 2
    assert store.read_bytes("S_IMG_1") == pictures["1"] and store.read_bytes("S_IMG_1.png") == green
