"""The cache of a batch that rows join and leave between decoding steps."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .media_cache import MediaCacheMixin


# columns for tokens to come when a layer is laid out anew, which copies all that it holds
_ROOM = 64


@dataclass
class _Window:
    """The part of a layer's tensors that is in use: so many rows, and the columns from `start` to `end`."""

    rows: int = 0
    start: int = 0
    end: int = 0
    max_rows: int = 0
    max_columns: int = 0


class _BatchLayer(CacheLayerMixin):
    """Keys and values `(max_rows, H, max_columns, d)`; `update` writes the column at the end of the window."""

    is_sliding = False

    def __init__(self, window: _Window):
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # zeros: what a mask hides must be finite all the same
        shape = (self.window.max_rows, key_states.shape[1], self.window.max_columns)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values `(B, H, S + 1, d)` with those of the new token of each row, `(B, H, 1, d)`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.window
        self.keys[: window.rows, :, window.end] = key_states[:, :, 0]
        self.values[: window.rows, :, window.end] = value_states[:, :, 0]
        used = (slice(window.rows), slice(None), slice(window.start, window.end + 1))
        return self.keys[used], self.values[used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.window.end - self.window.start

    def get_max_length(self) -> int:
        return -1


class Member(NamedTuple):
    """
    A row of another cache that joins.

    Args:
        row: which.
        length: how many of its tokens, from the first on.
        medium: the medium that the row's tokens see from now on, from 1; 0 for none.
    """

    row: int
    length: int
    medium: int


class BatchCache(MediaCacheMixin, Cache):
    """
    Keys and values of rows of different lengths, which all end at the same column: what a batch padded on the left
    has, so that masks, positions, ALiBi and sliding windows are those of such a batch, for any decoder.

    A row that leaves gives its place to the last one, and there are never columns that no row uses. Of the media of a
    row only the one that its next tokens see is kept: `media_key_values` holds one per row, and `media_index` says 1,
    or 0 where a row has none.

    Args:
        max_tokens: rows times columns that the tensors never exceed, unless `add` is asked for more.
        device: where the model takes its inputs.
    """

    def __init__(self, max_tokens: int, device: torch.device):
        self._window = _Window()
        super().__init__(layer_class_to_replicate=functools.partial(_BatchLayer, self._window))
        self.max_tokens = max_tokens
        self.device = device
        self.lengths: list[int] = []  # tokens of each row
        self._media: dict[int, torch.Tensor] = {}  # (max_rows, 1, n, 2 * inner) by layer
        self._sees_medium: list[bool] = []

    @property
    def taken(self) -> int:
        """Tokens that the tensors have room for: rows times columns."""
        return self._window.max_rows * self._window.max_columns

    def add(self, cache: Cache | None, members: Sequence[Member]) -> None:
        """Let rows of `cache`, which are copied, join behind those that are here. None for rows without a token."""
        window = self._window
        self._make_room(window.rows + len(members), max(member.length for member in members))
        media = getattr(cache, "media_key_values", {}) if any(member.medium for member in members) else {}
        for layer, states in media.items():
            if layer not in self._media:
                self._media[layer] = states.new_zeros(window.max_rows, 1, *states.shape[2:])
        for member in members:
            columns = slice(window.end - member.length, window.end)
            for index in range(0 if cache is None or not member.length else len(cache.layers)):
                source = cache.layers[index]
                if len(self.layers) == index:
                    self.layers.append(self.layer_class_to_replicate())
                layer = self.layers[index]
                if not layer.is_initialized:
                    layer.lazy_initialization(source.keys, source.values)
                layer.keys[window.rows, :, columns] = source.keys[member.row, :, : member.length]
                layer.values[window.rows, :, columns] = source.values[member.row, :, : member.length]
            for layer, states in self._media.items():
                states[window.rows, 0] = media[layer][member.row, member.medium - 1] if member.medium else 0
            window.rows += 1
            self.lengths.append(member.length)
            self._sees_medium.append(bool(member.medium))
        self._rows_changed()

    def remove(self, row: int) -> None:
        """Free a row; the last one takes its place."""
        window = self._window
        last = window.rows - 1
        if row != last:
            used = (slice(None), slice(window.start, window.end))
            for layer in self.layers:
                layer.keys[row][used] = layer.keys[last][used]
                layer.values[row][used] = layer.values[last][used]
            for states in self._media.values():
                states[row] = states[last]
        for numbers in (self.lengths, self._sees_medium):
            numbers[row] = numbers[last]
            numbers.pop()
        window.rows = last
        self._rows_changed()

    def advance(self) -> None:
        """Count the token that the last step wrote for each row, and have room for another."""
        self._window.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def prepare_step(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Positions `(B, 1)` of the next tokens, and the mask `(B, S + 1)`, 1 for tokens; None if it hides nothing."""
        self._make_room(self._window.rows, 0)
        lengths = torch.tensor(self.lengths, device=self.device)[:, None]  # (B, 1)
        longest = max(self.lengths)
        if min(self.lengths) == longest:
            return lengths, None
        columns = torch.arange(longest + 1, device=lengths.device)
        return lengths, (columns >= longest - lengths).long()

    def update_media_index(self, media_index: torch.Tensor) -> None:
        """Nothing: what a row sees stays."""

    def _rows_changed(self) -> None:
        window = self._window
        if window.rows == 0:  # nothing is kept for a batch that is over
            self.layers.clear()
            self._media.clear()
            window.start = window.end = window.max_rows = window.max_columns = 0
        window.start = window.end - max(self.lengths, default=0)
        self.media_key_values = {layer: states[: window.rows] for layer, states in self._media.items()}
        self.media_index = torch.tensor(self._sees_medium, device=self.device).long()[:, None]  # (B, 1)

    def _make_room(self, rows: int, length: int) -> None:
        """Lay out the tensors anew unless `rows` of up to `length` tokens, and a token more for each, fit in them."""
        window = self._window
        used = window.end - window.start
        if rows <= window.max_rows and length <= window.end < window.max_columns:
            return
        # room beside what is needed, as far as the budget has it
        length = max(length, used)
        wanted = window.max_rows if rows <= window.max_rows else 2 * rows
        max_rows = max(rows, min(wanted, self.max_tokens // (length + 1)))
        max_columns = max(length + 1, min(length + _ROOM, self.max_tokens // max_rows))
        old = (slice(window.rows), slice(None), slice(window.start, window.end))
        new = (slice(window.rows), slice(None), slice(length - used, length))
        regrown = max_rows != window.max_rows
        window.max_rows, window.max_columns = max_rows, max_columns
        for layer in self.layers:
            keys, values = layer.keys, layer.values
            layer.lazy_initialization(keys, values)
            layer.keys[new], layer.values[new] = keys[old], values[old]
        if regrown:
            for layer, states in self._media.items():
                self._media[layer] = states.new_zeros(max_rows, *states.shape[1:])
                self._media[layer][: window.rows] = states[: window.rows]
            self.media_key_values = {layer: states[: window.rows] for layer, states in self._media.items()}
        window.start, window.end = length - used, length
