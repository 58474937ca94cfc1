"""Many prompts for one model: in batches of like length, and what all begin with read once."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..models.media_store import MediaStore, hash_of_tensor
from ..models.prefix_cache import compute_prefix, expand, shared_length


# fewer tokens than these are read sooner than copied
_LEAST_SHARED = 8


@dataclass(frozen=True)
class TokenizedPrompt:
    """
    Args:
        ids: `(L,)` int64, without padding.
        media: one value per image token: latents `(n, D)`, or a patch of an OtterHD.
        keys: what these are known by.
    """

    ids: torch.Tensor
    media: list[torch.Tensor]
    keys: list


@dataclass(frozen=True)
class Batch:
    """
    Args:
        numbers: of its prompts, as they were given.
        inputs: for the model, padded on the left.
        padding: columns of padding of each row.
        prefix: cache of what all rows begin with, see [`~otter_hf.models.prefix_cache`]; None if they share little.
    """

    numbers: list[int]
    inputs: dict[str, torch.Tensor]
    padding: list[int]
    prefix: Cache | None

    def cache(self) -> Cache | None:
        """What is read already of its rows, or None."""
        return None if self.prefix is None else expand(self.prefix, self.padding)


class PromptBatches:
    """
    Args:
        model: an Otter, Flamingo or OtterHD, whose weights stay as they are.
        pad_token_id: what rows are padded with.
        media: of a Flamingo or Otter.
    """

    def __init__(self, model: PreTrainedModel, pad_token_id: int, media: MediaStore | None):
        self._model, self._pad, self._media = model, pad_token_id, media
        self._prefix: tuple[torch.Tensor, list, Cache] | None = None

    def split(self, inputs: Mapping[str, Any]) -> list[TokenizedPrompt]:
        """The prompts of a processor's batch; media that were not seen before are encoded."""
        rows = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        if self._media is not None:
            media = self._media.media_of(inputs)
            return [
                TokenizedPrompt(ids, [value for _, value in own], [key for key, _ in own])
                for ids, own in zip(rows, media, strict=True)
            ]
        counts = [int((ids == self._model.config.image_token_id).sum()) for ids in rows]
        patches = inputs.get("pixel_values")
        if patches is None:
            return [TokenizedPrompt(ids, [], []) for ids in rows]
        of_rows = patches.reshape(-1, patches.shape[-1]).to(self._model.dtype).split(counts)
        return [
            TokenizedPrompt(ids, list(own), [hash_of_tensor(patch) for patch in own])
            for ids, own in zip(rows, of_rows, strict=True)
        ]

    def batches(
        self, prompts: Sequence[TokenizedPrompt], size: int, wanted: Collection[int] | None = None
    ) -> Iterator[Batch]:
        """
        All prompts, the shortest first.

        Args:
            prompts: they decide together what is read in which batch.
            size: prompts of a batch.
            wanted: numbers of prompts; batches without any of these are left out.
        """
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].ids))
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        groups = [group for group in groups if wanted is None or not set(wanted).isdisjoint(group)]
        prefix = self._read_prefix(prompts) if groups else None
        for group in groups:
            inputs, padding = self._pack([prompts[number] for number in group])
            yield Batch(group, inputs, padding, prefix)

    def _read_prefix(self, prompts: Sequence[TokenizedPrompt]) -> Cache | None:
        """Always read in one go: what comes out depends on these prompts alone, not on those before them."""
        if len(prompts) < 2:
            return None
        keys = [prompt.keys for prompt in prompts]
        ids = [prompt.ids for prompt in prompts]
        # a model answers to the last token
        length = min(shared_length(ids, keys, self._model.config.image_token_id), min(map(len, ids)) - 1)
        if length < _LEAST_SHARED:
            return None
        ids = ids[0][:length]
        shared = keys[0][: int((ids == self._model.config.image_token_id).sum())]
        if self._prefix is None or not torch.equal(self._prefix[0], ids) or self._prefix[1] != shared:
            inputs, _ = self._pack(prompts[:1])
            self._prefix = (ids, shared, compute_prefix(self._model, inputs, length))
        return self._prefix[2]

    def _pack(self, prompts: Sequence[TokenizedPrompt]) -> tuple[dict[str, torch.Tensor], list[int]]:
        longest = max(len(prompt.ids) for prompt in prompts)
        padding = [longest - len(prompt.ids) for prompt in prompts]
        ids = torch.full((len(prompts), longest), self._pad)
        mask = torch.zeros_like(ids)
        for row, (prompt, width) in enumerate(zip(prompts, padding, strict=True)):
            ids[row, width:], mask[row, width:] = prompt.ids, 1
        device = self._model.device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if any(prompt.media for prompt in prompts):
            if self._media is not None:
                inputs["image_hidden_states"] = self._media.stack([prompt.media for prompt in prompts])
            else:
                patches = [patch for prompt in prompts for patch in prompt.media]
                inputs["pixel_values"] = torch.stack(patches).to(device)
        return inputs, padding
