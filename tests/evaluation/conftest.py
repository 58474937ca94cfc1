"""Models in folders, for what loads them by path."""

import os
import shutil
from pathlib import Path


# no test looks at the network, nor at somebody's cache of data sets
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import benchmark_rows
import pytest


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """Parquet files of the tests are read through a cache of their own."""
    import datasets

    folder = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", folder)
        yield


@pytest.fixture
def otter_folder(tmp_path, folders):
    """A tiny Otter on disk, the test's own."""
    return Path(shutil.copytree(folders["otter"], tmp_path / "otter"))


@pytest.fixture
def otterhd_folder(tmp_path, folders):
    """A tiny OtterHD on disk, the test's own."""
    return Path(shutil.copytree(folders["otterhd"], tmp_path / "otterhd"))


@pytest.fixture
def data(tmp_path):
    """Name of a benchmark -> its parquet file."""
    return lambda name, **kwargs: str(
        benchmark_rows.write_parquet(tmp_path / f"{name}.parquet", getattr(benchmark_rows, name)(**kwargs))
    )


@pytest.fixture
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
