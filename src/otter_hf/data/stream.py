"""A mixture as a stream: the first sample comes before the files have been read."""

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers.utils import logging

from .formats import load_mimicit, stream_records
from .mixture import SkipCounter, sample_of_entry
from .mixture_yaml import MixtureEntry, entries_of
from .samples import Sample, SampleError, SampleOptions


logger = logging.get_logger(__name__)


class StreamedMixture(IterableDataset):
    """The samples of several MIMIC-IT datasets as a stream.

    Instructions are read while training goes on, and pass through a shuffle buffer; datasets are drawn by weight.
    The order depends on `(seed, epoch)` alone. `num_samples` of the entries is not used: an epoch has each record
    once. Datasets with a train config are indexed first, since a context may be anywhere in the file.

    Args:
        mixture: a training YAML, or what `read_mixture` returned.
        options: how samples are made, see `SampleOptions`.
        weights: how often to draw from each dataset, by its name, in place of 1 for all. Only ratios count; a dataset
            that is exhausted takes no further part in the epoch, one of weight 0 none at all.
        buffer_size: records of each dataset that are shuffled at a time.
        populate_rel_ins: datasets without train config take their context from `rel_ins_ids`.
        on_error: `"raise"` the `SampleError` of a sample that cannot be used, or `"skip"` and count it.
        seed: of all random choices.
        shard: `(index, number)`: keep every `number`-th sample, from `index` on: one shard for each rank. Workers of a
            data loader divide what is left among them. transformers' `Trainer` takes it without: accelerate deals out
            what one process reads, and the other shards would never be trained.
        cache_dir: see `MimicitMixture`.
        transform: see `MimicitMixture`.

    Resuming: `state_dict()` and `load_state_dict()` hold the epoch and how many samples have been taken of it; the
    next iteration goes on behind them, without decoding their pictures. With data loader workers, which make whole
    batches in turn, use the loader's own count: `load_state_dict({"epoch": e, "position": batches * batch_size,
    "batch_size": batch_size})`.

    Raises:
        ValueError: for mistakes in the YAML, and while iterating for those in the files.
    """

    def __init__(
        self,
        mixture: str | Path | Sequence[MixtureEntry],
        options: SampleOptions | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        buffer_size: int = 1000,
        populate_rel_ins: bool = False,
        on_error: str = "raise",
        seed: int = 42,
        shard: tuple[int, int] = (0, 1),
        cache_dir: str | Path | None = None,
        transform: Callable[[Sample, random.Random], Sample] | None = None,
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}.")
        if buffer_size < 1:
            raise ValueError(f"buffer_size must be at least 1, got {buffer_size}.")
        if not 0 <= shard[0] < shard[1]:
            raise ValueError(f"shard must be (index, number) with 0 <= index < number, got {shard}.")
        self.entries = entries_of(mixture, cache_dir, on_error)
        self.weights = _weights(self.entries, weights or {})
        if unused := [entry.name for entry in self.entries if entry.num_samples not in (-1, 0)]:
            logger.warning(f"num_samples of {', '.join(unused)} has no effect on a stream: give weights.")
        self.options = options or SampleOptions()
        self.buffer_size = buffer_size
        self.populate_rel_ins = populate_rel_ins
        self.on_error = on_error
        self.seed = seed
        self.shard = shard
        self.cache_dir = cache_dir
        self.transform = transform
        open_store = functools.cache(lambda paths: self.options.open_store(paths, cache_dir))
        self._stores = [open_store(tuple(entry.images_path)) for entry in self.entries]
        # shared with data loader workers, which live through epochs
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._start = torch.zeros(2, dtype=torch.int64).share_memory_()  # samples taken, and of a batch of workers
        self._taken = 0
        self._skipped = SkipCounter()

    @property
    def skipped(self) -> dict[str, int]:
        """How many samples were skipped so far, by reason, in all data loader workers."""
        return self._skipped.totals()

    def set_epoch(self, epoch: int) -> None:
        """Tells the epoch, whose order and choices the next iteration has; it starts at the beginning."""
        if epoch != int(self._epoch):
            self._start[0] = self._taken = 0
        self._epoch[0] = epoch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of samples that were taken of it, in this process."""
        return {"epoch": int(self._epoch), "position": self._taken}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Makes the next iteration go on where `state_dict` was called."""
        self._epoch[0] = state["epoch"]
        self._start[:] = torch.tensor([state["position"], state.get("batch_size", 1)])
        self._taken = state["position"]

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch, (start, batch_size) = int(self._epoch), self._start.tolist()
        batches, part_of_one = divmod(start, max(1, batch_size))
        # a data loader begins with its first worker, which takes the part of the one whose turn it is
        number = (number + batches) % workers
        taken = -(-(batches - number) // workers) * batch_size + (part_of_one if batches % workers == number else 0)
        # the samples of this shard go to its workers in turn
        first = self.shard[0] + self.shard[1] * number
        rows = islice(enumerate(self._rows(epoch)), first, None, self.shard[1] * workers)
        self._taken, self._start[0] = (start, 0) if worker is None else (self._taken, start)
        for index, (dataset, row) in islice(rows, taken, None):
            generator = random.Random(f"{self.seed} {epoch} {index}")
            self._taken += 1
            try:
                sample = sample_of_entry(self.entries[dataset], row, self._stores[dataset], self.options, generator)
                sample = sample if self.transform is None else self.transform(sample, generator)
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                if self._skipped.add(error.reason) == 1:
                    logger.warning(f"{error} It is skipped, as are others like it ({error.reason}).")
                continue
            yield sample

    def _rows(self, epoch: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of an epoch in their order, with the number of their dataset."""
        generator = random.Random(f"{self.seed} {epoch}")
        streams = {
            number: _shuffled(self._records(entry), self.buffer_size, random.Random(f"{self.seed} {epoch} {number}"))
            for number, entry in enumerate(self.entries)
            if self.weights[number]
        }
        while streams:
            numbers = list(streams)
            (number,) = generator.choices(numbers, [self.weights[number] for number in numbers])
            row = next(streams[number], None)
            if row is None:
                del streams[number]
            else:
                yield number, row

    def _records(self, entry: MixtureEntry) -> Iterator[dict[str, Any]]:
        if not entry.train_config_path and not self.populate_rel_ins:
            return stream_records(entry.mimicit_path)
        table, _ = load_mimicit(
            entry.mimicit_path,
            train_config_path=entry.train_config_path or None,
            populate_rel_ins=self.populate_rel_ins,
            on_error=self.on_error,
            cache_dir=self.cache_dir,
        )
        return iter(table)


def _weights(entries: Sequence[MixtureEntry], weights: Mapping[str, float]) -> list[float]:
    unknown = set(weights) - {entry.name for entry in entries}
    if unknown:
        raise ValueError(f"weights names {sorted(unknown)}, but the datasets are {[entry.name for entry in entries]}.")
    bad = {name: weight for name, weight in weights.items() if not weight >= 0}
    if bad:
        raise ValueError(f"weights must not be negative, got {bad}.")
    values = [float(weights.get(entry.name, 1)) for entry in entries]
    if not any(values):
        raise ValueError("weights must leave at least one dataset with a weight above 0.")
    return values


def _shuffled(rows: Iterator[dict], buffer_size: int, generator: random.Random) -> Iterator[dict]:
    buffer = list(islice(rows, buffer_size))
    for row in rows:
        place = generator.randrange(buffer_size)
        buffer[place], row = row, buffer[place]
        yield row
    generator.shuffle(buffer)
    yield from buffer
