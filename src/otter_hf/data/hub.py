"""MIMIC-IT datasets in the form they have on the Hub, as `pufanyi/MIMICIT`: written, uploaded, and read back.

A dataset `X` there has up to three configurations: `X_Images` (`id`, `image`), `X_Instructions` (`id`, `instruction`,
`answer`, `images` and `related instructions` as ids), and `X`, the same with the pictures themselves in each row. We
add `X_Train` (`id`, `context`) where there is a train config, and the columns `images_in_text`, `frames_per_medium`
and `system` where a record has them.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha1
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

import yaml
from datasets import Features, Image, List, Value, get_dataset_config_names, load_dataset
from huggingface_hub import HfApi
from transformers.utils import logging

from ..files import claim, replacing
from ..made_from import MadeFrom, keep, kept
from ..reading import path_inside
from .formats import FEATURES, MimicitFiles, load_mimicit, write_mimicit
from .json_stream import iter_json_object
from .mixture_yaml import MixtureEntry, entries_of
from .parquet_writer import PICTURES, write_rows


logger = logging.get_logger(__name__)

_INSTRUCTIONS = Features(
    {
        "id": Value("string"),
        "instruction": Value("string"),
        "answer": Value("string"),
        "images": List(Value("string")),
        "related instructions": List(Value("string")),
    }
)
# columns that the published datasets do not have
_OWN = ("images_in_text", "frames_per_medium", "system")
_TRAIN = Features({"id": Value("string"), "context": List(Value("string"))})


def write_hub_form(
    mixture: str | Path | Sequence[MixtureEntry], folder: str | Path, cache_dir: str | Path | None = None
) -> list[str]:
    """Writes every dataset of a mixture to `folder`, ready for `datasets.load_dataset(folder, "X_Images")`.

    Pictures are kept byte by byte. The folder appears when all is written.

    Returns:
        The names of the configurations.

    Raises:
        ValueError: if two datasets have one name, or the folder exists.
        OSError: if another process is writing it.
    """
    entries = entries_of(mixture, cache_dir)
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two datasets of the mixture are called {name!r}: on the Hub, names must differ.")
    folder = Path(folder)
    made_from = _made_from(entries)
    configurations = []
    with claim(folder.with_name(f".{folder.name}.lock"), folder), replacing(folder) as incomplete:
        if folder.exists():
            raise ValueError(f"The folder {folder} exists: name a new one.")
        incomplete.mkdir()
        for entry in entries:
            for suffix, features, rows in _configurations(entry, cache_dir):
                configuration = f"{entry.name}_{suffix}"
                _write_parquet(incomplete / configuration / "train-00000.parquet", features, rows)
                configurations.append(configuration)
        (incomplete / "README.md").write_text(_card(configurations), encoding="utf-8")
        keep(incomplete, {"mixture": made_from})
    return configurations


def push_mixture(
    mixture: str | Path | Sequence[MixtureEntry],
    repo_id: str,
    folder: str | Path,
    *,
    private: bool = False,
    cache_dir: str | Path | None = None,
) -> list[str]:
    """Writes a mixture to `folder` (`write_hub_form`) and uploads it to the dataset repository `repo_id`.

    The repository is created if need be. If `folder` exists, from an earlier run whose upload was broken off, it is
    only uploaded. Returns the names of the configurations.

    Raises:
        ValueError: if `folder` is not of this mixture as it is now.
    """
    folder = Path(folder)
    if folder.exists():
        entries = entries_of(mixture, cache_dir)
        if changes := _made_from(entries).changes(kept(folder).get("mixture")):
            raise ValueError(
                f"{folder} is not of the mixture as it is now: {changes}; remove it, or name another folder."
            )
        configurations = get_dataset_config_names(str(folder))
    else:
        configurations = write_hub_form(mixture, folder, cache_dir)
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder, ignore_patterns=".*")
    return configurations


def read_hub_form(repository: str, name: str, folder: str | Path, revision: str | None = None) -> MimicitFiles:
    """Writes the dataset `name` of a Hub repository, or of a folder in that form, as MIMIC-IT files in `folder`.

    Reads `X_Instructions` with `X_Images` if they are there, else `X`, whose pictures get ids `X_IMG_` and a hash of
    their bytes, so that equal ones are stored once. Pictures are kept byte by byte; rows are streamed. `X_Train`
    becomes the train config. Rows without an instruction or answer are left out, also as context of others, and
    counted in a warning.

    Raises:
        ValueError: if the repository has no such dataset, it lacks a column, or a row names a file in the place of its
            picture that is not in the folder.
    """
    known = get_dataset_config_names(repository, revision=revision)
    picture = partial(_image, repository=repository)
    rows = partial(_read_rows, repository, revision=revision)
    train, with_ids = f"{name}_Train", f"{name}_Instructions" in known
    if not with_ids and name not in known:
        raise ValueError(f"{repository} has no configuration {name} or {name}_Instructions, only {', '.join(known)}.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    with TemporaryFile("w+", dir=folder, encoding="utf-8", errors="replace") as file:
        usable, images = _UsableRows(file), None
        if with_ids:
            for row in usable.of(rows(f"{name}_Instructions")):
                usable.keep(row, row.get("images") or [])
            if f"{name}_Images" in known:
                images = ((row["id"], picture(row["image"], row["id"])) for row in rows(f"{name}_Images"))
        else:
            images = _embedded_images(name, rows, usable, picture)
            if train in known:  # its contexts are read before pictures and rows
                for _ in usable.of(rows(name)):
                    pass
        config = None
        if train in known:
            config = {row["id"]: usable.ids(row["context"]) for row in rows(train) if usable.ids([row["id"]])}
        files = write_mimicit(folder, name, usable.records(), images, config)
    if usable.left_out:
        logger.warning(f"Left out of {name}: {dict(Counter(usable.left_out.values()))}.")
    return files


def _embedded_images(
    name: str,
    rows: Callable[[str], Iterable],
    usable: "_UsableRows",
    picture: Callable[[Mapping[str, Any], str], bytes],
) -> Iterator[tuple[str, bytes]]:
    """The pictures in the rows of a configuration, each once; the rows are kept without them."""
    seen = set()
    for row in usable.of(rows(name)):
        images = [picture(image, row["id"]) for image in row.get("images") or []]
        ids = [f"{name}_IMG_{sha1(data).hexdigest()[:16]}" for data in images]
        usable.keep(row, ids)
        for id, data in zip(ids, images, strict=True):
            if id not in seen:
                seen.add(id)
                yield id, data


def _read_rows(repository: str, configuration: str, revision: str | None) -> Iterable[Mapping[str, Any]]:
    """The rows of a configuration, streamed, with pictures as they are stored."""
    stream = load_dataset(repository, configuration, split="train", streaming=True, revision=revision)
    features = stream.features or stream._resolve_features().features
    for column, feature in features.items():
        if isinstance(feature, Image):
            stream = stream.cast_column(column, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            stream = stream.cast_column(column, List(Image(decode=False)))
    return logging.tqdm(stream, desc=f"Reading {configuration}")


class _UsableRows:
    """
    Rows that have both texts; `left_out` are the ids of the others that were met, with what they lack. They come from
    afar, some with pictures in them, and but once: what is written of them later waits in a file.
    """

    def __init__(self, file: TextIO):
        self.left_out: dict[str, str] = {}
        self._file = file

    def of(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        for row in rows:
            missing = [key for key in ("instruction", "answer") if key in row and not isinstance(row[key], str)]
            if missing:
                self.left_out[row["id"]] = f"no {missing[0]}"
            else:
                yield row

    def ids(self, ids: Iterable[str] | None) -> list[str]:
        return [id for id in ids or () if id not in self.left_out]

    def keep(self, row: Mapping[str, Any], image_ids: Sequence[str]) -> None:
        json.dump([*_record(row, image_ids), row.get("related instructions")], self._file)
        self._file.write("\n")

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Those that were kept."""
        self._file.seek(0)
        for id, record, related in map(json.loads, self._file):
            yield id, {**record, "rel_ins_ids": self.ids(related)}


def _made_from(entries: Sequence[MixtureEntry]) -> MadeFrom:
    paths = [(entry.mimicit_path, entry.train_config_path, *entry.images_path) for entry in entries]
    files = [path for of_entry in paths for path in of_entry if path]
    return MadeFrom.of(files, **{"the datasets": [entry.name for entry in entries]})


def _configurations(entry: MixtureEntry, cache_dir: str | Path | None) -> Iterator[tuple[str, Features, Iterable]]:
    records, store = load_mimicit(entry.mimicit_path, entry.images_path, cache_dir=cache_dir)
    if len(store):
        images = ({"id": id, "image": {"bytes": store.read_bytes(id), "path": None}} for id in dict.fromkeys(store))
        yield "Images", PICTURES, images
    columns = {"image_ids": "images", "rel_ins_ids": "related instructions"}
    features = _INSTRUCTIONS
    own = {name: FEATURES[name] for name in _OWN if any(records[name])}
    features = Features({**features, **own})
    yield "Instructions", features, records.rename_columns(columns).select_columns(list(features))
    if entry.train_config_path:
        contexts = iter_json_object(entry.train_config_path)
        yield "Train", _TRAIN, ({"id": id, "context": context} for id, context in contexts)


def _write_parquet(path: Path, features: Features, rows: Iterable[Mapping[str, Any]]):
    path.parent.mkdir(parents=True)
    write_rows(path, features.arrow_schema, logging.tqdm(rows, desc=f"Writing {path.parent.name}", unit=" rows"))


def _card(configurations: Sequence[str]) -> str:
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/*"}]} for name in configurations
    ]
    return f"---\n{yaml.safe_dump({'configs': configs}, sort_keys=False)}---\n"


def _record(row: Mapping[str, Any], image_ids: Sequence[str]) -> tuple[str, dict[str, Any]]:
    missing = [column for column in ("id", "instruction", "answer") if column not in row]
    if missing:
        raise ValueError(f"The instructions have no column {', '.join(missing)}, only {', '.join(row)}.")
    record = {"instruction": row["instruction"], "answer": row["answer"], "image_ids": list(image_ids)}
    return row["id"], record | {name: row[name] for name in _OWN if row.get(name)}


def _image(value: Mapping[str, Any] | None, id: str, repository: str) -> bytes:
    value = value or {}  # tables have null for what is not there
    data = value.get("bytes")
    if data is None and value.get("path"):
        # of a folder of pictures; anything else that a row names would be a file of whoever reads it
        try:
            data = path_inside(repository, value["path"]).read_bytes()
        except (ValueError, OSError):
            raise ValueError(
                f"Row {id!r} has no picture but the name {value['path']!r:.80}, which is no file in {repository}."
            ) from None
    if data is None:
        raise ValueError(f"Row {id!r} has an image without bytes.")
    return data
