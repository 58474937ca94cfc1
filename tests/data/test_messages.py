"""Rows of messages, as TRL, LLaMA-Factory and ms-swift have them, in checks, training and preferences."""

import base64
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from otter_hf.cli import main
from otter_hf.data.formats import write_mimicit
from otter_hf.data.mixture import MimicitMixture, read_mixture
from otter_hf.data.samples import SampleOptions
from otter_hf.data.sources import preferences_as_dataset, read_chats, read_llava, read_preferences
from otter_hf.data.stream import StreamedMixture
from otter_hf.data.validate import check_mixture


def png(colour) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = png("red"), png("blue")
DATA = "data:image/png;base64," + base64.b64encode(BLUE).decode()


def said(role, content):
    return {"role": role, "content": content}


def text(words):
    return {"type": "text", "text": words}


ANSWER = said("assistant", "yes")
ROWS = {
    "marks": {"messages": [said("user", "<image>a<image>b?"), ANSWER], "images": ["red.png", "blue.png"]},
    "no marks": {"messages": [said("user", "ab?"), ANSWER], "images": ["red.png", "blue.png"]},
    "parts": {
        "messages": [said("user", [{"type": "image"}, text("a"), {"type": "image"}, text("b?")]), ANSWER],
        "images": ["red.png", {"bytes": BLUE, "path": None}],
    },
    "own": {
        "messages": [
            said("user", [{"type": "image", "image": "red.png"}, text("a")]),
            said("user", [{"type": "image_url", "image_url": {"url": DATA}}, text("b?")]),
            ANSWER,
        ]
    },
    "later turn": {
        "messages": [said("system", "be kind"), said("user", "hello"), ANSWER, said("user", "<image>and?"), ANSWER],
        "images": ["red.png"],
    },
    "words": {"messages": [said("user", [text("what is <image>?")]), said("assistant", [text("a mark")])]},
    "no types": {"messages": [said("user", [{"image": "red.png"}, {"text": "a?"}]), ANSWER]},
    "trl": {"prompt": [said("user", "a?")], "completion": [ANSWER]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "<image>a?"}, {"from": "gpt", "value": "yes"}],
        "images": [None, "red.png", {"bytes": None, "path": None}],
    },
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "blue.png").write_bytes(BLUE)
    return tmp_path


def lines(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def colours(conversation):
    data = [one if isinstance(one, bytes) else one.read_bytes() for _, one in conversation.pictures]
    return ["red" if one == RED else "blue" for one in data]


def test_every_form(folder):
    rows = [row for name, row in ROWS.items() if name != "parts"]
    marks, no_marks, own, later, words, no_types, trl, sharegpt = read_chats(lines(folder, *rows))
    for one in (marks, own, no_marks):
        assert colours(one) == ["red", "blue"] and one.pictures_per_turn == [2]
    assert marks.turns == [("<image>a<image>b?", "yes")] and own.turns == [("<image>a\n\n<image>b?", "yes")]
    assert no_marks.turns == [("<image><image>ab?", "yes")]
    assert later.turns[1] == ("<image>and?", "yes") and later.pictures_per_turn == [0, 1] and later.system == "be kind"
    assert words.pictures == [] and "<image>" not in words.turns[0][0]
    assert trl.turns == no_types.turns == [("a?", "yes")] and colours(no_types) == ["red"]
    assert sharegpt.turns == [("a?", "yes")] and colours(sharegpt) == ["red"]
    messages = [ROWS["parts"]["messages"][0], said("assistant", [text("yes")])]
    table = pa.Table.from_pylist([{"messages": messages, "images": [{"bytes": RED, "path": None}, {"bytes": BLUE}]}])
    pq.write_table(table, folder / "rows.parquet")
    (parts,) = read_chats(folder / "rows.parquet")
    assert (parts.turns, colours(parts)) == (marks.turns, ["red", "blue"])


def test_query_and_response(folder):
    """ms-swift's other form."""
    row = {"query": "<image>b?", "response": "yes", "history": [["a?", "no"]], "system": "be kind"}
    (read,) = read_chats(lines(folder, {**row, "images": ["red.png"]}))
    assert read.turns == [("a?", "no"), ("<image>b?", "yes")] and read.pictures_per_turn == [0, 1]
    assert read.system == "be kind" and not read.unused
    with pytest.raises(ValueError, match="history must be a list"):
        list(read_chats(lines(folder, {**row, "history": ["a?"]})))


def test_question_and_answer(folder):
    """As sets of visual questions have them, pictures in the rows; more keys are named."""
    row = {"image": {"bytes": RED, "path": None}, "question": "a?", "answer": "yes", "answer_type": "CLOSED"}
    pq.write_table(pa.Table.from_pylist([row]), folder / "rows.parquet")
    (read,) = read_chats(folder / "rows.parquet")
    assert read.turns == [("a?", "yes")] and colours(read) == ["red"] and read.unused == ["key 'answer_type'"]
    with pytest.raises(ValueError, match="it is LRV's form"):
        list(read_chats(lines(folder, {"image_id": "1", "question": "a?", "answer": "yes"})))
    beside = {"messages": [said("user", "b?"), ANSWER], "question": "a?", "answer": "yes"}
    (read,) = read_chats(lines(folder, beside))
    assert read.turns == [("b?", "yes")] and read.unused == ["key 'question'", "key 'answer'"]


def test_turns_of_the_cauldron(folder):
    """FineVision has them, too, with what was measured of each row beside them."""
    texts = [{"user": "a?", "assistant": "no", "source": "x"}, {"user": "b?", "assistant": "yes", "source": "x"}]
    row = {"texts": texts, "images": [{"bytes": RED, "path": None}], "relevance_min": 3}
    pq.write_table(pa.Table.from_pylist([row]), folder / "rows.parquet")
    (read,) = read_chats(folder / "rows.parquet")
    assert read.turns == [("a?", "no"), ("b?", "yes")] and colours(read) == ["red"]
    assert set(read.unused) == {"key 'relevance_min'", "key 'source' of a message"}


def test_pictures_that_are_named_in_a_text(folder):
    """Qwen-VL's form."""
    asked = "Picture 1: <img>red.png</img>\nPicture 2: <img>blue.png</img>\nAlike?"
    messages = [{"role": "user", "content": asked}, ANSWER, {"role": "user", "content": "Sure?"}, ANSWER]
    path = lines(folder, {"messages": messages})
    conversations = [{"from": message["role"], "value": message["content"]} for message in messages]
    (folder / "llava.json").write_text(json.dumps([{"id": "0", "conversations": conversations}]))
    for read in (*read_chats(path), *read_llava(folder / "llava.json", folder)):
        assert colours(read) == ["red", "blue"] and read.pictures_per_turn == [2, 0]
        assert read.turns[0][0] == "Picture 1: <image>\nPicture 2: <image>\nAlike?"


def test_parts_may_say_which_picture(folder):
    """The index of a part counts, and what a part has besides is named."""
    parts = [{"type": "image", "index": 1, "text": None}, {"type": "image", "index": 0, "min_pixels": 4}, text("?")]
    (read,) = read_chats(lines(folder, {"messages": [said("user", parts), ANSWER], "images": ["red.png", "blue.png"]}))
    assert colours(read) == ["blue", "red"] and read.unused == ["key 'min_pixels' of a part"]


FRAMES = ["red.png", "blue.png", "red.png"]


@pytest.mark.parametrize(
    "user, media",
    [
        ("<image>a<video>?", {"images": ["blue.png"], "videos": [FRAMES]}),
        ([{"type": "image", "image": "blue.png"}, text("a"), {"type": "video", "video": FRAMES}, text("?")], {}),
    ],
    ids=["marks", "parts"],
)
def test_films_of_frames(user, media, folder):
    """LLaMA-Factory and Qwen's tools give a film as a list of its frames: one medium."""
    path = lines(folder, {"messages": [said("user", user), ANSWER, said("user", "b?"), ANSWER], **media})
    assert check_mixture(path, cache_dir=folder / "cache").ok(strict=True)
    mixture = MimicitMixture(path, SampleOptions(num_frames=2), cache_dir=folder / "cache")
    (sample,) = mixture
    assert sample["media_per_turn"] == [2, 0] and sample["media_places"] == [[0, 1], []]
    colour = [[frame.getpixel((0, 0))[0] for frame in medium] for medium in sample["media"]]
    assert colour == [[0], [255, 255]] and mixture.most_frames() == 3


def test_a_film_of_frames_in_front(folder):
    """It has not more frames than num_frames says, and no repeated ones."""
    path = lines(folder, {"messages": [said("user", "a?"), ANSWER, said("user", "b?"), ANSWER], "videos": [FRAMES]})
    for num_frames, taken in ((2, 2), (5, 3)):
        (sample,) = MimicitMixture(path, SampleOptions(num_frames=num_frames), cache_dir=folder / "cache")
        assert sample["media_per_turn"] == [1, 0] and len(sample["media"][0]) == taken


def test_splits_of_a_dataset_are_not_mixed(folder):
    """Of a repository of `datasets`, the files of all splits lie in one folder."""
    table = pa.Table.from_pylist([ROWS["trl"]])
    for split in ("train", "test"):
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="holds the splits test, train"):
        list(read_chats(folder))
    assert len(list(read_chats(folder / "train-00000-of-00001.parquet"))) == 1


def test_base64_and_file_addresses(folder):
    base = {"type": "image", "base64": DATA[22:]}
    local = {"type": "image", "image": f"file://{folder}/red.png"}
    (read,) = read_chats(lines(folder, {"messages": [said("user", [base, local, text("?")]), ANSWER]}))
    assert colours(read) == ["blue", "red"]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": [said("user", "<image>?"), ANSWER]}, "1 <image> for 0 pictures"),
        ({"messages": [said("tool", "a"), ANSWER]}, "the role 'tool' is not read"),
        ({"messages": [said("user", [{"type": "audio"}]), ANSWER]}, "a part of the type 'audio' is not read"),
        ({"messages": [said("user", 5), ANSWER]}, "content must be a text or a list of parts"),
        ({"messages": "hello"}, "messages must be a list of role and content"),
        ({"images": ["red.png"]}, "messages must be a list"),
        ({"messages": [said("user", "a"), ANSWER], "images": ["../x.png"]}, "leads out of"),
        (
            {"messages": [said("user", "a"), ANSWER], "images": [DATA.partition(",")[2] * 9]},
            "images must be a file name",
        ),
        ({"messages": [said("user", "a"), ANSWER], "images": ["https://example.org/a.png"]}, "is an address"),
        ({"messages": [said("user", "a"), ANSWER], "audios": ["a.wav"]}, "has the key 'audios'"),
        ({"messages": [said("user", "a"), {**ANSWER, "weight": 0}]}, "has the weight 0"),
        ({"messages": [said("user", "a"), {**ANSWER, "loss": False}]}, "has the loss False"),
        ({"messages": [said("user", "a"), {**ANSWER, "training": 0}]}, "has the training 0"),
        ({"messages": [said("user", "a"), ANSWER], "objects": {"ref": [], "bbox": [[1, 2, 3, 4]]}}, "has objects"),
        ({"messages": [said("user", [{"type": "image", "index": 1}]), ANSWER], "images": ["red.png"]}, "the index 1"),
        ({"messages": [said("user", [{**text("a"), "image": "red.png"}]), ANSWER]}, "has the key 'image'"),
        ({"messages": [said("user", "a"), said("assistant", "<img>red.png</img>")]}, "name a picture in <img></img>"),
        ({"messages": [said("user", "<img>red.png</img>a<image>"), ANSWER]}, "name a picture in <img></img>"),
        ({"messages": [said("user", "a"), ANSWER], "videos": [[]]}, "videos must be a file name"),
        ({"messages": [said("user", "a"), ANSWER], "images": [FRAMES]}, "images must be a file name"),
        ({"messages": [said("user", "a"), ANSWER], "conversations": [1]}, "has both messages and conversations"),
        (
            {"messages": [said("user", "a"), ANSWER, said("user", "<image>b")], "images": ["red.png"]},
            "the question at its end has a picture or film, and no answer",
        ),
    ],
)
def test_what_is_refused(row, message, folder):
    path = lines(folder, row)
    with pytest.raises(ValueError, match=f"Line 1 of .*rows.jsonl.*{message}"):
        list(read_chats(path))
    (skipped,) = read_chats(path, on_invalid="skip")
    assert skipped.left_out
    report = check_mixture(path, cache_dir=folder / "cache")
    assert not report.ok() and "Line 1 of" in report.findings[0].message


def test_rows_are_a_mixture(folder):
    path = lines(folder, *(ROWS[name] for name in ("marks", "later turn", "trl")))
    assert check_mixture(path, cache_dir=folder / "cache").ok(strict=True)
    mixture = MimicitMixture(path, cache_dir=folder / "cache")
    samples = [mixture[index] for index in range(3)]
    assert [len(sample["media"]) for sample in samples] == [2, 1, 0]
    assert samples[0]["media_places"] == [[0, 1]] and samples[1]["media_places"] == [[], [0]]
    assert samples[1]["task_description"] == "be kind"
    # a file that has changed is read again
    lines(folder, ROWS["trl"])
    assert len(MimicitMixture(path, cache_dir=folder / "cache")) == 1
    (entry,) = read_mixture(path, cache_dir=folder / "cache")
    assert entry.task_group == "TEXT_ONLY"


def test_a_folder_of_parquet_is_a_mixture(folder, monkeypatch):
    """As repositories of `datasets` have it; it is read once, however often a training starts."""
    (folder / "rows").mkdir()
    for number, picture in enumerate((RED, BLUE)):
        row = {"messages": [said("user", "<image>?"), ANSWER], "images": [{"bytes": picture, "path": None}]}
        pq.write_table(pa.Table.from_pylist([row]), folder / "rows" / f"train-{number:05}-of-00002.parquet")
    assert len(MimicitMixture(folder / "rows", cache_dir=folder / "cache")) == 2
    monkeypatch.setattr("otter_hf.data.sources.chats_in_cache.read_chats", None)
    monkeypatch.chdir(folder / "rows")
    assert MimicitMixture(".", cache_dir=folder / "cache").entries[0].name == "rows"
    assert len(MimicitMixture(folder / "rows", cache_dir=folder / "cache")) == 2


def test_files_stay_where_they_are(folder):
    """A copy of all pictures would take as much room again; of rows that hold pictures it is needed."""
    (folder / "sub").mkdir()
    (folder / "blue.png").rename(folder / "sub" / "blue.png")
    path = lines(folder, {**ROWS["marks"], "images": ["./red.png", "sub/blue.png"]})
    (entry,) = read_mixture(path, cache_dir=folder / "cache")
    assert entry.images_path == [str(folder)] and not [*(folder / "cache").rglob("*.parquet")]
    (sample,) = MimicitMixture(path, cache_dir=folder / "cache")
    assert [medium[0].getpixel((0, 0)) for medium in sample["media"]] == [(255, 0, 0), (0, 0, 255)]
    (folder / "linked").mkdir()
    (folder / "linked" / "red.png").symlink_to(folder / "red.png")
    for name, place in (
        ("sub/blue.png", str(folder / "sub")),
        ("linked/red.png", None),
    ):  # of a store no link leads out
        path = lines(folder, {"messages": [said("user", "<image>?"), ANSWER], "images": [name]})
        (entry,) = read_mixture(path, cache_dir=folder / "cache")
        assert entry.images_path == [place] or place is None
        (sample,) = MimicitMixture(path, cache_dir=folder / "cache")
        assert sample["media"][0][0].getpixel((0, 0)) == ((0, 0, 255) if place else (255, 0, 0))
    path = lines(folder, {"messages": [said("user", [{"type": "image", "image": DATA}, text("a")]), ANSWER]})
    (entry,) = read_mixture(path, cache_dir=folder / "cache")
    assert [name.endswith("rows.parquet") for name in entry.images_path] == [True]


def test_rows_beside_other_datasets(folder):
    """Under `mimicit_path` of a training YAML, with the folder of their pictures."""
    (folder / "pictures").mkdir()
    (folder / "red.png").rename(folder / "pictures" / "red.png")
    rows = lines(folder, ROWS["sharegpt"], ROWS["sharegpt"])
    (folder / "list.json").write_text(json.dumps([ROWS["trl"]]))
    files = write_mimicit(folder, "X", {"x": {"instruction": "Q", "answer": "A"}})
    own = {"mimicit_path": rows.name, "images_path": "pictures", "num_samples": 3, "task_description": "Look."}
    yaml = folder / "mix.yaml"
    texts = {"X": {"mimicit_path": files.instructions_path.name}, "LIST": {"mimicit_path": "list.json"}}
    yaml.write_text(json.dumps({"TEXT_ONLY": texts, "IMAGE_TEXT": {"ROWS": own}}))
    assert check_mixture(yaml, cache_dir=folder / "cache").ok()
    mixture = MimicitMixture(yaml, SampleOptions(use_task_description=True), cache_dir=folder / "cache")
    told = [(one["dataset"], one["task_group"], len(one["media"]), one["task_description"]) for one in mixture]
    assert told == 3 * [("ROWS", "IMAGE_TEXT", 1, "Look.")] + [
        ("X", "TEXT_ONLY", 0, None),
        ("LIST", "TEXT_ONLY", 0, None),
    ]
    for wrong in ({"train_config_path": "list.json"}, {"images_path": "list.json"}):
        yaml.write_text(json.dumps({"IMAGE_TEXT": {"ROWS": own | wrong}}))
        with pytest.raises(ValueError, match="IMAGE_TEXT/ROWS: .*rows.jsonl holds rows of messages, .*: leave train"):
            read_mixture(yaml, cache_dir=folder / "cache")
    yaml.write_text(json.dumps({"TEXT_ONLY": {"ROWS": own}}))
    with pytest.raises(
        ValueError, match="TEXT_ONLY/ROWS: the rows of .*rows.jsonl have pictures .*: move it to IMAGE"
    ):
        read_mixture(yaml, cache_dir=folder / "cache")


@pytest.mark.parametrize("make", [MimicitMixture, StreamedMixture])
def test_rows_that_cannot_be_used_are_skipped(make, folder, caplog):
    gone = {**ROWS["sharegpt"], "images": ["gone.png"]}
    path = lines(folder, ROWS["sharegpt"], gone, {"messages": [said("tool", "a"), ANSWER]}, ROWS["trl"])
    for _ in range(2):  # also where the cache has it
        caplog.clear()
        mixture = make(path, on_error="skip", cache_dir=folder / "cache")
        assert len([*mixture]) == 2
        assert "Left out of rows: {'missing picture': 1, 'role': 1}" in caplog.text
    with pytest.raises(ValueError, match="Line 3 of"):
        make(path, cache_dir=folder / "cache")


def test_what_is_held_out_takes_no_turns_from_others(folder):
    """Earlier turns are no samples of their own: a share of them would be missing, with their pictures."""
    turns = [said("user", "<image>a?"), ANSWER, said("user", "b?"), ANSWER, said("user", "c?"), ANSWER]
    path = lines(folder, *({"messages": turns, "images": ["red.png"]} for _ in range(12)))
    sides = [MimicitMixture(path, eval_fraction=0.5, held_out=one, cache_dir=folder / "cache") for one in (0, 1)]
    assert sum(map(len, sides)) == 12 and all(map(len, sides))
    assert all(len(sample["turns"]) == 3 and len(sample["media"]) == 1 for side in sides for sample in side)


def test_to_mimicit(folder, capsys):
    path = lines(folder, ROWS["marks"], ROWS["later turn"])
    out = str(folder / "out")
    assert main(["data", "to-mimicit", str(path), "--images", str(folder), "--output", out, "--name", "M"]) in (
        0,
        None,
    )
    assert "2 conversations, 3 records, 2 pictures" in capsys.readouterr().out
    assert len(MimicitMixture(folder / "out" / "M.yaml", cache_dir=folder / "cache")) == 2


def test_train_data_is_a_name_of_it():
    from otter_hf.training.upstream import translate

    assert translate([("train_data", ["rows.jsonl"])], lambda note: None) == [("train_mixture", ["rows.jsonl"])]


ASKED, GOOD, BAD = said("user", "<image>a?"), said("assistant", "good"), said("assistant", "bad")
PARTED = [{"type": "image", "text": None}, text("a?")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"messages": [ASKED], "chosen": GOOD, "rejected": BAD},
        {"prompt": "a?", "chosen": "good", "rejected": "bad"},
        {"prompt": [said("user", [{"type": "image"}, text("a?")])], "chosen": [GOOD], "rejected": [BAD]},
        {
            "conversations": [{"from": "human", "value": "<image>a?"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"prompt": "<image>a?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"messages": [ASKED, GOOD], "rejected_response": "bad"},
        {"messages": [ASKED, GOOD], "rejected_messages": [ASKED, BAD]},
        {"query": "<image>a?", "response": "good", "rejected_response": "bad"},
        {"question": "a?", "chosen": "good", "rejected": "bad"},
    ],
    ids=[
        *("prompt", "whole", "messages", "texts", "parts", "sharegpt"),
        *("prompt and whole", "rejected_response", "rejected_messages", "query", "question"),
    ],
)
def test_preferences(row, folder):
    (read,) = read_preferences(lines(folder, {**row, "images": ["red.png"]}))
    assert read["images"] == [{"bytes": RED, "path": None}]
    assert read["prompt"] == [said("user", PARTED)]
    assert (read["chosen"], read["rejected"]) == (
        [said("assistant", [text("good")])],
        [said("assistant", [text("bad")])],
    )


def test_the_system_text_of_preferences(folder):
    row = {"prompt": [said("system", "be brief"), said("user", "a?")], "chosen": "good", "rejected": "bad"}
    (read,) = read_preferences(lines(folder, {**row, "system": "be kind"}))
    assert read["prompt"] == [said("system", [text("be kind\nbe brief")]), said("user", [text("a?")])]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": [ASKED], "chosen": [GOOD]}, "has no rejected"),
        ({"messages": [ASKED, GOOD], "rejected_response": "bad", "chosen": [GOOD]}, "under one pair of names"),
        ({"messages": [ASKED, GOOD], "rejected_response": "bad", "rejected_images": ["a.png"]}, "rejected_images"),
        ({"prompt": [ASKED], "chosen": [ASKED], "rejected": [ASKED]}, "nothing behind the prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "has no prompt"),
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, "1 <image> for 0 images"),
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD], "videos": ["a.mp4"]}, "has videos"),
        ({"prompt": "<video>a?", "chosen": [GOOD], "rejected": [BAD]}, "holds <video>"),
        (
            {"prompt": [said("user", [{"type": "video", "path": "a.mp4"}])], "chosen": [GOOD], "rejected": [BAD]},
            "holds <video>",
        ),
        ({"prompt": "a?", "chosen": "<image>", "rejected": [BAD]}, "chosen holds <image>"),
        ({"prompt": "a?", "chosen": [GOOD], "rejected": [ASKED]}, "rejected must end with an answer"),
        ({"prompt": [said("system", "a")], "chosen": [GOOD], "rejected": [BAD]}, "prompt must end with a message"),
        ({"prompt": "a?", "chosen": [GOOD], "rejected": [BAD], "images": ["no.png"]}, "needs the picture .*no.png"),
    ],
)
def test_preferences_that_are_refused(row, message, folder):
    with pytest.raises(ValueError, match=f"Line 1 of .*{message}"):
        list(read_preferences(lines(folder, row)))


def test_preferences_in_the_cache_are_those_of_the_file(folder, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    for number, answer in enumerate(("good", "better")):
        row = {"prompt": "a?", "chosen": answer, "rejected": "bad", "images": ["red.png"]}
        Image.new("RGB", (8 + number, 8), "red").save(folder / "red.png")
        (read,) = preferences_as_dataset(lines(folder, row))
        assert read["chosen"][0]["content"] == [text(answer)] and read["images"][0].size == (8 + number, 8)
    (folder / "red.png").write_bytes(BLUE)  # the picture alone
    (read,) = preferences_as_dataset(folder / "rows.jsonl")
    assert read["images"][0].getpixel((0, 0)) == (0, 0, 255)
