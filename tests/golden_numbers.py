"""Where the numbers of the original code are: all of them beside the checkout, an extract in it."""

from pathlib import Path


ALL = Path(__file__).resolve().parents[2] / "shared" / "golden"
EXTRACT = Path(__file__).resolve().parent / "golden"
