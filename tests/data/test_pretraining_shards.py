"""Shards: the files, their order among readers, and the YAML that names them."""

import io
import tarfile

import pytest
from pretraining_shards import ids, make_stream, picture, run, write_documents, write_pairs

from otter_hf.data.pretraining import (
    PretrainingSet,
    ShardOrder,
    ShardWriter,
    expand_shards,
    read_pretraining_sets,
    shard_sizes,
)
from otter_hf.data.pretraining.shards import ShardReader, index_shard


# --- files ---


def test_names_of_shards(tmp_path):
    for name in ("08", "09", "10", "x"):
        (tmp_path / f"{name}.tar").touch()
    (tmp_path / "08.parquet").touch()

    def expand(*names):
        return [path.name for path in expand_shards([tmp_path / name for name in names])]

    assert expand("{08..10}.tar") == ["08.tar", "09.tar", "10.tar"]
    assert expand("") == ["08.tar", "09.tar", "10.tar", "x.tar"]
    assert expand("0*.tar") == ["08.tar", "09.tar"]
    assert expand("x.tar", "{09..09}.tar") == ["x.tar", "09.tar"]


def test_sizes_are_taken_from_what_stands_beside_the_shards(tmp_path):
    write_pairs(tmp_path, shards=2, per_shard=3)
    paths = expand_shards(tmp_path)
    assert shard_sizes(paths) == [3, 3]
    (tmp_path / "0001_stats.json").write_text('{"successes": 7, "failed_to_download": 2}')  # as img2dataset
    assert shard_sizes(paths) == [3, 7]
    (tmp_path / "sizes.json").write_text('{"0000.tar": 5, "0001.tar": 6}')
    assert shard_sizes(paths) == [5, 6]
    (tmp_path / "sizes.json").write_text('{"0000.tar": "five"}')
    with pytest.raises(ValueError, match="sizes.json does not hold numbers"):
        shard_sizes(paths)
    (tmp_path / "alone").mkdir()
    (tmp_path / "0000.tar").rename(tmp_path / "alone" / "0000.tar")
    (tmp_path / "alone" / "__len__").write_text("9")
    assert shard_sizes(expand_shards(tmp_path / "alone")) == [9]


def test_output_of_img2dataset_is_read_as_it_is(tmp_path, tiny_processor):
    """Its layout: tar with key.jpg, key.txt, key.json; a parquet and a _stats.json beside it."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as tar:
            for number in range(3):
                key = f"{shard:05d}{number:04d}"
                (tmp_path / key).mkdir()
                for suffix, data in (("jpg", picture(number, kind="JPEG")), ("txt", b"words"), ("json", b"{}")):
                    file = tmp_path / key / f"{key}.{suffix}"
                    file.write_bytes(data)
                    tar.add(file, file.name)
        (tmp_path / f"{shard:05d}_stats.json").write_text('{"count": 5, "successes": 3}')
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    stream = make_stream(tmp_path, tiny_processor, batch_size=3)
    assert sorted(ids(run(stream))) == [f"{s:05d}/{s:05d}{n:04d}" for s in range(2) for n in range(3)]


def test_members_are_grouped_as_webdataset_does(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("d/1.JPG", "d/1.txt", "d/2.seg.png", "d/2.txt", "e/2.txt", "e/2.txt", ".hidden", "readme"):
            tar.addfile(tarfile.TarInfo(name))
    grouped = [(key, sorted(parts)) for key, parts in index_shard(tmp_path / "a.tar")]
    assert grouped == [
        ("d/1", ["jpg", "txt"]),
        ("d/2", ["seg.png", "txt"]),
        ("e/2", ["txt"]),
        ("e/2", ["txt"]),
    ]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["short", "n" * 90 + "/" + "m" * 60, "é", "x" * 160])
def test_tar_files_of_any_dialect(tmp_path, format, name):
    if format == tarfile.USTAR_FORMAT and len(name) == 160:
        name = "x" * 80
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number in range(3):
            for suffix, data in (("txt", b"words" * number), ("png", picture(number))):
                info = tarfile.TarInfo(f"{name}{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    samples = index_shard(tmp_path / "a.tar")
    assert [sample.key for sample in samples] == [f"{name}{number}" for number in range(3)]
    reader = ShardReader(10)
    for number, sample in enumerate(samples):
        assert reader.read(tmp_path / "a.tar", sample) == {"txt": b"words" * number, "png": picture(number)}


def test_files_that_are_no_shards(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"nothing" * 500)
    with pytest.raises(ValueError, match="a.tar is no plain tar file"):
        PretrainingSet("a", "pairs", tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x.txt"))
    with pytest.raises(ValueError, match="a.tar is no plain tar file"):
        PretrainingSet("a", "pairs", tmp_path)


def test_writer_leaves_only_complete_shards(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "%02d.tar", max_samples=2) as writer:
        for number in range(3):
            writer.write(f"{number}", {"txt": b"x"})
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["00.tar"] and writer.sizes == {"00.tar": 2}
    with ShardWriter(tmp_path, "b%d.tar", max_bytes=10) as writer:
        for number in range(3):
            writer.write(f"{number}", {"txt": b"x" * 6})
    assert writer.sizes == {"b0.tar": 2, "b1.tar": 1}
    assert len(index_shard(tmp_path / "b0.tar")) == 2


def test_each_shard_is_indexed_once_in_a_round(tmp_path, tiny_processor, monkeypatch):
    """Samples are read at random from all shards of a block: their indices must stay at hand."""
    write_pairs(tmp_path, shards=20, per_shard=3)
    stream = make_stream(tmp_path, tiny_processor)
    opened = []
    monkeypatch.setattr(
        "otter_hf.data.pretraining.shards.index_shard", lambda path: opened.append(path) or index_shard(path)
    )
    assert len(set(ids(run(stream)))) == 60
    assert len(opened) == 20


# --- order ---


@pytest.mark.parametrize(("sizes", "readers"), [([7, 1, 0, 12, 3], 4), ([5], 5), ([1000, 3, 40], 7), ([4] * 25, 3)])
def test_readers_share_any_shards_equally(sizes, readers):
    order = ShardOrder([f"{i}" for i in range(len(sizes))], sizes, num_readers=readers, block_size=6)
    for round in range(3):
        seen = []
        for reader in range(readers):
            length = order.length(reader, round)
            assert length in (sum(sizes) // readers, sum(sizes) // readers + 1)
            walk = order.walk(reader, round, 0)
            seen += [next(walk)[:2] for _ in range(length)]
            # behind them the next round begins
            assert next(walk)[2:] == (round + 1, 1)
        assert sorted(seen) == [(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)]


def test_any_place_of_the_order_is_found_directly():
    order = ShardOrder(["a", "b", "c"], [30, 10, 25], num_readers=2, block_size=8)
    walk = order.walk(1, 0, 0)
    steps = [next(walk) for _ in range(150)]
    for taken in (0, 1, 7, 8, 31, 32, 33, 64, 100, 149):
        round, place = order.locate(1, taken)
        assert next(order.walk(1, round, place)) == steps[taken]
        if taken:
            assert next(order.walk(1, *steps[taken - 1][2:])) == steps[taken]


# --- the YAML of sets ---


def test_sets_from_yaml(tmp_path):
    write_pairs(tmp_path / "pairs")
    write_documents(tmp_path / "docs")
    path = tmp_path / "sets.yaml"
    path.write_text(
        "mmc4: {kind: interleaved, shards: 'docs/{0000..0001}.tar', num_samples: 10, min_similarity: 0.25}\n"
        "laion: {kind: pairs, shards: [pairs, pairs/0001.tar], loss_weight: 0.2, resampled: true, weights: [2, 1]}\n"
    )
    mmc4, laion = read_pretraining_sets(path)
    assert (mmc4.name, mmc4.sizes, mmc4.loss_weight, mmc4.builder.min_similarity) == ("mmc4", [12, 12], 1.0, 0.25)
    assert (laion.sizes, laion.loss_weight, laion.batch_size) == ([10] * 5, 0.2, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must map names of sets"),
        ("a: 3", "a must map keys"),
        ("a: {shards: pairs}", "a lacks 'kind'"),
        ("a: {kind: pears, shards: pairs}", "a: kind must be 'pairs' or 'interleaved', got 'pears'"),
        ("a: {kind: pairs, shards: gone.tar}", "gone.tar.*does not exist"),
        ("a: {kind: pairs, shards: 'gone/*.tar'}", "gone/\\*.tar.*no tar file"),
        ("a: {kind: pairs, shards: 'pairs/{0000..0009}.tar'}", "0004.tar does not exist"),
        (
            "a: {kind: pairs, shards: pairs, batchsize: 3}",
            "'batchsize' is no setting of pairs; did you mean 'batch_size'",
        ),
        ("a: {kind: pairs, shards: pairs, min_similarity: 0.3}", "'min_similarity' is no setting of pairs"),
        ("a: {kind: pairs, shards: pairs, loss_weight: 0}", "loss_weight must be above 0"),
        ("a: {kind: pairs, shards: pairs, batch_size: 0}", "batch_size must be a positive number"),
        ("a: {kind: pairs, shards: pairs, weights: [1]}", "weights need resampled: true"),
        ("a: {kind: pairs, shards: pairs, resampled: true, weights: [1, 2]}", "weights must be 1 numbers"),
        ("a: {", "cannot be parsed"),
    ],
)
def test_mistakes_in_the_yaml(tmp_path, text, message):
    write_pairs(tmp_path / "pairs")
    (tmp_path / "sets.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pretraining_sets(tmp_path / "sets.yaml")
    with pytest.raises(ValueError, match="does not exist"):
        read_pretraining_sets(tmp_path / "gone.yaml")
