"""
Flamingo -> Otter: adds `<answer>` and a row for it.

    python conversion/flamingo_to_otter.py --source flamingo-9b --output otter-init

The same as `otter-hf convert flamingo-to-otter`; `--help` lists all options.
"""

import sys

from otter_hf.cli.convert import main


if __name__ == "__main__":
    sys.exit(main("flamingo-to-otter"))
