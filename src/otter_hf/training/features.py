"""Training from a store on disk: what is frozen of a Flamingo's eyes sees each medium once, not once an epoch."""

from pathlib import Path

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..models.flamingo import FlamingoModel
from ..models.media_folder import DEFAULT_MAX_BYTES, MediaFolder, hash_of_tensor
from ..models.media_store import fingerprint_of_eyes, name_of_medium
from .freezing import is_trained


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
    if is_trained(tower):
        raise ValueError("media_store needs a vision tower that is not trained: add vision to freeze.")
    if is_trained(model.perceiver):
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
        features = self._store.fetch(
            dict(zip(names, pixel_values, strict=True)),
            lambda frames: self._compute(torch.stack(frames), **kwargs).last_hidden_state,
        )
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

        def compute(media: list[torch.Tensor]) -> torch.Tensor:
            padded = nn.utils.rnn.pad_sequence(media, batch_first=True)
            return self._compute(padded, None, [len(medium) for medium in media], **kwargs).pooler_output

        latents = self._store.fetch({name: frames[i] for i, name in names.items()}, compute)
        dtype = next(iter(latents.values())).dtype
        shape = (len(pixel_values), self._config.perceiver_num_latents, self._config.vision_hidden_size)
        states = torch.zeros(shape, dtype=dtype, device=pixel_values.device)
        for i, name in names.items():
            states[i] = latents[name]
        return BaseModelOutputWithPooling(pooler_output=states)
