"""
A language model and a vision tower -> a Flamingo or Otter to be trained.

    python conversion/inject_lm.py --language-model lmsys/vicuna-7b-v1.5 \
        --vision-tower openai/clip-vit-large-patch14 --model-type otter --output otter-vicuna

The same as `otter-hf convert inject-lm`; `--help` lists all options.
"""

import sys

from otter_hf.cli.convert import main


if __name__ == "__main__":
    sys.exit(main("inject-lm"))
