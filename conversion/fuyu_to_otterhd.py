"""
Fuyu-8B or OtterHD-8B as published in 2023 -> an OtterHD folder of today.

    python conversion/fuyu_to_otterhd.py --source Otter-AI/OtterHD-8B --output otterhd-8b

The same as `otter-hf convert fuyu-to-otterhd`; `--help` lists all options.
"""

import sys

from otter_hf.cli.convert import main


if __name__ == "__main__":
    sys.exit(main("fuyu-to-otterhd"))
