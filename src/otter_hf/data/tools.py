"""What `otter-hf data` does with whole files: image stores to parquet, train configs, merged datasets."""

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.utils import logging

from .formats import MimicitFiles, make_train_config, write_mimicit
from .image_store import ImageStore, iter_pictures
from .images import decode_image
from .json_stream import iter_json_object
from .parquet_writer import write_images


logger = logging.get_logger(__name__)


def store_to_parquet(
    paths: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    resize: int | None = None,
    encoding: str = "bytes",
    cache_dir: str | Path | None = None,
) -> tuple[int, list[str]]:
    """Writes an image store of any kind as one parquet file whose pictures can be read at random at once.

    Pictures are kept byte by byte, unless they are resized: to a square of `resize` pixels, bicubic, as PNG. Pictures
    that cannot be decoded are left out. The file appears when it is complete. `encoding` is that of `write_images`:
    `"bytes"` is read fastest, `"base64"` also by the loader of 2023.

    Returns:
        The number of pictures written and the ids of those left out.
    """
    left_out, written = [], 0

    def pictures() -> Iterator[tuple[str, bytes]]:
        nonlocal written
        for id, data in iter_pictures(paths, cache_dir):
            try:
                if data is None:
                    raise OSError("damaged base64")
                picture = decode_image(data)
            except OSError as error:
                logger.warning(f"Left out image {id!r}: {error}.")
                left_out.append(id)
                continue
            written += 1
            yield id, data if resize is None else _resized(picture, resize)

    with _replacing(output) as temporary:
        write_images(temporary, pictures(), encoding)
    return written, left_out


def _resized(picture: Image.Image, size: int) -> bytes:
    buffer = io.BytesIO()
    picture.resize((size, size), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def write_train_config(instructions: str | Path, output: str | Path, *, keep_context: bool = True) -> int:
    """Writes the train config that `make_train_config` derives from an instructions file; returns its size.

    `keep_context=False` writes empty contexts.
    """
    config = make_train_config(iter_json_object(instructions, "data"))
    if not keep_context:
        config = dict.fromkeys(config, [])
    with _replacing(output) as temporary:
        temporary.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    return len(config)


def merge_datasets(
    datasets: Sequence[MimicitFiles], folder: str | Path, name: str, cache_dir: str | Path | None = None
) -> MimicitFiles:
    """Writes several MIMIC-IT datasets as one, in their order.

    A dataset without train config brings all of its records as examples, without context, if another one has a train
    config. Pictures that several stores have under one id must be equal, and are written once.

    Raises:
        ValueError: if a record id is in two datasets, or an image id stands for two different pictures.
    """
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
    return [images_path] if isinstance(images_path, (str, Path)) else list(images_path)


class _replacing:
    """A temporary path that takes the place of `path` when the block ends well."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = self.path.with_name(f".{self.path.name}.incomplete")
        return self.temporary

    def __exit__(self, kind, *error):
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)
