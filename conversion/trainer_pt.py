"""
final_weights.pt or checkpoint_*.pt of the 2023 training scripts -> a model folder.

    python conversion/trainer_pt.py --checkpoint final_weights.pt --base otter-init --output otter-trained

The same as `otter-hf convert trainer-pt`; `--help` lists all options.
"""

import sys

from otter_hf.cli.convert import main


if __name__ == "__main__":
    sys.exit(main("trainer-pt"))
