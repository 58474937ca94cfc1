"""
A folder of today -> one that Otter's code of 2023 reads.

    python conversion/export_legacy.py --source otter-bf16 --output otter-2023

The same as `otter-hf convert export-legacy`; `--help` lists all options.
"""

import sys

from otter_hf.cli.convert import main


if __name__ == "__main__":
    sys.exit(main("export-legacy"))
