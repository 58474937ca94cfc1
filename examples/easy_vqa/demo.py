"""
The whole path on real pictures: data, training from scratch, evaluation, a chat. `make demo` runs it.

    python examples/easy_vqa/demo.py --output out/demo

Runs the other scripts of this folder one after the other, each of which can be run alone, and adds to the
`metrics.json` of the evaluation what the run took.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path


FOLDER = Path(__file__).resolve().parent
PACKAGES = ("otter-hf", "torch", "transformers", "accelerate", "datasets", "tokenizers", "easy-vqa")


def main(output: Path, started: float, extra: list[str]) -> None:
    """Writes everything into `output`; `extra` arguments go to the training."""
    data, untrained, model = output / "data", output / "untrained", output / "model"
    # nothing is downloaded, and the memory-mapped copies of the data stay with the demo
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(output / "cache")}
    run("prepare.py", "--output", data)
    run("build_tiny_otter.py", "--data", data, "--output", untrained)
    train_seconds = run(
        "train.py",
        FOLDER / "recipe.yaml",
        *("--model_name_or_path", untrained, "--output_dir", model),
        *("--train_mixture", data / "train.yaml", "--eval_mixture", data / "validation.yaml"),
        *extra,
    )
    run("evaluate.py", "--model", model, "--output", output)
    run("chat.py", "--model", model)
    shutil.copy(model / "training.png", output / "training.png")

    path = output / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8"))
    # the largest process of all steps; Linux counts KiB, macOS bytes
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    metrics |= {
        "seconds": round(time.time() - started),
        "train_seconds": round(train_seconds),
        "peak_memory_mb": round(peak / 2**20),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "cpus": os.cpu_count(),
    }
    path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(f"\n{'test accuracy':<40}{metrics['accuracy']:.1%}")
    print(f"{'  from the question alone':<40}{metrics['question_only']:.1%}")
    print(f"{'  the same model, shuffled pictures':<40}{metrics['shuffled_images']:.1%}")
    print(f"{metrics['seconds']} s, peak memory {metrics['peak_memory_mb']} MiB; figures and model in {output}")


def run(script: str, *arguments: object) -> float:
    """Runs a script of this folder; returns its seconds."""
    command = [sys.executable, str(FOLDER / script), *map(str, arguments)]
    print("\n$ python " + " ".join([os.path.relpath(command[1]), *command[2:]]), flush=True)
    start = time.time()
    status = subprocess.run(command).returncode
    if status:
        sys.exit(status)
    return time.time() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/demo"))
    parser.add_argument("--started", type=float, default=time.time(), help="when the whole command began, in seconds")
    arguments, rest = parser.parse_known_args()
    main(arguments.output, arguments.started, rest)
