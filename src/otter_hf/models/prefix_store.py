"""What prompts begin with alike, found as they come: examples sent with every question, a conversation's turns."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import BatchFeature, PreTrainedModel
from transformers.cache_utils import Cache

from .batch_media import in_steps
from .media_attention import split_media
from .media_cache import MediaCacheMixin
from .media_folder import hash_of_tensor
from .media_store import MediaStore, name_of_medium
from .otterhd import OtterHDForConditionalGeneration
from .prefix_cache import compute_prefix, crop, shared_length


# a shorter beginning is read again
_LEAST_TOKENS = 32
# prompts with which a new one is compared
_REMEMBERED = 64


@dataclass(eq=False)
class _Prompt:
    """Tokens `(L,)`, what stands at each image token, and their cache, if there is one."""

    ids: torch.LongTensor
    media: list
    cache: Cache | None = None
    nbytes: int = field(init=False)

    def __post_init__(self):
        self.nbytes = 0 if self.cache is None else _bytes_of(self.cache)


class PrefixStore:
    """
    Beginnings of prompts that a model has read, by their tokens and pixels.

    The second prompt that begins as another did has the shared beginning read by itself, and what becomes of it is
    kept for those behind it; all of the prompt, if it goes on where the other ended. So examples that come with every
    question are read twice in all, and each turn of a conversation behind the first is read once, though it comes as
    an ever longer prompt. Answers stay the same to rounding.

    Args:
        model: an Otter, Flamingo or OtterHD whose weights stay as they are while the store is in use.
        media: encoded pictures to share with others.
        max_bytes: of keys and values that are kept, where the model is; those used least recently go first. A
            beginning that takes more is not read here.
        piece_tokens: that are read in one go.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        media: MediaStore | None = None,
        max_bytes: int = 2**30,
        piece_tokens: int = 512,
    ):
        self.model, self.media = model, media
        self.max_bytes, self.piece_tokens = max_bytes, piece_tokens
        self._bytes_per_token = 0.0  # of the last beginning, of which there may be none too large
        self._seen: deque[_Prompt] = deque(maxlen=_REMEMBERED)
        self._kept: OrderedDict[int, _Prompt] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Of what is kept."""
        return sum(kept.nbytes for kept in self._kept.values())

    @torch.no_grad()
    def prefix_of(self, inputs: Mapping, is_cancelled: Callable[[], bool] = lambda: False) -> Cache | None:
        """
        The cache of what a prompt begins with, to be read only; None where nothing is known of it. What it shares with
        an earlier prompt the model reads here; several threads may ask, one at a time is answered.

        Args:
            inputs: of one conversation, as a processor returns them.
            is_cancelled: looked at before each piece; nothing is read any more once it returns True.
        """
        ids = inputs["input_ids"][0].cpu()
        prompt = _Prompt(ids, _media_keys(self.model, inputs))
        with self._lock:
            return self._prefix_of(inputs, prompt, is_cancelled)

    def _prefix_of(self, inputs: Mapping, prompt: _Prompt, is_cancelled: Callable[[], bool]) -> Cache | None:
        ids = prompt.ids
        # the last token is answered to, and is no picture's
        limit = len(ids) - 1
        places = {name: min(limit, self._shared(prompt, kept)) for name, kept in self._kept.items()}
        best = max(places, key=places.__getitem__, default=None)
        held = 0 if best is None or places[best] < _LEAST_TOKENS else places[best]
        wanted = 0
        for seen in self._seen:
            shared = self._shared(prompt, seen)
            wanted = max(wanted, limit if shared == len(seen.ids) else min(limit, shared))
        self._seen.append(prompt)
        cache = None
        if held:
            self._kept.move_to_end(best)
            kept = self._kept[best]
            cache = kept.cache if held == len(kept.ids) else crop(kept.cache, held)
        if wanted < held + _LEAST_TOKENS:
            return cache
        longer = self._read(inputs, wanted, None if cache is None else crop(cache, held), is_cancelled)
        if longer is None:
            return cache
        self._keep(_Prompt(ids[:wanted], prompt.media, longer))
        return longer

    def _read(
        self, inputs: Mapping, wanted: int, cache: Cache | None, is_cancelled: Callable[[], bool]
    ) -> Cache | None:
        """The cache of the first `wanted` tokens, from one that holds fewer; None if that would be too large."""
        inputs = self._on_device(inputs, wanted, is_cancelled)
        held = 0 if cache is None else cache.get_seq_length()
        for end in (*range(held + self.piece_tokens, wanted, self.piece_tokens), wanted):
            if is_cancelled() or wanted * self._bytes_per_token > self.max_bytes:
                return None
            cache = compute_prefix(self.model, inputs, end, cache)
            self._bytes_per_token = _bytes_of(cache) / end
        return cache if _bytes_of(cache) <= self.max_bytes else None

    def _keep(self, prompt: _Prompt) -> None:
        self._kept[id(prompt)] = prompt
        while self.nbytes > self.max_bytes and self._kept:
            self._kept.popitem(last=False)

    def _shared(self, one: _Prompt, other: _Prompt) -> int:
        return shared_length((one.ids, other.ids), (one.media, other.media), self.model.config.image_token_id)

    def _on_device(self, inputs: Mapping, wanted: int, is_cancelled: Callable[[], bool]) -> BatchFeature:
        """The inputs, with what the model made of the media among the first `wanted` tokens where that is kept."""
        if self.media is not None and inputs.get("pixel_values") is not None:
            count = int((inputs["input_ids"][0, :wanted] == self.model.config.image_token_id).sum())
            latents: list[torch.Tensor] = []
            # few at a time, as others wait for the store meanwhile
            for media in in_steps(split_media(inputs)[0][:count]):
                if is_cancelled():
                    break
                latents += [encoded for _, encoded in self.media.encode_media(media)]
            inputs = {name: value for name, value in inputs.items() if not name.startswith("pixel_")}
            if latents:
                inputs["image_hidden_states"] = self.media.stack([latents])
        return BatchFeature(dict(inputs)).to(self.model.device, self.model.dtype)


def _media_keys(model: PreTrainedModel, inputs: Mapping) -> list:
    """For each image token of a row what tells its pixels: those of its medium, or of its patch."""
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return []
    if isinstance(model, OtterHDForConditionalGeneration):
        pixels = pixels.reshape(-1, pixels.shape[-1])
        grids = inputs.get("image_grid_thw")
        counts = [1] * len(pixels) if grids is None else grids.prod(dim=1).tolist()
        keys = [hash_of_tensor(patches) for patches in pixels.split(counts)]
        return [(key, patch) for key, count in zip(keys, counts, strict=True) for patch in range(count)]
    return [name_of_medium(medium) for medium in split_media(inputs)[0]]


def _bytes_of(cache: Cache) -> int:
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    if isinstance(cache, MediaCacheMixin):
        tensors += cache.media_key_values.values()
    return sum(tensor.nbytes for tensor in tensors)


__all__ = ["PrefixStore"]
