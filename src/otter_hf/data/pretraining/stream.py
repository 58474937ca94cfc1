"""Shards as a stream of training batches that ends to the batch, and goes on to the sample."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers.utils import logging

from ..mixture import SkipCounter
from ..samples import SampleError
from .collator import PretrainingCollator
from .order import ShardOrder
from .samples import PretrainingSample, RejectedSample, TextEncoder
from .sets import PretrainingSet
from .shards import ShardReader


if TYPE_CHECKING:
    from ...models.flamingo.processing_flamingo import FlamingoProcessor

logger = logging.get_logger(__name__)


# so many samples that cannot be used, one behind the other, are a mistake and not an accident
_PATIENCE = 10_000


class PretrainingSkipCounter(SkipCounter):
    """Of samples and pictures of documents that are broken, and of samples that are not wanted."""

    reasons = (
        *("missing sample", "missing part", "unreadable text", "empty text", "unreadable image"),
        *("unreadable image in a document", "no image", "single image"),
    )


class StreamItem(NamedTuple):
    """What a data loader worker hands on: a batch of each set, which of which epoch, and how far it has read each."""

    batches: dict[str, dict[str, Any]]
    epoch: int
    number: int
    worker: int
    places: list[tuple[int, int]]


def num_batches(num_samples: int, batch_size: int, world_size: int = 1, num_workers: int = 0) -> int:
    """
    Batches of each process in an epoch: enough for all samples, and the same number from each data loader worker.

    1,000 samples in batches of 10 are 100; over 8 processes 13, and 16 with 4 workers each.
    """
    workers = max(1, num_workers)
    batches = -(-num_samples // (batch_size * world_size))
    return -(-batches // workers) * workers


class PretrainingStream(IterableDataset):
    """
    Batches of pretraining sets, read from shards at random places.

    Every process has the same number of full batches in an epoch, see `num_batches`: what is rejected or broken is
    replaced by what comes next. Samples are divided among processes and data loader workers such that each comes once,
    before any comes again, whatever the sizes of the shards; an epoch goes on where the last one ended. The order
    depends on `seed` and on the numbers of processes and workers alone.

    ```python
    stream = PretrainingStream(read_pretraining_sets("sets.yaml"), processor, num_workers=4)
    for batches in stream.track(stream.dataloader()):  # {"mmc4": {"input_ids": ..., ...}, "laion": ...}
        ...
    ```

    Args:
        sets: one or more. Where they have `num_samples`, these must make the same number of batches; sets without it
            follow. If none has, the set with the most samples is read once in an epoch, and the others begin again.
        processor: of the Flamingo or Otter to train.
        num_workers: of the data loader.
        shard: `(rank, number of processes)`.
        seed: of all random choices.
        block_size: samples that are shuffled at a time, see `ShardOrder`.

    Resuming: `state_dict()` holds how far each worker has read, of the batches that `track` has handed on;
    `load_state_dict` goes on with the batch behind them, to the bit, with the same numbers of processes and workers.
    An iteration that is left in the middle begins again where it began, unless a state is loaded.

    Raises:
        ValueError: for settings that do not go together; while iterating, if a set has no sample that can be used.
    """

    def __init__(
        self,
        sets: Sequence[PretrainingSet],
        processor: "FlamingoProcessor",
        *,
        num_workers: int = 0,
        shard: tuple[int, int] = (0, 1),
        seed: int = 42,
        block_size: int = 5000,
    ):
        self.sets = list(sets)
        names = [one.name for one in self.sets]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"A pretraining needs one or more sets of different names, got {names}.")
        if not 0 <= shard[0] < shard[1]:
            raise ValueError(f"shard must be (rank, number) with 0 <= rank < number, got {shard}.")
        self.num_workers = num_workers
        self.shard = shard
        self.seed = seed
        self.collator = PretrainingCollator(processor)
        self._encoder = TextEncoder(processor.tokenizer)
        self._orders = [self._order_of(one, block_size) for one in self.sets]
        self.num_batches = self._agree_on_batches()
        self._readers = [ShardReader(block_size + 2 * max(one.sizes)) for one in self.sets]
        self._skipped = PretrainingSkipCounter()
        # of the batches that were taken: epoch, their number, and each worker's round and place in each set
        self._epoch = self._taken = 0
        self._places = torch.zeros(self._workers, len(self.sets), 2, dtype=torch.int64)
        # where the next iteration begins. Shared with data loader workers, which may live through epochs, and only
        # written when none of them is at work: epoch, batches taken, batches to leave out; and places
        self._start = torch.zeros(3, dtype=torch.int64).share_memory_()
        self._start_places = self._places.clone().share_memory_()

    @property
    def _workers(self) -> int:
        return max(1, self.num_workers)

    def _order_of(self, one: PretrainingSet, block_size: int) -> ShardOrder:
        try:
            return ShardOrder(
                one.paths,
                one.sizes,
                num_readers=self.shard[1] * self._workers,
                seed=self.seed,
                block_size=block_size,
                resampled=one.resampled,
                shard_weights=one.shard_weights,
            )
        except ValueError as error:
            raise ValueError(f"{one.name}: {error}") from None

    def _agree_on_batches(self) -> int:
        asked = {one.name: one.num_samples for one in self.sets if one.num_samples is not None}
        counted = asked or {one.name: sum(one.sizes) for one in self.sets}
        batches = {
            one.name: num_batches(counted[one.name], one.batch_size, self.shard[1], self.num_workers)
            for one in self.sets
            if one.name in counted
        }
        if asked and len(set(batches.values())) > 1:
            raise ValueError(
                f"The sets differ in their batches of an epoch, {batches}: give them num_samples in proportion to "
                "their batch_size, or only one of them."
            )
        return max(batches.values())

    def __len__(self) -> int:
        """Batches of an epoch, of each set."""
        return self.num_batches

    @property
    def task_groups(self) -> list[str]:
        """The names of the sets."""
        return [one.name for one in self.sets]

    @property
    def skipped(self) -> dict[str, int]:
        """How many samples were left out so far, by reason, in all data loader workers."""
        return self._skipped.totals()

    def dataloader(self, **kwargs) -> DataLoader:
        """A data loader with the right number of workers, for `track`; `kwargs` are those of `DataLoader`."""
        return DataLoader(self, batch_size=None, num_workers=self.num_workers, collate_fn=_as_it_is, **kwargs)

    def track(self, items: Iterable[StreamItem]) -> Iterator[dict[str, dict[str, Any]]]:
        """The batches of what the data loader gives: set name -> batch. `state_dict` counts them as taken."""
        # not with the last batch itself: a worker without any may be so late that it has yet to see where to begin
        if self._taken == self.num_batches and self._start[:2].tolist() != [self._epoch, self._taken]:
            self._begin_here()
        for item in items:
            self._epoch, self._taken = item.epoch, item.number + 1
            self._places[item.worker] = torch.tensor(item.places)
            yield item.batches

    def _begin_here(self, left_out: int = 0) -> None:
        self._start[:] = torch.tensor([self._epoch, self._taken, left_out])
        self._start_places[:] = self._places

    def set_epoch(self, epoch: int) -> None:
        """
        Starts an epoch. The one behind a complete epoch goes on there; any other one begins where it would without
        samples that are left out.
        """
        if epoch == self._epoch and self._taken < self.num_batches:
            return
        if epoch != self._epoch + 1 or self._taken < self.num_batches:
            for worker in range(self._workers):
                for number, one in enumerate(self.sets):
                    samples = epoch * self.num_batches // self._workers * one.batch_size
                    place = self._orders[number].locate(self._reader_number(worker), samples)
                    self._places[worker, number] = torch.tensor(place)
        self._epoch, self._taken = epoch, 0
        self._begin_here()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, of this process: for JSON."""
        return {"epoch": self._epoch, "taken": self._taken, "places": self._places.tolist(), **self._layout()}

    def load_state_dict(self, state: Mapping[str, Any], *, leave_out: bool = False) -> None:
        """
        Goes on where `state_dict` was called.

        Args:
            leave_out: whoever iterates leaves out the batches that were taken of the epoch, as transformers' `Trainer`
                does: they are None, and nothing is read for them.

        Raises:
            ValueError: if sets, processes or workers are not those that the state was made with.
        """
        layout = self._layout()
        for key, value in layout.items():
            if state.get(key) != value:
                raise ValueError(
                    f"The state of the stream was saved with {key} {state.get(key)}, now it is {value}: go on with "
                    "the same, or start the data anew."
                )
        self._epoch, self._taken = state["epoch"], state["taken"]
        self._places[:] = torch.tensor(state["places"])
        self._begin_here(self._taken if leave_out else 0)

    def _layout(self) -> dict[str, Any]:
        return {
            "sets": [[one.name, one.batch_size, sum(one.sizes)] for one in self.sets],
            "num_batches": self.num_batches,
            "shard": list(self.shard),
            "num_workers": self.num_workers,
            "seed": self.seed,
        }

    def __iter__(self) -> Iterator[StreamItem | None]:
        info = get_worker_info()
        number, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if workers != self._workers:
            raise ValueError(f"The stream was made for {self._workers} workers, the data loader has {workers}.")
        epoch, taken, left_out = self._start.tolist()
        if taken == self.num_batches and not left_out:
            epoch, taken = epoch + 1, 0
        yield from itertools.repeat(None, len(range(number, left_out, workers)))
        # data loaders begin with worker 0, which takes the part of the one whose turn it is
        part = number if left_out else (number + taken) % workers
        first = taken + (part - taken) % workers
        readers = [self._samples(index, part) for index in range(len(self.sets))]
        for item in range(first, self.num_batches, workers):
            batches, places = {}, []
            for one, reader in zip(self.sets, readers, strict=True):
                batches[one.name], place = self._batch(one, reader)
                places.append(place)
            yield StreamItem(batches, epoch, item, part, places)

    def _batch(
        self, one: PretrainingSet, reader: Iterator[tuple[PretrainingSample, tuple[int, int]]]
    ) -> tuple[dict[str, Any], tuple[int, int]]:
        """The next samples of a set as a batch, and the place behind them. Their pictures live no longer than this."""
        samples, ends = zip(*itertools.islice(reader, one.batch_size), strict=True)
        batch = {
            **self.collator(samples, one.builder.label_all),
            "sample_ids": [sample.id for sample in samples],
            "task_groups": [one.name] * len(samples),
        }
        return batch, ends[-1]

    def _reader_number(self, worker: int) -> int:
        return self.shard[0] * self._workers + worker

    def _samples(self, number: int, worker: int) -> Iterator[tuple[PretrainingSample, tuple[int, int]]]:
        """The usable samples of a set for a worker, from its place on, each with the place behind it."""
        one, order, reader = self.sets[number], self._orders[number], self._reader_number(worker)
        in_vain = 0
        for shard, index, round, place in order.walk(reader, *self._start_places[worker, number].tolist()):
            generator = Random(f"{self.seed} {one.name} {reader if one.resampled else ''} {round} {shard} {index}")
            try:
                sample = self._read(number, shard, index, generator)
            except SampleError as error:
                if self._skipped.add(error.reason) == 1 and not isinstance(error, RejectedSample):
                    logger.warning(f"{one.name}: {error} It is skipped, as others like it ({error.reason}).")
                in_vain += 1
                if in_vain >= min(_PATIENCE, 20 * sum(one.sizes)):
                    raise ValueError(
                        f"{one.name}: {in_vain} samples in turn could not be used ({self.skipped}); the last: {error}"
                    ) from None
                continue
            in_vain = 0
            for _ in range(sample.num_unreadable):
                if self._skipped.add("unreadable image in a document") == 1:
                    logger.warning(
                        f"{one.name}: Document {sample.id!r} has a damaged picture, which is left out of it."
                    )
            yield sample, (round, place)

    def _read(self, number: int, shard: int, index: int, generator: Random) -> PretrainingSample:
        one, reader = self.sets[number], self._readers[number]
        path = one.paths[shard]
        try:
            samples = reader.index(path)
            if index >= len(samples):
                raise SampleError(f"{path} has {len(samples)} of its {one.sizes[shard]} samples.", "missing sample")
            sample = samples[index]
            parts = reader.read(path, sample)
        except (OSError, ValueError) as error:
            if isinstance(error, SampleError):
                raise
            raise SampleError(f"{path} cannot be read: {error}", "missing sample") from None
        return one.builder(f"{path.stem}/{sample.key}", parts, self._encoder, generator)


def _as_it_is(item):
    return item
