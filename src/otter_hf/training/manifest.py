"""What is in a checkpoint, written down with it, so that a damaged one is known before it is gone on from."""

import json
from pathlib import Path

import xxhash

from ..files import update_with_file, write_json


MANIFEST = "files.json"
# written again when the checkpoint is pushed, and of no use for going on
_FREE = (MANIFEST, "README.md")
# what training goes on from, as patterns of which one must be there: for checkpoints without a manifest
_PARTS = {
    "weights": ("*.safetensors", "*model*.bin", "pytorch_model_fsdp_*", "global_step*"),
    "optimizer": ("optimizer*", "global_step*"),
    "schedule": ("scheduler.pt", "global_step*"),
    "random generators": ("rng_state*",),
}


def write_manifest(folder: str | Path) -> None:
    """Puts `files.json` into a folder: path -> size in bytes and XXH3-128 checksum of each file, in subfolders too."""
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _FREE)
    write_json(
        folder / MANIFEST,
        {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "xxh3": _checksum(path)}
            for path in paths
        },
    )


def damage_of(folder: str | Path) -> str | None:
    """
    What is wrong with a checkpoint, for a sentence; None if it is whole.

    Sizes are looked at first, then checksums. Of a checkpoint without `files.json`, written by an earlier version or
    another program, only what is missing or empty can be told.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        return _damage_without_manifest(folder)
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {folder / name: (entry["bytes"], entry["xxh3"]) for name, entry in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    for path, (size, _) in expected.items():
        if not path.is_file():
            return f"its {path.relative_to(folder)} is missing"
        if path.stat().st_size != size:
            return f"its {path.relative_to(folder)} has {path.stat().st_size} of {size} bytes"
    for path, (_, checksum) in expected.items():
        try:
            if _checksum(path) != checksum:
                return f"its {path.relative_to(folder)} has other content than was written"
        except OSError as error:
            return f"its {path.relative_to(folder)} cannot be read ({error.strerror})"
    return None


def _damage_without_manifest(folder: Path) -> str | None:
    # saved without what it takes to go on: `RunRecord.going_on_from` says so
    parts = _PARTS if any(next(folder.glob(name), None) for name in _PARTS["optimizer"]) else ("weights",)
    for part in parts:
        if not any(next(folder.glob(name), None) for name in _PARTS[part]):
            return f"it has no {part}"
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size == 0:
            return f"its {path.relative_to(folder)} is empty"
    return None


def _checksum(path: Path) -> str:
    return update_with_file(xxhash.xxh3_128(), path).hexdigest()


__all__ = ["MANIFEST", "damage_of", "write_manifest"]
