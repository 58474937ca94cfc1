"""MMC4 and LAION as they are published, to WebDataset shards."""

import io
import json
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from transformers.utils import logging

from ..images import decode_base64, encode_base64
from .shards import ShardWriter, expand_braces, write_sizes


logger = logging.get_logger(__name__)


@dataclass
class ConversionCounts:
    """What a converter wrote, and what it left out, by reason."""

    samples: int = 0
    images: int = 0
    left_out: Counter = field(default_factory=Counter)

    def __add__(self, other: "ConversionCounts") -> "ConversionCounts":
        return ConversionCounts(
            self.samples + other.samples, self.images + other.images, self.left_out + other.left_out
        )


def mmc4_to_tar(
    doc_shards: str,
    image_shards: str,
    output: str | Path,
    *,
    max_samples: int = 30_000,
    max_bytes: float = 1e10,
    num_proc: int = 1,
) -> ConversionCounts:
    """
    Writes MMC4 documents together with their pictures: a `json` part per document, in which each entry of `image_info`
    has its picture as `image_base64`.

    A picture that is not in its tar is left out, and so is a document without any, or a line that is none. Shards are
    named after the file of documents, `NAME.000.tar`, with their numbers of samples in `sizes.json`. A file of
    documents whose shards are complete is not converted again.

    Args:
        doc_shards: JSON-lines files, also zipped, as a pattern with braces: `docs_shard_{0..23098}_v2.jsonl.zip`.
        image_shards: the tar files of their pictures, in the same order; a picture is found by its name, in whatever
            folder of the tar.
        output: folder for the shards.
        max_samples, max_bytes: of a shard.
        num_proc: processes, each with a file of documents at a time.

    Raises:
        ValueError: if the patterns differ in their number of files, or a file does not exist or is no tar.
    """
    docs, tars = expand_braces(doc_shards), expand_braces(image_shards)
    if len(docs) != len(tars):
        raise ValueError(
            f"{doc_shards!r} stands for {len(docs)} files and {image_shards!r} for {len(tars)}: give each file of "
            "documents its tar of pictures."
        )
    convert = partial(_convert_mmc4_shard, output=Path(output), max_samples=max_samples, max_bytes=max_bytes)
    return _convert_all(convert, list(zip(docs, tars, strict=True)), Path(output), num_proc)


def laion_to_tar(
    folder: str | Path, output: str | Path, *, max_samples: int = 500_000, max_bytes: float = 2e10, num_proc: int = 1
) -> ConversionCounts:
    """
    Writes pairs of TSV files as shards of pictures with captions.

    Each `*image*.tsv` (key, picture in base64) goes with the file whose name has `text` for `image` (key, JSON
    `{"captions": [...]}`, of which the first counts). Pictures keep their bytes. Rows without caption or picture are
    left out. Shards are named `NAME.000.tar` after the TSV file, with their numbers of samples in `sizes.json`. The
    rows are read one after the other, so that `.lineidx` files are not needed. A file whose shards are complete is not
    converted again.

    Args:
        folder: of the TSV files; folders in it are looked into as well.
        output: folder for the shards.
        max_samples, max_bytes: of a shard.
        num_proc: processes, each with a pair of files at a time.

    Raises:
        ValueError: if a file lacks its other half, or their keys or numbers of rows differ.
    """
    pictures = sorted(path for path in Path(folder).rglob("*.tsv") if "image" in path.name)
    if not pictures:
        raise ValueError(f"{folder} has no *image*.tsv in it.")
    pairs = [(path, path.with_name(path.name.replace("image", "text"))) for path in pictures]
    convert = partial(_convert_laion_pair, output=Path(output), max_samples=max_samples, max_bytes=max_bytes)
    return _convert_all(convert, pairs, Path(output), num_proc)


def _convert_all(convert, jobs: Sequence[tuple], output: Path, num_proc: int) -> ConversionCounts:
    for job in jobs:
        for path in job:
            if not os.path.isfile(path):
                raise ValueError(f"The file {path} does not exist.")
    output.mkdir(parents=True, exist_ok=True)
    done = output / "sizes.json"
    known = json.loads(done.read_text(encoding="utf-8")) if done.exists() else {}
    # a job is written down when all of its shards are there
    jobs = [job for job in jobs if not any(name.startswith(f"{_stem(job[0])}.") for name in known)]
    total = ConversionCounts()

    def finish(results: Iterator[tuple[ConversionCounts, dict[str, int]]]) -> None:
        nonlocal total
        for counts, sizes in results:
            total += counts
            write_sizes(output, sizes)

    if num_proc > 1 and len(jobs) > 1:
        with ProcessPoolExecutor(num_proc, mp_context=get_context("spawn")) as pool:
            finish(pool.map(convert, jobs))
    else:
        finish(map(convert, jobs))
    return total


def _stem(path: str | Path) -> str:
    return Path(path).name.split(".")[0]


def _convert_mmc4_shard(job: tuple[str, str], output: Path, max_samples: int, max_bytes: float):
    docs, tar_path = job
    counts = ConversionCounts()
    with (
        _open_tar(tar_path) as tar,
        _open_lines(docs) as lines,
        ShardWriter(output, f"{_stem(docs)}.%03d.tar", max_samples, max_bytes) as writer,
    ):
        members = _members(tar, tar_path)
        for number, line in enumerate(lines):
            document = _document(line)
            if document is None:
                counts.left_out["line that is no document"] += 1
                continue
            kept = []
            for info in document["image_info"]:
                member = members.get(info.get("image_name"))
                if member is None:
                    counts.left_out["picture not in its tar"] += 1
                else:
                    kept.append({**info, "image_base64": encode_base64(tar.extractfile(member).read())})
            if not kept:
                counts.left_out["document without pictures"] += 1
                continue
            data = json.dumps({**document, "image_info": kept}, ensure_ascii=False).encode("utf-8")
            writer.write(f"{_stem(docs)}_{number:07d}", {"json": data})
            counts.samples += 1
            counts.images += len(kept)
    return counts, writer.sizes


def _open_tar(path: str) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:")
    except tarfile.ReadError as error:
        raise ValueError(f"{path} is no plain tar file: {error}.") from None


def _members(tar: tarfile.TarFile, path: str) -> dict[str, tarfile.TarInfo]:
    """The files of a tar by their names without folders."""
    members, end = {}, os.path.getsize(path)
    try:
        for member in tar:
            if member.isreg() and member.offset_data + member.size <= end:
                members[os.path.basename(member.name)] = member
    except tarfile.ReadError as error:
        logger.warning(f"{path} is damaged behind its file {len(members)} ({error}): the rest of it is left out.")
    return members


def _document(line: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(line)
        return document if all(isinstance(info, dict) for info in document["image_info"]) else None
    except (ValueError, KeyError, TypeError):
        return None


def _open_lines(path: str) -> BinaryIO:
    if not zipfile.is_zipfile(path):
        return open(path, "rb")
    archive = zipfile.ZipFile(path)
    names = archive.namelist()
    if len(names) != 1:
        raise ValueError(f"{path} holds {len(names)} files, it should be one of JSON lines.")
    return archive.open(names[0])


def _convert_laion_pair(job: tuple[Path, Path], output: Path, max_samples: int, max_bytes: float):
    counts = ConversionCounts()
    with (
        open(job[0], encoding="utf-8") as pictures,
        open(job[1], encoding="utf-8") as captions,
        ShardWriter(output, f"{_stem(job[0])}.%03d.tar", max_samples, max_bytes) as writer,
    ):
        number = 0
        while True:
            number += 1
            rows = [line.rstrip("\n").split("\t") for line in (pictures.readline(), captions.readline())]
            if rows == [[""], [""]]:
                break
            if len(rows[0]) < 2 or len(rows[1]) < 2 or rows[0][0] != rows[1][0]:
                raise ValueError(
                    f"Row {number} of {job[0]} has the key {rows[0][0]!r} and that of {job[1].name} {rows[1][0]!r}: "
                    "the files must have the same keys in the same order, and two columns."
                )
            parts = _pair(rows[0][1], rows[1][1])
            if isinstance(parts, str):
                counts.left_out[parts] += 1
                continue
            writer.write(f"{_stem(job[0])}_{number - 1:09d}", parts)
            counts.samples += 1
            counts.images += 1
    return counts, writer.sizes


def _pair(picture: str, captions: str) -> dict[str, bytes] | str:
    """The parts of a sample, or the reason why it is left out."""
    try:
        caption = json.loads(captions)["captions"][0]
    except (ValueError, KeyError, TypeError, IndexError):
        caption = None
    if not isinstance(caption, str) or not caption.strip():
        return "no caption"
    try:
        data = decode_base64(picture)
        with Image.open(io.BytesIO(data)) as image:  # the header is enough to know the format
            suffix = "png" if image.format == "PNG" else "jpg"
    except (OSError, ValueError):
        return "no picture"
    return {suffix: data, "txt": caption.encode("utf-8")}
