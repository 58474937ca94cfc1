"""
An Otter of 2023 with LoRA factors -> a merged model, or the model and a PEFT adapter.

    python conversion/lora.py --source otter-lora --output otter-merged

The same as `otter-hf convert lora`; `--help` lists all options.
"""

import sys

from otter_hf.cli.convert import main


if __name__ == "__main__":
    sys.exit(main("lora"))
