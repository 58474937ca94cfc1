"""The samples of the datasets of a training YAML, by number, and the order in which they are trained on."""

import contextlib
import functools
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset as Table
from torch.utils.data import Dataset, Sampler, get_worker_info
from transformers.utils import logging

from ..films import is_film
from .formats import load_mimicit
from .image_store import ImageStore
from .mixture_yaml import MixtureEntry, entries_of, read_mixture  # noqa: F401  here callers find it, too
from .samples import TEXT_ONLY, VIDEO_TEXT, Sample, SampleError, SampleOptions, build_sample
from .tables import aligned


logger = logging.get_logger(__name__)


def is_held_out(sample_id: str, fraction: float) -> bool:
    """Whether a sample is among the `fraction` kept for evaluation: decided by its id alone, so always the same."""
    digest = hashlib.blake2b(sample_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def sample_rows(num_rows: int, num_samples: int) -> np.ndarray:
    """The rows of a dataset that one epoch uses, int64 of shape `(N,)`.

    `num_samples` of -1, 0 or `num_rows`: all, in order. Fewer: drawn without replacement. More: all of them as often
    as they fit in whole, and the rest drawn with replacement. The draws are those of the original (seed 0), from a
    generator of their own.
    """
    if num_samples in (-1, 0, num_rows):
        return np.arange(num_rows)
    if num_rows == 0:
        raise ValueError(f"num_samples={num_samples} cannot be drawn from a dataset without samples.")
    generator = random.Random(0)
    if num_samples < num_rows:
        return np.array(generator.sample(range(num_rows), num_samples))
    rest = generator.choices(range(num_rows), k=num_samples % num_rows)
    return np.concatenate([np.tile(np.arange(num_rows), num_samples // num_rows), np.array(rest, dtype=int)])


class MimicitMixture(Dataset):
    """The samples of several MIMIC-IT datasets as one map-style dataset; items are `Sample` dicts.

    Nothing but ids and row numbers is held in memory; images are decoded when their sample is asked for. Random
    choices depend on `(seed, epoch, index)` alone, so they are the same in any worker and after a restart.

    Args:
        mixture: a training YAML, or what `read_mixture` returned.
        options: how samples are made, see `SampleOptions`.
        populate_rel_ins: datasets without train config take their context from `rel_ins_ids`.
        on_error: what to do with a sample that cannot be used (missing or unreadable image, missing text). `"raise"`
            the `SampleError`, or `"skip"`: count it under its reason and take the next sample.
        seed: for the choices made per sample.
        cache_dir: where Arrow copies are kept; default: `otter_hf` in the cache of the `datasets` library.
        transform: `(sample, generator) -> sample`, applied to each sample: augmentation of its images, another order
            or choice of its turns. All its random choices have to come from the generator. It may raise a
            `SampleError` too.
        eval_fraction: leave out this share of the samples, by the hash of their ids, also as context of others; turns
            of a conversation that are no samples by themselves stay.
        held_out: take what `eval_fraction` leaves out, each once, and nothing else.

    Raises:
        ValueError: for any mistake in the YAML or the files that it names, see `read_mixture` and `load_mimicit`.
    """

    def __init__(
        self,
        mixture: str | Path | Sequence[MixtureEntry],
        options: SampleOptions | None = None,
        *,
        populate_rel_ins: bool = False,
        on_error: str = "raise",
        seed: int = 42,
        cache_dir: str | Path | None = None,
        transform: Callable[[Sample, random.Random], Sample] | None = None,
        eval_fraction: float = 0.0,
        held_out: bool = False,
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}.")
        self.entries = entries_of(mixture, cache_dir, on_error)
        self.options = options or SampleOptions()
        self.on_error = on_error
        self.seed = seed
        self.transform = transform
        self._held_out: set[str] = set()  # ids of samples that are for evaluation alone
        self._tables, self._stores, self._rows = [], [], []
        open_store = functools.cache(lambda paths: self.options.open_store(paths, cache_dir))
        for entry in self.entries:
            try:
                table, _ = load_mimicit(
                    entry.mimicit_path,
                    train_config_path=entry.train_config_path or None,
                    populate_rel_ins=populate_rel_ins,
                    on_error=on_error,
                    cache_dir=cache_dir,
                )
                store = open_store(tuple(entry.images_path))
                if eval_fraction:
                    ids = table["id"]
                    held = np.array([is_held_out(id, eval_fraction) for id in ids], dtype=bool)
                    side = np.flatnonzero(held == held_out)
                    if not held_out:
                        self._held_out.update(itertools.compress(ids, held))
                    rows = side[sample_rows(len(side), 0 if held_out else entry.num_samples)]
                else:
                    rows = sample_rows(len(table), entry.num_samples)
            except ValueError as error:
                raise ValueError(f"{entry.task_group}/{entry.name}: {error}") from None
            self._tables.append(table)
            self._stores.append(store)
            self._rows.append(rows)
        self._ends = np.cumsum([len(rows) for rows in self._rows])
        # shared with data loader workers, which live through epochs and count what they skip
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._skipped = SkipCounter()

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def task_groups(self) -> list[str]:
        """The task group of each sample."""
        return [entry.task_group for entry, rows in zip(self.entries, self._rows, strict=True) for _ in rows]

    @property
    def text_lengths(self) -> np.ndarray:
        """Characters of each sample's instructions and answers, context included: int64 `(N,)`."""
        return np.concatenate(
            [_text_lengths(table)[rows] for table, rows in zip(self._tables, self._rows, strict=True)]
        )

    @property
    def skipped(self) -> dict[str, int]:
        """How many samples were skipped so far, by reason, in all data loader workers."""
        return self._skipped.totals()

    def most_frames(self) -> int:
        """The most pictures and film frames of a sample, as far as a few of each dataset tell; at least 1."""
        most = 1
        for end, rows in zip(self._ends.tolist(), self._rows, strict=True):
            for index in range(end - len(rows), end, max(1, len(rows) // 4)):
                with contextlib.suppress(SampleError):
                    most = max(most, sum(map(len, self._build(index)["media"])))
        return most

    def longest_medium(self) -> int:
        """The most frames of a medium, as far as records tell: encoded films are taken to be in VIDEO_TEXT alone."""
        longest = 1
        for entry, table in zip(self.entries, self._tables, strict=True):
            if entry.task_group == VIDEO_TEXT:
                longest = max(longest, self.options.num_frames)
            elif entry.task_group != TEXT_ONLY:
                images, frames = _most_images(table)
                longest = max(
                    longest, min(frames, self.options.num_frames), images if entry.images_as == "frames" else 1
                )
        return longest

    def shows_films(self) -> bool:
        """Whether there are films in the data; encoded ones outside of VIDEO_TEXT as far as some records tell."""
        for entry, table, rows, store in zip(self.entries, self._tables, self._rows, self._stores, strict=True):
            if entry.task_group == TEXT_ONLY:
                continue
            if entry.task_group == VIDEO_TEXT or _most_images(table)[1] > 1:
                return True
            some = itertools.chain(*(table[int(row)]["image_ids"] for row in rows[:: max(1, len(rows) // 64)]))
            if any(_is_film(store, id) for id in some):
                return True
        return False

    def digest(self) -> list[list]:
        """
        What the data are, wherever they lie: of each dataset its group, name, number of samples and images, and a
        hash of the text of some of its records.
        """
        datasets = []
        for entry, table, rows, store in zip(self.entries, self._tables, self._rows, self._stores, strict=True):
            some = [table[int(row)] for row in rows[:: max(1, len(rows) // 64)]]
            texts = json.dumps([[one[key] for key in ("id", "instruction", "answer", "image_ids")] for one in some])
            digest = hashlib.blake2b(texts.encode(), digest_size=8).hexdigest()
            datasets.append([entry.task_group, entry.name, len(rows), len(store), digest])
        return datasets

    def skip(self, error: SampleError) -> None:
        """Counts a sample that is left out, and tells the first of its kind."""
        if self._skipped.add(error.reason) == 1:
            logger.warning(f"{error} It is skipped, as are others like it ({error.reason}).")

    def set_epoch(self, epoch: int) -> None:
        """Tells the epoch that the choices made per sample depend on; the `Trainer` calls it."""
        self._epoch[0] = epoch

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Sample {index} of {len(self)}.")
        index %= len(self)
        for attempt in range(len(self)):
            try:
                return self._build((index + attempt) % len(self), self.transform)
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                self.skip(error)
        raise SampleError(f"None of the {len(self)} samples of the mixture can be used.")

    def _build(self, index: int, transform: Callable[[Sample, random.Random], Sample] | None = None) -> Sample:
        number = int(np.searchsorted(self._ends, index, side="right"))
        entry, rows = self.entries[number], self._rows[number]
        row = int(rows[index - (self._ends[number] - len(rows))])
        generator = random.Random(f"{self.seed} {int(self._epoch)} {index}")
        record = self._tables[number][row]
        if self._held_out:
            context = [turn for turn in record["context"] if turn["id"] not in self._held_out]
            record = {**record, "context": context}
        sample = sample_of_entry(entry, record, self._stores[number], self.options, generator)
        return sample if transform is None else transform(sample, generator)

    def summary(self) -> str:
        """A table of the datasets: group, name, number of records, samples per epoch, their share, and images."""
        lines = [("group", "dataset", "records", "samples", "share", "images")]
        for entry, table, rows, store in zip(self.entries, self._tables, self._rows, self._stores, strict=True):
            share = f"{len(rows) / max(1, len(self)):.1%}"
            numbers = (f"{len(table):,}", f"{len(rows):,}", share, f"{len(store):,}")
            lines.append((entry.task_group, entry.name, *numbers))
        lines.append(("total", "", f"{sum(map(len, self._tables)):,}", f"{len(self):,}", "", ""))
        return aligned(lines)


def sample_of_entry(
    entry: MixtureEntry, row: Mapping[str, Any], store: ImageStore, options: SampleOptions, generator: random.Random
) -> Sample:
    """`build_sample` with the settings of a dataset, which the sample names."""
    sample = build_sample(
        row,
        store,
        entry.task_group,
        options,
        images_as=entry.images_as,
        task_descriptions=entry.task_description,
        generator=generator,
    )
    return {**sample, "task_group": entry.task_group, "dataset": entry.name}


def _is_film(store: ImageStore, id: str) -> bool:
    try:
        medium = store.medium(id)
    except (KeyError, OSError):
        return False
    return isinstance(medium, Path) or is_film(medium)


def _most_images(table: Table) -> tuple[int, int]:
    """The most images of a record that are frames of one medium, and the most frames of a film among its media."""
    most_images = most_frames = 1
    names = ["image_ids", "frames_per_medium", "images_in_text"]
    for part in table.select_columns(names).with_format("arrow").iter(10_000):
        images, films = (pc.list_value_length(part[name]).fill_null(0).to_numpy() for name in names[:2])
        apart = part["images_in_text"].fill_null(False).to_numpy() | (films > 0)
        most_images = max(most_images, int(np.where(apart, 1, images).max(initial=0)))
        most_frames = max(most_frames, pc.max(pc.list_flatten(part["frames_per_medium"])).as_py() or 1)
    return most_images, most_frames


def _text_lengths(table: Table) -> np.ndarray:
    lengths = [np.empty(0, dtype=np.int64)]
    for part in table.select_columns(["instruction", "answer", "context"]).with_format("arrow").iter(10_000):
        context = part["context"].combine_chunks()
        turns = np.concatenate([[0], _characters(context.flatten()).cumsum()])
        ends = np.concatenate([[0], pc.list_value_length(context).fill_null(0).to_numpy().cumsum()])
        own = _characters(part.select(["instruction", "answer"]).to_struct_array().combine_chunks())
        lengths.append(own + turns[ends[1:]] - turns[ends[:-1]])
    return np.concatenate(lengths)


def _characters(records: pa.StructArray) -> np.ndarray:
    counts = [pc.utf8_length(records.field(name)).fill_null(0).to_numpy() for name in ("instruction", "answer")]
    return sum(counts).astype(np.int64)


class SkipCounter:
    """Counts by reason, `"unusable"` for those that are none of ours, as of a user's transform.

    Increments of data loader workers are seen by the process that made it.
    """

    reasons = (
        *("missing image", "unreadable image", "unreadable film", "no frames", "images and places"),
        *("missing instruction", "missing answer", "overlong", "bad image", "bad text", "unusable"),
    )

    def __init__(self):
        # a row for each worker, so that no two processes write one number
        self._counts = torch.zeros(256, len(self.reasons), dtype=torch.int64).share_memory_()

    def add(self, reason: str) -> int:
        """Counts one more; returns how many this process has counted for the reason."""
        worker = get_worker_info()
        row = 0 if worker is None else 1 + worker.id % (len(self._counts) - 1)
        count = self._counts[row, self.reasons.index(reason if reason in self.reasons else "unusable")]
        count += 1
        return int(count)

    def totals(self) -> dict[str, int]:
        """Samples left out so far, by reason, in all processes."""
        totals = self._counts.sum(dim=0).tolist()
        return {reason: total for reason, total in zip(self.reasons, totals, strict=True) if total}


class GroupedSampler(Sampler[int]):
    """Shuffles samples such that every global batch is of one group (task group, by default in Otter's training).

    Each sample is used once per epoch, so groups are met in proportion to their sizes. The order depends on
    `(seed, epoch)` alone: all ranks of a distributed job see the same sequence, and `accelerate` deals consecutive
    batches of it to the ranks, which therefore work on one group in each step.

    Args:
        groups: the group of each sample.
        batch_size: samples of one global step: batch size per device times number of processes.
        seed: seed of the shuffle.
        lengths: of the samples, in any unit. Given these, batches are of samples of about the same length: the
            shuffled samples of a group are sorted by it, `SORTED_BATCHES` batches at a time.

    The last samples of each group that fill no batch follow at the end, mixed.
    """

    SORTED_BATCHES = 50

    def __init__(self, groups: Sequence[str], batch_size: int, seed: int = 42, lengths: Sequence[int] | None = None):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if lengths is not None and len(lengths) != len(groups):
            raise ValueError(f"There are {len(lengths)} lengths for {len(groups)} samples: give one for each.")
        names = {name: number for number, name in enumerate(sorted(set(groups)))}
        self._group_of = np.fromiter(map(names.__getitem__, groups), np.int64, len(groups))
        self._num_groups = len(names)
        self._lengths = None if lengths is None else np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._group_of)

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next iteration has, from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        batches, rest = [], []
        for group in range(self._num_groups):
            members = generator.permutation(np.flatnonzero(self._group_of == group))
            full = len(members) // self.batch_size * self.batch_size
            rest.extend(members[full:])
            members = members[:full]
            if self._lengths is not None:
                pool = np.arange(full) // (self.batch_size * self.SORTED_BATCHES)
                members = members[np.lexsort((self._lengths[members], pool))]
            batches.extend(members.reshape(-1, self.batch_size))
        for batch in generator.permutation(len(batches)):
            yield from batches[batch].tolist()
        yield from generator.permutation(np.array(rest, dtype=int)).tolist()
