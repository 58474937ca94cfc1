"""Mutated files end in a sentence or are read; a minute of them: `make fuzz`."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.reader_targets import TARGETS
from fuzz.run import fuzz


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in ("mkv", "avi", "gif")])
def test_mutated_files(name):
    tried, _, faults = fuzz(name, seed=1, until=math.inf, most=10)
    assert tried == 10 and not faults, faults


@pytest.mark.slow
def test_mutated_files_for_twenty_minutes():
    """`OTTER_FUZZ_SECONDS` sets how long."""
    seconds = os.environ.get("OTTER_FUZZ_SECONDS", "1200")
    script = Path(__file__).with_name("run.py")
    run = subprocess.run([sys.executable, script, "--seconds", seconds], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
