"""OBELICS as it is published, with its pictures as img2dataset downloaded them, to WebDataset shards."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...reading import parse_json, refuse_lfs_pointer
from ...storage import AnyPath, is_one_path, is_remote, to_path
from ..engine import Engine
from ..images import encode_base64
from ..parquet_pages import is_of_disk
from .converters import ShardCounts, convert_all, stem
from .samples import ImageTextPairs
from .shards import SampleParts, ShardReader, ShardWriter, expand_shards


_SUFFIXES = ImageTextPairs.picture_suffixes


def obelics_to_tar(
    files: str | Path | Sequence[str | Path],
    image_shards: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    max_samples: int = 30_000,
    max_bytes: float = 1e10,
    engine: Engine | None = None,
) -> ShardCounts | None:
    """
    Writes documents of OBELICS (https://huggingface.co/papers/2306.16527) together with their pictures, in the form of
    MMC4 that `mmc4_to_tar` writes.

    A row has the lists `images` and `texts`, of which one holds something at each place: the address of a picture or a
    text. A picture goes with the text behind it. OBELICS has no similarities: `matched_sim` is 1. A picture that was
    not downloaded is left out and counted, and so is a document without any.

    Args:
        files: parquet files, or folders of them.
        image_shards: of img2dataset, run over the addresses of `images`; see `expand_shards`. Pictures are found by
            the `url` in their `json` parts.
        output: folder for the shards, named `NAME.000.tar` after the parquet file, with `sizes.json`. A file whose
            shards are complete is not converted again, unless it, a shard of pictures or an argument has changed.
        max_samples, max_bytes: of a shard.
        engine: where it runs, a parquet file at a time; default: in this process.

    Returns:
        As `mmc4_to_tar`.

    Raises:
        ValueError: if a file does not exist, or has other columns.
    """
    files = [files] if is_one_path(files) else list(files)
    paths = [
        path for one in map(to_path, files) for path in (sorted(one.glob("*.parquet")) if one.is_dir() else [one])
    ]
    if not paths:
        raise ValueError(f"There is no parquet file in {', '.join(map(str, files))}.")
    shards = expand_shards(image_shards)
    convert = partial(
        _convert,
        pictures=_Pictures(shards),
        output=to_path(output),
        max_samples=max_samples,
        max_bytes=max_bytes,
    )
    jobs = [(path,) for path in paths]
    return convert_all(convert, jobs, output, engine, shards, max_samples=max_samples, max_bytes=max_bytes)


class _Pictures:
    """Pictures of img2dataset's shards by their addresses."""

    def __init__(self, shards: Sequence[Path]):
        self.reader = ShardReader(100_000)
        self.places: dict[str, tuple[Path, SampleParts]] = {}
        for shard in shards:
            for sample in self.reader.index(shard):
                if "json" not in sample.parts or not any(suffix in sample.parts for suffix in _SUFFIXES):
                    continue
                # the picture itself is read when it is needed
                meta = self.reader.read(shard, SampleParts(sample.key, {"json": sample.parts["json"]}))["json"]
                try:
                    url = parse_json(meta)["url"]
                except (ValueError, KeyError, TypeError):
                    continue
                picture = next((suffix, sample.parts[suffix]) for suffix in _SUFFIXES if suffix in sample.parts)
                if isinstance(url, str):
                    self.places[url] = shard, SampleParts(sample.key, dict([picture]))

    def get(self, url: str) -> bytes | None:
        if url not in self.places:
            return None
        (data,) = self.reader.read(*self.places[url]).values()
        return data


def _convert(job: tuple[AnyPath], pictures: _Pictures, output: AnyPath, max_samples: int, max_bytes: float):
    (path,) = job
    counts = ShardCounts()
    with ShardWriter(output, f"{stem(path)}.%03d.tar", max_samples, max_bytes) as writer:
        for number, row in enumerate(_rows(path)):
            if not _are_texts(row["images"]) or not _are_texts(row["texts"]):
                counts.left_out["document whose images or texts are no lists of texts"] += 1
                continue
            if len(row["images"] or []) != len(row["texts"] or []):
                counts.left_out["document whose images and texts differ in number"] += 1
                continue
            sentences, infos = _document(row, pictures, counts)
            if not infos:
                counts.left_out["document without pictures"] += 1
                continue
            document = {"text_list": sentences, "image_info": infos}
            data = json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")
            writer.write(f"{stem(path)}_{number:07d}", {"json": data})
            counts.samples += 1
            counts.images += len(infos)
    return counts, writer.sizes


def _are_texts(values: Any) -> bool:
    return values is None or (
        isinstance(values, list) and all(value is None or isinstance(value, str) for value in values)
    )


def _rows(path: str | Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    refuse_lfs_pointer(path)
    try:
        file = pq.ParquetFile(path.open("rb") if is_remote(path) else path)
        if missing := {"images", "texts"} - set(file.schema_arrow.names):
            raise ValueError(f"{path} has no column {' or '.join(sorted(missing))}, only {file.schema_arrow.names}.")
        for batch in file.iter_batches(256, columns=["images", "texts"]):
            yield from batch.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if is_of_disk(error):
            raise
        raise ValueError(f"{path} cannot be read as parquet: {error}.") from None


def _document(row: dict[str, Any], pictures: _Pictures, counts: ShardCounts) -> tuple[list[str], list[dict]]:
    """Texts, and the pictures in front of them."""
    sentences: list[str] = []
    infos: list[dict[str, Any]] = []
    for url, text in zip(row["images"] or [], row["texts"] or [], strict=True):
        if text is not None:
            sentences.append(text)
            continue
        data = None if url is None else pictures.get(url)
        if data is None:
            counts.left_out["picture that was not downloaded"] += 1
            continue
        infos.append(
            {
                "raw_url": url,
                "matched_text_index": len(sentences),
                "matched_sim": 1.0,
                "image_base64": encode_base64(data),
            }
        )
    if infos and infos[-1]["matched_text_index"] == len(sentences):
        sentences.append("")  # a picture at the end stands in front of nothing
    return sentences, infos
