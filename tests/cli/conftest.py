"""What is asked in a terminal: a model's folder, and files to ask about."""

import shutil
from pathlib import Path

import pytest
from serving_files import write_video


@pytest.fixture
def folder(folders, tmp_path):
    return Path(shutil.copytree(folders["otter"], tmp_path / "model"))


@pytest.fixture
def files(pictures, tmp_path):
    """Paths of two pictures and a video."""
    for picture, name in zip(pictures, ("red.png", "green.png"), strict=False):
        picture.save(tmp_path / name)
    write_video(tmp_path / "ramp.mp4", 12)
    return [str(tmp_path / name) for name in ("red.png", "green.png", "ramp.mp4")]
