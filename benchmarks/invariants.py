"""Loss and gradient norm, step by step, of runs that must learn the same.

    python benchmarks/invariants.py

Runs the tests marked `invariant` (accumulation, packing, checkpointing, resuming) and records what they compared in
`results/invariants.json`.
"""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "invariants.json"


def main() -> int:
    settings = {"OTTER_HF_INVARIANTS": str(RESULT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    RESULT.unlink(missing_ok=True)
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "invariant", str(ROOT / "tests" / "training")]
    code = subprocess.run(tests, cwd=ROOT, env=os.environ | settings, check=False).returncode
    if code == 0:
        print(RESULT.read_text(encoding="utf-8"))
    return code


if __name__ == "__main__":
    sys.exit(main())
