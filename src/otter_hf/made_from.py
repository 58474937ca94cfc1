"""What a result was made from, by which commands that go on or keep what is there know that their inputs changed."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from .files import write_text
from .storage import full_name, is_remote, to_path


# of a model's folder, what its replies depend on; beside it lie logs, checkpoints, and results of ours
_OF_MODELS = (
    "*.safetensors*",
    "*.bin*",
    "*config.json",
    "tokenizer*",
    "chat_template*",
    "vocab*",
    "merges*",
    "*.model",
)
_MOST_NAMED = 3
_FILE = ".made_from.json"


def state(path: str | Path) -> list | None:
    """What tells whether a file or folder is still the same.

    Of a file it is `[bytes, time of change in ns]`, of a folder `[number of files, digest of their names, bytes and
    times]`, of a file at an address `[bytes, what its store tells of it]`, of what is not there None.
    """
    path = to_path(path)
    if is_remote(path):
        try:
            if path.fs.info(path.path)["type"] == "directory":
                return _joint((file.path, file) for file in sorted(path.rglob("*"), key=str) if file.is_file())
            return [path.stat().st_size, path.fs.ukey(path.path)]
        except OSError:
            return None
    if path.is_dir():
        return _joint((file.relative_to(path), file) for file in sorted(path.rglob("*")) if file.is_file())
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def state_of_all(paths: Iterable[str | Path]) -> list:
    """The state of many files as one: `[number of files, digest of their names, bytes and times]`."""
    return _joint((path.name, path) for path in map(Path, paths))


def state_of_model(name_or_path: str | Path) -> Any:
    """The state of a model's weights, configuration and tokenizer, with those of the model that an adapter is for.

    Of a Hub id it is the commit, None of what is not there.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        from transformers.utils import cached_file

        try:
            return Path(cached_file(str(name_or_path), "config.json")).parent.name
        except OSError:  # not there, or no name of a repository: who loads it will say so
            return state(folder)
    files = {file for pattern in _OF_MODELS for file in folder.glob(pattern) if file.is_file()}
    states: dict[str, Any] = {file.name: state(file) for file in sorted(files)}
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return states
    return {**states, "base model": state_of_model(base)} if base else states


@dataclass(frozen=True)
class MadeFrom:
    """
    What a result is made from, to be kept beside it as JSON and compared later.

    Args:
        files: states by path.
        options: everything else that changes the result, under the names a user gives it.
    """

    files: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: Iterable[str | Path], **options: Any) -> "MadeFrom":
        """Files and folders as they are now, and options."""
        return cls({full_name(to_path(path)): state(path) for path in paths}, options)

    def to_json(self) -> dict[str, Any]:
        """As it is kept; what JSON has no form for becomes text."""
        return json.loads(json.dumps(asdict(self), default=str))

    def changes(self, before: Any) -> str:
        """
        What is different now, in words; empty if nothing is. A file that was moved, unchanged, is the same.

        Args:
            before: what `to_json` gave when the result was made; None, or anything else, if nothing was kept.
        """
        if not isinstance(before, dict) or not {"files", "options"} <= before.keys():
            return "nothing says what it was made from"
        now, told = self.to_json(), []
        moved = [(Path(path).name, state) for path, state in before["files"].items()]
        for path, state in now["files"].items():
            if before["files"].get(path, state) != state:
                told.append(f"{path} has changed since")
            elif path not in before["files"] and (Path(path).name, state) not in moved:
                told.append(f"{path} was not part of it")
        here = [(Path(path).name, state) for path, state in now["files"].items()]
        for path, state in before["files"].items():
            if path not in now["files"] and (Path(path).name, state) not in here:
                told.append(f"it was made from {path}")
        told += differences(before["options"], now["options"])
        more = [f"and {len(told) - _MOST_NAMED} more"] if len(told) > _MOST_NAMED else []
        return "; ".join([*told[:_MOST_NAMED], *more])


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs in two mappings of JSON's types, each in words; what one of them lacks is None there."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} was {_short(before.get(name))} and is {_short(now.get(name))}" for name in names]


def kept(folder: str | Path) -> dict[str, Any]:
    """What `keep` has kept in a folder, by name of the result; empty where there is nothing."""
    try:
        content = json.loads((to_path(folder) / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def keep(folder: str | Path, results: Mapping[str, MadeFrom]) -> None:
    """Adds to the folder of some results, in the hidden file `.made_from.json`, what they were made from."""
    content = {**kept(folder), **{name: made_from.to_json() for name, made_from in results.items()}}
    write_text(to_path(folder) / _FILE, json.dumps(content))


def _joint(files: Iterable[tuple[Any, Path]]) -> list:
    digest, count = blake2b(digest_size=16), 0
    for name, path in files:
        digest.update(f"{name}\0{state(path)}\n".encode("utf-8", "surrogateescape"))
        count += 1
    return [count, digest.hexdigest()]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else f"{text[:57]}..."
