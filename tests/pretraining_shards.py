"""Shards for the tests of pretraining: pictures of one colour, told apart by it; and streams of them."""

import io
import json
from pathlib import Path

from PIL import Image

from otter_hf.data.images import encode_base64
from otter_hf.data.pretraining import PretrainingSet, PretrainingStream, ShardWriter


def picture(number: int, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    """A picture whose red is `number`."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, 40, 200)).save(buffer, kind)
    return buffer.getvalue()


def padded(data: bytes, size: int) -> bytes:
    """A picture as a file of `size` bytes; decoders stop where it ends."""
    return data + bytes(size - len(data))


def write_pairs(folder: Path, shards: int = 4, per_shard: int = 10, first: int = 0, bad=()) -> list[int]:
    """`shards` tars with pictures 0, 1, 2, ... and captions `caption 0`, ...; returns the numbers of the good ones."""
    with ShardWriter(folder, "%04d.tar", max_samples=per_shard) as writer:
        for number in range(first, first + shards * per_shard):
            data = b"\xff\xd8damaged" if number in bad else picture(number)
            writer.write(f"{number:05d}", {"png": data, "txt": f" caption {number} ".encode()})
    return [number for number in range(first, first + shards * per_shard) if number not in bad]


def document(sentences: list[str], images: list[tuple[int, float, bytes]]) -> bytes:
    """An MMC4 document; images are `(matched_text_index, matched_sim, bytes)`."""
    info = [
        {
            "image_name": f"{i}.png",
            "matched_text_index": index,
            "matched_sim": similarity,
            "image_base64": encode_base64(data),
        }
        for i, (index, similarity, data) in enumerate(images)
    ]
    return json.dumps({"text_list": sentences, "image_info": info}).encode()


def write_documents(folder: Path, count: int = 24, per_shard: int = 12) -> None:
    """Documents of three sentences with two pictures; each third one has a single picture."""
    with ShardWriter(folder, "%04d.tar", max_samples=per_shard) as writer:
        for number in range(count):
            images = [(2, 0.5, padded(picture(number), 11_000)), (0, 0.4, padded(picture(number + 100), 11_000))]
            data = document([f"A{number}.", "B.", "C."], images[: 1 if number % 3 == 0 else 2])
            writer.write(f"d{number:05d}", {"json": data})


def make_stream(folder, processor, **kwargs) -> PretrainingStream:
    """A stream of one set of pairs, `cc3m`, in batches of two."""
    settings = {key: kwargs.pop(key) for key in ("num_samples", "resampled", "weights", "batch_size") if key in kwargs}
    sets = [PretrainingSet("cc3m", "pairs", folder, **{"batch_size": 2, **settings}, options={"mirror": 0.5})]
    return PretrainingStream(sets, processor, **kwargs)


def run(stream: PretrainingStream, **kwargs) -> list[dict]:
    """The batches of an epoch."""
    return list(stream.track(stream.dataloader(**kwargs)))


def ids(batches: list[dict], name: str = "cc3m") -> list[str]:
    """The samples of a set's batches."""
    return [id for batch in batches for id in batch[name]["sample_ids"]]
