"""Checkpoints as tables of tensors that are read from disk one at a time, when asked for."""

import json
import math
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..reading import refuse_lfs_pointer


class ConversionError(ValueError):
    """A source that cannot be converted; the message is one sentence for the user."""


SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
# keys under which training scripts wrap a state dict
_WRAPPERS = ("model_state_dict", "state_dict", "model")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor on disk, or computed from others: its shape and dtype are known, `load()` makes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor], shape=None, dtype=None) -> "LazyTensor":
        """The tensor after `function`, which changes the shape or dtype only as said here."""
        return LazyTensor(
            self.shape if shape is None else tuple(shape),
            self.dtype if dtype is None else dtype,
            lambda: function(self.load()),
        )


def open_checkpoint(path: str | Path) -> dict[str, LazyTensor]:
    """
    The tensors of one file or of all weight files in a folder.

    Args:
        path: `.safetensors`, or a file of `torch.save` (`.bin`, `.pt`, `.pth`), of which only tensors and plain
            containers are unpickled; or a folder with `model.safetensors` or `pytorch_model.bin`, whole or in shards.

    Returns:
        names -> tensors; the wrappers of training scripts (`model_state_dict`, `state_dict`, `model`) and the prefix
        `module.` of distributed training are removed.

    Raises:
        ConversionError: if something is missing, damaged, or holds more than tensors.
    """
    path = Path(path)
    refuse_lfs_pointers(path)
    if path.is_dir():
        tensors = {}
        for file in weight_files(path):
            tensors |= open_checkpoint(file)
        return tensors
    if not path.is_file():
        raise ConversionError(f"{path} does not exist.")
    tensors = _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def weight_files(folder: str | Path) -> list[Path]:
    """The files that hold a folder's weights, safetensors first. Raises ConversionError if there are none."""
    folder = Path(folder)
    for filename in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{filename}.index.json"
        if index.is_file():
            files = [folder / name for name in sorted(_shard_names(index))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise ConversionError(f"{folder} lacks {missing[0]}, which its {index.name} lists.")
            return files
        if (folder / filename).is_file():
            return [folder / filename]
    raise ConversionError(
        f"{folder} holds no weights; expected model.safetensors or pytorch_model.bin, whole or in shards."
    )


def _shard_names(index: Path) -> set[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        strange = next((name for name in names if Path(name).name != name), None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{index} is damaged: it names no weight files; copy it again.") from error
    if strange is not None:
        raise ConversionError(f"{index} names {strange!r}, which is no file beside it.")
    return names


def check_weights(folder: str | Path) -> None:
    """
    Raise ConversionError if a local model folder holds damaged weights or index, or pointers in the place of files.

    Of safetensors the header and the size are read, so that it takes no time; a folder of an adapter may have no other
    weights.
    """
    folder = Path(folder)
    refuse_lfs_pointers(folder)
    adapter = folder / "adapter_model.safetensors"
    names = ("model.safetensors", "pytorch_model.bin")
    has_weights = any((folder / f"{name}{end}").is_file() for name in names for end in ("", ".index.json"))
    for path in [*(weight_files(folder) if has_weights else ()), *((adapter,) if adapter.is_file() else ())]:
        if path.suffix == ".safetensors":
            _open_safetensors(path)
        elif not path.stat().st_size:
            raise ConversionError(f"{path} is empty: copy it again.")


def refuse_lfs_pointers(path: str | Path) -> None:
    """Raise ConversionError for a file, or a file in a folder, of which git has fetched the pointer only."""
    path = Path(path)
    try:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            refuse_lfs_pointer(file)
    except ValueError as error:
        raise ConversionError(str(error)) from None


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_size = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(min(header_size, size)))
        header.pop("__metadata__", None)
        entries = {name: _entry(name, entry) for name, entry in header.items()}
    except ConversionError as error:
        raise ConversionError(f"{path} is damaged: {error}") from error
    except (struct.error, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{path} is damaged: its safetensors header cannot be read; copy it again.") from error
    # one behind the other, without gap or overlap, as the format has it
    end = 0
    for name, (_, _, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if start != end:
            raise ConversionError(f"{path} is damaged: the bytes of {name} overlap others or leave a gap.")
        end = stop
    expected = 8 + header_size + end
    if size != expected:
        raise ConversionError(
            f"{path} is damaged: it has {size} bytes where its header says {expected}; copy it again."
        )
    return {
        name: LazyTensor(shape, dtype, _reader(path, 8 + header_size + start, dtype, math.prod(shape), shape))
        for name, (dtype, shape, start, _) in entries.items()
    }


def _entry(name: str, entry: dict) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """dtype, shape, first byte and the one behind the last, of a tensor in a safetensors header."""
    try:
        kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"its header does not say where {name} is; copy it again.") from error
    if kind not in SAFETENSORS_DTYPES:
        raise ConversionError(f"{name} has dtype {kind!r}, which is none of {', '.join(SAFETENSORS_DTYPES)}.")
    dtype, numbers = SAFETENSORS_DTYPES[kind], (*shape, start, stop)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ConversionError(f"{name} has shape {list(shape)} at bytes {start} to {stop}; copy it again.")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ConversionError(f"{name} has {stop - start} bytes, which shape {list(shape)} in {kind} has not.")
    return dtype, shape, start, stop


def _open_torch(path: Path) -> dict[str, LazyTensor]:
    try:
        # fake tensors know where in the file their bytes are, and take no memory
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} holds pickled objects other than tensors, which could run code, and is not opened; ask its "
            "author for a file of plain tensors."
        ) from error
    except Exception as error:  # whatever its bytes make of the reader
        if "TorchScript" in str(error):
            raise ConversionError(
                f"{path} is a TorchScript archive, such as OpenAI's files of CLIP, and is not opened; name the same "
                "weights in another form, such as openai/clip-vit-large-patch14."
            ) from error
        raise ConversionError(f"{path} is damaged or is no file of torch.save; copy it again.") from error
    opened: list = []
    while isinstance(content, dict) and (wrapper := next((key for key in _WRAPPERS if key in content), None)):
        opened.append(content)
        content = content[wrapper]
        if any(content is outer for outer in opened):
            raise ConversionError(f"{path} is not a state dict: its {wrapper!r} contains itself.")
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ConversionError(f"{path} is not a state dict: it holds values that are no tensors.")
    return {name: _lazy_fake_tensor(path, tensor) for name, tensor in content.items()}


def _lazy_fake_tensor(path: Path, fake: torch.Tensor) -> LazyTensor:
    shape, dtype, stride = tuple(fake.shape), fake.dtype, fake.stride()
    offset = fake.untyped_storage()._checkpoint_offset
    if offset is None:
        raise ConversionError(f"{path} was written before PyTorch 1.6; load it there and save it again.")
    # the elements between the first and the last one, which for a contiguous tensor are just its own
    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if fake.numel() else 0
    read = _reader(path, offset + fake.storage_offset() * dtype.itemsize, dtype, span, (span,))
    return LazyTensor(shape, dtype, lambda: read().as_strided(shape, stride).contiguous())


def _reader(path: Path, start: int, dtype: torch.dtype, count: int, shape) -> Callable[[], torch.Tensor]:
    """Reads `count` elements at byte `start`. No memory map: its pages would count as memory in use until the end."""

    def read() -> torch.Tensor:
        buffer = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        with path.open("rb") as file:
            file.seek(start)
            if count and file.readinto(buffer.numpy()) != buffer.numel():
                raise ConversionError(f"{path} is damaged: it ends in the middle of a tensor; copy it again.")
        return buffer.view(dtype).view(shape)

    return read
