"""
The layers of Flamingo: perceiver resampler, gated cross-attention, and the wrapper around a decoder layer.

Shape legend: N media or blocks of text tokens, c tokens of a block, T media of a row, F frames of one medium, S frames
of all media, v vision tokens of one frame, n latents of one medium, D vision width, H heads, d head width.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..host_reads import numbers_on, reads_are_free
from ..media_attention import MediaBlocks, MediaSegments, make_media_blocks, make_media_segments
from ..media_cache import MediaCacheMixin
from ..mixed_dtypes import in_dtype_of
from ..varlen_attention import has_varlen_kernel
from .configuration_flamingo import FlamingoConfig


# all the same here: flex attention exists for masks, and there is none
_TORCH_ATTENTION = ("sdpa", "varlen_sdpa", "flex_attention")


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """
    `(N, H, c, d)` queries over `(N, H, n, d)` keys and values -> `(N, c, H, d)`, weights `(N, H, c, n)`.
    `attention_mask`: `(N, 1, 1, n)` bool or None.
    """
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def make_media_groups(
    config: FlamingoConfig, media_index: torch.Tensor, num_media: int, dtype: torch.dtype, in_order: bool = False
) -> MediaBlocks | MediaSegments | None:
    """
    The groups of tokens that cross-attention takes, for all layers; None without any image.

    Segments go through the variable-length kernel of flash attention or of torch, or on a CPU one by one through
    torch's attention, where that costs less than empty slots and copied keys. Elsewhere a call per segment costs more:
    blocks are a batch.

    Args:
        media_index: `(B, L)`.
        num_media: T, images stored per row.
        dtype: of the computation.
        in_order: see `make_media_segments`.
    """
    if num_media == 0:
        return None
    device = media_index.device
    regrouped = num_media > 1 and media_index.shape[1] > 1 and not is_torchdynamo_compiling()
    if regrouped and (
        is_flash_attention_requested(config)
        or (config._attn_implementation in _TORCH_ATTENTION and reads_are_free(media_index))
        or (config._attn_implementation == "varlen_sdpa" and has_varlen_kernel(device, dtype))
    ):
        return make_media_segments(media_index, num_media, config.perceiver_num_latents, in_order)
    return make_media_blocks(media_index, num_media)


class CrossAttention(nn.Module):
    """Bias-free multi-head attention of queries over the keys and values of one source."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: FlamingoConfig, query_dim: int, source_dim: int, num_heads: int, head_dim: int):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.scaling = head_dim**-0.5
        inner_dim = num_heads * head_dim
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(source_dim, 2 * inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, query_dim, bias=False)

    def attend(
        self, query: torch.Tensor, key_value: torch.Tensor, attention_mask: torch.Tensor | None = None, **flash_kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        `query (N, c, H*d)`, `key_value (N, n, 2*H*d)` -> `(N, c, H*d)` and, by eager attention only, the weights
        `(N, H, c, n)`. `attention_mask (N, 1, 1, n)`: bool, False hides a key; None where there is nothing to hide.
        `flash_kwargs`: as for transformers' flash attention, `cu_seq_lens_q` and so on.
        """
        states = (query, *key_value.chunk(2, dim=-1))
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in states)  # (N, H, ., d)
        implementation = self.config._attn_implementation
        # flash attention knows no mask but that of padding on the left
        if implementation in _TORCH_ATTENTION or (attention_mask is not None and implementation != "eager"):
            implementation = "varlen_sdpa"
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, is_causal=False, **flash_kwargs
        )
        return output.flatten(2), weights


class FeedForward(nn.Sequential):
    """LayerNorm, expand, GELU, contract; the indices 0, 1 and 3 are part of the published weight names."""

    def __init__(self, dim: int, mult: int):
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, mult * dim, bias=False),
            nn.GELU(),
            nn.Linear(mult * dim, dim, bias=False),
        )


class PerceiverBlock(GradientCheckpointingLayer, CrossAttention):
    """The latents attend to the medium and to themselves, then pass a feed-forward layer."""

    def __init__(self, config: FlamingoConfig):
        dim = config.vision_hidden_size
        super().__init__(config, dim, dim, config.perceiver_num_heads, config.perceiver_head_dim)
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, config.perceiver_ff_mult)

    def forward(
        self,
        latents: torch.Tensor,
        media: torch.Tensor,
        groups: Sequence[tuple[int, int]],
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        `latents (N, n, D)` -> `(N, n, D)`.

        Args:
            media: `(S*v, D)`, the tokens of all media, one behind the other.
            groups: how many media have how many tokens, in order: one attention call for each pair, which needs no
                mask. All layers run once whatever the groups, as sharded training wants of every rank.
            attention_mask: `(N, 1, 1, F*v + n)` bool, for a single group.
        """
        normed = self.norm_latents(latents)
        sizes = [size for size, _ in groups]
        is_folded = self._media_are_constant(media)
        media = self._project_constant(media) if is_folded else self.norm_media(media)
        own_sources = self.to_kv(normed) if is_folded else normed
        sources = [
            torch.cat([of_group.unflatten(0, (size, -1)), own], dim=1)  # (size, tokens + n, D or 2*H*d)
            for of_group, own, size in zip(
                _split(media, [size * tokens for size, tokens in groups]),
                _split(own_sources, sizes),
                sizes,
                strict=True,
            )
        ]
        if is_folded:
            key_values = sources
        else:
            key_value = self.to_kv(_join([source.flatten(0, 1) for source in sources]))  # (S*v + N*n, 2*H*d)
            key_values = _split(key_value, [len(source) * source.shape[1] for source in sources])
            key_values = [own.unflatten(0, (size, -1)) for own, size in zip(key_values, sizes, strict=True)]
        attended = [
            self.attend(query, of_group, attention_mask)[0]  # (size, n, H*d)
            for query, of_group in zip(_split(self.to_q(normed), sizes), key_values, strict=True)
        ]
        latents = latents + self.to_out(_join(attended))
        return latents + self.feed_forward(latents)

    def _media_are_constant(self, media: torch.Tensor) -> bool:
        """Whether in training no gradient goes on into media, and both layers are plain and whole."""
        return (
            torch.is_grad_enabled()
            and self.to_kv.weight.requires_grad
            and not media.requires_grad
            and not is_torchdynamo_compiling()
            and (type(self.norm_media), type(self.to_kv)) == (nn.LayerNorm, nn.Linear)
            and all(type(part.weight) is nn.Parameter for part in (self.norm_media, self.to_kv))  # FSDP's are DTensors
            and self.to_kv.weight.shape[1] == media.shape[-1]  # sharded by ZeRO-3 it is empty
            and not any((part._forward_hooks or part._forward_pre_hooks) for part in (self.norm_media, self.to_kv))
        )

    def _project_constant(self, media: torch.Tensor) -> torch.Tensor:
        """
        `to_kv(norm_media(media))` with the norm's weight and bias in the matrix: their gradients come with the
        matrix's, and the one of all media, which nobody else asks for, is never computed.
        """
        normed = nn.functional.layer_norm(media, media.shape[-1:], eps=self.norm_media.eps)
        matrix = self.to_kv.weight
        return nn.functional.linear(normed, matrix * self.norm_media.weight, matrix @ self.norm_media.bias)


def _split(states: torch.Tensor, sizes: list[int]) -> Sequence[torch.Tensor]:
    return (states,) if len(sizes) == 1 else states.split(sizes)


def _join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """As `torch.cat`, which would copy a part that is alone."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class PerceiverResampler(nn.Module):
    """
    Turns the features of an image or video into a fixed number of latents (Alayrac et al. 2022, section 3.1.1;
    Jaegle et al. 2021, https://huggingface.co/papers/2103.03206).
    """

    def __init__(self, config: FlamingoConfig):
        super().__init__()
        dim = config.vision_hidden_size
        self.latents = nn.Parameter(torch.empty(config.perceiver_num_latents, dim))
        self.frame_embs = None
        if config.max_num_frames is not None:
            self.frame_embs = nn.Parameter(torch.empty(config.max_num_frames, dim))
        self.layers = nn.ModuleList([PerceiverBlock(config) for _ in range(config.perceiver_depth)])
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        features: torch.Tensor,
        frame_counts: Sequence[int] | None = None,
        frame_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Features of N media -> `(N, n, D)`.

        Args:
            features: `(N, F, v, D)`; or, with `frame_counts`, `(S, v, D)`.
            frame_counts: the number of frames of each of the N media, whose S frames follow each other in `features`.
                Media of one length should be next to each other: each run of them is one attention call.
            frame_mask: `(N, F)` bool, True for frames that are there; the others cost as much and change nothing. Its
                shapes depend on no value, as a compiled graph needs.

        Raises:
            ValueError: for more frames than the model has frame embeddings.
        """
        features = in_dtype_of(self.latents, features)
        attention_mask = None
        if frame_counts is None:
            num_media, longest, num_tokens = features.shape[:3]
            groups = [(num_media, longest * num_tokens)]
            if frame_mask is not None:
                of_token = frame_mask.repeat_interleave(num_tokens, dim=1)  # (N, F*v)
                attention_mask = nn.functional.pad(of_token, (0, len(self.latents)), value=True)[:, None, None]
        else:
            num_media, longest, num_tokens = len(frame_counts), max(frame_counts), features.shape[1]
            groups = [(len([*run]), count * num_tokens) for count, run in itertools.groupby(frame_counts)]
        if self.frame_embs is not None:
            max_num_frames = self.frame_embs.shape[0]
            if longest > max_num_frames:
                raise ValueError(
                    f"pixel_values has {longest} frames per medium, but the model has embeddings for "
                    f"{max_num_frames} (config.max_num_frames); sample at most {max_num_frames} frames."
                )
            place = slice(longest)
            if frame_mask is not None:
                place = (frame_mask.cumsum(dim=1) - 1).clamp(min=0)  # (N, F)
            elif frame_counts is not None:
                place = numbers_on(features.device, [i for count in frame_counts for i in range(count)])
            features = features + self.frame_embs[place].unsqueeze(-2)
        media = features.reshape(-1, features.shape[-1])  # (S*v, D)
        latents = self.latents.expand(num_media, -1, -1)
        for layer in self.layers:
            latents = layer(latents, media, groups, attention_mask)
        return self.norm(latents)


class GatedCrossAttention(CrossAttention):
    """Text tokens attend to the latents of the one image each of them sees; tokens that see none get 0."""

    def __init__(self, config: FlamingoConfig, layer_idx: int):
        hidden_size = config.text_config.hidden_size
        super().__init__(
            config, hidden_size, config.vision_hidden_size, config.cross_attn_num_heads, config.cross_attn_head_dim
        )
        self.layer_idx = layer_idx
        self.norm = nn.LayerNorm(hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        vision_states: torch.Tensor | None,
        media_groups: MediaBlocks | MediaSegments,
        media_cache: MediaCacheMixin | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        `hidden_states (B, L, hidden)`; `vision_states (B, T, n, D)` of the images new in this call, or None when all
        are in `media_cache` already. Returns `(B, L, hidden)` and the weights `(N, H, c, n)` of `attend`.
        """
        if vision_states is None:
            key_value = media_cache.media_key_values[self.layer_idx]
        else:
            # not in four dimensions: bitsandbytes' 8-bit layers take at most three
            key_value = self.to_kv(vision_states.flatten(0, 1))  # (B*T, n, 2*H*d)
            key_value = key_value.unflatten(0, vision_states.shape[:2])  # (B, T, n, 2*H*d)
            if media_cache is not None:
                key_value = media_cache.update_media(key_value, self.layer_idx)
        query = media_groups.gather_tokens(self.to_q(self.norm(hidden_states)))  # (N, c, H*d)
        key_value = media_groups.gather_media(key_value)  # (N, n, 2*H*d)
        attended, weights = self.attend(query, key_value, **media_groups.flash_kwargs)
        return self.to_out(media_groups.scatter_tokens(attended)), weights


class GatedCrossAttentionBlock(GradientCheckpointingLayer):
    """Tanh-gated cross-attention and feed-forward (Alayrac et al. 2022, section 3.1.2)."""

    def __init__(self, config: FlamingoConfig, layer_idx: int):
        super().__init__()
        self.attn = GatedCrossAttention(config, layer_idx)
        self.attn_gate = nn.Parameter(torch.empty(1))
        self.feed_forward = FeedForward(config.text_config.hidden_size, config.cross_attn_ff_mult)
        self.ff_gate = nn.Parameter(torch.empty(1))
        self.on_text = config.cross_attn_on_text

    # tensors that carry gradients come first and by position: reentrant checkpointing follows only those
    def forward(
        self,
        hidden_states: torch.Tensor,
        vision_states: torch.Tensor | None,
        media_groups: MediaBlocks | MediaSegments | None,
        media_cache: MediaCacheMixin | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        `(B, L, hidden)` -> `(B, L, hidden)` and the attention weights `(N, H, c, n)`; without any image only the
        feed-forward part acts, as published, or with `cross_attn_on_text=False` nothing.
        """
        if media_groups is None and not self.on_text:
            return hidden_states, None
        weights, text_states = None, hidden_states
        hidden_states = in_dtype_of(self.attn_gate, hidden_states)
        if media_groups is not None:
            if vision_states is not None:
                vision_states = in_dtype_of(self.attn_gate, vision_states)
            attended, weights = self.attn(hidden_states, vision_states, media_groups, media_cache)
            hidden_states = hidden_states + attended * self.attn_gate.tanh()
        update = self.feed_forward(hidden_states) * self.ff_gate.tanh()
        if not self.on_text:
            update = update * media_groups.visible[..., None]
        hidden_states = hidden_states + update
        return in_dtype_of(text_states, hidden_states), weights


class FlamingoDecoderLayer(nn.Module):
    """
    A decoder layer of the text model, untouched, with an optional gated block in front.

    A plain module, not a checkpointing one: both parts checkpoint themselves, and a checkpoint around both would
    recompute the gated block twice and break reentrant checkpointing.
    """

    def __init__(self, decoder_layer: nn.Module, gated_cross_attn_layer: GatedCrossAttentionBlock | None):
        super().__init__()
        self.gated_cross_attn_layer = gated_cross_attn_layer
        self.decoder_layer = decoder_layer

    def forward(
        self,
        hidden_states,
        *args,
        vision_states=None,
        media_groups=None,
        media_cache=None,
        media_outputs: dict[str, list] | None = None,
        **kwargs,
    ):
        """
        As the wrapped layer; the first three media arguments are those of [`GatedCrossAttentionBlock`].

        `media_outputs` collects what transformers' hooks on the text model cannot see: the input of each layer in
        front of its gated block, and the weights of cross-attention.
        """
        if media_outputs is not None:
            media_outputs["inputs"].append(hidden_states)
        if self.gated_cross_attn_layer is not None:
            hidden_states, weights = self.gated_cross_attn_layer(
                hidden_states, vision_states, media_groups, media_cache
            )
            if media_outputs is not None and weights is not None:
                media_outputs["cross_attentions"].append(media_groups.scatter_weights(weights))
        return self.decoder_layer(hidden_states, *args, **kwargs)
