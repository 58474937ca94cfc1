"""
What the engine costs: documents like MMC4's to shards, in 64 tasks on 2 workers, beside a plain pool of 2 processes.

    python benchmarks/engine.py

The pool (`concurrent.futures`, spawned, a file at a time) is what did this before there was an engine. Both
sides start their workers anew each time, which import the same modules. Needs the extra `scale`.
"""

import argparse
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from _common import compare, report

from otter_hf.data.engine import Engine
from otter_hf.data.pretraining.converters import _convert_mmc4_shard, mmc4_to_tar


TESTS = Path(__file__).resolve().parents[1] / "tests"
TASKS, WORKERS = 64, 2


def pool(patterns: tuple[str, str], files: int, output: Path) -> int:
    """Samples written by a plain pool of processes."""
    jobs = [
        tuple(pattern.replace(f"{{0..{files - 1}}}", str(number)) for pattern in patterns) for number in range(files)
    ]
    convert = partial(_convert_mmc4_shard, output=output, max_samples=30_000, max_bytes=1e10)
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as processes:
        return sum(counts.samples for counts, _ in processes.map(convert, jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--files", type=int, default=TASKS)
    parser.add_argument("--documents", type=int, default=400, help="of a file")
    arguments = parser.parse_args()
    sys.path[:0] = [str(TESTS), str(TESTS / "data")]
    from engine_steps import write_documents

    with tempfile.TemporaryDirectory() as folder:
        patterns = write_documents(Path(folder, "in"), arguments.files, arguments.documents)
        total = arguments.files * arguments.documents

        def anew(convert) -> None:
            shutil.rmtree(Path(folder, "out"), ignore_errors=True)
            if (count := convert(Path(folder, "out"))) != total:
                raise RuntimeError(f"{count} samples were written, not {total}.")

        engine = Engine(tasks=TASKS, workers=WORKERS)
        ours = partial(anew, lambda output: mmc4_to_tar(*patterns, output, engine=engine).samples)
        peer = partial(anew, lambda output: pool(patterns, arguments.files, output))
        workload = f"{total:,} documents of {arguments.files} files, {TASKS} tasks, {WORKERS} workers"
        row = compare(workload, ours, peer, arguments.repeats, peer_is="concurrent.futures, 2 spawned processes")
        report("engine", f"a plain pool; datatrove {version('datatrove')}", [row])


if __name__ == "__main__":
    main()
