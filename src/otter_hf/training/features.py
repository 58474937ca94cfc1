"""Training from a store on disk: what is frozen of a Flamingo's eyes sees each medium once, not once an epoch."""

from pathlib import Path

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..models.flamingo import FlamingoModel
from ..models.media_folder import DEFAULT_MAX_BYTES, MediaFolder, hash_of_tensor
from ..models.media_store import fingerprint_of_eyes, name_of_medium


def store_media(
    model: FlamingoModel, folder: str | Path, max_bytes: int = DEFAULT_MAX_BYTES, dtype: torch.dtype | None = None
) -> MediaFolder:
    """
    Let a model read from a folder what its frozen parts make of media, and write there what is not in it.

    With a frozen resampler these are the latents of each medium; with one that is trained, the features of each frame.
    Their names are hashes of the pixels as the tower gets them, so that whatever changes a picture on its way makes
    another file.

    Args:
        model: an Otter or Flamingo whose vision tower is frozen. Its methods are replaced on this object, as
            accelerate's device hooks do: the modules, their weights and their names stay as they are.
        folder, max_bytes: see [`~otter_hf.models.media_folder.MediaFolder`].
        dtype: of the computation, if it is not that of the weights (autocast).

    Raises:
        ValueError: if the tower is trained: its features change with each step.
    """
    tower = model.vision_tower
    if _is_trained(tower):
        raise ValueError("media_store needs a vision tower that is not trained: add vision to freeze.")
    if _is_trained(model.perceiver):
        store = MediaFolder(folder, fingerprint_of_eyes(model, dtype, resampler=False), max_bytes)
        tower.forward = _StoredFeatures(store, tower)
    else:
        store = MediaFolder(folder, fingerprint_of_eyes(model, dtype), max_bytes)
        model._encode_frames = _StoredLatents(store, model)
    return store


class _StoredFeatures:
    """In place of a tower's `forward`."""

    def __init__(self, store: MediaFolder, tower: nn.Module):
        self._store, self._compute = store, tower.forward

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """`pixel_values (N, C, H, W)` -> an output with `last_hidden_state` alone."""
        names = [hash_of_tensor(frame) for frame in pixel_values]
        features = {name: self._store.get(name) for name in dict.fromkeys(names)}
        missing = {name: index for index, name in enumerate(names) if features[name] is None}
        if missing:
            computed = self._compute(pixel_values[[*missing.values()]], **kwargs).last_hidden_state
            for name, frame in zip(missing, computed, strict=True):
                self._store.put(name, frame)
                features[name] = frame
        states = torch.stack([features[name].to(pixel_values.device, non_blocking=True) for name in names])
        return BaseModelOutputWithPooling(last_hidden_state=states)


class _StoredLatents:
    """In place of a model's `_encode_frames`."""

    def __init__(self, store: MediaFolder, model: FlamingoModel):
        self._store, self._compute, self._config = store, model._encode_frames, model.config

    @torch.no_grad()
    def __call__(self, pixel_values, frame_mask, frame_counts: list[int] | None, **kwargs):
        """`pixel_values (N, F, C, H, W)` -> an output with `pooler_output (N, n, D)` alone."""
        if frame_counts is None:
            raise ValueError("media_store looks at pixels, which a compiled model cannot: leave torch_compile out.")
        frames = {}  # of each medium that is referred to, (F_i, C, H, W)
        for i, count in enumerate(frame_counts):
            if count:
                # real frames first, as the model takes them
                order = slice(None) if frame_mask is None else (~frame_mask[i]).byte().argsort(stable=True)
                frames[i] = pixel_values[i][order][:count]
        names = {i: name_of_medium(medium) for i, medium in frames.items()}
        latents = {name: self._store.get(name) for name in dict.fromkeys(names.values())}
        missing = {name: frames[i] for i, name in names.items() if latents[name] is None}
        if missing:
            media = nn.utils.rnn.pad_sequence(list(missing.values()), batch_first=True)
            counts = [len(medium) for medium in missing.values()]
            computed = self._compute(media, None, counts, **kwargs).pooler_output
            for name, medium in zip(missing, computed, strict=True):
                self._store.put(name, medium)
                latents[name] = medium
        dtype = next(iter(latents.values())).dtype
        shape = (len(pixel_values), self._config.perceiver_num_latents, self._config.vision_hidden_size)
        states = torch.zeros(shape, dtype=dtype, device=pixel_values.device)
        for i, name in names.items():
            states[i] = latents[name]
        return BaseModelOutputWithPooling(pooler_output=states)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
