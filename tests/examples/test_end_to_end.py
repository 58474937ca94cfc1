"""`examples/end_to_end.py`: what its captions say, and all of it with a few steps."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "end_to_end.py"


def test_captions_say_what_the_answers_say():
    easy_vqa = pytest.importorskip("easy_vqa", reason="the demo's extra is not installed")
    spec = importlib.util.spec_from_file_location("end_to_end", SCRIPT)
    end_to_end = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(end_to_end)
    questions = easy_vqa.get_test_questions()
    kinds = end_to_end.kinds_of(questions)
    assert len(kinds) > 700
    answers = [(picture, answer) for _, answer, picture in zip(*questions, strict=True) if answer not in ("yes", "no")]
    assert all(answer in kinds[picture] for picture, answer in answers if picture in kinds)


@pytest.mark.slow
def test_end_to_end_with_a_few_steps(tmp_path):
    pytest.importorskip("easy_vqa", reason="the demo's extra is not installed")
    steps = ["--pretrain-steps", "2", "--finetune-steps", "2", "--test", "8"]
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path), *steps]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["captions"]) == {"0 shots", "2 shots", "0 shots, shuffled pictures"}
    for name in ("answers, pretrained", "answers, from_scratch"):
        assert set(figures[name]) == {"0 shots", "2 shots", "4 shots", "0 shots, shuffled pictures"}
        assert all(0 <= share <= 1 for share in figures[name].values())
    # the pretrained model is an Otter, whose tokenizer has one token more
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("flamingo", "otter_pretrained")]
    assert [config["model_type"] for config in configs] == ["flamingo", "otter"]
    vocabularies = [config["text_config"]["vocab_size"] for config in configs]
    assert vocabularies[1] == vocabularies[0] + 1 == configs[1]["answer_token_id"] + 1
