"""
Samples per second of `PretrainingStream`, against plain reading of the tar files and against webdataset.

    python benchmarks/pretraining_stream.py [--repeats 5]

Makes shards of 256-pixel JPEG pictures with captions, as img2dataset writes them, and of MMC4 documents; takes two to
three minutes. Results go to results/pretraining_stream.json, the story is in pretraining_stream.md.
"""

import argparse
import base64
import importlib.util
import io
import json
import os
import tarfile
import tempfile
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import torch
from _common import compare, report
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from otter_hf import FlamingoProcessor
from otter_hf.data.images import encode_base64
from otter_hf.data.pretraining import PretrainingSet, PretrainingStream, ShardWriter, interleave, write_sizes


SHARDS, PER_SHARD, BATCH = 4, 100, 20
TEXT = "a picture of some things that stand beside each other on a table, number"


def make_processor() -> FlamingoProcessor:
    """CLIP's pictures of 224 pixels, and a byte-level BPE with four letters to a token, as language models have."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
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


def plain_pairs(folder: Path):
    """Member after member, each tar from its start: captions and pictures, not shuffled."""
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
    """As `plain_pairs`: sentences, the sentence of each picture, and the pictures."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                document = json.loads(tar.extractfile(member).read())
                images = [
                    Image.open(io.BytesIO(base64.b64decode(info["image_base64"]))).convert("RGB")
                    for info in document["image_info"]
                ]
                yield document["text_list"], [info["matched_text_index"] for info in document["image_info"]], images


def webdataset_pairs(folder: Path):
    import webdataset

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    return webdataset.WebDataset(shards, shardshuffle=100).shuffle(1000).decode("pilrgb").to_tuple("txt", "jpg")


def elsewhere(function):
    """`function`, each time with its memory at other addresses: they make decoding up to a third faster or slower."""
    generator = Random(0)

    def run():
        occupied = [bytearray(generator.randrange(120_000)) for _ in range(generator.randrange(32))]
        del occupied[::2]
        return function()

    return run


def rows(folder: Path, repeats: int) -> list[dict]:
    """A row per workload, ours and the peer in turn. Each run of either tells how many pictures it decoded."""
    processor = make_processor()
    pairs, documents = folder / "pairs", folder / "documents"
    total = SHARDS * PER_SHARD
    results = []

    def stream(kind: str, folder: Path, **options) -> PretrainingStream:
        return PretrainingStream([PretrainingSet(folder.name, kind, folder, BATCH, options=options)], processor)

    def samples(kind: str, folder: Path, count: int, **options):
        # a new stream each time, which has to read the headers of its shards
        return lambda: sum(
            len(sample.images) for sample, _ in islice(stream(kind, folder, **options)._samples(0, 0), count)
        )

    def add(workload: str, ours, peer, peer_is: str, count: int, turns: int = 1) -> None:
        if ours() != peer():
            raise RuntimeError(f"{workload}: the two decode different numbers of pictures.")
        both = elsewhere(ours), elsewhere(peer)
        results.append(compare(workload, *both, repeats, turns, samples=count, peer_is=peer_is))

    def count_pairs(source) -> int:
        return sum(1 for _ in source)

    def tokenize_pairs() -> int:
        count = 0
        for caption, _ in plain_pairs(pairs):
            processor.tokenizer(f"<image>{caption}<|endofchunk|></s>")
            count += 1
        return count

    def count_documents() -> int:
        return sum(len(images) for *_, images in plain_documents(documents))

    def tokenize_documents() -> int:
        count = 0
        for sentences, places, images in plain_documents(documents):
            processor.tokenizer(interleave(sentences, places, "</s>"))
            count += len(images)
        return count

    ours, workload = samples("pairs", pairs, total, mirror=0), "pairs: shuffled, read, decoded, tokenized"
    peer_is = "tar files in their order, read, decoded"
    add(workload, ours, lambda: count_pairs(plain_pairs(pairs)), f"{peer_is}, not tokenized", total, turns=10)
    add(workload, ours, tokenize_pairs, f"{peer_is}, tokenized", total, turns=10)
    if importlib.util.find_spec("webdataset"):
        from importlib.metadata import version

        shuffling = f"webdataset {version('webdataset')}, shuffled (buffer 1000), read, decoded, not tokenized"
        add(workload, ours, lambda: count_pairs(webdataset_pairs(pairs)), shuffling, total, turns=10)
    ours = samples("interleaved", documents, total // 4)
    workload = "documents of 3 pictures: shuffled, read, decoded, tokenized"
    add(workload, ours, count_documents, f"{peer_is}, not tokenized", total // 4, turns=10)
    add(workload, ours, tokenize_documents, f"{peer_is}, tokenized", total // 4, turns=10)

    def plain_batches() -> int:
        source, count = plain_pairs(pairs), 0
        while batch := list(islice(source, BATCH)):
            texts = [f"<image>{caption}<|endofchunk|></s>" for caption, _ in batch]
            inputs = processor(text=texts, images=[[image] for _, image in batch], return_tensors="pt")
            count += len(inputs["pixel_values"])
        return count

    def stream_batches() -> int:
        whole = stream("pairs", pairs)
        return sum(len(batches["pairs"]["pixel_values"]) for batches in whole.track(whole.dataloader()))

    add(f"pairs: batches of {BATCH} for the model", stream_batches, plain_batches, f"{peer_is}, processor", total)

    state = {**stream("pairs", pairs).state_dict(), "taken": total // BATCH // 2, "places": [[[0, total // 2]]]}

    def resume() -> int:
        half = stream("pairs", pairs)
        half.load_state_dict(state)
        return len(next(half.track(half.dataloader()))["pairs"]["pixel_values"])

    def read_again() -> int:
        source = plain_pairs(pairs)
        for _ in islice(source, total // 2):
            pass
        return count_pairs(islice(source, BATCH))

    add("first batch after half an epoch", resume, read_again, "reading and decoding the first half again", BATCH)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(prefix="pretraining_stream") as folder:
        make_shards(Path(folder))
        report("pretraining_stream", "plain tar reading and decoding", rows(Path(folder), arguments.repeats))
