"""
CPU seconds until a command has said how it is used, and that `import otter_hf` adds to transformers' Auto classes.

    python benchmarks/startup.py [--repeats 5] [--before FOLDER]

`--before` names another checkout (`git worktree add FOLDER 2286065`), measured in turn with this one. Byte code is
cached in a folder of the benchmark's own, as Python does for a user. docs: benchmarks/startup.md
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import report, summary


ROOT = Path(__file__).resolve().parents[1]
AUTO = "from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor"
COMMAND = "import sys; from otter_hf.cli import main; sys.exit(main({!r}))"
HELPS = ("chat", "train")
PROGRAMS = {
    "python alone": "pass",
    "Auto classes of transformers": AUTO,
    "Auto classes, then otter_hf": f"{AUTO}; import otter_hf",
    "import otter_hf": "import otter_hf",
    "otter-hf --version": COMMAND.format(["--version"]),
    "otter-hf --help": COMMAND.format(["--help"]),
    **{f"otter-hf {name} --help": COMMAND.format([name, "--help"]) for name in HELPS},
}


def cpu_seconds(program: str, source: Path, cache: str) -> float | None:
    """User and system time of a Python process that sees the package in `source`; None where it fails."""
    variables = {**os.environ, "PYTHONPATH": str(source), "PYTHONPYCACHEPREFIX": cache, "OMP_NUM_THREADS": "1"}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        return None
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--before", type=Path, help="another checkout to measure in turn")
    arguments = parser.parse_args()
    sources = {"now": ROOT / "src"}
    if arguments.before:
        sources["before"] = arguments.before.resolve() / "src"
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for name, program in PROGRAMS.items():
            seconds = {which: [] for which in sources}
            for repeat in range(arguments.repeats + 1):
                for which, source in sources.items():
                    value = cpu_seconds(program, source, f"{cache}/{which}")
                    if repeat and value is not None:  # the first one fills the cache
                        seconds[which].append(value)
            figures = {which: summary(values, 3) for which, values in seconds.items() if values}
            rows.append({"program": name, "unit": "CPU s", "repeats": arguments.repeats, **figures})
    report("startup", "the checkout `before`" if arguments.before else "none", rows)


if __name__ == "__main__":
    main()
