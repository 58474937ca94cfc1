"""Weight deltas: a tuned model minus its base, for bases whose licence forbids passing the weights on."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from .job import PROCESSORS, load_text_config, read_raw_config, resolve_folder, written_folder
from .memory import load_model_config
from .names import Rename, language_model_rename, rename_2023
from .plan import source_files
from .report import ConversionReport
from .tensors import ConversionError, LazyTensor, open_checkpoint
from .writer import checksums


_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")


@dataclass(frozen=True)
class _Folder:
    path: Path
    tensors: dict[str, LazyTensor]
    is_flamingo: bool


def make_delta(base: str | Path, tuned: str | Path, output: str | Path, **options) -> ConversionReport:
    """
    Write `tuned - base` in the layout of `tuned`: what the base lacks is written in full.

    Args:
        base: folder or Hub repository; of a language model alone if `tuned` is a Flamingo or Otter built on it.
        tuned: folder or Hub repository.
        options: those of [`apply_delta`].
    """
    return _combine("delta make", base, tuned, output, -1, **options)


def apply_delta(
    base: str | Path,
    delta: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    allow: bool = False,
    max_shard_size: int = 5 * 10**9,
    push_to_hub: str | None = None,
) -> ConversionReport:
    """
    Write `base + delta`. The sum has the rounding of one addition in the delta's dtype.

    Embeddings may have more rows in the delta than in the base; the further rows are taken from the delta.

    Raises:
        ConversionError: if shapes do not fit, or, unless `allow`, a weight of the base has no counterpart.
    """
    options = {"dtype": dtype, "allow": allow, "max_shard_size": max_shard_size, "push_to_hub": push_to_hub}
    return _combine("delta apply", base, delta, output, 1, **options)


def _combine(name: str, base, other, output, sign: int, **options) -> ConversionReport:
    report = ConversionReport(name)
    base_folder, other_folder = _open(base), _open(other)
    base_rename, other_rename = _renames(base_folder, other_folder)
    by_target = {base_rename(key): (key, tensor) for key, tensor in base_folder.tensors.items()}
    result, used = {}, set()
    for key, tensor in other_folder.tensors.items():
        target = other_rename(key)
        report.tensors[f"{other}: {key}"] = key
        if target not in by_target:
            result[key] = tensor
            report.notes.append(f"{key} is not in the base and is taken over in full")
            continue
        base_key, base_tensor = by_target[target]
        used.add(target)
        report.tensors[f"{base}: {base_key}"] = key
        result[key] = _sum(key, tensor, base_tensor, sign)
    report.unexplained += [f"{base}: {key} has no counterpart" for t, (key, _) in by_target.items() if t not in used]
    for label, folder in ((str(base), base_folder), (str(other), other_folder)):
        report.sources[label] = checksums(source_files(folder.path))
    with written_folder(report, output, result, **options) as folder:
        shutil.copytree(other_folder.path, folder, ignore=shutil.ignore_patterns(*_WEIGHTS, ".*"), dirs_exist_ok=True)
    return report


def _open(name_or_path) -> _Folder:
    folder = resolve_folder(name_or_path)
    return _Folder(folder, open_checkpoint(folder), read_raw_config(folder).get("model_type") in PROCESSORS)


def _renames(base: _Folder, other: _Folder) -> tuple[Rename, Rename]:
    if not other.is_flamingo:
        return (lambda key: key), (lambda key: key)
    rename = rename_2023(load_model_config(other.path).text_config)
    return (rename if base.is_flamingo else language_model_rename(load_text_config(base.path))), rename


def _sum(key: str, tensor: LazyTensor, base: LazyTensor, sign: int) -> LazyTensor:
    if base.shape[1:] != tensor.shape[1:] or base.shape[0] > tensor.shape[0]:
        raise ConversionError(
            f"{key} has shape {tensor.shape} but {base.shape} in the base; the two do not belong together."
        )

    def add(value: torch.Tensor) -> torch.Tensor:
        result = value.clone()
        rows = base.shape[0]
        result[:rows] = (value[:rows].float() + sign * base.load().float()).to(value.dtype)
        return result

    return tensor.map(add)
