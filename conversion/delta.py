"""
A tuned model minus its base, and back.

    python conversion/delta.py apply --base llama-7b --other otter-delta --output otter

The same as `otter-hf convert delta`; `--help` lists all options.
"""

import sys

from otter_hf.cli.convert import main


if __name__ == "__main__":
    sys.exit(main("delta"))
