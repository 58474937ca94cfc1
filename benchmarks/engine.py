"""
What the engine costs: documents like MMC4's to shards, in 64 tasks on 2 workers, beside the pool of 2 processes that
did it before there was an engine.

    python benchmarks/engine.py

The peer is this project at the commit before. Each side is a process of its own, they run in turn, and both start
their workers anew each time, with all imports. Their shards are compared first. Needs the extra `scale`.
"""

import argparse
import json
import shutil
import sys
import tempfile
from functools import partial
from multiprocessing import forkserver
from pathlib import Path


PEER_COMMIT = "0d81a5e"
BENCHMARKS = Path(__file__).resolve().parent
TESTS = BENCHMARKS.parent / "tests"
TASKS, WORKERS = 64, 2


def work() -> None:
    """One side: documents, pictures and the output come in as JSON, the number of samples goes out."""
    from otter_hf.data.pretraining.converters import mmc4_to_tar

    try:
        from otter_hf.data.engine import Engine
    except ImportError:  # at the commit before
        how = {"num_proc": WORKERS}
    else:
        how = {"engine": Engine(tasks=TASKS, workers=WORKERS)}
    for line in sys.stdin:
        documents, pictures, output = json.loads(line)
        forkserver._forkserver._stop()  # which has imported all of it, for the next call of the same process
        shutil.rmtree(output, ignore_errors=True)
        print(json.dumps(mmc4_to_tar(documents, pictures, output, **how).samples), flush=True)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def main() -> None:
    from importlib.metadata import version

    from _common import Side, check_out, compare, report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--files", type=int, default=TASKS)
    parser.add_argument("--documents", type=int, default=400, help="of a file")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work()
        return
    sys.path[:0] = [str(TESTS), str(TESTS / "data")]
    from engine_steps import write_documents

    with tempfile.TemporaryDirectory() as folder:
        patterns = write_documents(Path(folder, "in"), arguments.files, arguments.documents)
        total = arguments.files * arguments.documents
        sources = {"ours": BENCHMARKS.parent / "src", "peer": check_out(PEER_COMMIT, folder)}
        sides = {name: Side(__file__, source) for name, source in sources.items()}

        def convert(name: str) -> None:
            if (count := sides[name].run(json.dumps([*patterns, str(Path(folder, name))]))) != total:
                raise RuntimeError(f"{name} wrote {count} samples, not {total}.")

        for name in sides:
            convert(name)
        if shards(Path(folder, "ours")) != shards(Path(folder, "peer")):
            raise RuntimeError("The shards differ.")
        workload = f"{total:,} documents of {arguments.files} files, {TASKS} tasks, {WORKERS} workers"
        functions = (partial(convert, name) for name in sides)
        row = compare(workload, *functions, arguments.repeats, is_warm=True, peer_is=f"the pool of {PEER_COMMIT}")
        for side in sides.values():
            side.close()
        report("engine", f"the pool before the engine; datatrove {version('datatrove')}", [row])


if __name__ == "__main__":
    main()
