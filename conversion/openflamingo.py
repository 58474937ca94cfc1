"""
OpenFlamingo checkpoint.pt (v1 or v2) -> Flamingo.

    python conversion/openflamingo.py --checkpoint checkpoint.pt --language-model mosaicml/mpt-7b \
        --vision-tower openai/clip-vit-large-patch14 --output flamingo-9b

The same as `otter-hf convert openflamingo`; `--help` lists all options.
"""

import sys

from otter_hf.cli.convert import main


if __name__ == "__main__":
    sys.exit(main("openflamingo"))
