"""Streams of shards: who reads what, in which order, how many batches, and going on in the middle."""

import json
import time
from collections import Counter

import pytest
import torch
from pretraining_shards import ids, make_stream, run, write_documents, write_pairs

from otter_hf.data.pretraining import PretrainingSet, PretrainingStream, num_batches
from otter_hf.data.pretraining.shards import index_shard


@pytest.fixture
def pairs(tmp_path):
    write_pairs(tmp_path / "pairs")
    return tmp_path / "pairs"


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for ours, theirs in zip(batches, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            for key, value in ours[name].items():
                if torch.is_tensor(value):
                    assert torch.equal(value, theirs[name][key]), key
                else:
                    assert value == theirs[name][key]


# --- who reads what ---


def test_two_ranks_with_two_workers_are_disjoint_and_complete(pairs, tiny_processor):
    streams = [make_stream(pairs, tiny_processor, num_workers=2, shard=(rank, 2), batch_size=5) for rank in range(2)]
    read = [ids(run(stream)) for stream in streams]
    assert [len(of_rank) for of_rank in read] == [20, 20]
    assert len({*read[0], *read[1]}) == 40
    # each worker's batches: worker 0 makes those at even places
    of_workers = [set(of_rank[5 * k : 5 * k + 5]) for of_rank in read for k in range(4)]
    assert sum(map(len, of_workers)) == 40
    # the next epoch has them all again, in another order
    again = [ids(run(stream)) for stream in streams]
    assert len({*again[0], *again[1]}) == 40 and again != read


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_disjoint_and_complete_with_a_resume_on_each_rank(pairs, tiny_processor, taken):
    everything = []
    for rank in range(2):
        stream = make_stream(pairs, tiny_processor, num_workers=2, shard=(rank, 2), batch_size=5)
        batches = stream.track(stream.dataloader())
        before = [next(batches) for _ in range(taken)]
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = make_stream(pairs, tiny_processor, num_workers=2, shard=(rank, 2), batch_size=5)
        resumed.load_state_dict(state)
        after = run(resumed)
        assert len(before) + len(after) == 4
        everything += ids(before) + ids(after)
        whole = run(make_stream(pairs, tiny_processor, num_workers=2, shard=(rank, 2), batch_size=5))
        assert_equal(before + after, whole)
    assert sorted(everything) == sorted(set(everything)) and len(everything) == 40


def test_a_worker_that_starts_late_and_has_no_batch_left(pairs, tiny_processor):
    stream = make_stream(pairs, tiny_processor, num_workers=2, batch_size=10)
    batches = stream.track(stream.dataloader())
    before = [next(batches) for _ in range(3)]
    stream.load_state_dict(stream.state_dict())
    # the last batch is here before worker 1 has begun
    after = list(stream.track(stream.dataloader(worker_init_fn=lambda worker: time.sleep(worker))))
    assert len(before) + len(after) == 4
    following = list(stream.track(stream.dataloader()))
    assert len(following) == 4 and sorted(ids(following)) == sorted(ids(before) + ids(after))


def test_shards_and_samples_are_shuffled_by_the_seed(pairs, tiny_processor):
    first = ids(run(make_stream(pairs, tiny_processor)))
    assert first == ids(run(make_stream(pairs, tiny_processor)))
    assert first != ids(run(make_stream(pairs, tiny_processor, seed=1)))
    assert sorted(first) == sorted(set(first)) and first != sorted(first)
    # a block at a time: with blocks of one sample the order in a shard stays, and shards come in turn
    in_turn = ids(run(make_stream(pairs, tiny_processor, block_size=1)))
    shards = [id.split("/")[0] for id in in_turn]
    assert [shards[i] for i in range(0, 40, 10)] != ["0000", "0001", "0002", "0003"]
    assert all(in_turn[i : i + 10] == sorted(in_turn[i : i + 10]) for i in range(0, 40, 10))


# --- batches and epochs ---


@pytest.mark.parametrize(
    ("samples", "batch", "world", "workers", "expected"),
    [
        (1000, 10, 1, 0, 100),
        (1000, 10, 1, 4, 100),
        (1000, 10, 8, 0, 13),
        (1000, 10, 8, 4, 16),
        (1001, 10, 1, 0, 101),
        (1, 8, 1, 2, 2),
    ],
)
def test_number_of_batches(samples, batch, world, workers, expected):
    assert num_batches(samples, batch, world, workers) == expected


@pytest.mark.parametrize(("num_samples", "workers", "expected"), [(None, 0, 20), (13, 0, 7), (13, 2, 8), (100, 0, 50)])
def test_epochs_have_exactly_that_many_full_batches(pairs, tiny_processor, num_samples, workers, expected):
    stream = make_stream(pairs, tiny_processor, num_samples=num_samples, num_workers=workers)
    for _ in range(2):
        batches = run(stream)
        assert len(batches) == len(stream) == expected
        assert all(len(batch["cc3m"]["sample_ids"]) == 2 for batch in batches)


def test_short_epochs_go_through_all_samples_before_any_comes_again(pairs, tiny_processor):
    stream = make_stream(pairs, tiny_processor, num_samples=8, num_workers=2)
    counts = [Counter(ids(run(stream))) for _ in range(10)]
    assert all(sum(counter.values()) == 8 for counter in counts)
    assert set(sum(counts[:5], Counter()).values()) == {1} and set(sum(counts, Counter()).values()) == {2}


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_go_on_in_the_next_epoch_and_after_a_jump(pairs, tiny_processor, persistent):
    stream = make_stream(pairs, tiny_processor, num_samples=10, num_workers=2, batch_size=1)
    loader = stream.dataloader(persistent_workers=persistent)
    epochs = [list(stream.track(loader)) for _ in range(3)]
    assert stream.state_dict()["epoch"] == 2
    # an epoch is also reached directly, and left in the middle
    stream.set_epoch(1)
    batches = stream.track(loader)
    assert_equal([next(batches) for _ in range(3)], epochs[1][:3])
    batches.close()
    stream.load_state_dict(stream.state_dict())
    assert_equal(list(stream.track(loader)), epochs[1][3:])
    stream.set_epoch(2)
    assert_equal(list(stream.track(loader)), epochs[2])
    fresh = make_stream(pairs, tiny_processor, num_samples=10, num_workers=2, batch_size=1)
    fresh.set_epoch(2)
    assert_equal(run(fresh), epochs[2])


def test_batches_that_someone_else_leaves_out_are_not_read(pairs, tiny_processor):
    whole = run(make_stream(pairs, tiny_processor, num_workers=2))
    stream = make_stream(pairs, tiny_processor, num_workers=2)
    batches = stream.track(stream.dataloader())
    for _ in range(5):
        next(batches)
    resumed = make_stream(pairs, tiny_processor, num_workers=2)
    resumed.load_state_dict(stream.state_dict(), leave_out=True)
    items = list(resumed.dataloader())
    assert items[:5] == [None] * 5
    assert_equal(list(resumed.track(items[5:])), whole[5:])


def test_state_of_other_readers_is_refused(pairs, tiny_processor):
    state = make_stream(pairs, tiny_processor, num_workers=2).state_dict()
    for change in ({"num_workers": 1}, {"shard": (0, 2), "num_workers": 2}, {"batch_size": 4, "num_workers": 2}):
        with pytest.raises(ValueError, match="state of the stream was saved with"):
            make_stream(pairs, tiny_processor, **change).load_state_dict(state)
    with pytest.raises(ValueError, match="made for 1 workers, the data loader has 2"):
        list(torch.utils.data.DataLoader(make_stream(pairs, tiny_processor), batch_size=None, num_workers=2))


# --- resampling ---


def test_resampling_with_weights(tmp_path, tiny_processor):
    # sources of other sizes, in shards of other sizes
    write_pairs(tmp_path / "a", shards=4, per_shard=10)
    write_pairs(tmp_path / "b", shards=2, per_shard=3, first=100)
    stream = make_stream(
        [tmp_path / "a", tmp_path / "b"], tiny_processor, resampled=True, weights=[1, 3], num_samples=4000
    )
    order = stream._orders[0]
    walk = order.walk(0, 0, 0)
    drawn = Counter("a" if next(walk)[0] < 4 else "b" for _ in range(4000))
    assert drawn["b"] / drawn["a"] == pytest.approx(3, rel=0.2)
    # without weights each shard has the same chance, whole shards are read
    plain = make_stream([tmp_path / "a", tmp_path / "b"], tiny_processor, resampled=True)
    walk = plain._orders[0].walk(0, 0, 0)
    drawn = Counter("a" if next(walk)[0] < 4 else "b" for _ in range(4000))
    assert drawn["a"] / drawn["b"] == pytest.approx(40 / 6, rel=0.2)


def test_resampling_differs_between_readers_and_goes_on_to_the_bit(pairs, tiny_processor):
    def make(rank):
        return make_stream(pairs, tiny_processor, resampled=True, num_samples=60, num_workers=2, shard=(rank, 2))

    whole = [run(make(rank)) for rank in range(2)]
    assert [len(batches) for batches in whole] == [16, 16]
    assert ids(whole[0]) != ids(whole[1])
    # fewer shards than readers do not matter, and some samples come twice
    assert max(Counter(ids(whole[0])).values()) > 1
    stream = make(1)
    batches = stream.track(stream.dataloader())
    before = [next(batches) for _ in range(7)]
    resumed = make(1)
    resumed.load_state_dict(stream.state_dict())
    assert_equal(before + run(resumed), whole[1])


# --- what is damaged or rejected ---


def test_damaged_samples_are_replaced_and_counted(tmp_path, tiny_processor, caplog):
    good = write_pairs(tmp_path / "pairs", bad=(3, 17, 18))
    stream = make_stream(tmp_path / "pairs", tiny_processor, num_workers=2, batch_size=1)
    batches = run(stream)
    assert len(batches) == 40
    assert set(ids(batches)) <= {f"{number // 10:04d}/{number:05d}" for number in good}
    assert len(set(ids(batches))) == 37
    # one epoch, and the start of the next round
    assert 3 <= stream.skipped["unreadable image"] <= 6


def test_going_on_between_damaged_and_rejected_samples_is_bit_equal(tmp_path, tiny_processor):
    write_pairs(tmp_path / "pairs", bad=(3, 17, 18))
    write_documents(tmp_path / "docs")

    def make():
        sets = [
            PretrainingSet("mmc4", "interleaved", tmp_path / "docs", batch_size=2, num_samples=12),
            PretrainingSet("laion", "pairs", tmp_path / "pairs", batch_size=3),
        ]
        return PretrainingStream(sets, tiny_processor, num_workers=2)

    whole = run(make())
    assert len(whole) == 6 and all(list(batches) == ["mmc4", "laion"] for batches in whole)
    first = make()
    run(first)
    second = run(first)
    for taken in (3, 6):
        stream = make()
        batches = stream.track(stream.dataloader())
        before = [next(batches) for _ in range(taken)]
        resumed = make()
        resumed.load_state_dict(stream.state_dict())
        assert_equal(before + run(resumed), whole if taken < 6 else whole + second)


def test_truncated_shards_lose_their_end_and_no_more(pairs, tiny_processor, caplog):
    path = pairs / "0002.tar"
    sizes = [len(index_shard(path)) for path in sorted(pairs.glob("*.tar"))]
    (pairs / "sizes.json").write_text(json.dumps({f"{i:04d}.tar": size for i, size in enumerate(sizes)}))
    whole = path.read_bytes()
    end = index_shard(path)[6].parts["png"][0] + 20  # within the picture of sample 6
    path.write_bytes(whole[:end])
    stream = make_stream(pairs, tiny_processor, batch_size=1)
    read = ids(run(stream))
    lost = {f"0002/{number:05d}" for number in range(26, 30)}
    assert set(read) == {f"{n // 10:04d}/{n:05d}" for n in range(40)} - lost
    assert stream.skipped["missing sample"] >= 4


def test_a_set_without_any_usable_sample_ends_with_one_sentence(tmp_path, tiny_processor):
    write_pairs(tmp_path / "pairs", shards=1, bad=range(10))
    stream = make_stream(tmp_path / "pairs", tiny_processor)
    with pytest.raises(ValueError, match="cc3m: 200 samples in turn could not be used .*unreadable image"):
        run(stream)
    stream = PretrainingStream([PretrainingSet("m", "interleaved", tmp_path / "pairs")], tiny_processor)
    with pytest.raises(ValueError, match="has no json part"):
        run(stream)


# --- several sets ---


def test_sets_must_agree_on_their_batches(tmp_path, tiny_processor):
    for name in "ab":
        write_pairs(tmp_path / name, shards=1)

    def make(a, b):
        return PretrainingStream(
            [
                PretrainingSet("a", "pairs", tmp_path / "a", batch_size=2, num_samples=a),
                PretrainingSet("b", "pairs", tmp_path / "b", batch_size=4, num_samples=b),
            ],
            tiny_processor,
        )

    assert len(make(20, 40)) == len(make(19, 40)) == 10
    assert len(make(20, None)) == 10 and len(make(None, 20)) == 5
    # none says: the longest is read once, the other begins again
    assert len(make(None, None)) == 5 and len(ids(run(make(None, None)), "b")) == 20
    with pytest.raises(ValueError, match=r"differ in their batches .*'a': 10, 'b': 5"):
        make(20, 20)
    with pytest.raises(ValueError, match="different names"):
        PretrainingStream([], tiny_processor)


def test_more_readers_than_samples(pairs, tiny_processor):
    with pytest.raises(ValueError, match="cc3m: 4 shards hold 40 samples for 64 readers"):
        make_stream(pairs, tiny_processor, num_workers=32, shard=(0, 2))
