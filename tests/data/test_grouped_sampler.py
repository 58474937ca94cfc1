import itertools
from collections import Counter

import pytest
import torch

from otter_hf.data.mixture import GroupedSampler


def test_grouped_batches_cover_everything_in_proportion():
    groups = ["a"] * 640 + ["b"] * 250 + ["c"] * 3
    sampler = GroupedSampler(groups, batch_size=8)
    order = list(sampler)
    assert sorted(order) == list(range(893)) and len(sampler) == 893
    batches = [order[i : i + 8] for i in range(0, len(order), 8)]
    whole = [batch for batch in batches if len({groups[i] for i in batch}) == 1 and len(batch) == 8]
    assert Counter(groups[batch[0]] for batch in whole) == {"a": 80, "b": 31}
    # groups alternate: the first half of the epoch has its share of each
    first_half = Counter(groups[batch[0]] for batch in whole[:55])
    assert 30 < first_half["a"] < 50
    # every rank draws the same order, every epoch another one
    assert list(GroupedSampler(groups, batch_size=8)) == order
    sampler.set_epoch(1)
    assert list(sampler) != order and sorted(sampler) == list(range(893))


def test_groups_are_drawn_in_proportion_to_their_sizes():
    sizes = {"a": 500, "b": 300, "c": 200}
    groups = [name for name, size in sizes.items() for _ in range(size)]
    sampler, drawn = GroupedSampler(groups, batch_size=10), Counter()
    for epoch in range(1000):  # ten draws of each
        sampler.set_epoch(epoch)
        order = list(itertools.islice(sampler, 0, 100, 10))
        drawn.update(groups[index] for index in order)
    expected = {name: 10_000 * size / 1000 for name, size in sizes.items()}
    chi_squared = sum((drawn[name] - expected[name]) ** 2 / expected[name] for name in sizes)
    assert chi_squared < 13.8  # exceeded once in a thousand times, with two degrees of freedom


def test_ranks_work_on_one_group_in_each_step():
    accelerate = pytest.importorskip("accelerate.data_loader")
    groups = ["a"] * 40 + ["b"] * 24
    order = GroupedSampler(groups, batch_size=2 * 4)
    steps = []
    for rank in range(2):
        batches = torch.utils.data.BatchSampler(order, batch_size=4, drop_last=True)
        steps.append(list(accelerate.BatchSamplerShard(batches, num_processes=2, process_index=rank)))
    for first, second in zip(*steps, strict=True):
        assert len({groups[i] for i in (*first, *second)}) == 1


def test_batches_of_about_the_same_length():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 1000, (2000,), generator=generator).numpy()
    groups = ["a" if i % 4 else "b" for i in range(2000)]
    sampler = GroupedSampler(groups, 8, seed=3, lengths=lengths)
    order = list(sampler)
    assert sorted(order) == list(range(2000))
    assert order == list(GroupedSampler(groups, 8, seed=3, lengths=lengths))
    batches = [order[i : i + 8] for i in range(0, 2000 // 8 * 8, 8)]
    spread = [lengths[batch].max() - lengths[batch].min() for batch in batches]
    assert sum(spread) / len(spread) < 50
    assert sum(len({groups[i] for i in batch}) > 1 for batch in batches) <= 1
    means = [lengths[batch].mean() for batch in batches[:100]]
    assert means != sorted(means)  # long and short ones come in any order
    sampler.set_epoch(1)
    assert list(sampler) != order
    with pytest.raises(ValueError, match="3 lengths for 2 samples"):
        GroupedSampler(["a", "b"], 1, lengths=[1, 2, 3])
