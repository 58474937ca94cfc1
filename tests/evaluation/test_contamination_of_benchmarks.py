"""`otter-hf eval --training-data`: rows of benchmarks that a model was trained on."""

import json
from dataclasses import replace

import pytest
import yaml
from benchmark_rows import RED, endpoint, mme, write_parquet
from PIL import Image

from otter_hf.cli import main
from otter_hf.data import write_mimicit
from otter_hf.data.contamination import Overlap


pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (docs/evaluation.md)")


def test_shared_rows_are_listed_before_anything_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    question = "Is a yes? Please answer yes or no"
    records = {
        "seen": {"instruction": question, "answer": "yes", "image_ids": ["red"]},
        "other": {"instruction": "What colour is it?", "answer": "green", "image_ids": ["green"]},
    }
    write_mimicit(tmp_path, "LA", records, {"red": RED, "green": Image.new("RGB", (9, 9), "green")})
    training = {"IMAGE_TEXT": {"LA": {"mimicit_path": "LA_instructions.json", "images_path": "LA.parquet"}}}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(training))
    shown = [{"question_id": 7, "image": Image.new("RGB", (30, 30), "blue"), "question": question, "answers": ["a"]}]
    others = [{**shown[0], "question_id": i, "question": f"what is {i}?"} for i in range(3)]
    tables = {
        name: str(write_parquet(tmp_path / f"{name}.parquet", rows))
        for name, rows in (("mme", mme()), ("vqa", shown), ("demonstrations", others))
    }
    datasets = [
        {"name": "mme", "data_path": tables["mme"], "limit": 2},
        {"name": "vqav2", "train": tables["demonstrations"], "test": tables["vqa"], "shots": [1]},
    ]
    with endpoint(lambda text: "Yes") as (address, _):
        models = [{"name": "stub", "endpoint": address, "model": "stub"}]
        config = {"models": models, "datasets": datasets, "output": str(tmp_path / "out")}
        (tmp_path / "eval.yaml").write_text(yaml.safe_dump(config))
        assert main(["eval", str(tmp_path / "eval.yaml"), "--training-data", str(tmp_path / "train.yaml")]) == 0
    found = json.loads((tmp_path / "out" / "contamination.json").read_text())
    assert found["rows"] == [{"training": "LA/seen", "evaluation": "mme/existence/a.png"}]
    assert {pair["evaluation"] for pair in found["pictures"]} == {"mme/0/0", "mme/1/0"}
    assert {pair["evaluation"] for pair in found["questions"]} == {"mme/existence/a.png", "vqav2/7"}
    assert found["compared"]["evaluation_rows"] == 3

    # started again it does not look again, but for other data
    from otter_hf.evaluation import contamination
    from otter_hf.evaluation.config import load_config
    from otter_hf.evaluation.run import _look_for_contamination

    looked = []
    monkeypatch.setattr(contamination, "check_contamination", lambda config: looked.append(1) or Overlap())
    monkeypatch.setattr(Overlap, "table", lambda self: "")
    config = replace(load_config(tmp_path / "eval.yaml"), training_data=str(tmp_path / "train.yaml"))
    _look_for_contamination(config)
    assert not looked and json.loads((tmp_path / "out" / "contamination.json").read_text()) == found
    config.datasets[0].limit = 3
    _look_for_contamination(config)
    write_parquet(tmp_path / "mme.parquet", mme()[:4])
    _look_for_contamination(config)
    (tmp_path / "LA_instructions.json").write_text(json.dumps({"data": records}))
    _look_for_contamination(config)
    assert len(looked) == 3
