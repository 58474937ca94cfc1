"""
A Flamingo or Otter folder, of 2023 or of today -> today's names, in any dtype.

    python conversion/dtype.py --source luodian/OTTER-Image-MPT7B --dtype bfloat16 --output otter-bf16

The same as `otter-hf convert dtype`; `--help` lists all options.
"""

import sys

from otter_hf.cli.convert import main


if __name__ == "__main__":
    sys.exit(main("dtype"))
