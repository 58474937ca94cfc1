"""Sources to a folder of parquet shards: streamed, and taken up again where a run ended."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from hashlib import blake2b
from threading import Event
from typing import Any

from PIL import Image
from transformers.utils import logging

from ...data.engine import Engine, run
from ...data.images import decode_image, image_bytes
from ...data.parquet_writer import write_images
from ...files import claim, copy_at_address, disk_full_told, move, remove, replacing, write_json
from ...made_from import state
from ...pictures import encode_image, read_image
from ...storage import AnyPath, forget_listings, is_remote, to_path
from .base import Converter, LeftOut, Source


logger = logging.get_logger(__name__)

# so many shards at least, as far as there are sources, for as many workers
_FEWEST_SHARDS = 32


@dataclass
class StoreReport:
    """What a conversion wrote and left out.

    `left_out` has an entry `{"source", "kind", "reason"}` for each source or picture that could not be used.
    """

    store: AnyPath
    sources: int = 0
    images: int = 0
    left_out: list[dict[str, str]] = field(default_factory=list)

    def kinds(self) -> dict[str, int]:
        """How many were left out, by kind."""
        return dict(Counter(entry["kind"] for entry in self.left_out))


def convert(
    converter: Converter,
    output: AnyPath,
    *,
    size: int | None = 224,
    encoding: str = "bytes",
    engine: Engine | None = None,
    sources_per_shard: int | None = None,
    retry: bool = False,
) -> StoreReport | None:
    """Writes the pictures of a public set as the image store `<output>/<short name>.parquet`, a folder of shards.

    Image ids are the original's. Other than there, pictures are not held in memory, dots in names are kept, videos
    are sampled by time, and what cannot be used is left out and reported in `<output>/<short name>_report.json`.

    The store gets its name when all shards are complete. A run that was stopped or killed is called again: it writes
    the shards that are not there, and with a warning those of which a file has changed since, and leaves the others as
    they are. What is in a shard does not depend on the engine.

    At an address (`s3://bucket/store`) the shards get their names one by one when all are complete, and no lock keeps
    a second call out.

    Args:
        output: folder for the store, also at an address.
        size: pictures become squares of this many pixels (Lanczos) in RGB, as PNG, which is the original's format.
            None: the bytes of pictures are kept as they are, and video frames become PNG in their own size.
        encoding: `"bytes"`, or `"base64"`, the text that the loader of 2023 needs.
        engine: where it runs, a shard at a time, which holds one picture and about a hundred encoded ones in memory;
            default: in 8 threads of this process.
        sources_per_shard: default: the converter's, or fewer, so that there are 32 shards; a conversion that was begun
            keeps its own.
        retry: also write the shards again in which something was left out.

    Returns:
        What is in the store, and what was left out; None if the rest was handed to Slurm.

    Raises:
        ValueError: if there are no sources, two have one name, or the folder holds another store or the beginning of
            another conversion: other sources or another size.
        OSError: if another process is writing the folder.
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be a number of pixels, or None for the original bytes, got {size}.")
    if sources_per_shard is not None and sources_per_shard < 1:
        raise ValueError(f"sources_per_shard must be at least 1, got {sources_per_shard}.")
    name = converter.short_name
    sources = _unique_sources(converter)
    default = min(converter.sources_per_shard, -(-len(sources) // _FEWEST_SHARDS))
    store = to_path(output) / f"{name}.parquet"
    progress = to_path(output) / f".{name}.progress"
    forget_listings(store)
    if store.exists() and not (progress / "conversion.json").exists():
        raise ValueError(f"{store} is there already: remove it, or choose another output.")
    progress.mkdir(parents=True, exist_ok=True)
    with nullcontext() if is_remote(store) else claim(progress / "lock", store), disk_full_told(store):
        asked = {"size": size, "encoding": encoding, "sources_per_shard": sources_per_shard}
        settings = _settings(progress / "conversion.json", name, sources, asked, default)
        shards = _Shards(converter, sources, settings, store, progress)
        return shards.write(engine or Engine(threads=8), retry)


def _unique_sources(converter: Converter) -> list[Source]:
    places: dict[str, Source] = {}
    try:
        for source in converter.sources():
            if source.name in places:
                raise ValueError(
                    f"{converter.short_name}: {source.place} and {places[source.name].place} would both be named "
                    f"{source.name!r}: rename one."
                )
            places[source.name] = source
    except (NotADirectoryError, IsADirectoryError) as error:
        kind = "a folder" if isinstance(error, IsADirectoryError) else "a file"
        raise ValueError(
            f"{converter.short_name} reads {converter.expects}; {error.filename or converter.image_path} is {kind}."
        ) from None
    if not places:
        raise ValueError(
            f"{converter.short_name} finds nothing in {converter.image_path}: it reads {converter.expects}."
        )
    return list(places.values())


def _settings(
    path: AnyPath, name: str, sources: list[Source], asked: dict[str, Any], default_per_shard: int
) -> dict[str, Any]:
    """The settings of the conversion that was begun here, which must be this one, or else those asked for."""
    names = "\0".join(source.name for source in sources).encode("utf-8", "surrogateescape")
    now = {
        **asked,
        "number of sources": len(sources),
        "digest of source names": blake2b(names, digest_size=16).hexdigest(),
    }
    if not path.exists():
        now["sources_per_shard"] = now["sources_per_shard"] or default_per_shard
        write_json(path, now)
        return now
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        now["sources_per_shard"] = now["sources_per_shard"] or begun["sources_per_shard"]
        begun = {key: begun[key] for key in now}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: remove {path.parent} and {name}.parquet to begin again.") from None
    for key, value in now.items():
        if begun[key] != value:
            raise ValueError(
                f"{path.parent} belongs to a conversion with {key}={begun[key]}, now it is {value}: use the same, or "
                f"remove it and {name}.parquet to begin again."
            )
    return begun


class _Shards:
    """The shards of one conversion."""

    def __init__(
        self, converter: Converter, sources: list[Source], settings: dict[str, Any], store: AnyPath, progress: AnyPath
    ):
        self.converter, self.store, self.progress = converter, store, progress
        self.incomplete_store = progress / store.name
        self.size, self.encoding = settings["size"], settings["encoding"]
        per_shard = settings["sources_per_shard"]
        self.shards = [sources[i : i + per_shard] for i in range(0, len(sources), per_shard)]

    def write(self, engine: Engine, retry: bool) -> StoreReport | None:
        pending = {f"part.{n}": n for n in range(len(self.shards)) if self._is_pending(n, retry)}
        done = len(self.shards) - len(pending)
        if done:
            logger.warning(f"{done} of {len(self.shards)} shards of {self.store} are complete and stay as they are.")
        if self.store.exists() and not is_remote(self.store):
            if not pending:
                return self.finish()
            os.replace(self.store, self.incomplete_store)
        for number in pending.values():
            # one to be replaced must not be found with the report of the new one
            remove(self._report_path(number))
            remove(self.incomplete_store / self._shard_name(number))
        name = f"Shards of {self.store.name}"
        done = run(self._write_shard, pending, self.progress, engine, name=name, finish=self.finish)
        return self.finish() if done else None

    def finish(self) -> StoreReport:
        """Gives the store its name, and writes the report."""
        if self.incomplete_store.exists():
            for path in self.incomplete_store.glob(".*.incomplete"):  # of workers that were killed
                remove(path)
            if is_remote(self.store):
                copy_at_address(self.incomplete_store, self.store)
                remove(self.incomplete_store)
            else:
                move(self.incomplete_store, self.store)
        return self.report(self.store.with_name(f"{self.converter.short_name}_report.json"))

    def _is_pending(self, number: int, retry: bool) -> bool:
        shards = (folder / self._shard_name(number) for folder in (self.incomplete_store, self.store))
        if not (self._report_path(number).exists() and any(shard.exists() for shard in shards)):
            return True
        try:
            report = json.loads(self._report_path(number).read_text(encoding="utf-8"))
        except ValueError:  # damaged
            return True
        before = report.get("made_from", {})
        # of a file that is gone, what was made of it stays
        changed = [file for file, now in self._made_from(number).items() if now and now != before.get(file)]
        if changed:
            more = f" (and {len(changed) - 1} more files of it)" if len(changed) > 1 else ""
            logger.warning(f"part.{number} of {self.store} is written again: {changed[0]} has changed since{more}.")
        return bool(changed) or retry and bool(report["left_out"])

    def _made_from(self, number: int) -> dict[str, Any]:
        """The states of the files that a shard is made of; links have none."""
        places = (source.place for source in self.shards[number])
        files = (file for place in places for file in (place if isinstance(place, tuple) else (place,)))
        return {str(file): state(file) for file in files if file is not None and not isinstance(file, str)}

    @staticmethod
    def _shard_name(number: int) -> str:
        return f"part.{number}.parquet"

    def _report_path(self, number: int) -> AnyPath:
        return self.progress / f"part.{number}.json"

    def _write_shard(self, number: int, stop: Event) -> dict[str, Any]:
        """Writes a shard, and gives its report."""
        left_out: list[dict[str, str]] = []
        made_from = self._made_from(number)
        with replacing(self.incomplete_store / self._shard_name(number), shared=True) as written:
            ids = write_images(written, self._pictures(self.shards[number], left_out, stop), self.encoding)
        return {"images": len(ids), "left_out": left_out, "made_from": made_from}

    def _pictures(
        self, sources: list[Source], left_out: list[dict[str, str]], stop: Event
    ) -> Iterator[tuple[str, bytes]]:
        def leave_out(what: str, error: LeftOut) -> None:
            left_out.append({"source": what, "kind": error.kind, "reason": str(error)})

        for source in sources:
            if stop.is_set():
                raise InterruptedError("the conversion was stopped")
            try:
                for picture_name, picture in self.converter.read(source):
                    try:
                        data = encode_picture(picture, self.size)
                    except LeftOut as error:
                        leave_out(picture_name, error)
                        continue
                    yield f"{self.converter.short_name}_IMG_{picture_name}", data
            except LeftOut as error:
                leave_out(source.name, error)

    def report(self, path: AnyPath) -> StoreReport:
        report = StoreReport(self.store, sources=sum(map(len, self.shards)))
        for number in range(len(self.shards)):
            shard = json.loads(self._report_path(number).read_text(encoding="utf-8"))
            report.images += shard["images"]
            report.left_out += shard["left_out"]
        write_json(path, {**vars(report), "store": str(self.store), "kinds": report.kinds()})
        return report


def encode_picture(picture: bytes | AnyPath | Image.Image, size: int | None) -> bytes:
    """The bytes to store: as they are, or for a `size` a square PNG in RGB, resized with Lanczos unless it fits.

    Raises:
        LeftOut: of kind `"missing"` if it is a file that is not there, `"damaged"` if it cannot be decoded.
    """
    try:
        data = picture if isinstance(picture, Image.Image) else image_bytes(picture)
    except FileNotFoundError:
        raise LeftOut("missing", f"there is no file {picture}") from None
    except OSError as error:
        raise LeftOut("damaged", f"{picture} cannot be read ({error.strerror})") from None
    if isinstance(data, bytes):
        try:
            decoded = decode_image(data)
        except OSError as error:
            raise LeftOut("damaged", str(error)) from None
    else:
        decoded = read_image(data)
    if size is None:
        return image_bytes(data)
    if decoded.size != (size, size):
        decoded = decoded.resize((size, size), Image.Resampling.LANCZOS)
    return encode_image(decoded)
