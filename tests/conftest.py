"""Shared by all tests: no network, and the numbers of the original code where they are at hand."""

import os
from pathlib import Path

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the numbers computed by the 2023 code; not part of the repository."""
    if not GOLDEN.is_dir():
        pytest.skip("the numbers of the original code (../shared/golden) are not beside this checkout")
    return GOLDEN
