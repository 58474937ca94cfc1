"""Who sees which image: the one place that turns `media_index` into attention.

`media_index (B, L)` holds, for every text token, the 1-based position in its row of the image it sees; 0 means it
sees none. A token never sees more than one image (Alayrac et al. 2022, section 3.1.3), so no mask over all images is
ever needed: tokens are regrouped so that each group sees exactly one image, and the work grows with the text alone,
not with text x images. The groups are either

- segments, all tokens of an image, of any length, for variable-length attention: nothing is padded or copied; or
- blocks of one length, for attention in batches: their shapes depend on no value, as a compiled graph needs.

Shape legend: B rows, L text tokens, T images of a row, n latents of an image, N groups, c tokens of a block, D width.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

from .host_reads import reads_are_free


def running_media_index(
    is_media: torch.Tensor, seen: torch.Tensor | None = None, in_view: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The default rule: a token sees the last image placed at or before it.

    Args:
        is_media: `(B, L)` bool, True at `<image>` tokens.
        seen: `(B,)` int64, images already seen by each row in earlier, cached calls; the next is numbered `seen + 1`.
        in_view: `(B,)` int64, the image the last cached token sees, and with it every token before a new image. Given
            together with `seen`.

    Returns:
        `media_index (B, L)` int64.
    """
    media_index = is_media.long().cumsum(dim=-1)  # (B, L)
    if seen is None:
        return media_index
    return torch.where(media_index > 0, media_index + seen[:, None], in_view[:, None])


def batch_first_media(pixel_values: torch.Tensor, batch_size: int) -> torch.Tensor:
    """`(B, C, H, W)`, `(B, T, C, H, W)` or `(B, T, F, C, H, W)` -> `(B, T, F, C, H, W)`; ValueError otherwise."""
    if pixel_values.ndim == 4:
        pixel_values = pixel_values[:, None, None]
    elif pixel_values.ndim == 5:
        pixel_values = pixel_values[:, :, None]
    if pixel_values.ndim != 6 or pixel_values.shape[0] != batch_size:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; expected (B, T, F, C, H, W), (B, T, C, H, W) or "
            f"(B, C, H, W) with B = {batch_size}, the rows of input_ids."
        )
    return pixel_values


def split_media(inputs: Mapping[str, torch.Tensor]) -> list[list[torch.Tensor]]:
    """
    Of each row of a batch its media, `(F, C, H, W)` pixels of their frames without those that pad.

    Args:
        inputs: `input_ids (B, L)`, and `pixel_values (B, T, F, C, H, W)` with `pixel_attention_mask (B, T, F)`, if
            there are any. A medium without frames is padding itself.
    """
    num_rows = len(inputs["input_ids"])
    if inputs.get("pixel_values") is None:
        return [[] for _ in range(num_rows)]
    pixels = batch_first_media(inputs["pixel_values"], num_rows)
    if inputs.get("pixel_attention_mask") is None:
        return [list(row) for row in pixels]
    mask = inputs["pixel_attention_mask"].bool().cpu()
    return [
        [medium[frames] for medium, frames in zip(*row, strict=True) if frames.any()]
        for row in zip(pixels, mask, strict=True)
    ]


def media_behind(media: Mapping[str, torch.Tensor], seen: torch.Tensor, new: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Of each row the media behind those it has seen, aligned to the left; `{}` if there are none.

    Args:
        media: `(B, T, ...)` each, under the names of model inputs; `pixel_attention_mask` hides what pads.
        seen: `(B,)` int64, how many of each row's media stand in front.
        new: `(B,)` int64, how many are wanted of it.
    """
    most = int(new.max())
    if most <= 0:
        return {}
    place = torch.arange(most, device=seen.device)  # (T_new,)
    source = place + seen[:, None]  # (B, T_new)
    chosen = {}
    for name, values in media.items():
        rows = torch.arange(len(values), device=values.device)[:, None]
        chosen[name] = values[rows, source.clamp(max=values.shape[1] - 1).to(values.device)]
    if (mask := chosen.get("pixel_attention_mask")) is not None:
        chosen["pixel_attention_mask"] = mask * (place < new[:, None]).to(mask.device)[..., None]
    return chosen


class MediaBlocks(NamedTuple):
    """
    Text tokens regrouped into N blocks of c that each see one image.

    A plain tuple of tensors, so that accelerate's device hooks move it with the other layer arguments.
    Where blocks are rows (one image per row, or one token per row as in decoding), nothing is regrouped.
    """

    visible: torch.Tensor  # (B, L) bool, the token sees some image
    media_of_block: torch.Tensor | None  # (N,) int64 into the B*T images; None: block i sees image i
    # (N, c) int64 into the B*L tokens, unused slots repeat a token of the row; None: block i is row i
    token_of_slot: torch.Tensor | None
    slot_of_token: torch.Tensor | None  # (B*L,) int64 into the N*c slots; None: block i is row i

    def gather_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, L, D)` token features -> `(N, c, D)`."""
        if self.token_of_slot is None:
            return tokens
        return tokens.flatten(0, 1)[self.token_of_slot]

    def gather_media(self, media: torch.Tensor) -> torch.Tensor:
        """`(B, T, n, D)` image features -> `(N, n, D)`, the image each block sees."""
        media = media.flatten(0, 1)  # (B*T, n, D)
        return media if self.media_of_block is None else media.index_select(0, self.media_of_block)

    def scatter_tokens(self, blocks: torch.Tensor) -> torch.Tensor:
        """`(N, c, D)` -> `(B, L, D)`; tokens that see no image get 0."""
        tokens = blocks
        if self.slot_of_token is not None:
            tokens = blocks.flatten(0, 1).index_select(0, self.slot_of_token)  # (B*L, D)
            tokens = tokens.view(*self.visible.shape, -1)
        return tokens * self.visible[..., None]

    def scatter_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Attention weights `(N, H, c, n)` -> `(B, H, L, n)`; tokens that see no image get 0."""
        per_token = self.scatter_tokens(weights.transpose(1, 2).flatten(2))  # (B, L, H*n)
        return per_token.unflatten(-1, (weights.shape[1], -1)).transpose(1, 2)

    @property
    def flash_kwargs(self) -> FlashAttentionKwargs:
        """Empty: blocks are a batch of equal lengths."""
        return {}


class MediaSegments(NamedTuple):
    """
    Text tokens in the order of the N = B*T images; the tokens of an image are a segment, which may be empty.

    Has the methods of [`MediaBlocks`], but all segments are in one row: that is how variable-length kernels take them.
    """

    visible: torch.Tensor  # (B, L) bool, the token sees some image
    seen: torch.Tensor | None  # (N,) bool, the segment has tokens; None: all have
    token_of_place: torch.Tensor | None  # (B*L,) int64; None: tokens are in this order already
    place_of_token: torch.Tensor | None  # (B*L,) int64, the inverse
    flash_kwargs: FlashAttentionKwargs  # where segments begin and end, among tokens and among latents

    def gather_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, L, D)` token features -> `(1, B*L, D)`."""
        tokens = tokens.flatten(0, 1)
        return (tokens if self.token_of_place is None else tokens.index_select(0, self.token_of_place))[None]

    def gather_media(self, media: torch.Tensor) -> torch.Tensor:
        """`(B, T, n, D)` image features -> `(1, N*n, D)`."""
        media = media.flatten(0, 1)  # (N, n, D)
        if self.seen is not None and media.requires_grad:
            # kernels may leave the gradients of keys in an empty segment as they find them
            media = torch.where(self.seen[:, None, None], media, 0)
        return media.flatten(0, 1)[None]

    def scatter_tokens(self, segments: torch.Tensor) -> torch.Tensor:
        """`(1, B*L, D)` -> `(B, L, D)`; tokens that see no image get 0."""
        tokens = segments[0]
        tokens = tokens if self.place_of_token is None else tokens.index_select(0, self.place_of_token)
        return tokens.view(*self.visible.shape, -1) * self.visible[..., None]


def make_media_segments(
    media_index: torch.Tensor, num_media: int, num_latents: int, in_order: bool = False
) -> MediaSegments:
    """
    Sort tokens by the image they see. Nothing is read back from a device; on a CPU, where reading costs nothing,
    tokens that are in order as they are are not copied.

    Args:
        media_index: `(B, L)` int64, see the module's docstring; values above `num_media` are an error of the caller.
        num_media: T, images stored per row.
        num_latents: n.
        in_order: whether no token sees an earlier image than the token before it, as by [`running_media_index`].
    """
    batch_size, length = media_index.shape
    row = torch.arange(batch_size, device=media_index.device)[:, None]  # (B, 1)
    # what sees nothing rides along with the first image of its row
    image = ((media_index - 1).clamp(min=0) + row * num_media).flatten()  # (B*L,) into the B*T images
    lengths = image.new_zeros(batch_size * num_media).scatter_add_(0, image, torch.ones_like(image))  # (N,)
    seen = lengths > 0
    if reads_are_free(image):
        in_order = in_order or bool((image.diff() >= 0).all())
        seen = None if seen.all() else seen
    order = inverse = None
    if not in_order:
        order = image.argsort(stable=True)  # (B*L,)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    cu_seq_lens = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))  # (N + 1,)
    return MediaSegments(
        media_index > 0,
        seen,
        order,
        inverse,
        FlashAttentionKwargs(
            cu_seq_lens_q=cu_seq_lens,
            cu_seq_lens_k=torch.arange(len(lengths) + 1, device=image.device, dtype=torch.int32) * num_latents,
            max_length_q=length,  # kernels take a bound
            max_length_k=num_latents,
        ),
    )


def make_media_blocks(media_index: torch.Tensor, num_media: int) -> MediaBlocks:
    """
    Group tokens by the image they see.

    The tokens of an image fill consecutive blocks of c, the last of them partly, so `floor((L + T (c - 1)) / c)`
    blocks per row always suffice: all shapes follow from `(B, L)` and `num_media` alone, and nothing is read back from
    the device.

    Args:
        media_index: `(B, L)` int64, see the module's docstring; values above `num_media` are an error of the caller.
        num_media: T, images stored per row.
    """
    batch_size, length = media_index.shape
    visible = media_index > 0
    if num_media == 1:
        return MediaBlocks(visible, None, None, None)
    image = (media_index - 1).clamp(min=0)  # (B, L); what sees nothing rides along with the first image
    row = torch.arange(batch_size, device=media_index.device)[:, None]  # (B, 1)
    if length == 1:
        return MediaBlocks(visible, (row * num_media + image).flatten(), None, None)

    tokens_of_image = image.new_zeros(batch_size, num_media).scatter_add_(1, image, torch.ones_like(image))  # (B, T)
    # large enough that copying an image's keys and values for each block does not dominate
    block = 64 if 128 * num_media <= length else 32
    num_blocks = (length + num_media * (block - 1)) // block
    slots_of_image = (tokens_of_image + block - 1) // block * block
    slot_end = slots_of_image.cumsum(dim=1)  # (B, T)
    # an image's tokens start this many places later among the slots than among the tokens sorted by image
    shift = (slot_end - slots_of_image) - (tokens_of_image.cumsum(dim=1) - tokens_of_image)  # (B, T)

    order = image.argsort(dim=1, stable=True)  # (B, L)
    position = torch.arange(length, device=media_index.device).expand(batch_size, length)
    slot_in_order = position + shift.gather(1, image.gather(1, order))
    slot_of_token = torch.empty_like(order).scatter_(1, order, slot_in_order)  # (B, L)
    token_of_slot = order.new_zeros(batch_size, num_blocks * block).scatter_(1, slot_of_token, position)
    block_start = torch.arange(num_blocks, device=media_index.device) * block
    image_of_block = torch.searchsorted(slot_end, block_start.expand(batch_size, -1).contiguous(), right=True)
    # blocks past the last token see any image
    image_of_block = image_of_block.clamp(max=num_media - 1)
    return MediaBlocks(
        visible,
        (row * num_media + image_of_block).flatten(),
        (row * length + token_of_slot).view(-1, block),
        (row * (num_blocks * block) + slot_of_token).flatten(),
    )
