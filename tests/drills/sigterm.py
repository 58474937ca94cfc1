"""
SIGTERM to the whole process group of a training with data workers, at any moment: exit code 143, a checkpoint that is
whole, and no process left.

    python tests/drills/sigterm.py --kind train --repeats 20
"""

import argparse
import faulthandler
import importlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import yaml  # noqa: E402
from pretraining_shards import write_documents, write_pairs  # noqa: E402
from training_files import environment, write_training_files  # noqa: E402

from otter_hf.training.checkpoints import find_checkpoint  # noqa: E402


SETTINGS = {
    "max_steps": 100_000,
    "logging_steps": 1,
    "save_strategy": "no",
    "dataloader_num_workers": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file"]
LAUNCH += [str(Path(__file__).parents[2] / "examples" / "accelerate_configs" / "cpu.yaml")]
# kind -> the program, and what starts it in two processes; None for one process, forked from one with all imports done
KINDS = {
    "train": ("train", None),
    "pretrain": ("pretrain", None),
    "torchrun": ("train", TORCHRUN),
    "torchrun-pretrain": ("pretrain", TORCHRUN),
    "accelerate": ("train", LAUNCH),
}
MODULES = {"train": "otter_hf.training.run", "pretrain": "otter_hf.training.pretraining"}
PROGRAM = "import sys\nfrom {} import main\nmain(sys.argv[1:])\n"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*MODULES.values()])
# torchrun and accelerate end with 1 whatever happened to them and to their processes; a shell shows -15 as 143
CODES = {None: (143, -signal.SIGTERM), "launched": (1, 143, -signal.SIGTERM)}


def prepare(folder: Path) -> None:
    """Model, data and a recipe for each program; the steps are endless, so that the signal ends them."""
    write_training_files(folder, text_only=7)
    write_documents(folder / "docs")
    write_pairs(folder / "pairs", shards=4, per_shard=6)
    sets = {
        "mmc4": {"kind": "interleaved", "shards": "docs", "batch_size": 1, "num_samples": 8},
        "laion": {"kind": "pairs", "shards": "pairs", "batch_size": 1},
    }
    (folder / "sets.yaml").write_text(yaml.safe_dump(sets, sort_keys=False))
    common = SETTINGS | {"model_name_or_path": str(folder / "base")}
    recipes = {
        "train": common | {"train_mixture": str(folder / "data.yaml"), "per_device_train_batch_size": 2},
        "pretrain": common | {"train_sets": str(folder / "sets.yaml")},
    }
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        (folder / f"{name}.py").write_text(PROGRAM.format(MODULES[name]))


def drill(folder: Path, kind: str, output: Path, wait: float) -> dict:
    """One run, ended `wait` seconds behind its first step: exit code, the checkpoint, and what of it was wrong."""
    program, starter = KINDS[kind]
    arguments = [str(folder / f"{program}.yaml"), "--output_dir", str(output)]
    log = output.with_suffix(".log")
    log.touch()
    if starter is None:
        process = FORKS.Process(target=alone, args=(MODULES[program], arguments, log))
        process.start()
        wait_for, ended = process.join, lambda: process.exitcode
    else:
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *starter, str(folder / f"{program}.py"), *arguments],
                env=environment(folder),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_for, ended = process.wait, process.poll
    while "'loss'" not in log.read_text() and ended() is None:
        time.sleep(0.05)
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGTERM)
    started = time.monotonic()
    wait_for(timeout=300)
    seconds, code, faults = time.monotonic() - started, ended(), []
    if code not in CODES[starter and "launched"]:
        faults.append(f"exit code {code}")
    try:
        checkpoint = find_checkpoint("auto", output)
    except ValueError as error:
        checkpoint = None
        faults.append(str(error))
    if checkpoint is None:
        faults.append("no checkpoint")
    elif not json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"]:
        faults.append("a checkpoint of no step")
    deadline = time.monotonic() + 30
    while alive := members(process.pid):
        if time.monotonic() > deadline:
            faults.append(f"live on: {[describe(number) for number in alive]}")
            if starter is None:
                os.killpg(process.pid, signal.SIGUSR1)  # their stacks, into the log
                time.sleep(1)
                faults.append(log.read_text()[-2000:])
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.1)
    return {"code": code, "seconds": seconds, "faults": faults, "log": str(log)}


def alone(module: str, arguments: list[str], log: Path) -> None:
    """A training in this process, as a session of its own."""
    os.setsid()
    # as in any other process; else its data workers come from a server of their own, which outlives it by its imports
    multiprocessing.set_start_method("fork", force=True)
    file = os.open(log, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.register(signal.SIGUSR1)
    importlib.import_module(module).main(arguments)


def describe(process: int) -> str:
    """Command, state, parent, signals, and where in the kernel a process waits."""
    try:
        folder = Path("/proc", str(process))
        command = (folder / "cmdline").read_text().replace("\0", " ").strip()[:80]
        status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines() if ":\t" in line)
        told = {name: status[name].strip() for name in ("State", "PPid", "Threads", "ShdPnd", "SigBlk")}
        return f"{command} | {told} | {(folder / 'wchan').read_text()}"
    except OSError as error:
        return str(error)


def members(group: int) -> list[int]:
    """The processes of a group, zombies aside."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(of_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def run(folder: Path, kind: str, repeats: int, seed: int = 0) -> list[dict]:
    """`repeats` drills, the signal at moments drawn by `seed`."""
    draw = random.Random(seed)
    results = []
    for number in range(repeats):
        results.append(drill(folder, kind, folder / f"{kind}-{number}", draw.uniform(0, 1.5)))
        print(f"{kind} {number + 1}: {results[-1]}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder)
        for kind in KINDS if arguments.kind == "all" else [arguments.kind]:
            results = run(folder, kind, arguments.repeats)
            failed = sum(bool(result["faults"]) for result in results)
            worst = max(result["seconds"] for result in results)
            print(f"{kind}: {len(results)} tried, {failed} failed, the slowest took {worst:.1f} s to end")


if __name__ == "__main__":
    main()
