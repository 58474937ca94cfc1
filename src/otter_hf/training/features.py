"""What a frozen vision tower makes of a picture, kept on disk: the tower sees each picture once, not each epoch."""

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..files import replacing
from ..models.media_store import hash_of_tensor


class VisionFeatureCache:
    """
    Reads a frozen vision tower's `last_hidden_state` of each frame from a folder, and writes there what it has not.

    A file `.safetensors` per frame, read through a memory map, and named after the hash of the frame's pixels as the
    tower gets them, so that whatever changes a picture on its way makes another file. The files are in a folder named
    after the hash of the tower's configuration and weights and the precision it computes in. Files appear complete,
    so several processes may share the folder; nothing is ever removed from it.

    Args:
        folder: where to keep features; made if it is not there.
        tower: a vision tower of transformers without trainable parameters, called with `pixel_values` alone.
        dtype: of the computation, if it is not that of the weights (autocast).

    Raises:
        ValueError: if the tower is trained: its features change with each step.
    """

    def __init__(self, folder: str | Path, tower: nn.Module, dtype: torch.dtype | None = None):
        if any(parameter.requires_grad for parameter in tower.parameters()):
            raise ValueError("cache_vision_features needs a vision tower that is not trained: add vision to freeze.")
        self.folder = Path(folder) / _fingerprint(tower, dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hits = self.misses = 0
        self._tower_forward = tower.forward
        # as accelerate's device hooks do: the module, its weights and their names stay as they are
        tower.forward = self._forward

    @torch.no_grad()
    def _forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """`pixel_values (N, C, H, W)` -> an output with `last_hidden_state` alone."""
        keys = [hash_of_tensor(frame) for frame in pixel_values]
        features = {key: _read(self._file(key)) for key in keys}
        missing = {key: index for index, key in enumerate(keys) if features[key] is None}
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if missing:
            computed = self._tower_forward(pixel_values[[*missing.values()]], **kwargs).last_hidden_state
            for key, frame in zip(missing, computed, strict=True):
                _write(self._file(key), frame)
                features[key] = frame
        states = torch.stack([features[key].to(pixel_values.device, non_blocking=True) for key in keys])
        return BaseModelOutputWithPooling(last_hidden_state=states)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _read(file: Path) -> torch.Tensor | None:
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor("features")
    except FileNotFoundError:
        return None


def _write(file: Path, features: torch.Tensor) -> None:
    with replacing(file, shared=True) as written:
        save_file({"features": features.cpu().contiguous()}, written)


def _fingerprint(tower: nn.Module, dtype: torch.dtype | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    config = {key: value for key, value in tower.config.to_dict().items() if not key.startswith(("_", "transformers"))}
    digest.update(repr((sorted(config.items(), key=lambda item: item[0]), dtype)).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {hash_of_tensor(tensor.flatten())}".encode())
    return digest.hexdigest()
