"""Where the numbers of the original code are: all of them beside the checkout, an extract in it."""

from pathlib import Path


ALL = Path(__file__).resolve().parents[2] / "shared" / "golden"
EXTRACT = Path(__file__).resolve().parent / "golden"
# Otter and Flamingo folders with whole weights, without LoRA
FOLDERS = (
    "flamingo_falcon",
    "flamingo_llama",
    "flamingo_mpt",
    "otter_llama_image",
    "otter_llama_image_every4",
    "otter_llama_video",
    "otter_mpt1b_redpajama",
    "otter_mpt_image",
)
