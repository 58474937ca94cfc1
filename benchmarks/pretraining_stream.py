"""
Samples per second of `PretrainingStream`, against plain reading of the tar files and against webdataset.

    python benchmarks/pretraining_stream.py [--repeats 5]

Makes shards of 256-pixel JPEG pictures with captions, as img2dataset writes them, and of MMC4 documents; takes about a
minute. Results go to results/pretraining_stream.json, the story is in pretraining_stream.md.
"""

import argparse
import base64
import importlib.util
import io
import json
import tarfile
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from _common import compare, report
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from otter_hf import FlamingoProcessor
from otter_hf.data.images import encode_base64
from otter_hf.data.pretraining import PretrainingSet, PretrainingStream, ShardWriter, write_sizes


SHARDS, PER_SHARD, BATCH = 4, 100, 20
TEXT = "a picture of some things that stand beside each other on a table, number"


def make_processor() -> FlamingoProcessor:
    """CLIP's pictures of 224 pixels, and a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    return FlamingoProcessor(CLIPImageProcessorPil(), FlamingoProcessor.prepare_tokenizer(tokenizer))


def make_jpegs(count: int) -> list[bytes]:
    """`count` pictures of 256 pixels, about 20 kB each."""
    generator = np.random.default_rng(0)
    jpegs = []
    for _ in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8))
        image = np.asarray(coarse.resize((256, 256), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(image + generator.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=85)
        jpegs.append(buffer.getvalue())
    return jpegs


def make_shards(folder: Path) -> None:
    jpegs = make_jpegs(100)
    total = SHARDS * PER_SHARD
    with ShardWriter(folder / "pairs", "%05d.tar", max_samples=PER_SHARD) as writer:
        for number in range(total):
            metadata = json.dumps({"key": f"{number:09d}", "url": "http://example.com", "width": 256}).encode()
            jpeg = jpegs[number % len(jpegs)]
            writer.write(f"{number:09d}", {"jpg": jpeg, "txt": f"{TEXT} {number}".encode(), "json": metadata})
    write_sizes(folder / "pairs", writer.sizes)
    with ShardWriter(folder / "documents", "%05d.tar", max_samples=PER_SHARD // 4) as writer:
        for number in range(total // 4):
            info = [
                {
                    "image_name": f"{i}.jpg",
                    "matched_text_index": 2 * i,
                    "matched_sim": 0.4,
                    "image_base64": encode_base64(jpegs[(number + i) % len(jpegs)]),
                }
                for i in range(3)
            ]
            document = {"text_list": [f"{TEXT} {i}." for i in range(8)], "image_info": info}
            writer.write(f"{number:09d}", {"json": json.dumps(document).encode()})
    write_sizes(folder / "documents", writer.sizes)


def plain_samples(folder: Path):
    """Member after member, each tar from its start: no shuffling, no text."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            caption = image = None
            for member in tar:
                data = tar.extractfile(member).read()
                if member.name.endswith(".txt"):
                    caption = data.decode()
                elif member.name.endswith(".jpg"):
                    image = Image.open(io.BytesIO(data)).convert("RGB")
                else:
                    yield caption, image


def plain_documents(folder: Path):
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                document = json.loads(tar.extractfile(member).read())
                yield (
                    document["text_list"],
                    [
                        Image.open(io.BytesIO(base64.b64decode(info["image_base64"]))).convert("RGB")
                        for info in document["image_info"]
                    ],
                )


def webdataset_samples(folder: Path):
    import webdataset

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    return webdataset.WebDataset(shards, shardshuffle=100).shuffle(1000).decode("pilrgb").to_tuple("txt", "jpg")


def rows(folder: Path, repeats: int) -> list[dict]:
    """A row per workload, ours and the peer in turn."""
    processor = make_processor()
    total = SHARDS * PER_SHARD
    results = []

    def stream(kind: str, name: str, **options) -> PretrainingStream:
        one = PretrainingSet(kind, kind, folder / name, batch_size=BATCH, options=options)
        return PretrainingStream([one], processor)

    def samples(kind: str, name: str, count: int, **options):
        # a new stream each time, which has to read the headers of its shards
        return lambda: [None for _ in islice(stream(kind, name, **options)._samples(0, 0), count)]

    def add(workload: str, ours, peer, peer_is: str, count: int) -> None:
        results.append(compare(workload, ours, peer, repeats, samples=count, peer_is=peer_is))

    def plain_tokenized():
        for caption, _ in plain_samples(folder / "pairs"):
            processor.tokenizer(f"<image>{caption}<|endofchunk|></s>")

    ours = samples("pairs", "pairs", total, mirror=0)
    workload = "pairs: shuffled, read, decoded, tokenized"
    add(workload, ours, plain_tokenized, "tar files in their order, read, decoded, tokenized", total)
    add(
        workload,
        ours,
        lambda: sum(1 for _ in plain_samples(folder / "pairs")),
        "tar files in their order, read, decoded, not tokenized",
        total,
    )
    if importlib.util.find_spec("webdataset"):
        from importlib.metadata import version

        add(
            workload,
            ours,
            lambda: sum(1 for _ in webdataset_samples(folder / "pairs")),
            f"webdataset {version('webdataset')}, shuffled (buffer 1000), read, decoded, not tokenized",
            total,
        )
    add(
        "documents of 3 pictures: shuffled, read, decoded, tokenized",
        samples("interleaved", "documents", total // 4),
        lambda: sum(1 for _ in plain_documents(folder / "documents")),
        "tar files in their order, read and decoded",
        total // 4,
    )

    def plain_batches():
        source = plain_samples(folder / "pairs")
        while batch := list(islice(source, BATCH)):
            texts = [f"<image>{caption}<|endofchunk|></s>" for caption, _ in batch]
            processor(text=texts, images=[[image] for _, image in batch], return_tensors="pt")

    def stream_batches():
        whole = stream("pairs", "pairs")
        return sum(1 for _ in whole.track(whole.dataloader()))

    add(
        f"pairs: batches of {BATCH} for the model",
        stream_batches,
        plain_batches,
        "tar files in their order, read, decoded, processor",
        total,
    )

    state = {**stream("pairs", "pairs").state_dict(), "taken": total // BATCH // 2, "places": [[[0, total // 2]]]}

    def resume():
        half = stream("pairs", "pairs")
        half.load_state_dict(state)
        next(half.track(half.dataloader()))

    def read_again():
        for _ in islice(plain_samples(folder / "pairs"), total // 2 + BATCH):
            pass

    add("first batch after half an epoch", resume, read_again, "reading and decoding the first half again", BATCH)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="pretraining_stream") as folder:
        make_shards(Path(folder))
        report("pretraining_stream", "plain tar reading and decoding", rows(Path(folder), arguments.repeats))
