"""What the benchmarks share: alternating timings, summaries, the result file, this project at a commit before."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch
import transformers


RESULTS = Path(__file__).parent / "results"


def summary(values: list[float], digits: int = 5) -> dict:
    return {
        "min": round(min(values), digits),
        "median": round(statistics.median(values), digits),
        "max": round(max(values), digits),
    }


def time_call(function, count: int = 1) -> float:
    """Seconds of a call, the mean of `count`."""
    start = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - start) / count


def compare(workload: str, ours, peer, repeats: int, turns: int = 1, is_warm: bool = False, **extra) -> dict:
    """
    Time two functions in turn, so that each ratio is of two neighbours; ratio = peer's time over ours.

    Fast functions are repeated until a sample takes at least 20 ms. With `turns`, a repeat is the median of so many
    runs of each, in turn: what disturbs the machine for a moment does not count. With `is_warm` each has run before,
    and takes long enough.
    """
    calls = [1, 1] if is_warm else []
    for function in () if is_warm else (ours, peer):
        function()  # warm-up
        calls.append(max(1, int(0.02 / time_call(function))))
    seconds = ([], [])
    for _ in range(repeats):
        runs = ([], [])
        for _ in range(turns):
            for times, function, count in zip(runs, (ours, peer), calls, strict=True):
                times.append(time_call(function, count))
        for values, times in zip(seconds, runs, strict=True):
            values.append(statistics.median(times))
    return {
        "workload": workload,
        "unit": "s",
        "ours": summary(seconds[0], 6),
        "peer": summary(seconds[1], 6),
        "ratio": summary([b / a for a, b in zip(*seconds, strict=True)], 2),
        **extra,
    }


class Side:
    """
    A process that runs `script --work` with the package of `source`, or with what the interpreter `python` has: a line
    in, a line of JSON out.
    """

    def __init__(self, script: str, source: Path | None = None, python: str = sys.executable, arguments: tuple = ()):
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
        if source is not None:
            environment["PYTHONPATH"] = os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [python, script, "--work", *arguments]
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def run(self, line: str = "") -> dict:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def commit_parser(description: str, peer: str) -> argparse.ArgumentParser:
    """The arguments of a benchmark beside this project at another commit, whose sides are `--work`; see [`Side`]."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peer", default=peer, help="commit to compare with (default: %(default)s)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    return parser


def check_out(commit: str, folder: str) -> Path:
    """The folder of the package as it was at `commit`, taken out of git's history into `folder`."""
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(["git", "-C", root, "archive", commit, "src"], stdout=subprocess.PIPE) as git:
        with tarfile.open(fileobj=git.stdout, mode="r|") as archive:
            archive.extractall(folder, filter="data")
    return Path(folder) / "src"


def report(name: str, peer: str, rows: list[dict]) -> None:
    """Write `results/NAME.json` and print it as one object."""
    result = {
        "name": name,
        "peer": peer,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    temporary = RESULTS / f"{name}.json.part"
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.rename(RESULTS / f"{name}.json")
    print(json.dumps(result))
