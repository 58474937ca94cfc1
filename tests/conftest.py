"""Shared by all tests: no network, tiny models made once, and the numbers of the original code."""

import copy
import gc
import multiprocessing
import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# models this small only wait for a second thread
os.environ.setdefault("OMP_NUM_THREADS", "1")

import golden_numbers
import pytest
from PIL import Image, ImageFile


def pytest_collection_finish():
    """What is imported stays: a training collects garbage at its end, and need not look through all of that."""
    gc.collect()
    gc.freeze()


# processes that a test starts, and kills, are forked from one that has imported this already
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["pytest", "otter_hf.data.tools", "otter_hf.training.run"]
)


# importing lmms-eval, as a test module does, switches it on for every test in the process
@pytest.fixture(autouse=True)
def pillow_refuses_truncated_pictures(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of all numbers computed by the 2023 code; not part of the repository, which has an extract of them."""
    if not golden_numbers.ALL.is_dir():
        pytest.skip("the numbers of the original code (../shared/golden) are not beside this checkout")
    return golden_numbers.ALL


@pytest.fixture(scope="session")
def golden_case():
    """`golden_case(name)`: the folder of one case, out of all or else of the extract."""
    root = golden_numbers.ALL if golden_numbers.ALL.is_dir() else golden_numbers.EXTRACT

    def find(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"{name} is not among the numbers of the original code in tests/golden")
        return root / name

    return find


@pytest.fixture(scope="session")
def tiny_otter():
    """Model and processor that every test has a copy of."""
    from otter_hf.testing import tiny  # the process that only hands out tests to others need not wait for it

    return tiny("otter")


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, str]:
    """Folders of a tiny Otter, Flamingo (as OpenFlamingo's, without a chat template) and OtterHD; only to be read."""
    from otter_hf.testing import write_tiny

    root = tmp_path_factory.mktemp("models")
    return {family: str(write_tiny(family, root / family)) for family in ("otter", "flamingo", "otterhd")}


@pytest.fixture
def processor(tiny_otter):
    """An Otter processor of 28x28 pictures with a byte tokenizer."""
    return copy.deepcopy(tiny_otter[1])


@pytest.fixture
def model(tiny_otter):
    """A random Otter with open gates (two of four layers gated) for `processor`."""
    import torch

    torch.manual_seed(0)
    return copy.deepcopy(tiny_otter[0])


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Four plain pictures of different colours and sizes."""
    colours = ["red", "green", "blue", "yellow"]
    return [Image.new("RGB", (20 + 8 * i, 40), colour) for i, colour in enumerate(colours)]
