"""Models in folders, for what loads them by path."""

import os


# no test looks at the network, nor at somebody's cache of data sets
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
from otterhd_tiny import tiny_model, tiny_processor


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
def otter_folder(tmp_path, model, processor):
    """A tiny Otter on disk."""
    model.save_pretrained(tmp_path / "otter")
    processor.save_pretrained(tmp_path / "otter")
    return tmp_path / "otter"


@pytest.fixture
def otterhd_folder(tmp_path):
    """A tiny OtterHD on disk."""
    processor = tiny_processor()
    tiny_model(processor, max_position_embeddings=2048).save_pretrained(tmp_path / "otterhd")
    processor.save_pretrained(tmp_path / "otterhd")
    return tmp_path / "otterhd"
