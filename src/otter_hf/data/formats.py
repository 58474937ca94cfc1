"""MIMIC-IT files: instructions, train configs and image stores, read to memory-mapped tables and written.

The formats are those of the MIMIC-IT paper, https://huggingface.co/papers/2306.05425, as the Otter repository reads
them. Ids are opaque strings.
"""

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from PIL import Image
from transformers.utils import logging

from ..files import claim, disk_full_told, move
from ..progress import with_progress
from ..prompts import IMAGE_TOKEN
from ..reading import whole_characters
from ..storage import AnyPath, to_path
from .arrow_cache import IdIndex, cached_arrow_file, open_arrow_file
from .image_store import ImageStore
from .json_stream import iter_json_object
from .parquet_writer import kept_for_next_run, move_image_parts, write_image_parts


logger = logging.get_logger(__name__)

_RECORD = {
    "id": Value("string"),
    "instruction": Value("string"),
    "answer": Value("string"),
    "image_ids": List(Value("string")),
    # of how many of the images each medium is made, where some are films given as their frames; otherwise empty
    "frames_per_medium": List(Value("int32")),
    # whether each `<image>` in the instruction is the place of one of the images, in their order
    "images_in_text": Value("bool"),
    "system": Value("string"),
}
# A row is a training example; `context` holds its earlier turns or in-context examples, oldest first.
FEATURES = Features({**_RECORD, "rel_ins_ids": List(Value("string")), "context": List(_RECORD)})
_SCHEMA = FEATURES.arrow_schema
_BATCH_ROWS = 1000


def load_mimicit(
    instructions_path: AnyPath,
    images_path: AnyPath | Sequence[AnyPath] = (),
    train_config_path: AnyPath | None = None,
    *,
    populate_rel_ins: bool = False,
    on_error: str = "raise",
    cache_dir: str | Path | None = None,
) -> tuple[Dataset, ImageStore]:
    """Reads one MIMIC-IT dataset.

    Args:
        instructions_path: the `*_instructions.json` file: `{"meta": ..., "data": {id: record}}`; this and the others
            also at addresses.
        images_path: image store, see `ImageStore`; none for text-only data.
        train_config_path: the `*_train.json` file: `{id: [context ids]}`. Its keys are the training examples, in its
            order, and its values their context.
        populate_rel_ins: without a train config, take the context of each record from its `rel_ins_ids`. Without
            both, every record is an example without context.
        on_error: what to do with ids in contexts or in the train config that no record has: `"raise"`, or `"skip"`
            them with a warning that counts them.
        cache_dir: where Arrow copies are kept; default: `otter_hf` in the cache of the `datasets` library.

    Returns:
        The examples as a memory-mapped `Dataset` with the columns `FEATURES`, and the images. An `instruction` or
        `answer` that is missing or not text is `None`; it matters only when it is used.

    Raises:
        ValueError: naming the file and the record, if something is malformed, an id is there twice, or (by default)
            a context is unknown.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}.")
    instructions_path = to_path(instructions_path)
    records = _Records(instructions_path, cache_dir)
    if train_config_path is not None:
        arrow = cached_arrow_file(
            [instructions_path, train_config_path],
            "examples",
            lambda: records.build_examples(_read_train_config(train_config_path), train_config_path, on_error),
            cache_dir,
            on_error=on_error,
        )
    elif populate_rel_ins:
        arrow = cached_arrow_file(
            [instructions_path],
            "examples-rel-ins",
            lambda: records.build_examples(records.related(), instructions_path, on_error),
            cache_dir,
            on_error=on_error,
        )
    else:
        arrow = records.arrow
    return Dataset.from_file(str(arrow)), ImageStore(images_path, cache_dir)


def stream_records(path: AnyPath) -> Iterator[dict[str, Any]]:
    """The records of an instructions file as rows with the columns `FEATURES`, without context, read as they go.

    Raises:
        ValueError: naming the file and the record, if something is malformed.
    """
    for id, record in iter_json_object(path, "data"):
        if not isinstance(record, dict):
            raise ValueError(f"Record {id!r} of {path} must be an object, got {_shown(record)}.")
        image_ids = _id_list(record.get("image_ids"), "image_ids of record %r of %s", id, path)
        yield {
            "id": id,
            "instruction": _text_or_none(record.get("instruction")),
            "answer": _text_or_none(record.get("answer")),
            "image_ids": image_ids,
            "frames_per_medium": frames_per_medium(id, record, len(image_ids)),
            "images_in_text": _images_in_text(id, record),
            "system": _system(id, record),
            "rel_ins_ids": _id_list(record.get("rel_ins_ids"), "rel_ins_ids of record %r of %s", id, path),
            "context": [],
        }


def _build_records(path: AnyPath) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    def batches():
        rows = []
        for row in with_progress(stream_records(path), desc=f"Reading {path.name}", unit=" records"):
            rows.append(row)
            if len(rows) == _BATCH_ROWS:
                yield _record_batch(rows)
                rows = []
        yield _record_batch(rows)

    return _SCHEMA, batches()


def _record_batch(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    columns = [pa.array([row[field.name] for row in rows], field.type) for field in _SCHEMA]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


class _Records:
    """The records of an instructions file with an index, to look up contexts."""

    def __init__(self, path: AnyPath, cache_dir: str | Path | None):
        self.path = path
        self.arrow = cached_arrow_file([path], "records", lambda: _build_records(path), cache_dir)
        self.dataset = Dataset.from_file(str(self.arrow)).with_format("arrow")
        ids = open_arrow_file(self.arrow)["id"]
        self.index = IdIndex(cached_arrow_file([self.arrow], "index", lambda: IdIndex.build(ids), cache_dir), ids)
        for first, _ in self.index.duplicates():
            raise ValueError(f"Record {ids[first].as_py()!r} is in {self.path} twice: ids must be unique.")

    def related(self) -> Iterator[tuple[str, list[str]]]:
        for table in self.dataset.select_columns(["id", "rel_ins_ids"]).iter(_BATCH_ROWS):
            yield from zip(table["id"].to_pylist(), table["rel_ins_ids"].to_pylist(), strict=True)

    def build_examples(
        self, contexts: Iterable[tuple[str, list[str]]], source: str | Path, on_error: str
    ) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """Schema and batches of the examples `(id, context ids)`, for `cached_arrow_file`."""

        def batches():
            rows, context_rows, lengths = [], [], []
            unknown = own = 0
            for id, context in with_progress(contexts, desc=f"Resolving {Path(source).name}", unit=" examples"):
                found = [self.index.find(other) for other in (id, *context)]
                if -1 in found:
                    missing = (id, *context)[found.index(-1)]
                    where = "is a key" if found[0] == -1 else f"is in the context of {id!r}"
                    message = f"Id {missing!r} {where} in {source}, but {self.path} has no such record"
                    if on_error == "raise":
                        raise ValueError(f"{message}: correct the id, or pass on_error='skip' to leave it out.")
                    if not unknown:
                        logger.warning(f"{message}; it is left out, as are others like it.")
                    unknown += found.count(-1)
                    if found[0] == -1:
                        continue
                own += id in context
                rows.append(found[0])
                context_rows.extend(row for row in found[1:] if row != -1)
                lengths.append(sum(row != -1 for row in found[1:]))
                if len(rows) == _BATCH_ROWS:
                    yield from self._example_batches(rows, context_rows, lengths)
                    rows, context_rows, lengths = [], [], []
            yield from self._example_batches(rows, context_rows, lengths)
            if own:
                logger.warning(f"{own} examples in {source} have themselves, with their answers, as context.")
            if unknown:
                logger.warning(f"{unknown} ids in {source} are no records of {self.path}: they were left out.")

        return _SCHEMA, batches()

    def _example_batches(self, rows: list[int], context_rows: list[int], lengths: list[int]):
        if not rows:
            return []
        columns = {name: _one_chunk(self.dataset[rows][name]) for name in FEATURES if name != "context"}
        context_schema = Features(_RECORD).arrow_schema
        if context_rows:
            context = self.dataset[context_rows].select(list(_RECORD))
            fields = [_one_chunk(context[name]) for name in _RECORD]
        else:
            fields = [pa.array([], field.type) for field in context_schema]
        structs = pa.StructArray.from_arrays(fields, names=list(_RECORD))
        offsets = pa.array(np.cumsum([0, *lengths]), pa.int32())
        columns["context"] = pa.ListArray.from_arrays(offsets, structs)
        return [pa.RecordBatch.from_arrays([columns[name] for name in FEATURES], schema=_SCHEMA)]


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks)


def _read_train_config(path: str | Path) -> Iterator[tuple[str, list[str]]]:
    for id, context in iter_json_object(path):
        yield id, _id_list(context, "context of %r in %s", id, path)


def _text_or_none(value: Any) -> str | None:
    return whole_characters(value) if isinstance(value, str) else None


def _id_list(value: Any, what: str, *names: Any) -> list[str]:
    ids = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
        raise ValueError(f"The {what % names} must be a list of strings, a string or null, got {_shown(value)}.")
    return [_text_or_none(id) for id in ids]


def _images_in_text(id: str, record: Mapping[str, Any]) -> bool:
    value = record.get("images_in_text") or False
    if not isinstance(value, bool):
        raise ValueError(f"The images_in_text of record {id!r} must be true or false, got {_shown(value)}.")
    return value


def frames_per_medium(id: str, record: Mapping[str, Any], num_images: int) -> list[int]:
    """Of how many of its images each medium of a record is made; empty where it does not say. ValueError if wrong."""
    counts = record.get("frames_per_medium") or []
    if not isinstance(counts, list) or not all(type(count) is int and count > 0 for count in counts):
        raise ValueError(f"The frames_per_medium of record {id!r} must be a list of numbers, got {_shown(counts)}.")
    if counts and sum(counts) != num_images:
        raise ValueError(
            f"The frames_per_medium of record {id!r} are {sum(counts)} images, of which it has {num_images}."
        )
    return counts


def _system(id: str, record: Mapping[str, Any]) -> str | None:
    value = record.get("system")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"The system text of record {id!r} must be a string or null, got {_shown(value)}.")
    return _text_or_none(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


class MimicitFiles(NamedTuple):
    """The files of one dataset, in the order of `load_mimicit`'s arguments; `None` for those not written."""

    instructions_path: Path
    images_path: Path | tuple[()] = ()
    train_config_path: Path | None = None


def write_mimicit(
    folder: str | Path,
    name: str,
    records: Mapping[str, Mapping[str, Any]] | Iterable[tuple[str, Mapping[str, Any]]],
    images: ImageStore | Mapping[str, Any] | Iterable[tuple[str, bytes | str | Path | Image.Image]] | None = None,
    train_config: Mapping[str, Sequence[str]] | None = None,
    meta: Mapping[str, Any] | None = None,
    *,
    image_encoding: str = "bytes",
) -> MimicitFiles:
    """Writes one MIMIC-IT dataset: `<name>_instructions.json`, `<name>.parquet` and `<name>_train.json` in `folder`.

    The files get their names only when all are complete, so nothing half-written is ever read, and an existing dataset
    stays as it was if this one turns out broken. A call that was killed or interrupted can be repeated: it goes on
    behind the last complete 256 MB of pictures, which it finds in the hidden folder `.<name>.parquet.parts`.

    Args:
        records: `id -> {"instruction", "answer", "image_ids", "rel_ins_ids", "frames_per_medium", "images_in_text",
            "system"}`, as a mapping or in pairs. All but the texts are optional, `image_ids` may also be one string or
            `None`. With `frames_per_medium` so many of the images, one behind the other, are a film; with
            `images_in_text` the instruction holds an `<image>` for each medium, where it stands; `system` is a line in
            front of the prompt.
        images: `image id -> picture`, as a mapping or in pairs, read one by one. Bytes and files are kept as they
            are, PIL pictures become PNG. More than 256 MB of them make `<name>.parquet` a folder of parts. No parquet
            file is written for an `ImageStore`, which the records then refer to, and for None, text-only data.
        train_config: `id -> context ids`; none: no train config is written.
        meta: what to put under `meta`, by default a format version.
        image_encoding: see `otter_hf.data.parquet_writer.write_images`.

    Returns:
        The paths, such that `load_mimicit(*write_mimicit(...))` reads the dataset back.

    Raises:
        ValueError: naming the record, if its text is missing or it names an image or record that is not there; if
            `name` is none of a file.
    """
    if name != Path(name).name:
        raise ValueError(f"The name of a dataset becomes part of file names, got {name!r}: leave out the folder.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    new_images = images is not None and not isinstance(images, ImageStore)
    files = MimicitFiles(
        folder / f"{name}_instructions.json",
        folder / f"{name}.parquet" if new_images else (),
        None if train_config is None else folder / f"{name}_train.json",
    )
    with ExitStack() as cleanup:
        cleanup.enter_context(claim(folder / f".{name}.lock", folder / name))
        cleanup.enter_context(disk_full_told(folder / name))
        texts = [path for path in (files.train_config_path, files.instructions_path) if path]
        temporary = {path: path.with_name(f".{path.name}.incomplete") for path in texts}
        for path in temporary.values():
            cleanup.callback(path.unlink, missing_ok=True)
        image_ids = images or ()
        if new_images:
            parts = folder / f".{name}.parquet.parts"
            cleanup.enter_context(kept_for_next_run(parts))
            image_ids = write_image_parts(parts, _pairs(images), image_encoding)
        ids, related = _write_records(
            temporary[files.instructions_path], _pairs(records), image_ids, meta or {"version": "0.0.1"}
        )
        for id, context in (train_config or {}).items():
            related.extend((id, other) for other in (id, *context))
        for id, other in related:
            if other not in ids:
                raise ValueError(
                    f"Record {id!r} has {other!r} as context, which is no record: add it or remove the id."
                )
        if train_config is not None:
            with open(temporary[files.train_config_path], "w", encoding="utf-8", errors="replace") as file:
                json.dump({id: list(context) for id, context in train_config.items()}, file, ensure_ascii=False)
        # instructions last: who finds them finds all that they refer to
        if new_images:
            move_image_parts(parts, files.images_path)
        for path, incomplete in temporary.items():
            move(incomplete, path)
    return files


def _pairs(items: Mapping | Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    return items.items() if isinstance(items, Mapping) else items


def _write_records(
    path: Path, records: Iterable[tuple[str, Mapping[str, Any]]], known_images: Container[str], meta: Mapping[str, Any]
) -> tuple[set[str], list[tuple[str, str]]]:
    """Writes the instructions file; returns the ids and the pairs `(id, related id)` that remain to be checked."""
    ids, related = set(), []
    # half a surrogate pair, which JSON can spell, becomes a question mark, as in reading
    with open(path, "w", encoding="utf-8", errors="replace") as file:
        file.write('{"meta": ' + json.dumps(meta, ensure_ascii=False) + ', "data": {')
        for id, record in records:
            for key in ("instruction", "answer"):
                if not isinstance(record.get(key), str):
                    raise ValueError(f"The {key} of record {id!r} must be a string, got {_shown(record.get(key))}.")
            if id in ids:
                raise ValueError(f"Record {id!r} is given twice: ids must be unique.")
            image_ids = _id_list(record.get("image_ids"), "image_ids of record %r", id)
            rel_ins_ids = _id_list(record.get("rel_ins_ids"), "rel_ins_ids of record %r", id)
            for image_id in image_ids:
                if image_id not in known_images:
                    raise ValueError(f"Record {id!r} needs image {image_id!r}, which is not among the images.")
            marks = record["instruction"].count(IMAGE_TOKEN)
            num_media = len(frames_per_medium(id, record, len(image_ids)) or image_ids)
            if _images_in_text(id, record) and marks != num_media:
                raise ValueError(
                    f"The instruction of record {id!r}, which says images_in_text, has {marks} {IMAGE_TOKEN} for "
                    f"{num_media} images: write one for each."
                )
            _system(id, record)
            related.extend((id, other) for other in rel_ins_ids)
            record = {**record, "image_ids": image_ids, "rel_ins_ids": rel_ins_ids}
            separator = ",\n" if ids else "\n"
            file.write(separator + json.dumps(id, ensure_ascii=False) + ": " + json.dumps(record, ensure_ascii=False))
            ids.add(id)
        file.write("\n}}\n")
    return ids, related


def make_train_config(records: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, list[str]]:
    """Derives a train config from the `rel_ins_ids` of records.

    A record that is already in the context of an earlier one is no example of its own. Related ids that no record has
    are dropped. Records without `rel_ins_ids` are left out, with a warning that counts them.
    """
    records = dict(_pairs(records))
    config, used, without = {}, set(), []
    for id, record in records.items():
        if record.get("rel_ins_ids") is None:
            without.append(id)
        elif id not in used:
            config[id] = [other for other in record["rel_ins_ids"] if other in records]
            used.update(config[id])
    if without:
        logger.warning(f"{len(without)} records have no rel_ins_ids and are left out, the first is {without[0]!r}.")
    return config
