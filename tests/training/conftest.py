"""A small mixture whose samples differ in all that batching could get wrong, and runs on it."""

import json
import os
import platform
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from PIL import Image

from otter_hf.data import write_mimicit
from otter_hf.training.run import run as main


@pytest.fixture(scope="session")
def trajectories():
    """What `record` collects; written to the file that the environment names, see benchmarks/invariants.py."""
    collected = {}
    yield collected
    if path := os.environ.get("OTTER_HF_INVARIANTS"):
        result = {
            "name": "invariants",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "device": "cpu",
            "rows": [{"invariant": name, "runs": runs} for name, runs in collected.items()],
        }
        Path(f"{path}.part").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        Path(f"{path}.part").rename(path)


@pytest.fixture
def record(trajectories, tmp_path):
    """`record(invariant, {run: output folder})` keeps loss and gradient norm of each step, and returns the runs."""

    def read(folder: Path) -> dict[str, list[float]]:
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        steps = [entry for entry in history if "loss" in entry]
        return {key: [entry[key] for entry in steps] for key in ("loss", "grad_norm")}

    def record(name: str, folders: dict[str, Path]) -> dict[str, dict[str, list[float]]]:
        trajectories[name] = {run: read(folder) for run, folder in folders.items()}
        return trajectories[name]

    return record


@pytest.fixture
def ragged(model, processor, tmp_path, monkeypatch):
    """A model folder `base` and a mixture `data.yaml`: texts of any length, no, one or three pictures."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    colours = ["red", "green", "blue", "yellow", "black", "white", "purple", "orange"]
    images = {colour: Image.new("RGB", (20, 24), colour) for colour in colours}
    texts, pictures, shots = {}, {}, {}
    for i, colour in enumerate(colours):
        texts[f"t{i}"] = {"instruction": "say it " * (1 + i), "answer": "yes " * (1 + 5 * (i % 3)), "image_ids": []}
        pictures[f"p{i}"] = {"instruction": "color?" * (i % 3), "answer": colour * (1 + i % 4), "image_ids": [colour]}
        shots[f"p{i}"] = [f"p{(i + j) % 8}" for j in (1, 2)]
    text_files = write_mimicit(tmp_path, "texts", texts, {})
    files = write_mimicit(tmp_path, "pictures", pictures, images)
    (tmp_path / "shots_train.json").write_text(json.dumps(shots))
    entry = {"mimicit_path": str(files.instructions_path), "images_path": str(files.images_path)}
    mixture = {
        "IMAGE_TEXT": {"pictures": entry},
        "TEXT_ONLY": {"texts": {"mimicit_path": str(text_files.instructions_path)}},
        "IMAGE_TEXT_IN_CONTEXT": {"shots": {**entry, "train_config_path": str(tmp_path / "shots_train.json")}},
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(mixture))
    return tmp_path


@pytest.fixture
def fit(ragged):
    """Trains on `ragged` with more settings; returns the output folder."""
    fixed = {
        "model_name_or_path": str(ragged / "base"),
        "train_mixture": str(ragged / "data.yaml"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "peak_flops": 1e11,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }

    def fit(output: str = "out", **settings) -> Path:
        recipe = ragged / f"{output}.yaml"
        recipe.write_text(yaml.safe_dump(fixed | {"output_dir": str(ragged / output)} | settings))
        main([str(recipe)])
        return ragged / output

    return fit
