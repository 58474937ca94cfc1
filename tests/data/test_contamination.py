"""What training and evaluation data share."""

import io
import json

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from otter_hf.cli import main
from otter_hf.data import write_mimicit
from otter_hf.data.contamination import (
    Question,
    Questions,
    find_overlap,
    fingerprint,
    mixture_questions,
    normalise_question,
    perceptual_hash,
)


def photograph(seed: int, side: int = 96) -> Image.Image:
    """Blobs of colour: as a photograph, most of it in low frequencies."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def drawing(shape: str, colour: str) -> Image.Image:
    picture = Image.new("RGB", (64, 64), "white")
    getattr(ImageDraw.Draw(picture), shape)((20, 20, 44, 44), fill=colour)
    return picture


def stored_with_loss(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.resize((53, 53)).save(buffer, "JPEG", quality=40)
    return Image.open(buffer)


def side(rows, pictures):
    known = {name: fingerprint(picture) for name, picture in pictures.items()}
    return Questions([Question(*row) for row in rows], known.get)


TRAINING = {"t0": photograph(0), "t1": photograph(1), "t2": drawing("ellipse", "red"), "t3": photograph(3)}


@pytest.mark.parametrize(
    ("picture", "found"),
    [
        (photograph(1), ["t1"]),
        (stored_with_loss(photograph(1)), ["t1"]),
        (photograph(1).point(lambda level: min(255, level + 8)), ["t1"]),
        (photograph(7), []),
        (drawing("ellipse", "red"), ["t2"]),
        # at the same place, which a hash of grey levels would take for the same
        (drawing("ellipse", "blue"), []),
        (drawing("rectangle", "red"), []),
        (Image.new("RGB", (64, 64), "red"), []),
    ],
    ids=["equal", "scaled and stored with loss", "brighter", "other", "drawing", "other colour", "other form", "flat"],
)
def test_pictures_are_found_again_and_others_are_not(picture, found):
    training = side([("row", "what?", TRAINING)], TRAINING)
    overlap = find_overlap(training, side([("e", "who?", ["e0"])], {"e0": picture}), num_threads=1)
    assert overlap.pictures == [(name, "e0") for name in found]
    assert overlap.rows == overlap.questions == []


def test_a_question_about_the_same_picture_tells_more_than_either():
    training = side(
        [("a", "What is it?", ["t0"]), ("b", "Who is there?", ["t1"]), ("c", "what is it", ["t3"]), ("d", "why", [])],
        TRAINING,
    )
    pictures = {"e0": TRAINING["t0"], "e1": photograph(9), "e2": TRAINING["t1"]}
    evaluation = side(
        [("0", "<image>what  is it ?", ["e0"]), ("1", "WHAT IS IT", ["e1"]), ("2", "where?", ["e2"]), ("3", "?!", [])],
        pictures,
    )
    overlap = find_overlap(training, evaluation, num_threads=1)
    assert overlap.rows == [("a", "0")]
    assert overlap.pictures == [("t0", "e0"), ("t1", "e2")]
    assert overlap.questions == [("a", "0"), ("a", "1")]
    assert overlap.compared == {
        "evaluation_rows": 4,
        "evaluation_pictures": 3,
        "training_rows": 4,
        "training_pictures": 3,
    }
    assert "same question about the same picture: 1 (0 = a)" in overlap.table()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Is it red?", " is  it\nRED ", True),
        ("<image>Is it red?", "Is it red", True),
        ("Is it red?\nAnswer the question using a single word or phrase.", "Is it red?", True),
        ("Which?\nAnswer with the option's letter from the given choices directly.", "Which?", True),
        ("e\u0301cole", "École", True),
        ("ﬁre", "fire", True),
        ("Is it red?", "Is it reddish?", False),
        ("图里有什么？", "图里有什么", True),
    ],
)
def test_questions_differ_in_their_words(one, other, same):
    assert (normalise_question(one) == normalise_question(other)) == same


def test_the_hash_is_that_of_imagehash():
    imagehash = pytest.importorskip("imagehash")
    for seed in range(20):
        expected = imagehash.phash(photograph(seed)).hash.flatten()
        assert (perceptual_hash(photograph(seed)) == expected).all()


@pytest.fixture
def mixtures(tmp_path, monkeypatch):
    """A training YAML whose pictures are 0 to 3, and another with 2 to 5."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, numbers in (("train", range(4)), ("test", range(2, 6))):
        records = {
            f"R{i}": {"instruction": f"what is number {i}?", "answer": "it", "image_ids": [f"I{i}"]} for i in numbers
        }
        pictures = {f"I{i}": photograph(i, 64 if name == "train" else 80) for i in numbers}
        write_mimicit(tmp_path, name, records, pictures)
        files = {"mimicit_path": f"{name}_instructions.json", "images_path": f"{name}.parquet"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"IMAGE_TEXT": {name.upper(): files}}))
    return tmp_path


def test_check_lists_what_is_shared(mixtures, capsys):
    report = mixtures / "report.json"
    command = ["data", "check", str(mixtures / "train.yaml"), "--against", str(mixtures / "test.yaml")]
    assert main([*command, "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert "same question about the same picture: 2 (TEST/R2 = TRAIN/R2, TEST/R3 = TRAIN/R3)" in out
    found = json.loads(report.read_text())["contamination"]
    assert found["pictures"] == [{"training": f"TRAIN/I{i}", "evaluation": f"TEST/I{i}"} for i in (2, 3)]
    assert found["rows"] == [{"training": f"TRAIN/R{i}", "evaluation": f"TEST/R{i}"} for i in (2, 3)]
    assert main([*command, "--strict"]) == 1
    capsys.readouterr()
    # what cannot be compared does not keep back what is wrong with it
    (mixtures / "bad_instructions.json").write_text('{"data": {"R": 1}}')
    bad = (mixtures / "train.yaml").read_text().replace("train_instructions", "bad_instructions")
    (mixtures / "bad.yaml").write_text(bad)
    assert main(["data", "check", str(mixtures / "bad.yaml"), "--against", str(mixtures / "test.yaml")]) == 1
    out = capsys.readouterr().out
    assert "record 'R' is no object" in out and "error: not compared: Record 'R'" in out
    # of the pictures nothing is decoded
    assert main([*command, "--skip-images"]) == 0
    out = capsys.readouterr().out
    assert "same picture: 0" in out and "same question: 2" in out


def test_films_and_damaged_pictures_are_counted(mixtures):
    training = mixture_questions(mixtures / "train.yaml")
    evaluation = mixture_questions(mixtures / "test.yaml")
    broken = evaluation._replace(fingerprint=lambda id: None if id == "TEST/I2" else evaluation.fingerprint(id))
    overlap = find_overlap(training, broken, num_threads=1)
    assert overlap.left_out == 1
    assert overlap.pictures == [("TRAIN/I3", "TEST/I3")]
    assert "not compared: 1 films" in overlap.table()


def test_datasets_of_one_name_in_two_groups(mixtures):
    """Each has its own pictures, of which none is lost."""
    entries = {
        group: {"A": {"mimicit_path": f"{name}_instructions.json", "images_path": f"{name}.parquet"}}
        for group, name in (("IMAGE_TEXT", "train"), ("IMAGE_TEXT_IN_CONTEXT", "test"))
    }
    (mixtures / "both.yaml").write_text(yaml.safe_dump(entries))
    overlap = find_overlap(mixture_questions(mixtures / "both.yaml"), mixture_questions(mixtures / "test.yaml"))
    found = {training for training, _ in overlap.pictures}
    assert found == {
        *(f"IMAGE_TEXT/A/I{i}" for i in (2, 3)),
        *(f"IMAGE_TEXT_IN_CONTEXT/A/I{i}" for i in (2, 3, 4, 5)),
    }
    assert overlap.left_out == 0 and overlap.compared["training_pictures"] == 8


def test_what_is_transparent_is_white_on_both_sides():
    seen = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    seen.paste(photograph(0), (8, 8))
    shown = seen.convert("RGBA")
    ground = Image.new("RGBA", seen.size, "white")
    ground.alpha_composite(seen)
    for one, other in zip(fingerprint(shown), fingerprint(ground.convert("RGB")), strict=True):
        assert (one == other).all()


def test_datasets_whose_names_begin_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = {}
    for file, name, pictures in (
        ("a", "A", {"1": photograph(0), "B/2": photograph(1)}),
        ("b", "A/B", {"1": TRAINING["t3"]}),
    ):
        records = {id: {"instruction": "what?", "answer": "it", "image_ids": [id]} for id in pictures}
        write_mimicit(tmp_path, file, records, pictures)
        datasets[name] = {"mimicit_path": f"{file}_instructions.json", "images_path": f"{file}.parquet"}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"IMAGE_TEXT": datasets}))
    look = mixture_questions(tmp_path / "mix.yaml").fingerprint
    for name, seed in (("A/1", 0), ("A/B/2", 1), ("A/B/1", 3)):
        assert (look(name)[0] == perceptual_hash(photograph(seed))).all()
    assert look("A/B/3") is look("C/1") is None
