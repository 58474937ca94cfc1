"""One sample never ends a run that leaves out what it cannot use."""

import pytest
from collators_tiny import COLLATORS
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset

from otter_hf.data.mixture import SkipCounter
from otter_hf.data.samples import SampleError
from otter_hf.training.trainer import NamingCollator, _num_samples, _of_samples


class Data:
    """Of a mixture what a collator needs; sample 0 asks too much, 1 has no picture to speak of."""

    def __init__(self, on_error="raise", broken=()):
        self.on_error, self.counter, self.broken = on_error, SkipCounter(), broken

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index in self.broken:
            raise SampleError(
                f"Sample 'S{index}' needs image 'I', which cannot be decoded.", reason="unreadable image"
            )
        question = "what color? " * (200 if index == 0 else 1)
        picture = [Image.new("RGB", (20, 24), "red")]
        return {"id": f"S{index}", "turns": [(question, "red")], "media_per_turn": [1], "media": [picture]}

    def skip(self, error):
        self.counter.add(error.reason)


@pytest.mark.parametrize("on_overlong", ["skip", "truncate"])
@pytest.mark.parametrize("family", COLLATORS)
def test_a_question_that_is_too_long_alone_in_its_batch(family, on_overlong):
    data = Data()
    collator = NamingCollator(COLLATORS[family](max_length=200, on_overlong=on_overlong), dataset=data)
    batch = collator([data[0]])
    assert batch["sample_ids"] in (["S1"], ["S2"], ["S3"])
    assert (batch["labels"] != -100).any()
    assert collator([data[0]])["sample_ids"] == batch["sample_ids"]  # always the same
    assert sum(data.counter.totals().values()) == 2
    # processes gather as many rows from each in an evaluation
    together = collator([data[0], data[2]])
    assert together["sample_ids"] == [*batch["sample_ids"], "S2"]
    assert _num_samples(together) == 2
    assert sum(data.counter.totals().values()) == 3
    with pytest.raises(SampleError, match="'S0'.* max_length=200"):
        NamingCollator(COLLATORS[family](max_length=200), dataset=data)([data[0]])
    with pytest.raises(SampleError, match="Sample 'S0'"):  # of a report's sample answer, whose place no other takes
        NamingCollator(collator.collator)([data[0]])


def test_parts_of_mixtures():
    """Of torch's subsets and sums, whose mixtures count what they leave out, and of lists, which do not."""
    data, other = Data(), Data()
    data.task_groups, other.task_groups = ["A", "B", "A", "B"], ["C"] * 4
    part = ConcatDataset([Subset(data, [0, 2, 3]), other])
    assert _of_samples(part, "task_groups", "") == ["A", "A", "B", "C", "C", "C", "C"]
    assert _of_samples([1, 2], "task_groups", "") == ["", ""]
    for dataset in (part, [data[0], data[2]]):
        collator = NamingCollator(COLLATORS["otter"](max_length=200, on_overlong="truncate"), dataset=dataset)
        assert collator([data[0]])["sample_ids"][0] != "S0"
    assert sum(data.counter.totals().values()) >= 1


@pytest.mark.parametrize("family", COLLATORS)
def test_a_picture_that_the_collator_refuses(family, monkeypatch):
    """In a batch with others: these stay."""
    collator = COLLATORS[family]()

    class Picky:
        on_overlong = "error"

        def __call__(self, samples):
            if any(sample["id"] == "S1" for sample in samples):
                raise SampleError("Sample 'S1' has a picture of no pixels.", reason="bad image")
            return collator(samples)

    data = Data("skip")
    names = NamingCollator(Picky(), dataset=data)([data[1], data[2]])["sample_ids"]
    assert names[1] == "S2" and names[0] != "S1"
    assert data.counter.totals() == {"bad image": 1}
    both = ConcatDataset([[data[3]], data])  # a list, which does not say what to do
    assert NamingCollator(Picky(), dataset=both)([data[1], data[2]])["sample_ids"][1] == "S2"
    with pytest.raises(SampleError, match="'S1' has a picture of no pixels"):
        NamingCollator(Picky(), dataset=ConcatDataset([data, Data()]))([data[1], data[2]])
    with pytest.raises(SampleError, match="'S1' has a picture of no pixels"):
        NamingCollator(Picky(), dataset=Data())([data[1], data[2]])


def test_an_error_in_a_worker_is_one_sentence():
    data = Data(broken=[0, 1, 2, 3])
    with pytest.raises(SampleError) as raised:
        next(iter(DataLoader(data, num_workers=1, collate_fn=list)))
    assert str(raised.value) == "Sample 'S0' needs image 'I', which cannot be decoded."
