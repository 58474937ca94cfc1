"""Media that come again are not encoded again: worked examples of every question, pictures of earlier turns."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from .fingerprint import digest_of_weights
from .flamingo import FlamingoForConditionalGeneration
from .media_attention import batch_first_media, split_media
from .media_folder import DEFAULT_MAX_BYTES, MediaFolder, hash_of_tensor


class MediaStore:
    """
    Latents that a model made of media, by their pixels. In a Flamingo they depend on nothing but the medium and the
    weights (Alayrac et al. 2022, https://huggingface.co/papers/2204.14198, section 3.1.1): a batch that holds a medium
    for the second time gets them from here.

    Args:
        model: an Otter or Flamingo whose weights stay as they are while the store is in use.
        max_bytes: of the latents that are kept, on the model's device; those used least recently go first. Media of
            the batch at hand are always held.
        folder: where latents are kept on disk, too, see [`~otter_hf.models.media_folder.MediaFolder`]; what others
            keep there is never deleted.
        folder_bytes: most that the folder holds; what is above is encoded in each run.

    Attributes:
        hits, misses: media that were there, in memory or on disk, and that were encoded.
    """

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        max_bytes: int = 2**29,
        folder: str | Path | None = None,
        folder_bytes: int = DEFAULT_MAX_BYTES,
    ):
        self.model = model
        self.folder = None
        if folder is not None:
            self.folder = MediaFolder(folder, fingerprint_of_eyes(model.model), folder_bytes, evicts=False)
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._latents: OrderedDict[str, torch.Tensor] = OrderedDict()  # (n, D) each
        self._bytes = 0
        self._lock = threading.Lock()  # a server's prompts are read in one thread and their beginnings in others

    @torch.no_grad()
    def encode(self, inputs: Mapping) -> dict:
        """
        A batch with `image_hidden_states (B, T, n, D)` in place of `pixel_values`; without pixels as it is.

        Args:
            inputs: as a processor returns them, best still on the CPU: `input_ids (B, L)`, `pixel_values
                (B, T, F, C, H, W)`, `pixel_attention_mask (B, T, F)`.

        Raises:
            ValueError: as `get_image_features`.
        """
        if inputs.get("pixel_values") is None:
            return dict(inputs)
        rows = self.media_of(inputs)
        states = self.stack([[latents for _, latents in media] for media in rows])
        num_media = batch_first_media(inputs["pixel_values"], len(rows)).shape[1]
        # the mask beside it, and what is compiled, keep their number of media
        states = torch.nn.functional.pad(states, (0, 0, 0, 0, 0, num_media - states.shape[1]))
        return {**{k: v for k, v in inputs.items() if k != "pixel_values"}, "image_hidden_states": states}

    @torch.no_grad()
    def media_of(self, inputs: Mapping) -> list[list[tuple[str, torch.Tensor]]]:
        """
        For each row its media in order: what each is known by, and its latents `(n, D)`.

        Args:
            inputs: see `encode`.
        """
        rows = split_media(inputs)
        encoded = iter(self.encode_media([medium for row in rows for medium in row]))
        return [[next(encoded) for _ in row] for row in rows]

    @torch.no_grad()
    def encode_media(self, media: Sequence[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """Of each medium `(F, C, H, W)` what it is known by and its latents `(n, D)`, in one batch if new."""
        keys = [name_of_medium(medium) for medium in media]
        with self._lock:
            latents = self._known(dict.fromkeys(keys))
            missing = {key: medium for key, medium in zip(keys, media, strict=True) if key not in latents}
            self.hits += len(keys) - len(missing)
            self.misses += len(missing)
            if missing:
                new = dict(zip(missing, self._encode(list(missing.values())), strict=True))
                latents |= new
                for key, value in new.items() if self.folder is not None else ():
                    self.folder.put(key, value)
            self._keep(latents)
        return [(key, latents[key]) for key in keys]

    def stack(self, media: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """`image_hidden_states (B, T, n, D)` of each row's latents; zeros where a row has fewer."""
        config = self.model.config
        states = torch.zeros(
            *(len(media), max(map(len, media)), config.perceiver_num_latents, config.vision_hidden_size),
            dtype=next((latents.dtype for row in media for latents in row), self.model.dtype),
            device=self.model.device,
        )
        for row, of_row in enumerate(media):
            for place, latents in enumerate(of_row):
                states[row, place] = latents
        return states

    def _known(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """What is in memory or on disk."""
        known = {key: self._latents.get(key) for key in keys}
        for key in (key for key, value in known.items() if value is None and self.folder is not None):
            if (value := self.folder.get(key)) is not None:
                known[key] = value.to(self.model.device)
        return {key: value for key, value in known.items() if value is not None}

    def _encode(self, media: list[torch.Tensor]) -> torch.Tensor:
        """The latents `(N, n, D)` of N media `(F, C, H, W)` of any number of frames."""
        pixels = torch.nn.utils.rnn.pad_sequence(media, batch_first=True).to(self.model.device, self.model.dtype)
        counts = torch.tensor([len(medium) for medium in media])
        mask = torch.arange(pixels.shape[1]) < counts[:, None]
        return self.model.get_image_features(pixels, mask.to(pixels.device)).pooler_output

    def _keep(self, latents: dict[str, torch.Tensor]) -> None:
        for key, value in latents.items():
            if key not in self._latents:
                # a copy of its own, as a part of a batch would hold all of it
                self._latents[key] = value.clone()
                self._bytes += value.nbytes
            self._latents.move_to_end(key)
        while self._bytes > self.max_bytes and self._latents:
            self._bytes -= self._latents.popitem(last=False)[1].nbytes


def name_of_medium(frames: torch.Tensor) -> str:
    """What a medium `(F, C, H, W)` is known by: a hash of its pixels, as the tower gets them, and its frames."""
    return f"{hash_of_tensor(frames)}-{len(frames)}"


def fingerprint_of_eyes(model, dtype: torch.dtype | None = None, resampler: bool = True) -> str:
    """
    Of all that decides what a Flamingo's vision tower, and its resampler, make of a medium.

    Args:
        model: with `vision_tower` and `perceiver`.
        dtype: of the computation, if it is not that of the weights (autocast).
        resampler: False for the tower alone.
    """
    config = {**model.config.to_dict(), "vision_config": None}
    of_tower = model.config.vision_config.to_dict()
    config = {key: value for key, value in config.items() if key.startswith(("vision", "perceiver", "max_num_frames"))}
    config |= {key: value for key, value in of_tower.items() if not key.startswith(("_", "transformers"))}
    digest = digest_of_weights([model.vision_tower, model.perceiver] if resampler else [model.vision_tower])
    text = repr((digest, sorted(config.items(), key=lambda item: item[0]), dtype))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
