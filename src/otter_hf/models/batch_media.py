"""The pictures and videos of a row of a continuous batch, handed to the model piece by piece with its prompt."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from .media_attention import split_media
from .media_store import MediaStore


# pictures and frames that are encoded between two decoding steps, if no single medium has more
FRAMES_PER_STEP = 8


def in_steps(media: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Media `(F, C, H, W)` in their order, so many at a time as may be encoded between two decoding steps."""
    step: list[torch.Tensor] = []
    for medium in media:
        if step and sum(map(len, step)) + len(medium) > FRAMES_PER_STEP:
            yield step
            step = []
        step.append(medium)
    if step:
        yield step


class FlamingoMedia:
    """
    The media of a row that an Otter or Flamingo answers.

    Args:
        model: whose row it is.
        inputs: of the row, see [`ContinuousBatch.submit`].
        prefix: a cache with the beginning of the prompt.

    Attributes:
        frames: pictures and frames to be encoded.
        in_view: the medium that the answer sees, from 1; 0 for none.

    Raises:
        ValueError: if media and `<image>` tokens differ in number.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any], prefix: Cache | None):
        start = 0 if prefix is None else prefix.get_seq_length()
        places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten().tolist()
        self._places = [place for place in places if place >= start]
        media = _media_of(inputs)
        if len(media) not in (len(places), len(self._places)):
            raise ValueError(
                f"The prompt has {len(places)} `<image>`, {len(self._places)} of them behind the prefix, but inputs "
                f"hold {len(media)} media; pass one for each."
            )
        self._media = media[len(media) - len(self._places) :]  # (F, C, H, W) pixels or (n, D) latents
        self._frames = [len(medium) if medium.ndim == 4 else 0 for medium in self._media]
        self.frames = sum(self._frames)
        # the number a medium has in the cache, which may have forgotten others
        seen, in_view = (getattr(prefix, name, None) for name in ("media_seen", "media_in_view"))
        if seen is None:
            self.in_view = len(self._places)
        else:
            self.in_view = int(seen[0]) + len(self._places) if self._places else int(in_view[0])
        self.rewind()

    def rewind(self) -> None:
        """Begin again."""
        self._taken = slice(0, 0)

    def end_of_piece(self, start: int, stop: int) -> int:
        """Where a piece of the prompt from `start` has to end, at most at `stop`, to have not too many frames."""
        frames = 0
        for place, count in zip(self._places, self._frames, strict=True):
            if start <= place < stop:
                if frames and frames + count > FRAMES_PER_STEP:
                    return place
                frames += count
        return stop

    def take(self, stop: int) -> None:
        """The next piece ends at `stop`."""
        first = self._taken.stop
        self._taken = slice(first, max(first, sum(place < stop for place in self._places)))

    @staticmethod
    def batch(rows: Sequence["FlamingoMedia"], model: PreTrainedModel, store: MediaStore) -> dict[str, torch.Tensor]:
        """What the model is given with this piece of each row: `image_hidden_states (B, T, n, D)`, or nothing."""
        taken = [row._media[row._taken] for row in rows]
        if not any(taken):
            return {}
        encoded = iter(store.encode_media([medium for row in taken for medium in row if medium.ndim == 4]))
        latents = [[next(encoded)[1] if medium.ndim == 4 else medium for medium in row] for row in taken]
        return {"image_hidden_states": store.stack(latents)}


class PatchMedia:
    """The patches of a row that an OtterHD answers; see [`FlamingoMedia`], whose methods it has."""

    frames = in_view = 0  # patches are tokens

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any], prefix: Cache | None):
        start = 0 if prefix is None else prefix.get_seq_length()
        is_patch = inputs["input_ids"][0] == model.config.image_token_id
        total, new = int(is_patch.sum()), int(is_patch[start:].sum())
        patches = inputs.get("pixel_values")
        patches = torch.empty(0, 0) if patches is None else patches.reshape(-1, patches.shape[-1])  # (N, patch width)
        if len(patches) not in (total, new):
            raise ValueError(
                f"The prompt has {total} image tokens, {new} of them behind the prefix, but pixel_values holds "
                f"{len(patches)} patches; pass input_ids and pixel_values of one processor call."
            )
        self._before = is_patch.cumsum(0) - int(is_patch[:start].sum())  # (L,) new patches up to each token
        self._patches = patches[len(patches) - new :]
        self.rewind()

    def rewind(self) -> None:
        """Begin again."""
        self._taken = slice(0, 0)

    def end_of_piece(self, start: int, stop: int) -> int:
        """`stop`: patches are tokens."""
        return stop

    def take(self, stop: int) -> None:
        """The next piece ends at `stop`."""
        self._taken = slice(self._taken.stop, int(self._before[stop - 1]))

    @staticmethod
    def batch(rows: Sequence["PatchMedia"], model: PreTrainedModel, store: None) -> dict[str, torch.Tensor]:
        """What the model is given with this piece of each row: `pixel_values (N, patch width)`, if any has patches."""
        taken = [row._patches[row._taken] for row in rows]
        taken = [patches for patches in taken if len(patches)]
        return {"pixel_values": torch.cat(taken).to(model.device, model.dtype)} if taken else {}


def _media_of(inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The media of one row: `(F, C, H, W)` pixels of its frames, or `(n, D)` latents."""
    mask, latents, pixels = (
        inputs.get(name) for name in ("pixel_attention_mask", "image_hidden_states", "pixel_values")
    )
    if latents is not None and pixels is not None:
        raise ValueError("Give either pixel_values or image_hidden_states, what they were encoded to, not both.")
    if latents is None:
        return split_media(inputs)[0]
    if mask is None:
        return list(latents[0])
    return [medium for medium, frames in zip(latents[0], mask[0], strict=True) if frames.any()]
