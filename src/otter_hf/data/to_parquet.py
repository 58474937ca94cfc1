"""Image stores of any kind to parquet, part by part on an engine."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from PIL import Image
from transformers.utils import logging

from ..files import claim, copy_at_address, disk_full_told, move, remove, replacing, unfinished_folder, write_text
from ..films import is_film
from ..made_from import state
from ..pictures import encode_image
from ..storage import AnyPath, forget_listings, full_name, is_one_path, is_remote, to_path
from .engine import Engine, read_records, run
from .image_store import ImageStore, store_files
from .images import decode_image
from .parquet_writer import PART_BYTES, check_encoding, join_parts, refuse_other_folder, write_images


logger = logging.get_logger(__name__)


def store_to_parquet(
    paths: AnyPath | Sequence[AnyPath],
    output: AnyPath,
    *,
    resize: int | None = None,
    encoding: str = "bytes",
    engine: Engine | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[int, list[str]] | None:
    """Writes an image store of any kind as parquet whose pictures can be read at random at once.

    Pictures are kept byte by byte, unless they are resized: to a square of `resize` pixels, bicubic, as PNG. Pictures
    that cannot be decoded are left out. The output appears when it is complete; what is made of more than 256 MB
    becomes a folder of parts. A call that was stopped or killed goes on with the parts that are not complete; the
    others are in the hidden folder `.<output>.<digest>.parts`. What is written does not depend on the engine.

    Args:
        paths: files and folders of the store, see `ImageStore`.
        output: ends in `.parquet`; at an address, parts get their names one after the other.
        resize: side of the squares in pixels.
        encoding: that of `write_images`: `"bytes"` is read fastest, `"base64"` also by the loader of 2023, which reads
            no folders: it is one file.
        engine: where it runs, a part at a time, which holds a hundred pictures in memory; default: in a thread per
            processor.
        cache_dir: see `ImageStore`.

    Returns:
        The number of pictures written and the ids of those left out; None if the rest was handed to Slurm.

    Raises:
        ValueError: if there is no picture that can be decoded, an id is there twice, the output is the input or does
            not end in `.parquet`, or for other values of `resize` and `encoding`.
        FileExistsError: if the output is a folder that holds anything but parts of a store.
        OSError: if another process is at this output, or, at an address, where nothing keeps it out, has finished it.
    """
    if resize is not None and resize < 1:
        raise ValueError(f"resize must be a number of pixels, got {resize}.")
    check_encoding(encoding)
    output = to_path(output)
    if output.suffix != ".parquet":
        raise ValueError(f"The output must end in .parquet, got {output}.")
    given = [paths] if is_one_path(paths) else list(paths)
    sources = list(store_files(given, cache_dir))
    refuse_input_as_output([*sources, *given], output)
    forget_listings(output)
    refuse_other_folder(output)
    store = ImageStore(sources, cache_dir)
    ids = list(store)
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        id = next(id for id in ids if id in seen or seen.add(id))
        raise ValueError(f"Image id {id!r} is given twice: ids must be unique.")
    rows = max(1, PART_BYTES * len(ids) // max(1, sum(map(_size, sources))))
    starts = range(0, len(ids), rows)
    items = {f"{n:06d}": (n, start, min(rows, len(ids) - start)) for n, start in enumerate(starts)}
    with nullcontext() if is_remote(output) else claim(output.with_name(f".{output.name}.lock"), output):
        with disk_full_told(output):
            made_from = [(str(path.resolve()), state(path)) for path in sources], resize, encoding
            parts = unfinished_folder(output, made_from, "parts")
            _forget_parts_that_are_gone(parts, output)
            step = partial(_write_part, store=store, parts=parts, resize=resize, encoding=encoding)
            finish = partial(_settle, parts, output, encoding, len(items), ", ".join(map(str, given)))
            engine = engine or Engine(threads=os.cpu_count() or 1)
            if not run(step, items, parts / "records", engine, name=f"Parts of {output.name}", finish=finish):
                return None
            result = finish()
            remove(parts)
            return result


def refuse_input_as_output(sources: Sequence[AnyPath], output: AnyPath) -> None:
    """`ValueError` if the output is one of the sources, or a folder that one of them is in."""
    name = full_name(to_path(output))
    for path in sources:
        if f"{full_name(to_path(path))}/".startswith(f"{name}/"):
            raise ValueError(f"The output {output} would replace its input {path}: name another one.")


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


def _part(parts: AnyPath, number: int) -> AnyPath:
    return parts / "store" / f"part.{number}.parquet"


def _are_moved(parts: AnyPath, output: AnyPath) -> bool:
    """Whether the parts have got their final name, by a job of Slurm or a call that was killed behind it."""
    return (parts / "moved").exists() and output.exists()


def _forget_parts_that_are_gone(parts: AnyPath, output: AnyPath) -> None:
    """Takes the records from parts that somebody has deleted, or whose output somebody has."""
    if not _are_moved(parts, output):
        remove(parts / "moved")
        for name, record in read_records(parts / "records").items():
            if record["pictures"] and not _part(parts, int(name)).exists():
                remove(parts / "records" / f"{name}.json")


def _write_part(
    item: tuple[int, int, int],
    stop: Event,
    store: ImageStore,
    parts: AnyPath,
    resize: int | None,
    encoding: str,
) -> dict[str, Any]:
    """Writes pictures of a store as one part, or none if there are none, and gives its record."""
    number, *rows = item
    left_out: list[str] = []
    pictures = _pictures(store.rows(*rows), resize, left_out, stop)
    first = next(pictures, None)
    if first is None:
        return {"pictures": 0, "left_out": left_out}
    with replacing(_part(parts, number), shared=True) as written:
        count = len(write_images(written, _behind(first, pictures), encoding))
    return {"pictures": count, "left_out": left_out}


def _behind(first: Any, others: Iterator) -> Iterator:
    yield first
    yield from others


def _pictures(
    found: Iterable[tuple[str, bytes | None]], resize: int | None, left_out: list[str], stop: Event
) -> Iterator[tuple[str, bytes]]:
    for id, data in found:
        if stop.is_set():
            raise InterruptedError("the conversion was stopped")
        try:
            if data is None:
                raise OSError("damaged base64, or a damaged file")
            picture = None if is_film(data) else decode_image(data)
        except OSError as error:
            if error.errno is not None:  # of the disk, not of the picture
                raise
            logger.warning(f"Left out image {id!r}: {error}.")
            left_out.append(id)
            continue
        if resize is not None and picture is not None:
            data = encode_image(picture.resize((resize, resize), Image.Resampling.BICUBIC))
        yield id, data


def _settle(parts: AnyPath, output: AnyPath, encoding: str, count: int, names: str) -> tuple[int, list[str]]:
    """Gives the parts their final name, unless they have it; tells how many pictures there are, and which are not."""
    records, store = read_records(parts / "records"), parts / "store"
    left_out = [id for record in records.values() for id in record["left_out"]]
    numbers = sorted(int(name) for name, record in records.items() if record["pictures"])
    if len(records) == count and not numbers:
        remove(parts)
        raise ValueError(f"There is no picture in {names} that can be decoded: is it an image store?")
    if not _are_moved(parts, output):
        files = [path for path in (_part(parts, number) for number in numbers) if path.exists()]
        # all of them are gone where they were moved, and a kill came before that was written down
        if len(records) < count or (len(files) < len(numbers) and (files or not output.exists())):
            raise OSError(
                f"Parts of {output} are gone: another call has finished it, or somebody has deleted them. Run this "
                "again if it is not complete."
            )
        for path in store.glob(".*.incomplete") if store.is_dir() else ():  # of workers that were killed
            remove(path)
        if files:
            refuse_other_folder(output)
            written = files[0] if len(files) == 1 else store
            if len(files) > 1 and encoding != "bytes":
                written = parts / output.name
                with replacing(written) as joined:
                    join_parts(files, joined)
            if is_remote(output):
                remove(output)
                copy_at_address(written, output)
            else:
                move(written, output, known_folder=True)
        # before the parts go: those that a kill would leave are not all of it
        write_text(parts / "moved", f"{output}\n")
    remove(store)
    return sum(record["pictures"] for record in records.values()), left_out


__all__ = ["refuse_input_as_output", "store_to_parquet"]
