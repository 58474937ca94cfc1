"""The resolution example from end to end, two steps long and on a few pictures."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


pytest.importorskip("easy_vqa", reason="pip install easy-vqa")
pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "otterhd_resolution.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("otterhd_resolution", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_steps(example, tmp_path, monkeypatch, capsys):
    read_split = example.read_split
    monkeypatch.setattr(example, "read_split", lambda questions, paths: read_split(questions, paths)[:20])
    monkeypatch.setattr(example, "RESULT", tmp_path / "results" / "figures.json")
    monkeypatch.setattr(example, "BATCH_SIZE", 4)
    example.main(tmp_path / "out", steps=2)

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "results" / "figures.json").read_text())
    assert [(row["resolution"], row["image_tokens"]) for row in result["rows"]] == [(24, 6), (48, 20), (96, 72)]
    assert all(0 <= row[name] <= 1 for row in result["rows"] for name in ("shape", "color", "shape_shuffled"))
    assert Image.open(tmp_path / "out" / "accuracy.png").width > 500

    processor = AutoProcessor.from_pretrained(tmp_path / "out" / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "model")
    inputs = processor(text="User:what shape is present? Assistant:", images=Image.new("RGB", (300, 200), "red"))
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 8 * 6
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    # every word of the questions is one token
    words = processor.encode("User:what color is the shape? Assistant:\x04 teal", add_answer_token=False)[0]
    assert len(words) == 14


def test_pictures_are_placed_on_their_background(example):
    picture = Image.new("RGB", (64, 64), "white")
    picture.putpixel((5, 5), (1, 2, 3))
    placed = example.place(picture, example.random.Random(0))
    assert placed.size == (128, 128)
    assert sorted(placed.getcolors()) == [(1, (1, 2, 3)), (128 * 128 - 1, (255, 255, 255))]
