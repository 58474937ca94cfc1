"""
Two processes under `torchrun --max-restarts 1`, of which one dies in the middle: both are started again, go on from
the last checkpoint, and end with the losses of a training that nothing disturbed.

    python tests/drills/elastic.py --repeats 20

`--share-store` leaves torchrun's store to the processes of all attempts, as it is by default.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from training_files import PROGRAM, command, losses, torchrun, write_training_files  # noqa: E402


STEPS = 4
SETTINGS = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
DIE = """
import os, pathlib, signal
from otter_hf.training.trainer import OtterTrainer

original, flag = OtterTrainer.training_step, pathlib.Path({flag!r})

def step(self, *args, **kwargs):
    if self.state.global_step == 3 and self.args.process_index == {rank} and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)

OtterTrainer.training_step = step
"""


def drill(folder: Path, number: int, rank: int, share_store: bool) -> dict:
    """One run in which the process `rank` dies once, and what was wrong with its end."""
    name = f"run-{number}"
    started = time.monotonic()
    result = torchrun(
        folder,
        command(folder, name, resume_from_checkpoint="auto", **SETTINGS),
        *("--max-restarts", "1"),
        program=DIE.format(flag=str(folder / f"{name}.died"), rank=rank) + PROGRAM,
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0" if share_store else "1",
    )
    faults = []
    if not (folder / f"{name}.died").exists():
        faults.append("nobody died")
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "Error" in line]
        faults.append(f"exit code {result.returncode}: {lines[-1] if lines else result.stderr[-200:]}")
    elif "checkpoint-2" not in result.stderr:
        faults.append("it did not go on from the checkpoint")
    elif any(abs(a - b) > 1e-4 * abs(b) for a, b in zip(losses(folder / name), losses(folder / "whole"), strict=True)):
        faults.append("other losses")
    return {"rank": rank, "seconds": round(time.monotonic() - started, 1), "faults": faults}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--share-store", action="store_true")
    arguments = parser.parse_args()
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = write_training_files(Path(folder), text_only=7)
        whole = torchrun(folder, command(folder, "whole", **SETTINGS))
        assert whole.returncode == 0, whole.stderr[-2000:]
        results = []
        for number in range(arguments.repeats):
            results.append(drill(folder, number, draw.randrange(2), arguments.share_store))
            print(f"{number + 1}: {results[-1]}", flush=True)
    failed = sum(bool(result["faults"]) for result in results)
    worst = max(result["seconds"] for result in results)
    print(f"{len(results)} tried, {failed} failed, the slowest took {worst} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
