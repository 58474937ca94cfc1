"""The scripts of `examples/easy_vqa`."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


FOLDER = Path(__file__).resolve().parents[2] / "examples" / "easy_vqa"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"easy_vqa_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sample():
    picture = Image.new("RGB", (64, 64), (250, 240, 250))
    picture.paste("red", (20, 30, 40, 44))
    turns = [(f"question {i}?", f"answer {i}") for i in range(6)]
    return {
        "id": "a",
        "turns": turns,
        "media": [[picture]],
        "media_per_turn": [1, 0, 0, 0, 0, 0],
        "task_group": "IMAGE_TEXT",
    }


def test_augment_asks_a_few_questions_about_a_moved_picture(sample):
    augment = load("train").augment
    orders, boxes = set(), set()
    for seed in range(20):
        augmented = augment(sample, random.Random(seed))
        assert len(augmented["turns"]) == 3
        assert set(augmented["turns"]) < set(sample["turns"])
        assert augmented["media_per_turn"] == [1, 0, 0]
        ((picture,),) = augmented["media"]
        assert sorted(picture.getcolors()) == sorted(sample["media"][0][0].getcolors())
        orders.add(tuple(augmented["turns"]))
        boxes.add(picture.getchannel("G").point(lambda value: 255 * (value == 0)).getbbox())
    assert len(orders) > 10
    assert len(boxes) > 10
    again = augment(sample, random.Random(3))
    assert again["turns"] == augment(sample, random.Random(3))["turns"]


def test_augment_keeps_the_turns_of_worked_examples(sample):
    shots = {
        **sample,
        "turns": sample["turns"][:2],
        "media": [[Image.new("RGB", (64, 64), "white")], *sample["media"]],
        "media_per_turn": [1, 1],
        "task_group": "IMAGE_TEXT_IN_CONTEXT",
    }
    augmented = load("train").augment(shots, random.Random(0))
    assert augmented["turns"] == shots["turns"]
    assert augmented["media_per_turn"] == [1, 1]
    assert len(augmented["media"]) == 2


def test_prepared_files_hold_no_test_picture_and_no_validation_picture_is_trained_on(tmp_path, monkeypatch):
    easy_vqa = pytest.importorskip("easy_vqa", reason="the demo's extra is not installed")
    from otter_hf.data import MimicitMixture

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    load("prepare").main(tmp_path)
    train = MimicitMixture(tmp_path / "train.yaml", cache_dir=tmp_path / "cache")
    validation = MimicitMixture(tmp_path / "validation.yaml", cache_dir=tmp_path / "cache")
    assert train.task_groups.count("IMAGE_TEXT") == 3800
    assert len(train[0]["media"]) == 1
    assert len(train[len(train) - 1]["media"]) == len(train[len(train) - 1]["turns"]) == 3

    records = {
        name: json.loads((tmp_path / f"{name}_instructions.json").read_text())["data"].values()
        for name in ("train", "validation")
    }
    pictures = {name: {image for record in records[name] for image in record["image_ids"]} for name in records}
    assert len(pictures["train"]) == 3800
    assert len(pictures["validation"]) == 200
    assert not pictures["train"] & pictures["validation"]
    assert len(records["train"]) + len(records["validation"]) == len(easy_vqa.get_train_questions()[0])
    assert len(validation) == len(records["validation"])


def test_answers_are_drawn_with_mistakes_in_the_last_row(tmp_path):
    pytest.importorskip("easy_vqa", reason="the demo's extra is not installed")
    picture = Image.new("RGB", (64, 64), "lime")
    results = [(picture, f"question {i}?", "yes", "no" if i < 2 else "yes") for i in range(30)]
    load("evaluate").draw_answers(results, tmp_path)
    with Image.open(tmp_path / "answers.png") as figure:
        lime = (np.asarray(figure.convert("RGB")) == (0, 255, 0)).all(axis=2)  # (height, width)
    rows = [row.sum() for row in np.array_split(lime, 4)]
    assert min(rows[:3]) > 1.5 * rows[3] > 0


@pytest.mark.slow
def test_demo_from_end_to_end_with_a_few_steps(tmp_path):
    pytest.importorskip("easy_vqa", reason="the demo's extra is not installed")
    command = [sys.executable, str(FOLDER / "demo.py"), "--output", str(tmp_path), "--max_steps", "3"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    # the control that no model takes part in
    assert metrics["question_only"] == 0.67
    assert metrics["test_questions"] == 9673
    assert {"accuracy", "shuffled_images", "per_question_type", "seconds", "train_seconds"} <= metrics.keys()
    assert metrics["versions"]["transformers"]
    assert metrics["peak_memory_mb"] < 4096
    for name in ("training.png", "answers.png"):
        assert Image.open(tmp_path / name).width > 500
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert "Two worked examples" in run.stdout
