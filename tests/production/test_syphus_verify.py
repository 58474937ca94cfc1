"""Endpoints that are shown pictures, and pairs that are asked again without and with them."""

import base64
import io
import json

import pytest
from PIL import Image

from otter_hf.cli import main
from otter_hf.data.formats import load_mimicit
from otter_hf.data.parquet_writer import write_images
from otter_hf.production.syphus import (
    Budget,
    ChatReply,
    PictureOptions,
    SyphusRun,
    build_dataset,
    make_verification,
    verifications,
)
from otter_hf.production.syphus.batch import write_batch_files
from otter_hf.production.syphus.verify import agrees


COLOURS = ("red", "green", "blue")


@pytest.fixture
def store(tmp_path):
    """Two pictures for each of the pairs 0 to 2, of 100 x 50."""
    pictures = {
        f"SD_IMG_0000{pair}_{side}": Image.new("RGB", (100, 50), COLOURS[pair]) for pair in range(3) for side in (1, 2)
    }
    write_images(tmp_path / "SD.parquet", pictures.items())
    return tmp_path / "SD.parquet"


def make_run(tmp_path, store, num_queries=3, **options):
    rows = [{"img_id": str(number), "sentences": [f"It is number {number}"]} for number in range(num_queries)]
    (tmp_path / "sd.json").write_text(json.dumps(rows))
    pictures = PictureOptions([str(store)], **options)
    kind = "change.SpotTheDifference"
    return SyphusRun.create(tmp_path / "run", kind, tmp_path / "sd.json", "m", pictures=pictures, verify=True)


class Seeing:
    """Writes three pairs per query. Asked again it knows the first without pictures, and the second from them."""

    def __init__(self):
        self.chats = []

    def complete(self, messages):
        self.chats.append(messages)
        content = messages[-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        seen = None if isinstance(content, str) else self.colour(content[0])
        if "number" in text:
            pairs = [("Is it a picture?", "Yes, it is."), ("Which colour?", f"It is {seen}."), ("And now?", "A zebra")]
            return ChatReply("\n".join(f"Question: {q}\nAnswer: {a}" for q, a in pairs), "stop", 100, 20)
        replies = {"Is it a picture?": "Yes", "Which colour?": seen or "unknown", "And now?": "Nothing"}
        return ChatReply(replies[text], "stop", 10, 2)

    @staticmethod
    def colour(part):
        data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
        red, green, blue = Image.open(io.BytesIO(data)).getpixel((0, 0))
        return "red" if red > 200 else "blue" if blue > 200 else "green"


def test_pictures_stand_in_front_of_the_text(tmp_path, store):
    run = make_run(tmp_path, store, size=40)
    *_, asked = run.messages(next(run.queries()))
    first, second, text = asked["content"]
    assert text == {"type": "text", "text": "It is number 0"} and first["type"] == second["type"] == "image_url"
    data = base64.b64decode(first["image_url"]["url"].split(",")[1])
    assert Image.open(io.BytesIO(data)).size == (40, 20)
    # opened again it shows the same, and so does a file for a batch
    assert SyphusRun(run.folder).messages(next(run.queries()))[-1] == asked
    (path,) = write_batch_files(run)
    assert json.loads(path.read_text().splitlines()[0])["body"]["messages"][-1] == asked


def test_at_most_so_many_pictures(tmp_path, store):
    run = make_run(tmp_path, store, max_pictures=1)
    assert [part["type"] for part in run.messages(next(run.queries()))[-1]["content"]] == ["image_url", "text"]


def test_a_query_without_its_pictures_is_not_asked(tmp_path, store):
    run, client = make_run(tmp_path, store, num_queries=5), Seeing()
    summary = run.ask(client, concurrency=1)
    assert (summary.replies, summary.failed, len(client.chats)) == (3, 2, 3)
    assert summary.reasons == {"no pictures in the image store": 2}


def test_only_pairs_that_need_the_picture_and_repeat_are_used(tmp_path, store):
    run, client = make_run(tmp_path, store), Seeing()
    run.ask(client, concurrency=1)
    with pytest.raises(ValueError, match="Nothing of 3 queries can be used.*'not verified': 9"):
        build_dataset([run], tmp_path / "made", images_path=store)
    verification = make_verification(run)
    assert make_verification(run) is None and len(verifications(run)) == 1
    summary = verification.ask(client, concurrency=1)
    assert (summary.queries, summary.replies) == (18, 18)
    blind = [chat for chat in client.chats[3:] if isinstance(chat[-1]["content"], str)]
    assert len(blind) == 9
    report = build_dataset([run], tmp_path / "made", images_path=store)
    assert report.left_out == {"answered without the pictures": 3, "another answer when asked again": 3}
    table, _ = load_mimicit(report.files[0], store, cache_dir=tmp_path / "cache")
    assert [(row["instruction"], row["answer"]) for row in table] == [
        ("Which colour?", f"It is {colour}.") for colour in COLOURS
    ]
    with pytest.raises(ValueError, match="agreement must be above 0 and at most 1, got 2"):
        build_dataset([run], tmp_path / "made", images_path=store, agreement=2)


def test_both_share_a_budget(tmp_path, store):
    run, client = make_run(tmp_path, store), Seeing()
    budget = Budget(max_requests=8)
    summary = run.ask(client, budget, concurrency=1)
    summary = make_verification(run).ask(client, budget.behind(summary), concurrency=1)
    assert (summary.replies, summary.pending, summary.stopped) == (5, 13, "budget: max_requests=5")


@pytest.mark.parametrize(
    ("reply", "answer", "same"),
    [
        ("Yes", "Yes, there is a dog.", True),
        ("No, there is none.", "Yes, there is a dog.", False),
        ("It is red", "red", True),
        ("The car is red.", "A red car.", True),
        ("blue", "red", False),
        ("unknown", "A man opens the door", False),
        ("", "red", False),
        ("?", "!", True),
    ],
)
def test_agreement(reply, answer, same):
    assert agrees(reply, answer) == same


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--verify"], "need --with-pictures"),
        (["--max-pictures", "3"], "need --with-pictures"),
        (["--with-pictures", "gone.parquet"], "gone.parquet"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, store, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd.json").write_text(json.dumps([{"img_id": "0", "sentences": ["x"]}]))
    command = ["syphus", "run", "change.SpotTheDifference", "--annotations", "sd.json", "--model", "m"]
    assert main([*command, "--output", "bad", "--batch-files", *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "bad" / "run.json").exists()
