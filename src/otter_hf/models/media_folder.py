"""What frozen weights make of media, kept on disk: each medium is encoded once, not in each epoch or evaluation."""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import replacing
from .fingerprint import bytes_of_tensor


DEFAULT_MAX_BYTES = 64 * 10**9
# subfolders of this name are stores, all others somebody else's
_IS_OURS = re.compile("[0-9a-f]{32}")


def hash_of_tensor(tensor: torch.Tensor) -> str:
    """A checksum of a tensor's values and dtype, whatever its shape and device."""
    data = bytes_of_tensor(tensor)
    return hashlib.blake2b(data, digest_size=16, person=str(tensor.dtype).encode()[-16:]).hexdigest()


class MediaFolder:
    """
    Tensors by name, in files of a folder that others may use at the same time.

    A file `.safetensors` per tensor, read through a memory map, in a subfolder of the weights that made them: what
    other weights made is never read. Files appear complete; one that is damaged counts as missing.

    When the folder is full, what other weights made goes, that used the longest time ago first; when there is nothing
    of that, nothing more is written. So what fits is found in every epoch, where a cache that makes room for the
    newest would have thrown each file away before it is needed again. Whatever else lies in the folder is not looked
    at.

    Args:
        folder: made if it is not there.
        made_by: 32 hexadecimal digits, see `fingerprint_of_eyes`.
        max_bytes: of all such stores in `folder`. Each process looks for what others wrote whenever it has written a
            64th of this itself: so much, for each process but one, may there be too much for a while.
        evicts: False where what other weights made stays, and nothing is written into a full folder.

    Raises:
        ValueError: for another form of `made_by`.
    """

    def __init__(self, folder: str | Path, made_by: str, max_bytes: int = DEFAULT_MAX_BYTES, evicts: bool = True):
        if not _IS_OURS.fullmatch(made_by):
            raise ValueError(f"made_by must be 32 hexadecimal digits, got {made_by!r}.")
        self.root = Path(folder)
        self.folder = self.root / made_by
        self.max_bytes = max_bytes
        self.evicts = evicts
        self.hits = self.misses = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._look()

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor of this name, or None."""
        try:
            with safe_open(self._file(name), framework="pt") as opened:
                tensor = opened.get_tensor("media")
        except (FileNotFoundError, SafetensorError):
            self.misses += 1
            return None
        self.hits += 1
        return tensor

    def fetch(
        self, media: Mapping[str, torch.Tensor], compute: Callable[[list[torch.Tensor]], Iterable[torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """By name what is kept of media, or what `compute` makes of all others together, which is kept from now on."""
        found = {name: self.get(name) for name in media}
        missing = [name for name, tensor in found.items() if tensor is None]
        if missing:
            for name, tensor in zip(missing, compute([media[name] for name in missing]), strict=True):
                self.put(name, tensor)
                found[name] = tensor
        return found

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Keeps a tensor, if there is room."""
        size = tensor.nbytes + 512  # more than the header takes
        if not self._has_room(size):
            return
        try:
            with replacing(self._file(name), shared=True) as written:
                save_file({"media": tensor.detach().cpu().contiguous()}, written)
        except (FileNotFoundError, SafetensorError):
            if self._file(name).parent.exists():
                raise
            return  # another process has made room with it; what comes next begins anew
        self._bytes += size
        self._unseen += size

    def _file(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def _stores(self) -> list[Path]:
        return [path for path in self.root.iterdir() if path.is_dir() and _IS_OURS.fullmatch(path.name)]

    def _look(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.folder)  # in use, which others see who make room
        self._bytes, self._unseen = sum(map(_size, self._stores())), 0

    def _has_room(self, size: int) -> bool:
        if self._unseen > self.max_bytes // 64:
            self._look()
        if self._bytes + size <= self.max_bytes:
            return True
        others = [path for path in self._stores() if path != self.folder] if self.evicts else []
        for other in sorted(others, key=_last_change):
            shutil.rmtree(other, ignore_errors=True)
            self._look()
            if self._bytes + size <= self.max_bytes:
                return True
        return False


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.safetensors"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # another process made room
            continue
    return total


def _last_change(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


__all__ = ["DEFAULT_MAX_BYTES", "MediaFolder", "hash_of_tensor"]
