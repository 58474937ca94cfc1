"""What `otter-hf data` does with whole files: train configs, merged datasets."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ..files import claim, replacing
from ..storage import is_one_path
from .formats import MimicitFiles, make_train_config, write_mimicit
from .image_store import ImageStore
from .json_stream import iter_json_object
from .to_parquet import refuse_input_as_output


def write_train_config(instructions: str | Path, output: str | Path, *, keep_context: bool = True) -> int:
    """Writes the train config that `make_train_config` derives from an instructions file; returns its size.

    `keep_context=False` writes empty contexts. `ValueError` if the output is the input, `OSError` if another process
    is writing it.
    """
    refuse_input_as_output([instructions], Path(output))
    config = make_train_config(iter_json_object(instructions, "data"))
    if not keep_context:
        config = dict.fromkeys(config, [])
    output = Path(output)
    with claim(output.with_name(f".{output.name}.lock"), output), replacing(output) as temporary:
        temporary.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    return len(config)


def merge_datasets(
    datasets: Sequence[MimicitFiles], folder: str | Path, name: str, cache_dir: str | Path | None = None
) -> MimicitFiles:
    """Writes several MIMIC-IT datasets as one, in their order.

    A dataset without train config brings all of its records as examples, without context, if another one has a train
    config. Pictures that several stores have under one id must be equal, and are written once.

    Raises:
        ValueError: if a record id is in two datasets, or an image id stands for two different pictures; if an input
            would be replaced.
    """
    for files in datasets:
        inputs = [files.instructions_path, *_paths(files.images_path), *_paths(files.train_config_path or ())]
        for end in ("_instructions.json", "_train.json", ".parquet"):
            refuse_input_as_output(inputs, Path(folder, f"{name}{end}"))
    stores = [path for files in datasets for path in _paths(files.images_path)]
    store = ImageStore(stores, cache_dir)
    images = ((id, store.read_bytes(id)) for id in dict.fromkeys(store)) if stores else None
    config: dict[str, Any] | None = None
    if any(files.train_config_path for files in datasets):
        config = {}
        for files in datasets:
            if files.train_config_path:
                config.update(iter_json_object(files.train_config_path))
            else:
                config.update((id, []) for id, _ in _records(files))
    return write_mimicit(folder, name, chain.from_iterable(map(_records, datasets)), images, config)


def _records(files: MimicitFiles) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return iter_json_object(files.instructions_path, "data")


def _paths(images_path: Any) -> list[str | Path]:
    return [images_path] if is_one_path(images_path) else list(images_path)
