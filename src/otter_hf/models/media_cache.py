"""Images in the key/value cache: what cross-attention keeps between decoding steps, on any transformers `Cache`.

The keys and values of an image never change, so each gated layer projects them once and the cache object holds them
beside the text layers (`cache.layers` stays what transformers expects). It also remembers which image every cached
token sees, which is all that a later token needs to find its own. Nothing is kept on modules.
"""

import torch
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache, StaticCache
from transformers.utils.import_utils import is_torchdynamo_compiling

from .host_reads import reads_are_free


class MediaCacheMixin:
    """
    Cross-attention state on a `Cache`.

    Attributes:
        media_key_values: layer index -> `(B, T, n, 2 * inner)` projected keys and values of that layer.
        media_index: `(B, S)` int64, the image each cached token sees; for a static cache, whose tensors must not
            grow, only two columns: the largest value so far and the last one. None before the first call.
    """

    media_key_values: dict[int, torch.Tensor]
    media_index: torch.Tensor | None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.media_key_values, self.media_index = {}, None

    @property
    def num_media(self) -> int:
        """T, images stored per row (padded to the row with most)."""
        return next(iter(self.media_key_values.values())).shape[1] if self.media_key_values else 0

    @property
    def media_seen(self) -> torch.Tensor | None:
        """`(B,)` int64, images each row has seen so far; None for an empty cache."""
        return None if self.media_index is None else self.media_index.amax(dim=1)

    @property
    def media_in_view(self) -> torch.Tensor | None:
        """`(B,)` int64, the image the last cached token of each row sees; None for an empty cache."""
        return None if self.media_index is None else self.media_index[:, -1]

    def update_media(self, key_values: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """
        Add the keys and values of new images behind those each row has already seen (rows may differ in number).

        Args:
            key_values: `(B, T_new, n, 2 * inner)`.
            layer_idx: decoder layer the block stands in front of.

        Returns:
            `(B, T_old + T_new, n, 2 * inner)`; image `i` of a row at place `i - 1`.
        """
        old = self.media_key_values.get(layer_idx)
        if old is not None and self._ends_with_last_medium(old.shape[1]):
            key_values = torch.cat([old, key_values], dim=1)
        elif old is not None:
            seen = self.media_seen[:, None]  # (B, 1)
            place = torch.arange(old.shape[1] + key_values.shape[1], device=seen.device)  # (T,)
            source = torch.where(place < seen, place, old.shape[1] + place - seen)  # (B, T)
            source = source.clamp(max=place.shape[0] - 1).to(key_values.device)
            row = torch.arange(source.shape[0], device=source.device)[:, None]
            key_values = torch.cat([old, key_values], dim=1)[row, source]
        self.media_key_values[layer_idx] = self._fix_address(key_values)
        return key_values

    def _ends_with_last_medium(self, num_media: int) -> bool:
        """Whether every row is known to have seen all `num_media` that are stored, so that none is padding."""
        if is_torchdynamo_compiling() or not reads_are_free(self.media_index):
            return False
        return bool((self.media_seen == num_media).all())

    def update_media_index(self, media_index: torch.Tensor) -> None:
        """Remember the image each new token sees. `media_index`: `(B, L)` int64."""
        if not self.is_compileable:
            old = [] if self.media_index is None else [self.media_index]
            self.media_index = torch.cat([*old, media_index], dim=1)
            return
        largest = media_index.amax(dim=1)
        if self.media_index is None:
            self.media_index = self._fix_address(torch.stack([largest, media_index[:, -1]], dim=1))
        else:
            largest = torch.maximum(largest, self.media_seen)
            self.media_index.copy_(torch.stack([largest, media_index[:, -1]], dim=1))

    def _fix_address(self, states: torch.Tensor) -> torch.Tensor:
        """In a static cache a tensor stays where it is: CUDA graphs then read it in place, as the text layers'."""
        if self.is_compileable and not is_torchdynamo_compiling():
            torch._dynamo.mark_static_address(states)
        return states

    def _apply_to_media(self, function) -> None:
        self.media_key_values = {layer: function(states) for layer, states in self.media_key_values.items()}
        if self.media_index is not None:
            self.media_index = function(self.media_index)

    def reset(self):
        """As in transformers' caches; the media go, too."""
        super().reset()
        self.media_key_values, self.media_index = {}, None

    def reorder_cache(self, beam_idx: torch.LongTensor):
        """As in transformers' caches, for beams; media go with their rows."""
        super().reorder_cache(beam_idx)
        self._apply_to_media(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int):
        """As in transformers' caches; media are repeated with their rows."""
        super().batch_repeat_interleave(repeats)
        self._apply_to_media(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor):
        """As in transformers' caches; media of the other rows go, too."""
        super().batch_select_indices(indices)
        self._apply_to_media(lambda states: states[indices.to(states.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """As in the parent class; images that no remaining token sees are forgotten."""
        super().crop(tokens_to_remove)
        if tokens_to_remove < 0 and self.media_index is not None:
            self.media_index = self.media_index[:, :tokens_to_remove]
            if self.media_index.shape[1] == 0:
                self.media_key_values, self.media_index = {}, None


class MediaDynamicCache(MediaCacheMixin, DynamicCache):
    """A `DynamicCache` that also holds images."""


class MediaStaticCache(MediaCacheMixin, StaticCache):
    """A `StaticCache` that also holds images."""


class MediaQuantizedCache(MediaCacheMixin, QuantizedCache):
    """A `QuantizedCache` that also holds images (their keys and values are not quantized)."""


_MEDIA_CLASSES = {
    DynamicCache: MediaDynamicCache,
    StaticCache: MediaStaticCache,
    QuantizedCache: MediaQuantizedCache,
}


def with_media(cache: Cache) -> Cache:
    """
    Let `cache` hold images too; a cache that already does is returned as it is.

    The object keeps its identity: whoever passed it sees the images appear in it, as with the text layers.

    Raises:
        TypeError: for a cache class whose bookkeeping this module does not know.
    """
    if isinstance(cache, MediaCacheMixin):
        return cache
    if type(cache) not in _MEDIA_CLASSES:
        known = ", ".join(sorted(cls.__name__ for cls in _MEDIA_CLASSES))
        raise TypeError(f"past_key_values is a {type(cache).__name__}, which cannot hold images; use one of {known}.")
    cache.__class__ = _MEDIA_CLASSES[type(cache)]
    cache.media_key_values, cache.media_index = {}, None
    return cache
