"""Rows of a data set: where they are, as lmms-eval is told it, and the rows themselves."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..data.arrow_cache import open_arrow_file
from ..reading import leads_out


# suffix -> reader of `datasets`
READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}


def data_source(path: str, split: str) -> dict[str, Any]:
    """
    lmms-eval's `dataset_path` and `dataset_kwargs` for a local file, a local folder or a Hub id.

    Raises:
        ValueError: for a file of a kind `datasets` has no reader for.
    """
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix not in READERS:
            raise ValueError(f"{path} is none of {', '.join(READERS)}: convert it to one of them.")
        return {"dataset_path": READERS[local.suffix], "dataset_kwargs": {"data_files": {split: str(local)}}}
    if (local / "dataset_dict.json").is_file():
        return {"dataset_path": str(local), "dataset_kwargs": {"load_from_disk": True}}
    return {"dataset_path": str(local) if local.is_dir() else path, "dataset_kwargs": None}


def read_split(path: str, split: str):
    """
    The `datasets.Dataset` of a split of a local file, a local folder or a Hub id.

    Raises:
        ValueError: if a file is damaged, or of a kind `datasets` has no reader for.
    """
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    place = data_source(path, split)
    options = place["dataset_kwargs"] or {}
    local = Path(path).expanduser()
    try:
        for file in [local] if local.suffix == ".arrow" else local.rglob("*.arrow"):
            if file.is_file():
                open_arrow_file(file)  # which raises where datasets would end the process
        if options.get("load_from_disk"):
            return load_from_disk(place["dataset_path"])[split]
        return load_dataset(place["dataset_path"], split=split, **options)
    except (DatasetGenerationError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from None


def picture_places(source: str | None, image_dir: str | Path | None = None) -> Callable[[str], str]:
    """
    What gives the path of a picture that a row names; what names none, such as base64, comes back as it is.

    Args:
        source: a file or a folder of data, where pictures lie, too, unless `image_dir` says where; what is on the Hub
            has its pictures in it.
        image_dir: their folder.
    """
    data = None if source is None else Path(source).expanduser()
    folder = data and (data if data.is_dir() else data.parent if data.is_file() else None)

    def place(text: str) -> str:
        if image_dir is not None:
            return str(Path(image_dir).expanduser() / text)
        if folder is not None and not leads_out(text):
            with contextlib.suppress(OSError):  # longer than a name can be
                if (path := folder / text).is_file():
                    return str(path)
        return text

    return place
