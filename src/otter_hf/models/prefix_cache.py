"""
What prompts begin with alike, computed once: the keys and values of a prefix, as the cache of any batch that has it.

A batch that is padded on the left has in its first columns the padding of each row and then what the row begins with.
So the cache of a prefix becomes that of the batch by shifting it behind each row's padding, and positions, distances
and sliding windows are those of a batch that was read from its beginning.

Shape legend: B rows, L tokens, S tokens of the prefix, T media of a row, N patches (OtterHD), H heads, d head width.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import ModelOutput

from .flamingo import FlamingoForConditionalGeneration
from .media_attention import media_behind
from .media_cache import MediaCacheMixin, MediaDynamicCache
from .otterhd import OtterHDForConditionalGeneration
from .otterhd.generation_otterhd import patches_between


def can_share_prefixes(model: PreTrainedModel) -> bool:
    """Whether the cache of a model holds all that later tokens need: that of Otter, Flamingo and OtterHD does."""
    return isinstance(model, (FlamingoForConditionalGeneration, OtterHDForConditionalGeneration))


def common_length(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many values `(L,)` and `(M,)` begin with alike."""
    length = min(len(one), len(other))
    return int((one[:length] == other[:length].to(one.device)).long().cumprod(0).sum())


def shared_length(ids: Sequence[torch.Tensor], media: Sequence[Sequence], image_token_id: int | None) -> int:
    """
    How many tokens all prompts begin with, the media among them included.

    Args:
        ids: of each prompt `(L_i,)` int64, without padding.
        media: of each prompt one value per image token, equal where what stands there is the same.
        image_token_id: of the model.

    """
    first, *others = ids
    length = min([len(first), *(common_length(first, other) for other in others)])
    places = (first[:length] == image_token_id).nonzero()[:, 0].tolist()
    for number, place in enumerate(places):
        if any(of_row[number] != media[0][number] for of_row in media[1:]):
            return place
    return length


@torch.no_grad()
def compute_prefix(
    model: PreTrainedModel, inputs: Mapping, length: int | None = None, cache: Cache | None = None
) -> Cache:
    """
    The cache of the first columns of a batch.

    All layers keep all tokens, those with a sliding window, too, so that it can be cut and shifted.

    Args:
        model: an Otter, Flamingo or OtterHD.
        inputs: as a processor or [`~otter_hf.models.media_store.MediaStore`] returns them: `input_ids (B, L)`,
            `attention_mask (B, L)`, padded on the left, and the media of the whole rows.
        length: how many columns; by default all.
        cache: of the first so many columns already, which is extended in place.

    Raises:
        ValueError: as `forward` of the model.
    """
    length = inputs["input_ids"].shape[1] if length is None else length
    if cache is not None and cache.get_seq_length() >= length:
        return cache
    return read_columns(model, inputs, length, cache).past_key_values


@torch.no_grad()
def read_columns(
    model: PreTrainedModel, inputs: Mapping, length: int | None = None, cache: Cache | None = None
) -> ModelOutput:
    """What the model says to the last of the first `length` columns, `logits (B, 1, V)`; see `compute_prefix`."""
    ids = inputs["input_ids"]
    length = ids.shape[1] if length is None else length
    if cache is None:
        is_flamingo = isinstance(model, FlamingoForConditionalGeneration)
        cache = MediaDynamicCache() if is_flamingo else DynamicCache()
    start = cache.get_seq_length()
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return model(
        input_ids=ids[:, start:length],
        attention_mask=mask[:, :length],
        position_ids=positions[:, start:length],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **_media_between(model, inputs, start, length),
    )


def expand(cache: Cache, padding: Sequence[int]) -> Cache:
    """
    The cache of a batch of `len(padding)` rows that all begin with the same S tokens.

    Args:
        cache: of those tokens, of one row; it stays as it is.
        padding: columns of padding in front of each row; such a row has the first `S - padding` of the tokens. With
            beams each row's comes as many times as there are beams.

    Returns:
        A cache of S columns, on which the whole left-padded batch goes on: `model.generate(**batch,
        past_key_values=cache)`.
    """
    return _mapped(
        cache,
        lambda states: _shift(states, padding, 2),
        lambda states: states.expand(len(padding), *states.shape[1:]),
        lambda index: _shift(index, padding, 1),
    )


def crop(cache: Cache, length: int) -> Cache:
    """The first `length` columns of a cache that keeps all, as a cache of its own over the same memory."""
    return _part(cache, slice(None), slice(length))


def row_of(cache: Cache, row: int, padding: int = 0) -> Cache:
    """One row of a cache that keeps all, without its padding, as a cache of its own over the same memory."""
    return _part(cache, slice(row, row + 1), slice(padding, None))


def _part(cache: Cache, rows: slice, columns: slice) -> Cache:
    return _mapped(
        cache,
        lambda states: states[rows, :, columns],
        lambda states: states[rows],
        lambda index: index[rows, columns],
    )


def _mapped(cache: Cache, text: Callable, media: Callable, index: Callable) -> Cache:
    """A cache of functions of another's tensors: keys and values of text, those of media, and `media_index`."""
    has_media = isinstance(cache, MediaCacheMixin)
    mapped = MediaDynamicCache() if has_media else DynamicCache()
    for layer in cache.layers:
        mapped.layers.append(layer_of(text(layer.keys), text(layer.values)))
    if has_media and cache.media_index is not None and mapped.get_seq_length():
        mapped.media_key_values = {layer: media(states) for layer, states in cache.media_key_values.items()}
        mapped.media_index = index(cache.media_index)
    return mapped


def branch(cache: Cache, branches: int, room: int) -> Cache:
    """
    A cache in which each row comes `branches` times, for beams that part from one reading of their prompt.

    What they share is copied once and stays where it is: a step writes behind it, and beams that are put in another
    order within their row move what is behind it only. transformers' own copies all of it in each step, twice.

    Args:
        cache: of the prompts, whose media are what the last token sees, see `forget_media_behind`.
        room: columns that will be added, more or less.
    """
    has_media = isinstance(cache, MediaCacheMixin)
    branched = _BranchedMediaCache() if has_media else DynamicCache()
    for layer in cache.layers:
        branched.layers.append(_BranchedLayer(layer.keys, layer.values, branches, room))
    if has_media and cache.media_index is not None:
        branched.media_key_values = dict(cache.media_key_values)
        branched.media_index = cache.media_index
        branched._apply_to_media(lambda states: states.repeat_interleave(branches, dim=0))
    return branched


class _BranchedLayer(DynamicLayer):
    """Grows within a buffer; see `branch`."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, branches: int, room: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self._shared = keys.shape[-2]
        self._reserve(keys.repeat_interleave(branches, dim=0), values.repeat_interleave(branches, dim=0), room)

    def _reserve(self, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        length = keys.shape[-2]
        self._buffers = [
            nn.functional.pad(states, (0, 0, 0, room)) for states in (keys, values)
        ]  # (B, H, S + room, d)
        self.keys, self.values = (states[:, :, :length] for states in self._buffers)

    def update(self, key_states, value_states, *args, **kwargs):
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if self.keys.data_ptr() != self._buffers[0].data_ptr() or end > self._buffers[0].shape[-2]:
            self._reserve(self.keys, self.values, max(end - start, 32))
        for states, new in zip(self._buffers, (key_states, value_states), strict=True):
            states[:, :, start:end] = new
        self.keys, self.values = (states[:, :, :end] for states in self._buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for states in (self.keys, self.values):
            own = states[:, :, self._shared :]
            own.copy_(own.index_select(0, beam_idx.to(own.device)))


class _BranchedMediaCache(MediaDynamicCache):
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        # beams of a row look at the same medium
        DynamicCache.reorder_cache(self, beam_idx)


def forget_media_behind(cache: Cache | None) -> None:
    """
    Keep, of each row's media, only the one its last token sees: all that later tokens look at, up to new media. Those
    are then to be given as what is new: `generate` would count the whole prompt's.
    """
    if not isinstance(cache, MediaCacheMixin) or cache.num_media < 2:
        return
    rows = torch.arange(len(cache.media_index), device=cache.media_index.device)
    number = (cache.media_in_view - 1).clamp(min=0)  # (B,)
    cache.media_key_values = {
        index: states[rows.to(states.device), number.to(states.device)][:, None]
        for index, states in cache.media_key_values.items()
    }  # (B, 1, n, 2 * inner)
    cache.media_index = cache.media_index.clamp(max=1)


def layer_of(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    """A layer of a cache that holds all tokens, with `(B, H, S, d)` keys and values."""
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _shift(states: torch.Tensor, padding: Sequence[int], dim: int) -> torch.Tensor:
    """`states` of one row, for each row behind so many zeros along `dim`; what does not fit is cut off."""
    rows, length = len(padding), states.shape[dim]
    if not any(padding):
        return states.expand(rows, *states.shape[1:])
    shifted = states.new_zeros(rows, *states.shape[1:])
    for width in sorted(set(padding)):
        at = torch.tensor([row for row, own in enumerate(padding) if own == width], device=states.device)
        if width < length:
            kept = states.narrow(dim, 0, length - width)
            shifted.narrow(dim, width, length - width)[at] = kept.expand(len(at), *kept.shape[1:])
    return shifted


def _media_between(model: PreTrainedModel, inputs: Mapping, start: int, end: int) -> dict[str, torch.Tensor]:
    """What `forward` wants of the media of whole rows for the columns from `start` to `end`."""
    is_media = inputs["input_ids"] == model.config.image_token_id  # (B, L)
    if isinstance(model, OtterHDForConditionalGeneration):
        patches = inputs.get("pixel_values")  # (N, patch width), in the order of their tokens
        if patches is None:
            return {}
        patches = patches_between(is_media, patches.reshape(-1, patches.shape[-1]), start, end)
        return {"pixel_values": patches} if len(patches) else {}
    names = ("image_hidden_states", "pixel_values", "pixel_attention_mask")
    media = {name: inputs[name] for name in names if inputs.get(name) is not None}  # (B, T, ...) each
    return media_behind(media, is_media[:, :start].sum(dim=1), is_media[:, start:end].sum(dim=1))


__all__ = [
    "branch",
    "can_share_prefixes",
    "common_length",
    "compute_prefix",
    "crop",
    "expand",
    "forget_media_behind",
    "layer_of",
    "read_columns",
    "row_of",
    "shared_length",
]
