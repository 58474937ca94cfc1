"""Files of a tiny training run, and how to start one in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from PIL import Image

from otter_hf.data import write_mimicit
from otter_hf.testing import write_tiny


COLOURS = ["red", "green", "blue", "yellow", "black", "white"]


def write_training_files(folder: Path, text_only: int = 0) -> Path:
    """
    A tiny Otter `base`, and the mixtures `data.yaml` and `eval.yaml` of eleven questions about six pictures.

    Args:
        text_only: so many questions without a picture as well, in a group of their own.
    """
    write_tiny("otter", folder / "base")
    records, images = {}, {}
    for i, colour in enumerate(COLOURS):
        images[f"IMG_{i}"] = Image.new("RGB", (20, 24), colour)
        records[f"INS_{i}_a"] = {"instruction": "what color?", "answer": colour, "image_ids": [f"IMG_{i}"]}
        records[f"INS_{i}_b"] = {"instruction": f"is it {colour}?", "answer": "yes", "image_ids": [f"IMG_{i}"]}
    del records["INS_5_b"]  # an odd number: in batches of two, the last one also has a sample of another group
    paths = write_mimicit(folder, "six", records, images)
    entry = {"mimicit_path": str(paths.instructions_path), "images_path": str(paths.images_path)}
    mixture = {"IMAGE_TEXT": {"questions": entry}}
    (folder / "eval.yaml").write_text(yaml.safe_dump(mixture))
    if text_only:
        texts = {
            f"INS_t{i}": {"instruction": f"{i} plus {i}?", "answer": str(2 * i), "image_ids": []}
            for i in range(text_only)
        }
        paths = write_mimicit(folder, "sums", texts, {})
        mixture["TEXT_ONLY"] = {"sums": {"mimicit_path": str(paths.instructions_path)}}
    (folder / "data.yaml").write_text(yaml.safe_dump(mixture))
    return folder


def command(folder: Path, output: str = "out", **recipe) -> list[str]:
    """Arguments of `otter-hf train` for the files in `folder`; writes them down as a recipe."""
    fixed = {
        "model_name_or_path": str(folder / "base"),
        "train_mixture": str(folder / "data.yaml"),
        "output_dir": str(folder / output),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "peak_flops": 0,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    path = folder / f"recipe_{output}.yaml"
    path.write_text(yaml.safe_dump(fixed | recipe))
    return [str(path)]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    settings = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    return os.environ | settings | variables


# one training for each recipe that is given
PROGRAM = """
import sys
from otter_hf.training.run import main

for recipe in sys.argv[1:]:
    main([recipe])
"""


def torchrun(
    folder: Path,
    arguments: list[str],
    *flags: str,
    program: str = PROGRAM,
    processes: int = 2,
    timeout: float = 300,
    **variables: str,
) -> subprocess.CompletedProcess:
    """Trains with `torchrun` in `processes` processes, which talk over gloo."""
    script = folder / "script.py"
    script.write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    return subprocess.run(
        [*command, *flags, str(script), *arguments],
        env=environment(folder, **variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def losses(output: Path) -> list[float]:
    """The loss of each step of a finished run."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
