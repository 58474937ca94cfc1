"""Writing: a folder that appears complete or not at all, and safetensors shards streamed tensor by tensor."""

import contextlib
import hashlib
import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path

import torch

from ..files import claim, replacing, update_with_file
from .tensors import SAFETENSORS_DTYPES, ConversionError, LazyTensor


_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@contextlib.contextmanager
def output_folder(path: str | Path):
    """
    A temporary folder beside `path` that takes its name if the block succeeds, and is removed if it does not.

    Raises:
        ConversionError: if `path` exists and is not an empty folder.
        OSError: if another process writes it, or the disk is full.
    """
    path = Path(path)
    _refuse_to_replace(path)
    with claim(path.with_name(f".{path.name}.lock"), path), replacing(path) as written:
        written.mkdir()
        yield written
        _refuse_to_replace(path)  # a training or anything else may have begun there meanwhile


def _refuse_to_replace(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConversionError(f"{path} exists already; give an empty or a new folder as output.")


def write_safetensors(
    folder: Path,
    tensors: dict[str, LazyTensor],
    max_shard_size: int = 5 * 10**9,
    name: str = "model",
    *,
    allow: bool = False,
) -> list[dict]:
    """
    Write tensors as `{name}.safetensors`, or as shards with an index. At most one tensor is in memory at a time.

    Args:
        max_shard_size: in bytes; a single larger tensor gets a shard of its own.
        allow: whether tensors may hold numbers that are not finite.

    Returns:
        for each file its `file` name, `bytes` and `sha256`.

    Raises:
        ConversionError: naming a tensor with NaN or infinite values, as of a training that diverged or a dtype that
            is too small.
    """
    shards, size = [[]], 0
    for key, tensor in tensors.items():
        num_bytes = math.prod(tensor.shape) * tensor.dtype.itemsize
        if shards[-1] and size + num_bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += num_bytes
    if len(shards) == 1:
        return [_write_file(folder / f"{name}.safetensors", tensors, allow)]
    files, weight_map = [], {}
    for number, keys in enumerate(shards, 1):
        file = folder / f"{name}-{number:05d}-of-{len(shards):05d}.safetensors"
        files.append(_write_file(file, {key: tensors[key] for key in keys}, allow))
        weight_map |= dict.fromkeys(keys, file.name)
    total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return files


def _write_file(path: Path, tensors: dict[str, LazyTensor], allow: bool) -> dict:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for key, tensor in tensors.items():
        end = offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        entry = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        header[key], offset = entry, end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in (struct.pack("<Q", len(encoded)), encoded):
            digest.update(chunk)
            file.write(chunk)
        for key, tensor in tensors.items():
            value = tensor.load()
            if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
                raise RuntimeError(f"{key} came out as {value.dtype} {tuple(value.shape)}, planned as {tensor}.")
            if not allow and value.is_floating_point() and not value.isfinite().all():
                raise ConversionError(
                    f"{key} holds values that are NaN or infinite in {str(value.dtype).removeprefix('torch.')}: the "
                    "source is of no use, or --dtype too small for it; --allow writes it nevertheless."
                )
            chunk = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(chunk)
            file.write(chunk)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def checksums(paths: Iterable[Path]) -> list[dict]:
    """For each file its `file` name, `bytes` and `sha256`."""
    return [
        {
            "file": path.name,
            "bytes": path.stat().st_size,
            "sha256": update_with_file(hashlib.sha256(), path).hexdigest(),
        }
        for path in paths
    ]
