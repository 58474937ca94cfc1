"""Files of rows: JSON lists, JSON lines and parquet, each row with its place for messages."""

import json
import re
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ...reading import parse_json, refuse_lfs_pointer


# names of files in repositories of the `datasets` library
_SPLIT = re.compile(r"(\w+)-\d{5}-of-\d{5}(?:-\w+)?")


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON file that holds a list of them, of a file with one per line, or of parquet.

    Args:
        path: the file, or a folder of parquet files.

    Raises:
        ValueError: naming the file and the line or the record that is no JSON object.
    """
    return (row for _, row in read_named_rows(path))


def read_named_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `read_rows`, each row with its place for messages, such as `Line 3 of x.jsonl`."""
    path = Path(path)
    refuse_lfs_pointer(path)
    if path.is_dir() or path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        with open(path, encoding="utf-8-sig") as file:
            start = file.read(64).lstrip()
            file.seek(0)
            if start.startswith("["):
                for number, row in enumerate(parse_json(file.read())):
                    where = f"Record {number} of {path}"
                    yield where, _object(row, where)
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"Line {number} of {path}"
                    yield where, _object(_parsed(line, number, path), where)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither a JSON list nor JSON lines: {error}.") from None


def _parsed(line: str, number: int, path: Path) -> Any:
    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is neither a JSON list nor JSON lines: line {number}, column {error.colno}: {error.msg}."
        ) from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = files_of_rows(path)
    if not files:
        raise ValueError(f"{path} is a folder without parquet files: give a JSON file, JSON lines or parquet.")
    splits = {match[1] for file in files if (match := _SPLIT.fullmatch(file.stem))}
    if len(splits) > 1:  # what is kept for testing would be trained
        raise ValueError(
            f"{path} holds the splits {', '.join(sorted(splits))}: name a file, or a folder of one split."
        )
    for file in files:
        refuse_lfs_pointer(file)
        try:
            number = 0
            for batch in pq.ParquetFile(file).iter_batches(batch_size=64):  # rows may hold pictures
                for row in batch.to_pylist():
                    yield f"Row {number} of {file}", row
                    number += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} cannot be read as parquet: {error}.") from None


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, got {repr(row)[:60]}.")
    return row


def files_of_rows(path: Path) -> list[Path]:
    """The file, or the parquet files of a folder."""
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]


def state_of_files(files: Sequence[Path], *options: str) -> str:
    """What changes when one of the files or options does."""
    states = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else str(file)
        for file in files
    ]
    return blake2b(repr([*states, *options]).encode("utf-8", "surrogateescape"), digest_size=10).hexdigest()
