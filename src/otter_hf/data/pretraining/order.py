"""The order in which one reader of many goes through shards: by lot, and exact to the sample."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random


@dataclass(frozen=True)
class ShardOrder:
    """
    Which samples of which shards each of `num_readers` readers takes, and in which order, for ever.

    The samples come in rounds. A round has each sample of each shard once: shards are shuffled, the row of their
    samples is cut into one part for each reader, of equal length but for one sample, and a reader shuffles its part
    block by block. With `resampled`, each reader has rounds of its own, of whole shards that are drawn with
    replacement. All of it depends on `seed` alone, and any place is found without going through those before it.

    Args:
        paths: the shards.
        sizes: their numbers of samples.
        num_readers: over all processes and their data loader workers.
        seed: of all random choices.
        block_size: samples that are shuffled at a time. Only their places are held in memory, not their bytes.
        resampled: draw shards with replacement.
        shard_weights: with `resampled`, the chance of each shard; only ratios count. By default all are equal.

    Raises:
        ValueError: if there are fewer samples than readers, and for weights that cannot be.
    """

    paths: Sequence[Path]
    sizes: Sequence[int]
    num_readers: int = 1
    seed: int = 42
    block_size: int = 5000
    resampled: bool = False
    shard_weights: Sequence[float] | None = None

    def __post_init__(self):
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}.")
        if self.shard_weights is not None and not self.resampled:
            raise ValueError("Weights need resampling, since otherwise each sample comes once: set resampled.")
        total = sum(self.sizes)
        if not total or (total < self.num_readers and not self.resampled):
            raise ValueError(
                f"{len(self.paths)} shards hold {total} samples for {self.num_readers} readers (processes times data "
                "loader workers): give each at least one."
            )

    def spans(self, reader: int, round: int) -> list[tuple[int, int, int]]:
        """The parts of shards that a reader takes in a round, in their order: `(shard, first sample, behind last)`."""
        if self.resampled:
            generator = Random(f"{self.seed} {round} {reader}")
            usable = [shard for shard, size in enumerate(self.sizes) if size]
            weights = None if self.shard_weights is None else [self.shard_weights[shard] for shard in usable]
            drawn = generator.choices(usable, weights, k=max(1, len(usable) // self.num_readers))
            return [(shard, 0, self.sizes[shard]) for shard in drawn]
        shards = list(range(len(self.sizes)))
        Random(f"{self.seed} {round}").shuffle(shards)
        ends = list(accumulate(self.sizes[shard] for shard in shards))
        start = ends[-1] * reader // self.num_readers
        stop = ends[-1] * (reader + 1) // self.num_readers
        spans = []
        for place in range(bisect.bisect_right(ends, start), len(shards)):
            first = ends[place] - self.sizes[shards[place]]
            if first >= stop:
                break
            if ends[place] > first:
                spans.append((shards[place], max(0, start - first), min(stop, ends[place]) - first))
        return spans

    def walk(self, reader: int, round: int, place: int) -> Iterator[tuple[int, int, int, int]]:
        """
        The samples of a reader from a place of a round on, without end.

        Yields:
            `(shard, sample of the shard, round, place)`, the last two being where to go on behind the sample.
        """
        while True:
            spans = self.spans(reader, round)
            ends = list(accumulate(stop - first for _, first, stop in spans))
            while place < ends[-1]:
                block = place // self.block_size
                start = block * self.block_size
                samples = _places(spans, ends, start, min(start + self.block_size, ends[-1]))
                Random(f"{self.seed} {round} {reader} {block}").shuffle(samples)
                for shard, sample in samples[place - start :]:
                    place += 1
                    yield shard, sample, round, place
            round, place = round + 1, 0

    def locate(self, reader: int, taken: int) -> tuple[int, int]:
        """The round and place behind the first `taken` samples of a reader."""
        round = 0
        while taken >= (length := self.length(reader, round)):
            taken, round = taken - length, round + 1
        return round, taken

    def length(self, reader: int, round: int) -> int:
        """How many samples a round has for a reader."""
        if self.resampled:
            return sum(stop - first for _, first, stop in self.spans(reader, round))
        total = sum(self.sizes)
        return total * (reader + 1) // self.num_readers - total * reader // self.num_readers


def _places(spans, ends: list[int], start: int, stop: int) -> list[tuple[int, int]]:
    """`(shard, sample)` of the positions from `start` to `stop` of spans put one behind the other."""
    places = []
    for (shard, first, behind), end in zip(spans, ends, strict=True):
        begin = end - (behind - first)  # position of the span's first sample
        low, high = max(start, begin), min(stop, end)
        places += [(shard, first + position - begin) for position in range(low, high)]
    return places
