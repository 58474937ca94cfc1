"""What `otter-hf data` does with whole files: image stores to parquet, train configs, merged datasets."""

import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from glob import escape
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.utils import logging

from ..files import claim, disk_full_told, replacing
from ..films import is_film
from .formats import MimicitFiles, make_train_config, write_mimicit
from .image_store import ImageStore, iter_pictures, store_files
from .images import decode_image
from .json_stream import iter_json_object
from .parquet_writer import (
    append_image_parts,
    ids_of_parts,
    kept_for_next_run,
    move_image_parts,
    refuse_other_folder,
    write_images,
)


logger = logging.get_logger(__name__)


def store_to_parquet(
    paths: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    resize: int | None = None,
    encoding: str = "bytes",
    cache_dir: str | Path | None = None,
) -> tuple[int, list[str]]:
    """Writes an image store of any kind as parquet whose pictures can be read at random at once.

    Pictures are kept byte by byte, unless they are resized: to a square of `resize` pixels, bicubic, as PNG. Pictures
    that cannot be decoded are left out. The output appears when it is complete; more than 256 MB become a folder of
    parts, and a call that was killed goes on behind the last complete one, which it finds in the hidden folder
    `.<output>.<digest>.parts`. `encoding` is that of `write_images`: `"bytes"` is read fastest, `"base64"` also by the
    loader of 2023, which reads no folders: it is one file, and begins again when it was killed.

    Returns:
        The number of pictures written and the ids of those left out.

    Raises:
        ValueError: if there is no picture that can be decoded, an id is there twice, the output is the input or does
            not end in `.parquet`, or for other values of `resize` and `encoding`.
        FileExistsError: if the output is a folder that holds anything but parts of a store.
    """
    if resize is not None and resize < 1:
        raise ValueError(f"resize must be a number of pixels, got {resize}.")
    output = Path(output)
    if output.suffix != ".parquet":
        raise ValueError(f"The output must end in .parquet, got {output}.")
    sources = list(store_files(_paths(paths)))
    refuse_input_as_output(sources, output)
    refuse_other_folder(output)
    left_out: list[str] = []

    def pictures(written: set[str]) -> Iterator[tuple[str, bytes]]:
        for id, data in iter_pictures(sources, cache_dir):
            if id in written:
                written.discard(id)  # a second one of this id is a mistake
                continue
            try:
                if data is None:
                    raise OSError("damaged base64")
                picture = None if is_film(data) else decode_image(data)
            except OSError as error:
                logger.warning(f"Left out image {id!r}: {error}.")
                left_out.append(id)
                continue
            yield id, data if resize is None or picture is None else _resized(picture, resize)

    def checked(ids: set[str]) -> int:
        if not ids:
            names = ", ".join(map(str, sources))
            raise ValueError(f"There is no picture in {names} that can be decoded: is it an image store?")
        return len(ids)

    with claim(output.with_name(f".{output.name}.lock"), output), disk_full_told(output):
        if encoding != "bytes":
            with replacing(output) as temporary:
                count = checked(write_images(temporary, pictures(set()), encoding))
        else:
            parts = _parts_folder(output, sources, resize)
            with kept_for_next_run(parts):
                count = checked(append_image_parts(parts, pictures(ids_of_parts(parts))))
                move_image_parts(parts, output)
    return count, left_out


def _parts_folder(output: Path, sources: Sequence[Path], resize: int | None) -> Path:
    """Where the parts are until all are complete: another folder for sources that have changed, or another size."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    digest = blake2b(repr((stats, resize)).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    parts = output.with_name(f".{output.name}.{digest}.parts")
    for other in output.parent.glob(f".{escape(output.name)}.*.parts"):
        if other != parts:
            shutil.rmtree(other)
    return parts


def refuse_input_as_output(sources: Sequence[Path], output: Path):
    """`ValueError` if the output is one of the sources, or a folder that one of them is in."""
    for path in sources:
        if output.resolve() in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"The output {output} would replace its input {path}: name another one.")


def _resized(picture: Image.Image, size: int) -> bytes:
    buffer = io.BytesIO()
    picture.resize((size, size), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def write_train_config(instructions: str | Path, output: str | Path, *, keep_context: bool = True) -> int:
    """Writes the train config that `make_train_config` derives from an instructions file; returns its size.

    `keep_context=False` writes empty contexts. `ValueError` if the output is the input.
    """
    refuse_input_as_output([Path(instructions)], Path(output))
    config = make_train_config(iter_json_object(instructions, "data"))
    if not keep_context:
        config = dict.fromkeys(config, [])
    with replacing(output) as temporary:
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
            refuse_input_as_output(list(map(Path, inputs)), Path(folder, f"{name}{end}"))
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
