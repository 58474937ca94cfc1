"""MMC4 and LAION as they are published, to WebDataset shards."""

import io
import itertools
import json
import os
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from glob import escape as glob_escape
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

from PIL import Image
from transformers.utils import logging

from ...files import claim, remove
from ...made_from import MadeFrom, keep, kept
from ...reading import lines_of, parse_json, refuse_lfs_pointer
from ...storage import AnyPath, forget_listings, full_name, is_remote, to_path
from ..engine import Engine, read_records, run
from ..images import decode_base64, encode_base64
from .shards import ShardWriter, numbered_files, read_sizes, remove_shards, tar_files, write_sizes


logger = logging.get_logger(__name__)

_RECORDS = ".records"  # of the jobs of a conversion that is under way

# so many more rows of two files that differ than rows that agree are no damage
_MOST_MISMATCHES = 10


@dataclass
class ShardCounts:
    """What a converter wrote, and what it left out, by reason."""

    samples: int = 0
    images: int = 0
    left_out: Counter = field(default_factory=Counter)

    def __add__(self, other: "ShardCounts") -> "ShardCounts":
        return ShardCounts(self.samples + other.samples, self.images + other.images, self.left_out + other.left_out)


def mmc4_to_tar(
    doc_shards: str | Sequence[str],
    image_shards: str | Sequence[str],
    output: str | Path,
    *,
    max_samples: int = 30_000,
    max_bytes: float = 1e10,
    engine: Engine | None = None,
) -> ShardCounts | None:
    """
    Writes MMC4 documents together with their pictures: a `json` part per document, in which each entry of `image_info`
    has its picture as `image_base64`.

    A picture that is not in its tar is left out, with its row of `similarity_matrix`, and so is a document without
    any, or a line that is none. MMC4 has holes (14 of its 23,099 files of documents were never published): a number
    whose file of documents or pictures is not there is named in a warning and counted. Shards are
    named after the file of documents, `NAME.000.tar`, with their numbers of samples in `sizes.json`. A file of
    documents whose shards are complete is not converted again, unless it, its tar or an argument has changed.

    Args:
        doc_shards: JSON-lines files, also zipped, as a pattern with braces, `docs_shard_{0..23098}_v2.jsonl.zip` or
            `{0,2,5}`, or with `*`; or a list of patterns or files.
        image_shards: the tar files of their pictures, by patterns of the same kind: a file of documents and a tar
            belong together when the same number stands in both; without patterns, when they are at the same place of
            the list. A picture is found by its name, in whatever folder of the tar.
        output: folder for the shards.
        max_samples, max_bytes: of a shard.
        engine: where it runs, a file of documents at a time; default: in this process.

    Files and folders may be addresses, as `s3://bucket/docs_shard_{0..99}_v2.jsonl.zip`.

    Returns:
        What was written since all was complete the last time; None if it was handed to Slurm.

    Raises:
        ValueError: if the lists differ in length, no number has both of its files, or a file is no tar.
    """
    patterns = [[one] if isinstance(one, str) else list(one) for one in (doc_shards, image_shards)]
    if len(patterns[0]) != len(patterns[1]):
        raise ValueError(
            f"doc_shards names {len(patterns[0])} files or patterns and image_shards {len(patterns[1])}: give each "
            "its counterpart, in the same order."
        )
    jobs, left_out = [], Counter()
    for docs, tars in zip(*map(partial(map, numbered_files), patterns), strict=True):
        whole = [key for key in docs if key in tars and _is_file(docs[key]) and _is_file(tars[key])]
        missing = sorted({*docs, *tars} - set(whole), key=lambda key: [(len(part), part) for part in key])
        if missing:
            left_out["number without documents or pictures"] += len(missing)
            absent = [_absent_file(docs, tars, key) for key in missing]
            logger.warning(
                f"{len(missing)} numbers are left out, as one of their files is not there: {_some(absent)}."
            )
        jobs += [(docs[key], tars[key]) for key in whole]
    if not jobs:
        raise ValueError(
            f"doc_shards {doc_shards!r} and image_shards {image_shards!r} have no number of which both files are "
            "there: check the folders and the numbers."
        )
    convert = partial(_convert_mmc4_shard, output=to_path(output), max_samples=max_samples, max_bytes=max_bytes)
    counts = convert_all(convert, jobs, output, engine, max_samples=max_samples, max_bytes=max_bytes)
    return None if counts is None else counts + ShardCounts(left_out=left_out)


def _is_file(path: AnyPath) -> bool:
    return to_path(path).is_file()


def _absent_file(docs: dict[tuple, str], tars: dict[tuple, str], key: tuple) -> str:
    for files in (docs, tars):
        if key in files and not _is_file(files[key]):
            return files[key]
    return f"the {'documents' if key in tars else 'pictures'} of {(tars if key in tars else docs)[key]}"


def _some(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def laion_to_tar(
    folder: str | Path,
    output: str | Path,
    *,
    max_samples: int = 500_000,
    max_bytes: float = 2e10,
    engine: Engine | None = None,
) -> ShardCounts | None:
    """
    Writes pairs of TSV files as shards of pictures with captions.

    Each `*image*.tsv` (key, picture in base64) goes with the file whose name has `text` for `image` (key, JSON
    `{"captions": [...]}`, of which the first counts). Pictures keep their bytes. Rows without caption or picture are
    left out. Shards are named `NAME.000.tar` after the TSV file, with their numbers of samples in `sizes.json`. The
    rows are read one after the other, so that `.lineidx` files are not needed. A file whose shards are complete is not
    converted again, unless it, its other half or an argument has changed.

    Args:
        folder: of the TSV files; folders in it are looked into as well.
        output: folder for the shards.
        max_samples, max_bytes: of a shard.
        engine: where it runs, a pair of files at a time; default: in this process.

    Returns:
        As `mmc4_to_tar`.

    Raises:
        ValueError: if a file lacks its other half, or their keys or numbers of rows differ.
    """
    pictures = sorted(path for path in to_path(folder).rglob("*.tsv") if "image" in path.name)
    if not pictures:
        raise ValueError(f"{folder} has no *image*.tsv in it.")
    pairs = [(path, path.with_name(path.name.replace("image", "text"))) for path in pictures]
    convert = partial(_convert_laion_pair, output=to_path(output), max_samples=max_samples, max_bytes=max_bytes)
    return convert_all(convert, pairs, output, engine, max_samples=max_samples, max_bytes=max_bytes)


def convert_all(
    convert: Callable[[tuple], tuple[ShardCounts, dict[str, int]]],
    jobs: Sequence[tuple],
    output: str | Path,
    engine: Engine | None = None,
    pictures: Sequence[str | Path] = (),
    **options: Any,
) -> ShardCounts | None:
    """
    Runs `convert(job)`, which gives counts and sizes of shards, for the jobs that are not written down as done.

    Args:
        pictures: files beside those of a job that every job reads.
        options: what else the shards depend on. Shards of files that have changed since, or of other options, are
            written again, with a warning.

    Returns:
        As `mmc4_to_tar`.

    Raises:
        ValueError: if a file does not exist, or two jobs, of this or an earlier run, would write shards of one name.
        OSError: if another process is writing to the folder.
    """
    output = to_path(output)
    for job in jobs:
        for path in job:
            if not _is_file(path):
                raise ValueError(f"The file {path} does not exist.")
    first: dict[str, Any] = {}
    for job in jobs:
        if (other := first.setdefault(stem(job[0]), job[0])) != job[0]:
            raise ValueError(f"{other} and {job[0]} would both become {stem(job[0])}.*.tar: rename one of them.")
    output.mkdir(parents=True, exist_ok=True)
    forget_listings(output)
    shared = MadeFrom.of(pictures).files
    made_from = {stem(job[0]): MadeFrom({**MadeFrom.of(job).files, **shared}, options) for job in jobs}
    with nullcontext() if is_remote(output) else claim(output / ".lock", output):
        items = {stem(job[0]): (job, made_from[stem(job[0])].to_json()) for job in _pending(jobs, made_from, output)}
        step, finish = partial(_convert_job, convert=convert, output=output), partial(_settle, output)
        try:
            done = run(step, items, output / _RECORDS, engine or Engine(), name=f"Shards in {output}", finish=finish)
        except BaseException:
            finish()
            raise
        return finish() if done else None


def _convert_job(item: tuple[tuple, dict], stop: Event, convert: Callable, output: AnyPath) -> dict[str, Any]:
    """Writes the shards of a job, and gives its record."""
    job, made_from = item
    counts, sizes = convert(job)
    # an earlier attempt may have been about a longer file
    shards = re.compile(re.escape(stem(job[0])) + r"\.\d+\.tar")
    for path in output.glob(f"{glob_escape(stem(job[0]))}.*.tar"):
        if shards.fullmatch(path.name) and path.name not in sizes:
            remove(path)
    return {"samples": counts.samples, "images": counts.images, "left_out": dict(counts.left_out)} | {
        "sizes": sizes,
        "made_from": made_from,
    }


def _settle(output: AnyPath) -> ShardCounts:
    """Writes down what the records tell, in place of them; gives their counts."""
    total, sizes, made_from = ShardCounts(), {}, {}
    for name, record in read_records(output / _RECORDS).items():
        total += ShardCounts(record["samples"], record["images"], Counter(record["left_out"]))
        sizes |= record["sizes"]
        made_from[name] = MadeFrom(**record["made_from"])
    if made_from:
        keep(output, made_from)
        write_sizes(output, sizes)
    remove(output / _RECORDS)
    for path in output.glob(".*.incomplete"):
        remove(path)
    return total


def _pending(jobs: Sequence[tuple], made_from: Mapping[str, MadeFrom], output: AnyPath) -> list[tuple]:
    """The jobs that are not settled, or not with what is there now; shards and records of those are removed."""
    sizes, before, records = read_sizes(output), kept(output), read_records(output / _RECORDS)
    pending, stale = [], []
    for job in jobs:
        name = stem(job[0])
        # a job is written down when all of its shards are there
        shards = [shard for shard in sizes if shard.startswith(f"{name}.")]
        changes = made_from[name].changes(before.get(name))
        if shards and not changes:
            continue
        if shards and name in before and full_name(to_path(job[0])) not in before[name]["files"]:
            raise ValueError(f"{output} holds {name}.*.tar of another file ({changes}): choose another output.")
        if shards:
            logger.warning(f"{name}.*.tar in {output} is written again: {changes}.")
        if name in records and made_from[name].changes(records[name]["made_from"]):
            remove(output / _RECORDS / f"{name}.json")
        stale += shards
        pending.append(job)
    remove_shards(output, stale)
    return pending


def stem(path: str | Path) -> str:
    """The name of a file up to its first dot, which names the shards made of it."""
    return to_path(path).name.split(".")[0]


def _convert_mmc4_shard(job: tuple[str, str], output: AnyPath, max_samples: int, max_bytes: float):
    docs, tar_path = job
    counts = ShardCounts()
    with (
        _open_tar(tar_path) as tar,
        _open_lines(docs) as file,
        ShardWriter(output, f"{stem(docs)}.%03d.tar", max_samples, max_bytes) as writer,
    ):
        members = _members(tar, tar_path)
        for number, line in enumerate(_lines(file, docs)):
            document = _document(line)
            if document is None:
                counts.left_out["line that is no document"] += 1
                continue
            kept = []
            for info in document["image_info"]:
                name = info.get("image_name")
                member = members.get(name) if isinstance(name, str) else None
                if member is None:
                    counts.left_out["picture not in its tar"] += 1
                else:
                    kept.append({**info, "image_base64": encode_base64(tar.extractfile(member).read())})
            if not kept:
                counts.left_out["document without pictures"] += 1
                continue
            document = {**document, "image_info": kept, **_similarities(document, members)}
            data = json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")
            writer.write(f"{stem(docs)}_{number:07d}", {"json": data})
            counts.samples += 1
            counts.images += len(kept)
    return counts, writer.sizes


def _similarities(document: dict[str, Any], members: dict) -> dict[str, Any]:
    """`similarity_matrix`, where there is one: the rows of the pictures that are kept."""
    rows = document.get("similarity_matrix")
    if not isinstance(rows, list) or len(rows) != len(document["image_info"]):
        return {}
    kept = [str(info.get("image_name")) in members for info in document["image_info"]]
    return {"similarity_matrix": list(itertools.compress(rows, kept))}


@contextmanager
def _open_tar(path: str) -> Iterator[tarfile.TarFile]:
    refuse_lfs_pointer(path)
    with to_path(path).open("rb") as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:")
        except tarfile.ReadError as error:
            raise ValueError(f"{path} is no plain tar file: {error}.") from None
        with tar:
            yield tar


def _members(tar: tarfile.TarFile, path: str) -> dict[str, tarfile.TarInfo]:
    """The files of a tar by their names without folders."""
    members, end = {}, to_path(path).stat().st_size
    try:
        for member in tar_files(tar):
            if member.offset_data + member.size <= end:
                members[os.path.basename(member.name)] = member
    except tarfile.ReadError as error:
        logger.warning(f"{path} is damaged behind its file {len(members)} ({error}): the rest of it is left out.")
    return members


def _document(line: bytes) -> dict[str, Any] | None:
    try:
        document = parse_json(line)
        texts = all(isinstance(text, str) for text in document["text_list"])
        return document if texts and all(isinstance(info, dict) for info in document["image_info"]) else None
    except (ValueError, KeyError, TypeError):
        return None


# what zipfile raises beside OSError
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)


@contextmanager
def _open_lines(path: str) -> Iterator[BinaryIO]:
    refuse_lfs_pointer(path)
    with to_path(path).open("rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            yield file
            return
        try:
            archive = zipfile.ZipFile(file)
            names = archive.namelist()
            lines = archive.open(names[0]) if len(names) == 1 else None
        except _ZIP_ERRORS as error:
            raise ValueError(f"{path} is a damaged zip file: {error}.") from None
        if lines is None:
            raise ValueError(f"{path} holds {len(names)} files, it should be one of JSON lines.")
        with lines:
            yield lines


def _lines(file: BinaryIO, path: str) -> Iterator[bytes]:
    try:
        yield from lines_of(file)
    except _ZIP_ERRORS as error:
        raise ValueError(f"{path} is a damaged zip file: {error}.") from None


def _convert_laion_pair(job: tuple[AnyPath, AnyPath], output: AnyPath, max_samples: int, max_bytes: float):
    counts = ShardCounts()
    for path in job:
        refuse_lfs_pointer(path)
    mismatches: list[str] = []
    with (
        job[0].open("rb") as pictures,
        job[1].open("rb") as captions,
        ShardWriter(output, f"{stem(job[0])}.%03d.tar", max_samples, max_bytes) as writer,
    ):
        number = matches = 0
        for lines in itertools.zip_longest(lines_of(pictures), lines_of(captions), fillvalue=b""):
            number += 1
            rows = [line.decode("utf-8", "replace").rstrip("\n").split("\t") for line in lines]
            if len(rows[0]) < 2 or len(rows[1]) < 2 or rows[0][0] != rows[1][0]:
                mismatches.append(
                    f"Row {number} of {job[0]} has the key {rows[0][0]!r:.80} and that of {job[1].name} "
                    f"{rows[1][0]!r:.80}: the files must have the same keys in the same order, and two columns."
                )
                # one damaged row costs that one; files that do not belong together have nothing but such rows
                if not all(lines) or len(mismatches) >= _MOST_MISMATCHES + matches:
                    raise ValueError(mismatches[0])
                counts.left_out["row whose key or columns are damaged"] += 1
                continue
            matches += 1
            parts = _pair(rows[0][1], rows[1][1])
            if isinstance(parts, str):
                counts.left_out[parts] += 1
                continue
            writer.write(f"{stem(job[0])}_{number - 1:09d}", parts)
            counts.samples += 1
            counts.images += 1
        if mismatches and not matches:
            raise ValueError(mismatches[0])
    return counts, writer.sizes


def _pair(picture: str, captions: str) -> dict[str, bytes] | str:
    """The parts of a sample, or the reason why it is left out."""
    try:
        caption = parse_json(captions)["captions"][0]
    except (ValueError, KeyError, TypeError, IndexError):
        caption = None
    if not isinstance(caption, str) or not caption.strip():
        return "no caption"
    try:
        data = decode_base64(picture)
        with Image.open(io.BytesIO(data)) as image:  # the header is enough to know the format
            suffix = {"PNG": "png", "WEBP": "webp"}.get(image.format, "jpg")
    except (OSError, ValueError):
        return "no picture"
    return {suffix: data, "txt": caption.encode("utf-8", "replace")}
