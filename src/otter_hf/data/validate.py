"""Checks a training mixture before a run: every file, record, id and picture, with all that is wrong in one report."""

import io
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

from PIL import Image
from transformers.utils import logging

from ..files import remove
from ..films import is_film, read_video
from ..pictures import ImageError, is_dark_by_depth, orientation, read_image
from ..prompts import IMAGE_TOKEN, RESERVED_TOKENS, render
from ..storage import AnyPath, is_one_path, to_path
from .contamination import Overlap
from .engine import Engine, read_records, run
from .formats import frames_per_medium
from .image_store import ImageStore
from .images import decode_image
from .json_stream import iter_json_object
from .mixture_yaml import MixtureEntry, Problem, read_mixture
from .samples import IMAGE_TEXT, IMAGE_TEXT_IN_CONTEXT, TEXT_ONLY, VIDEO_TEXT
from .tables import aligned


SEVERITIES = ("error", "warning", "note")
_BATCH_IMAGES = 32


@dataclass
class Finding:
    """All problems of one rule in one dataset: how many there are, the first message, and what they concern."""

    severity: str
    rule: str
    message: str
    task_group: str = ""
    dataset: str = ""
    count: int = 0
    ids: list[str] = field(default_factory=list)


@dataclass
class DatasetCounts:
    """What a dataset holds."""

    task_group: str
    dataset: str
    records: int = 0
    examples: int = 0
    images: int = 0
    fewest_images: int = 0
    most_images: int = 0
    unmatched_image_ids: int = 0
    unreadable_images: int = 0


@dataclass
class ValidationReport:
    """The result of `check_mixture`, and where it was asked for what is shared with an evaluation set."""

    datasets: list[DatasetCounts] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    overlap: Overlap | None = None

    def ok(self, strict: bool = False) -> bool:
        """Whether there are no errors, and with `strict` no warnings either, and no picture of the evaluation."""
        bad = ("error", "warning") if strict else ("error",)
        contaminated = strict and self.overlap is not None and bool(self.overlap.pictures)
        return not contaminated and not any(finding.severity in bad for finding in self.findings)

    def add(self, severity: str, rule: str, message: str, entry: MixtureEntry | Problem | None = None, id: str = ""):
        """Counts one problem; later ones of the same rule and dataset join the first."""
        group, name = (entry.task_group, _name(entry)) if entry else ("", "")
        key = (severity, rule, group, name)
        finding = self._by_key.get(key)
        if finding is None:
            finding = self._by_key[key] = Finding(severity, rule, message, group, name)
            self.findings.append(finding)
        finding.count += 1
        if id:
            finding.ids.append(id)

    def __post_init__(self):
        self._by_key: dict[tuple, Finding] = {}

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `ok`, the datasets, the findings with all ids concerned, and `contamination` with all pairs."""
        return {
            "ok": self.ok(),
            "datasets": [asdict(counts) for counts in self.datasets],
            "findings": [asdict(finding) for finding in self.findings],
            **({} if self.overlap is None else {"contamination": self.overlap.to_dict()}),
        }

    def table(self) -> str:
        """For people: a line per dataset, then the findings, worst first."""
        columns = ("group", "dataset", "records", "examples", "images", "per record", "unmatched", "unreadable")
        lines = [columns]
        for counts in self.datasets:
            per_record = f"{counts.fewest_images}-{counts.most_images}"
            numbers = (counts.records, counts.examples, counts.images)
            bad = (counts.unmatched_image_ids, counts.unreadable_images)
            cells = (*(f"{number:,}" for number in numbers), per_record, *(f"{number:,}" for number in bad))
            lines.append((counts.task_group, counts.dataset, *cells))
        text = [aligned(lines)]
        for finding in sorted(self.findings, key=lambda finding: SEVERITIES.index(finding.severity)):
            where = f"{finding.task_group}/{finding.dataset}: " if finding.dataset else ""
            times = f" ({finding.count:,} times)" if finding.count > 1 else ""
            message = finding.message.removeprefix(where)
            text.append(f"{finding.severity}: {where}{finding.rule}{times}: {message}")
        if self.overlap is not None:
            text.append(self.overlap.table())
        totals = Counter(finding.severity for finding in self.findings)
        text.append(", ".join(f"{totals[severity]} {severity}s" for severity in SEVERITIES))
        return "\n".join(text)


# of training, where nothing else is said
_MAX_LENGTH = 2048


def check_mixture(
    mixture: AnyPath | Sequence[MixtureEntry],
    *,
    populate_rel_ins: bool = False,
    decode_images: bool = True,
    engine: Engine | None = None,
    cache_dir: str | Path | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    max_image_pixels: int | None = None,
) -> ValidationReport:
    """Checks a training YAML and everything that it names; reads on behind a mistake, to find all of them.

    Errors are what training would stop at, or skip: mistakes in the YAML, files that cannot be parsed, records without
    text, ids that nothing has, ids with two meanings, pictures that cannot be decoded. Warnings are what trains
    otherwise than it seems: unknown keys, truncated pictures, `rel_ins_ids` that are not used, context about other
    images, empty texts, repeated records, texts that speak of a picture (`<image>`, `<video>`) where none is given,
    examples above `max_length`. Notes do no harm: ragged image counts, pictures that no record uses, that training
    turns upright or scales from more than 8 bits, reserved tokens in texts.

    Args:
        mixture: a training YAML, also at an address, or what `read_mixture` returned.
        populate_rel_ins: as for `MimicitMixture`.
        decode_images: also decode each picture that a record uses.
        engine: where pictures are decoded, 32 at a time; default: in a thread per processor. Ray needs a `logging_dir`
            that all machines see.
        cache_dir: where the index files of image stores are kept.
        tokenizer: a transformers tokenizer, to count with for `max_length`.
        max_length: of an example's prompt in tokens, context included and pictures, BOS and EOS not; without a
            tokenizer, examples are told that have more words than training keeps tokens by default.
        max_image_pixels: as for `SampleOptions`.

    Raises:
        ValueError: for `max_length` without a tokenizer; for Slurm, which gives no answer to wait for.
    """
    if max_length is not None and tokenizer is None:
        raise ValueError(f"max_length={max_length} needs a tokenizer to count with.")
    engine = engine or Engine(threads=os.cpu_count() or 1)
    if engine.executor == "slurm" or (engine.executor == "ray" and engine.logging_dir is None):
        raise ValueError("A check waits for its answers: use the executor local, or ray with a logging_dir for all.")
    report = ValidationReport()
    if is_one_path(mixture):
        mixture = read_mixture(
            mixture, lambda problem: report.add(*problem[:3], problem if problem.dataset else None), cache_dir
        )
    stores = {}
    for entry in mixture:
        counts = DatasetCounts(entry.task_group, entry.name)
        report.datasets.append(counts)
        key = tuple(entry.images_path)
        if key not in stores:
            stores[key] = _open_store(entry, report, cache_dir, max_image_pixels), {}
        try:
            check = _DatasetCheck(entry, report, counts, populate_rel_ins, tokenizer, max_length)
            check.run(*stores[key], decode_images, engine)
        except (ValueError, OSError) as error:
            report.add("error", "unreadable file", str(error), entry)
    return report


def _open_store(
    entry: MixtureEntry, report: ValidationReport, cache_dir: str | Path | None, max_pixels: int | None
) -> ImageStore | None:
    try:
        return ImageStore(entry.images_path, cache_dir, max_pixels=max_pixels)
    except (ValueError, OSError) as error:
        report.add("error", "image store", str(error), entry)
        return None


def _name(entry: MixtureEntry | Problem) -> str:
    return entry.dataset if isinstance(entry, Problem) else entry.name


class _DatasetCheck:
    """The check of one dataset."""

    def __init__(
        self,
        entry: MixtureEntry,
        report: ValidationReport,
        counts: DatasetCounts,
        populate_rel_ins: bool,
        tokenizer: Any = None,
        max_length: int | None = None,
    ):
        self.entry, self.report, self.counts = entry, report, counts
        self.populate_rel_ins = populate_rel_ins
        self.tokenizer, self.max_length = tokenizer, max_length
        self.lengths: dict[str, int] = {}  # of the records, in tokens
        self.images: dict[str, list[str]] = {}  # record id -> image ids
        self.related: dict[str, list[str]] = {}
        self.placed: set[str] = set()  # records that say images_in_text

    def run(
        self,
        store: ImageStore | None,
        results: dict[str, tuple[str, str, str] | None],
        decode_images: bool,
        engine: Engine,
    ):
        self._check_records()
        self._check_contexts()
        if self.entry.task_group != TEXT_ONLY and store is not None:
            self._check_images(store, results, decode_images, engine)

    def _add(self, severity: str, rule: str, message: str, id: str = ""):
        self.report.add(severity, rule, message, self.entry, id)

    def _check_records(self):
        seen = set()
        path = self.entry.mimicit_path
        records = iter_json_object(path, "data")
        for id, record in logging.tqdm(records, desc=f"Checking {to_path(path).name}", unit=" records"):
            self.counts.records += 1
            if id in self.images:
                self._add("error", "record twice", f"record {id!r} is in the file more than once", id)
                continue
            self.images[id] = []
            if not isinstance(record, dict):
                self._add("error", "record", f"record {id!r} is no object", id)
                continue
            self._check_texts(id, record)
            self.images[id] = self._id_list(id, record, "image_ids")
            self.related[id] = self._id_list(id, record, "rel_ins_ids")
            if self.entry.task_group == TEXT_ONLY and self.images[id]:
                message = f"record {id!r} has image_ids, which {TEXT_ONLY} does not show"
                self._add("warning", "pictures that are not shown", message, id)
            self._check_places(id, record)
            self._check_marks(id, record)
            self.lengths[id] = self._length_of(record)
            content = repr((record.get("instruction"), record.get("answer"), self.images[id], self.related[id]))
            digest = blake2b(content.encode("utf-8", "replace"), digest_size=8).digest()
            if digest in seen:
                self._add("warning", "repeated record", f"record {id!r} says the same as an earlier one", id)
            seen.add(digest)
        used = [len(ids) for ids in self.images.values()]
        self.counts.fewest_images, self.counts.most_images = min(used, default=0), max(used, default=0)

    def _check_places(self, id: str, record: dict[str, Any]):
        try:
            images = len(frames_per_medium(id, record, len(self.images[id])) or self.images[id])
        except ValueError as error:
            self._add("error", "frames per medium", str(error), id)
            return
        if not record.get("images_in_text"):
            return
        self.placed.add(id)
        marks = str(record.get("instruction")).count(IMAGE_TOKEN)
        if record["images_in_text"] is not True or marks != images:
            message = f"the instruction of record {id!r} has {marks} {IMAGE_TOKEN} for {images} images"
            self._add("error", "images in text", message, id)

    def _check_marks(self, id: str, record: dict[str, Any]):
        """Warns of a text that speaks of a picture or film where training shows none."""
        shows_images = self.entry.task_group != TEXT_ONLY and self.images[id]
        text = str(record.get("instruction"))
        marks = [mark for mark in (IMAGE_TOKEN, "<video>") if mark in text]
        if marks and not (shows_images and marks == [IMAGE_TOKEN]):
            message = f"the instruction of record {id!r} holds {marks[-1]}, but the record shows none"
            self._add("warning", "placeholder without picture", message, id)

    def _length_of(self, record: dict[str, Any]) -> int:
        texts = [str(record.get(key) or "") for key in ("instruction", "answer")]
        if self.max_length is None:
            return sum(len(text.split()) for text in texts)  # no token holds two words
        prompt = render([tuple(texts)], media="none")
        return len(self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])

    def _check_texts(self, id: str, record: dict[str, Any]):
        for key in ("instruction", "answer"):
            text = record.get(key)
            if not isinstance(text, str):
                self._add("error", f"missing {key}", f"record {id!r} has no {key} text", id)
            elif not text.strip():
                self._add("warning", f"empty {key}", f"the {key} of record {id!r} is empty", id)
            elif any(token in text for token in self._reserved_tokens(key, record)):
                self._add("note", "reserved token", f"the {key} of record {id!r} holds one; it will be escaped", id)

    @staticmethod
    def _reserved_tokens(key: str, record: dict[str, Any]) -> list[str]:
        places = key == "instruction" and record.get("images_in_text")
        return [token for token in RESERVED_TOKENS if not (places and token == IMAGE_TOKEN)]

    def _id_list(self, id: str, record: dict[str, Any], key: str) -> list[str]:
        ids = record.get(key)
        ids = [] if ids is None else [ids] if isinstance(ids, str) else ids
        if not isinstance(ids, list) or not all(isinstance(other, str) for other in ids):
            self._add("error", key, f"the {key} of record {id!r} are not strings in a list", id)
            return []
        return ids

    def _check_contexts(self):
        contexts = self._contexts()
        in_use = bool(self.entry.train_config_path) or self.populate_rel_ins
        same_images = self.entry.task_group not in (IMAGE_TEXT_IN_CONTEXT, TEXT_ONLY)
        examples = set()
        for id, context in contexts:
            if id in examples:
                self._add("warning", "example twice", f"example {id!r} is in the train config more than once", id)
            examples.add(id)
            self.counts.examples += 1
            if in_use and id in context:
                self._add("warning", "its own context", f"example {id!r} has itself, with its answer, as context", id)
            for other in (id, *context):
                if other not in self.images:
                    message = f"{other!r}, needed by example {id!r}, is no record"
                    self._add("error" if in_use else "warning", "unmatched context", message, other)
                elif not in_use or not same_images or self.placed & {id, *context}:
                    continue
                elif self.images[other] != self.images.get(id):
                    message = f"example {id!r} has {other!r} as context, which is about other images"
                    self._add("warning", "context about other images", message, id)
            length = sum(self.lengths.get(other, 0) for other in (*(context if in_use else ()), id))
            if self.max_length is not None and length > self.max_length:
                message = f"the prompt of example {id!r} has {length} tokens, more than {self.max_length}"
                self._add("warning", "over-long", message, id)
            elif self.max_length is None and length > _MAX_LENGTH:
                message = (
                    f"the texts of example {id!r} have {length} words, and training keeps {_MAX_LENGTH} tokens unless "
                    "max_length says otherwise; --tokenizer and --max-length count tokens"
                )
                self._add("warning", "over-long", message, id)
        unused = sum(map(bool, self.related.values()))
        if unused and not in_use and self.entry.task_group in (IMAGE_TEXT, TEXT_ONLY):
            message = (
                f"{unused} records name earlier turns in rel_ins_ids, which are not used: each is trained without "
                "them; give train_config_path, or --populate-rel-ins"
            )
            self._add("warning", "unused rel_ins_ids", message)
        if not self.counts.examples:
            samples = self.entry.num_samples
            severity = "error" if samples > 0 else "warning"
            self._add(severity, "no examples", f"there is nothing to train on (num_samples={samples})")

    def _contexts(self) -> Iterator[tuple[str, list[str]]]:
        if not self.entry.train_config_path:
            yield from self.related.items()
            return
        for id, context in iter_json_object(self.entry.train_config_path):
            yield id, self._id_list(id, {"train config": context}, "train config")

    def _check_images(
        self,
        store: ImageStore,
        results: dict[str, tuple[str, str, str] | None],
        decode_images: bool,
        engine: Engine,
    ):
        self.counts.images = len(store)
        wanted = dict.fromkeys(image_id for ids in self.images.values() for image_id in ids)
        found = [image_id for image_id in wanted if image_id in store]
        missing = wanted.keys() - set(found)
        self.counts.unmatched_image_ids = len(missing)
        for id, ids in self.images.items():
            if self.entry.task_group == VIDEO_TEXT and not ids:
                self._add("error", "no frames", f"record {id!r} of a video dataset has no image_ids", id)
            for image_id in ids:
                if image_id in missing:
                    message = f"record {id!r} needs image {image_id!r}, which the image store does not have"
                    self._add("error", "missing image", message, image_id)
        if self.counts.fewest_images != self.counts.most_images and self.entry.task_group != VIDEO_TEXT:
            counts = f"{self.counts.fewest_images} to {self.counts.most_images}"
            self._add("note", "ragged image counts", f"records have {counts} images; batches are padded")
        if len(store) > len(found):
            self._add("note", "unused images", f"{len(store) - len(found):,} images are used by no record")
        if decode_images:
            _decode_all(store, [id for id in found if id not in results], results, self.entry.name, engine)
            for image_id in found:
                if results[image_id]:
                    severity, rule, reason = results[image_id]
                    self.counts.unreadable_images += severity == "error"
                    self._add(severity, rule, f"image {image_id!r}: {reason}", image_id)


def _decode_all(
    store: ImageStore,
    image_ids: Sequence[str],
    results: dict[str, tuple[str, str, str] | None],
    name: str,
    engine: Engine,
):
    """Adds to `results` what is wrong with each picture, None if nothing is."""
    batches = [image_ids[start : start + _BATCH_IMAGES] for start in range(0, len(image_ids), _BATCH_IMAGES)]
    items = {f"{number:06d}": batch for number, batch in enumerate(batches)}
    with _scratch(engine.logging_dir) as folder:
        run(partial(_decode_batch, store=store), items, folder / "records", engine, name=f"Decoding {name}")
        for number, record in read_records(folder / "records").items():
            found = (None if one is None else tuple(one) for one in record["found"])
            results.update(zip(items[number], found, strict=True))


@contextmanager
def _scratch(folder: AnyPath | None) -> Iterator[AnyPath]:
    """A folder, or a place at an address, for this block."""
    if folder is None:
        with TemporaryDirectory() as name:
            yield Path(name)
        return
    place = to_path(folder) / f"check-{uuid.uuid4().hex}"
    try:
        yield place
    finally:
        remove(place)


def _decode_batch(image_ids: Sequence[str], stop: Event, store: ImageStore) -> dict[str, Any]:
    return {"found": [_decode(store, id) for id in image_ids]}


def _decode(store: ImageStore, image_id: str) -> tuple[str, str, str] | None:
    """Severity, rule and reason of what is wrong with a picture, None if nothing is."""
    try:
        data = store.medium(image_id)
        if isinstance(data, Path) or is_film(data):
            return _check_film(data)
        try:
            read_image(data, "the picture", max_pixels=store.max_pixels)
        except ImageError as error:
            decode_image(data, max_pixels=store.max_pixels)
            return "warning", "truncated image", f"decoded only in part ({str(error).rstrip('.')})"
    except OSError as error:
        return "error", "unreadable image", str(error)
    with Image.open(io.BytesIO(data)) as image:
        mode, turned = image.mode, orientation(image)
        if is_dark_by_depth(image):
            return "warning", "dark image", "uses less than 12 of its 16 bits and is read as nearly black: scale it"
    if turned not in (None, 0, 1):
        return "note", "turned or deep image", f"stored turned (EXIF orientation {turned}), training shows it upright"
    if mode.startswith(("I", "F")):
        return "note", "turned or deep image", f"has more than 8 bits (mode {mode}), training scales them to 8"
    return None


def _check_film(film: bytes | Path) -> tuple[str, str, str] | None:
    try:
        read_video(film, "the film", num_frames=1)
    except ValueError as error:
        return "error", "unreadable film", str(error).rstrip(".")
    return None
