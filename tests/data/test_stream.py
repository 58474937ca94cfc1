import dataclasses
import itertools
import json
from collections import Counter

import pytest
from torch.utils.data import DataLoader

from otter_hf.data.formats import write_mimicit
from otter_hf.data.mixture import MimicitMixture, MixtureEntry
from otter_hf.data.samples import SampleError, SampleOptions
from otter_hf.data.stream import StreamedMixture


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def entries(tmp_path, by_colour):
    """60 records about pictures and 20 of text."""
    names = itertools.cycle(by_colour)
    pictured = {f"p{i}": {"instruction": f"Q{i}", "answer": "A", "image_ids": [next(names)]} for i in range(60)}
    texts = {f"t{i}": {"instruction": f"Q{i}", "answer": "A"} for i in range(20)}
    p, t = write_mimicit(tmp_path, "P", pictured, by_colour), write_mimicit(tmp_path, "T", texts)
    return [
        MixtureEntry(
            "IMAGE_TEXT", "P", str(p.instructions_path), str(p.images_path), task_description=["x", "y", "z"]
        ),
        MixtureEntry("TEXT_ONLY", "T", str(t.instructions_path)),
    ]


def ids(samples):
    return [sample["id"] for sample in samples]


def test_an_epoch_has_every_sample_once_in_a_seeded_order(entries):
    stream = StreamedMixture(entries, buffer_size=16)
    first = ids(stream)
    everything = {f"p{i}" for i in range(60)} | {f"t{i}" for i in range(20)}
    assert len(first) == 80 and set(first) == everything
    assert ids(stream) == first == ids(StreamedMixture(entries, buffer_size=16))
    assert first != sorted(first)
    stream.set_epoch(1)
    assert set(ids(stream)) == everything and ids(stream) != first
    assert ids(StreamedMixture(entries, buffer_size=16, seed=1)) != first


def test_samples_are_those_of_the_indexed_mixture(entries):
    options = SampleOptions(use_task_description=True)
    indexed = {sample["id"]: sample for sample in MimicitMixture(entries, options)}
    descriptions = set()
    for sample in StreamedMixture(entries, options):
        other = indexed[sample["id"]]
        descriptions.add(sample.pop("task_description"))
        assert [[f.tobytes() for f in m] for m in sample.pop("media")] == [
            [f.tobytes() for f in m] for m in other["media"]
        ]
        assert sample == {key: other[key] for key in sample}
    assert descriptions == {"x", "y", "z", None}


def test_contexts_are_streamed_too(tmp_path, entries):
    config = tmp_path / "train.json"
    config.write_text(json.dumps({"t3": ["t1", "t2"], "t9": []}))
    entry = MixtureEntry("TEXT_ONLY", "T", entries[1].mimicit_path, train_config_path=str(config))
    samples = {sample["id"]: sample for sample in StreamedMixture([entry])}
    assert set(samples) == {"t3", "t9"}
    assert [question for question, _ in samples["t3"]["turns"]] == ["Q1", "Q2", "Q3"]


def test_num_samples_has_no_effect_and_is_told(entries, caplog):
    StreamedMixture([dataclasses.replace(entries[0], num_samples=5), entries[1]])
    assert "num_samples of P has no effect on a stream" in caplog.text


def test_weights(entries):
    drawn = Counter(id[0] for id in ids(StreamedMixture(entries, weights={"P": 3, "T": 1}))[:40])
    assert drawn["p"] > 1.5 * drawn["t"] > 0
    assert {id[0] for id in ids(StreamedMixture(entries, weights={"P": 0}))} == {"t"}
    for weights, message in (({"Q": 1}, "weights names"), ({"P": -1}, "negative"), ({"P": 0, "T": 0}, "at least one")):
        with pytest.raises(ValueError, match=message):
            StreamedMixture(entries, weights=weights)


@pytest.mark.parametrize("position", [0, 1, 37, 79, 80])
def test_resuming_goes_on_at_the_same_sample(entries, position):
    options = SampleOptions(use_task_description=True)
    whole = [
        (sample["id"], sample["task_description"]) for sample in StreamedMixture(entries, options, buffer_size=16)
    ]
    stream = StreamedMixture(entries, options, buffer_size=16)
    assert ids(itertools.islice(stream, position)) == [id for id, _ in whole[:position]]
    resumed = StreamedMixture(entries, options, buffer_size=16)
    resumed.load_state_dict(stream.state_dict())
    rest = [(sample["id"], sample["task_description"]) for sample in resumed]
    assert rest == whole[position:]
    resumed.set_epoch(1)
    assert len(ids(resumed)) == 80


def test_shards_and_workers_divide_the_stream(entries):
    whole = ids(StreamedMixture(entries, buffer_size=16))
    shards = [StreamedMixture(entries, buffer_size=16, shard=(rank, 2)) for rank in range(2)]
    assert [ids(shard) for shard in shards] == [whole[0::2], whole[1::2]]
    loader = DataLoader(shards[1], batch_size=None, num_workers=2)
    assert sorted(ids(loader)) == sorted(whole[1::2])
    shards[0].load_state_dict({"epoch": 0, "position": 11})
    assert sorted(ids(DataLoader(shards[0], batch_size=None, num_workers=2))) == sorted(whole[0::2][11:])


@pytest.mark.parametrize("workers, taken", [(0, 3), (2, 3), (2, 4)])
def test_workers_go_on_behind_whole_batches(entries, workers, taken):
    def loader(stream):
        return DataLoader(stream, batch_size=4, num_workers=workers, collate_fn=ids)

    whole = [*loader(StreamedMixture(entries, buffer_size=16))]
    stream = StreamedMixture(entries, buffer_size=16)
    stream.load_state_dict({"epoch": 0, "position": 4 * taken, "batch_size": 4})
    assert [*loader(stream)] == whole[taken:]


def test_one_percent_damaged_pictures(tmp_path, by_colour):
    names = list(by_colour)
    records = {f"r{i}": {"instruction": "Q", "answer": "A", "image_ids": [f"i{i}"]} for i in range(200)}
    images = {f"i{i}": b"damaged" if i % 100 == 7 else by_colour[names[i % 4]] for i in range(200)}
    files = write_mimicit(tmp_path, "D", records, images)
    entry = MixtureEntry("IMAGE_TEXT", "D", str(files.instructions_path), str(files.images_path))
    for make in (StreamedMixture, MimicitMixture):
        kept = make([entry], on_error="skip")
        assert not {"r7", "r107"} & set(ids(kept if make is StreamedMixture else (kept[i] for i in range(200))))
        assert kept.skipped == {"unreadable image": 2}
    with pytest.raises(SampleError, match="'r7|'r107"):
        ids(StreamedMixture([entry]))
    loader = DataLoader(StreamedMixture([entry], on_error="skip"), batch_size=None, num_workers=2)
    assert len(ids(loader)) == 198 and loader.dataset.skipped == {"unreadable image": 2}


@pytest.mark.parametrize("make", [StreamedMixture, MimicitMixture])
def test_a_transform_may_refuse_samples(entries, make):
    def refuse(sample, generator):
        if sample["id"] in ("p7", "t3"):
            raise SampleError(f"Sample {sample['id']!r} is not wanted.", reason="mine")
        return sample

    mixture = make(entries, on_error="skip", transform=refuse)
    kept = ids(mixture if make is StreamedMixture else (mixture[i] for i in range(80)))
    assert set(kept).isdisjoint({"p7", "t3"}) and len(set(kept)) == 78
    assert mixture.skipped == {"unusable": 2}
    with pytest.raises(SampleError, match="is not wanted"):
        strict = make(entries, transform=refuse)
        ids(strict if make is StreamedMixture else (strict[i] for i in range(80)))


@pytest.mark.parametrize("settings", [{"on_error": "x"}, {"buffer_size": 0}, {"shard": (2, 2)}])
def test_wrong_settings(entries, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        StreamedMixture(entries, **settings)
