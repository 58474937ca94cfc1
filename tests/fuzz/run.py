"""Mutated files of every kind through their readers, for a number of seconds: what is no sentence of ours is a fault.

    python tests/fuzz/run.py --seconds 1200 [--seed 0] [TARGET ...]

Prints a line for each target, and for each fault the number that makes it again. Faults are exceptions other than
ValueError and OSError, files that take longer than `HANG_SECONDS` of a processor, or ten times that by the clock, and
more than a gigabyte of memory.
"""

import argparse
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.reader_targets import ERRORS, TARGETS, mutate  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402


HANG_SECONDS = 30
MOST_MEGABYTES = 1000


class Hang(BaseException):
    """A file took too long."""


def fuzz(name: str, seed: int, until: float, most: int | None = None) -> tuple[int, int, list[str]]:
    """Files tried, files refused, and faults of a target, until a time of `time.monotonic` or for `most` files."""
    make, read = TARGETS[name]
    tried = refused = 0
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder))
        data = path.read_bytes()
        read(path)
        while time.monotonic() < until and (most is None or tried < most):
            path.write_bytes(mutate(data, random.Random(f"{name} {seed} {tried}")))
            shutil.rmtree(Path(folder, "cache"), ignore_errors=True)
            try:
                read(path)
            except ERRORS:
                refused += 1
            except (Exception, Hang) as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                faults.append(f"{name} {seed} {tried}: {type(error).__name__} {error} ({place.name}:{place.lineno})")
            tried += 1
    return tried, refused, faults


def _hang(*_):
    raise Hang(f"no end within {HANG_SECONDS} s")


def _alarms(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=60, help="for all targets together (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    disable_progress_bar()
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, _hang)
    names = arguments.targets or list(TARGETS)
    totals = [0, 0, 0]
    for name in names:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        read = TARGETS[name][1]

        def timed(path, read=read):
            _alarms(HANG_SECONDS)
            try:
                read(path)
            finally:
                _alarms(0)

        TARGETS[name] = TARGETS[name][0], timed
        tried, refused, faults = fuzz(name, arguments.seed, time.monotonic() + arguments.seconds / len(names))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 - before
        if grown > MOST_MEGABYTES:
            faults.append(f"{name} {arguments.seed}: {grown} MB")
        line = f"{name}: {tried} tried, {refused} refused, {len(faults)} faults, {grown} MB more"
        print(line, *faults, sep="\n  ", flush=True)
        totals = [total + more for total, more in zip(totals, (tried, refused, len(faults)), strict=True)]
    tried, refused, faults = totals
    print(f"{len(names)} targets: {tried:,} tried, {refused:,} refused, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
