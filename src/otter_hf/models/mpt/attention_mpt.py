"""
ALiBi self-attention for every attention implementation.

ALiBi ([Press et al., 2021](https://huggingface.co/papers/2108.12409)) adds `slope[h] * (k - q)` to the score of query
position `q` and key position `k` in head `h`. Softmax ignores a constant added to a row, so positions may be counted
from anywhere, and left padding needs no correction.

| implementation      | how the bias gets in                                                                      |
|---------------------|-------------------------------------------------------------------------------------------|
| `eager`             | one additive mask `(B, H, Q, K)` per forward, in float32                                  |
| `sdpa`              | eight extra channels of queries and keys whose dot product is the bias: no mask, so the   |
|                     | causal flash kernels run; with a filled cache, the additive mask                          |
| `flex_attention`    | a `score_mod`: nothing is materialized                                                    |
| `varlen_sdpa`       | as `sdpa`; packed rows through torch's variable-length kernel, where that runs            |
| `flash_attention_2` | its argument `alibi_slopes`; padded and packed rows through the variable-length kernel    |

FlashAttention 3 and 4 have no such argument, and take fewer widths of heads than the extra channels would need.

Shapes: B rows, H heads, Q queries, K keys, L tokens, D channels per head. The model passes what these functions need
beyond transformers' attention interface as keyword arguments: `alibi_slopes (H,)` and, for packed rows, where samples
begin and end: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k`, as transformers' flash attention.
"""

import math

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.masking_utils import BlockMask, create_causal_mask
from transformers.modeling_flash_attention_utils import (
    FLASH_ATTN_KERNEL_FALLBACK,
    _upad_input,
    lazy_import_flash_attention,
)
from transformers.modeling_utils import AttentionInterface
from transformers.utils.import_utils import is_tracing

from ..host_reads import reads_are_free
from ..varlen_attention import packed_boundaries, varlen_sdpa_attention_forward


# Score of a masked key: its softmax weight underflows to 0 against any ALiBi bias, and it is finite in float16, so
# that a row without a single visible key (left padding) stays free of NaN.
MASKED_SCORE = -3e4


def alibi_slopes(n_heads: int, alibi_bias_max: float = 8, device: torch.device | str | None = None) -> torch.Tensor:
    """
    MosaicML's ALiBi slopes `(n_heads,)`, float32: `2 ** (-alibi_bias_max * i / n)` for `i = 1..n`, where `n` is
    `n_heads` rounded up to a power of two; if that adds heads, the slopes of odd `i` come after those of even `i`, and
    the first `n_heads` count.
    """
    n = 2 ** math.ceil(math.log2(n_heads))
    slopes = 2.0 ** (torch.arange(1, n + 1, dtype=torch.float32, device=device) * (-alibi_bias_max / n))
    if n != n_heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:n_heads]
    return slopes


def create_alibi_mask(
    config: PreTrainedConfig,
    slopes: torch.Tensor,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
) -> torch.Tensor:
    """
    ALiBi bias and causal, padding and packing mask in one additive mask `(B, H, Q, K)`: float32 for `eager`, whose
    softmax runs in float32, otherwise the dtype of `inputs_embeds`.
    """
    mask = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        allow_is_causal_skip=False,
    )  # (B, 1, Q, K), bool for sdpa, additive for eager
    first_query = past_key_values.get_query_offset() if past_key_values is not None else 0
    queries = torch.arange(mask.shape[-2], device=slopes.device) + first_query  # (Q,)
    keys = torch.arange(mask.shape[-1], device=slopes.device)  # (K,)
    bias = slopes.view(1, -1, 1, 1) * (keys - queries[:, None])  # (1, H, Q, K)
    if mask.dtype == torch.bool:
        mask = torch.where(mask, bias, MASKED_SCORE)
    else:
        mask = (bias + mask).clamp(min=MASKED_SCORE)
    return mask if config._attn_implementation == "eager" else mask.to(inputs_embeds.dtype)


def prepare_alibi_attention(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    cu_seq_lens: torch.Tensor | None = None,
) -> tuple[torch.Tensor | BlockMask | None, dict]:
    """
    What the blocks need for `config._attn_implementation`, computed once per forward.

    Rows are packed if `position_ids (B, L)` restart, there is no `attention_mask` and no cache (transformers' rule).
    `cu_seq_lens` are the sample boundaries of a padding-free collator, if it gave any.

    Returns:
        The attention mask in the form that implementation takes, and the keyword arguments for every block.

    Raises:
        ValueError: if the implementation has no place for the ALiBi bias.
    """
    implementation = config._attn_implementation
    if implementation != "eager" and implementation not in ALL_ATTENTION_FUNCTIONS._local_mapping:
        raise ValueError(
            f"attn_implementation={implementation!r} has no ALiBi bias; use 'sdpa', 'varlen_sdpa', "
            "'flex_attention', 'flash_attention_2' or 'eager'."
        )
    slopes = alibi_slopes(config.n_heads, config.alibi_bias_max, device=inputs_embeds.device)
    kwargs = {"alibi_slopes": slopes}
    arguments = {
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
    }
    if implementation == "eager":
        return create_alibi_mask(config, slopes, **arguments), kwargs
    if implementation == "flex_attention":
        return create_causal_mask(config=config, **arguments), kwargs

    maybe_packed = position_ids is not None and attention_mask is None and past_key_values is None
    if implementation in ("sdpa", "varlen_sdpa"):
        tracing = is_tracing(inputs_embeds)
        # Sample lengths cannot be read while tracing: packed rows then take the additive mask.
        if not _only_new_keys(attention_mask, past_key_values, inputs_embeds.shape[1]) or (maybe_packed and tracing):
            return create_alibi_mask(config, slopes, **arguments), kwargs
        # a mask that hides nothing costs a little, waiting for a device to say so costs more
        if attention_mask is not None and not tracing and reads_are_free(attention_mask) and attention_mask.all():
            attention_mask = None
    elif maybe_packed and cu_seq_lens is not None:
        return None, kwargs
    else:
        attention_mask = create_causal_mask(config=config, **arguments)  # None or (B, K)
    if maybe_packed and cu_seq_lens is None:
        kwargs |= packed_boundaries(position_ids.expand(inputs_embeds.shape[:2]))
    return attention_mask, kwargs


def _only_new_keys(attention_mask: torch.Tensor | None, past_key_values: Cache | None, length: int) -> bool:
    """Whether queries attend to nothing but the `length` tokens at hand, under at most a mask `(B, length)`."""
    if attention_mask is not None and attention_mask.shape[1:] != (length,):
        return False
    if past_key_values is None:
        return True
    if length == 1:  # a decoding step, which shall not read
        return False
    seen = past_key_values.get_seq_length()
    if isinstance(seen, torch.Tensor) and is_tracing(seen):  # a static cache counts in a tensor
        return False
    return bool(seen == 0)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference: softmax in float32 of `scaling * query @ key.T + attention_mask`. Returns output and weights."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling + attention_mask  # (B, H, Q, K), float32
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights  # (B, Q, H, D), (B, H, Q, K)


def alibi_channels(
    slopes: torch.Tensor,
    length: int,
    scaling: float,
    dtype: torch.dtype,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Channels `(H, L, 8)` for the queries and `(H, L, 8)` (with a padding mask `(B, H, L, 8)`) for the keys whose dot
    product, times `scaling`, is the ALiBi bias, and about `MASKED_SCORE` for keys where `padding_mask (B, L)` is 0.

    `slope * position` is split into pieces that bfloat16 holds exactly, and the query's pieces are subtracted from the
    key's one by one: for nearby tokens, the only ones with weight in a steep head, the large parts cancel without
    rounding. In float32 the bias is therefore more precise than `slope * (k - K + 1)` added to the score, and float16
    and bfloat16 lose nothing at position 10,000. Put these channels first: kernels add up channels in order.
    """
    unit = 32.0  # a power of two, shared out so that float16 holds slope * position of long sequences
    slopes = slopes / (scaling * unit)
    coarse = slopes.bfloat16().float()  # 8 bits: times a position below 65,536 it is exact in float32
    positions = torch.arange(length, device=slopes.device, dtype=torch.float32)
    bias = coarse[:, None] * positions  # (H, L)
    first = bias.bfloat16().float()
    second = (bias - first).bfloat16().float()
    third = bias - first - second + (slopes - coarse)[:, None] * positions
    one, zero = torch.full_like(bias, unit), torch.zeros_like(bias)

    query_channels = torch.stack([one, -first, one, -second, one, -third, one, zero], dim=-1)  # (H, L, 8)
    key_channels = torch.stack([first, one, second, one, third, one, zero, zero], dim=-1)  # (H, L, 8)
    if padding_mask is not None:
        masked = (padding_mask == 0) * max(MASKED_SCORE / (scaling * unit), -6e4)  # (B, L), finite in float16
        padding_channels = nn.functional.pad(masked[..., None], (6, 1))  # (B, L, 8): the seventh channel
        key_channels = key_channels + padding_channels[:, None]  # (B, H, L, 8)
    return query_channels.to(dtype), key_channels.to(dtype)


def alibi_sdpa_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    alibi_slopes: torch.Tensor,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    `scaled_dot_product_attention` under an additive mask `(B, H, Q, K)`, or, if the mask is `None` or a padding mask
    `(B, L)`, its causal kernels on queries and keys widened by [`alibi_channels`]. Packed rows are computed sample by
    sample, so their cost grows with the sum of the squared sample lengths.
    """
    sdpa = nn.functional.scaled_dot_product_attention
    if attention_mask is not None and attention_mask.ndim == 4:
        output = sdpa(query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling)
        return output.transpose(1, 2).contiguous(), None

    batch_size, n_heads, length, head_dim = query.shape
    key, value = key[:, :, :length], value[:, :, :length]  # a static cache also returns its empty slots
    query_channels, key_channels = alibi_channels(alibi_slopes, length, scaling, query.dtype, attention_mask)
    shape = (batch_size, n_heads, length, -1)
    query = torch.cat([query_channels.expand(shape), query], dim=-1)  # (B, H, L, 8 + D)
    key = torch.cat([key_channels.expand(shape), key], dim=-1)  # (B, H, L, 8 + D)
    # flash kernels want one width for all three
    value = nn.functional.pad(value, (0, query.shape[-1] - head_dim))  # (B, H, L, D + 8)

    if cu_seq_lens_q is None:
        output = sdpa(query, key, value, dropout_p=dropout, scale=scaling, is_causal=True).transpose(1, 2)
    else:
        output, _ = varlen_sdpa_attention_forward(
            module,
            query,
            key,
            value,
            None,
            scaling=scaling,
            dropout=dropout,
            is_causal=True,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
        )
    return output[..., :head_dim].contiguous(), None  # (B, L, H, D)


def alibi_flex_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BlockMask,
    scaling: float,
    alibi_slopes: torch.Tensor,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    `flex_attention` with the bias in its `score_mod`.

    Raises:
        ValueError: if dropout is asked for, or the mask is a dense 4-D tensor; the kernel has neither.
    """
    if dropout > 0:
        raise ValueError(f"flex_attention has no dropout; set attn_pdrop ({dropout}) to 0 or use 'sdpa'.")
    if not isinstance(attention_mask, BlockMask):
        raise ValueError("flex_attention takes an attention_mask of shape (B, L); a 4-D mask needs 'sdpa' or 'eager'.")
    # In a tensor, since a number would recompile the kernel at every decoding step.
    first_query = torch.full((), key.shape[2] - query.shape[2], device=query.device)

    def add_bias(score, batch, head, q, k):
        return score + alibi_slopes[head] * (k - q - first_query)

    output = compile_friendly_flex_attention(
        query, key, value, training=module.training, score_mod=add_bias, block_mask=attention_mask, scale=scaling
    )
    return output.transpose(1, 2).contiguous(), None  # (B, Q, H, D)


def alibi_flash_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    alibi_slopes: torch.Tensor,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    FlashAttention-2 with `alibi_slopes`, which transformers' own wrapper drops. Rows padded under a mask `(B, K)` and
    packed rows (`cu_seq_lens_*` and `max_length_*`) go through the variable-length kernel.
    """
    (flash, flash_varlen, _, pad, unpad), _ = lazy_import_flash_attention(module.config._attn_implementation)
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # (B, Q or K, H, D)
    batch_size, length = query.shape[:2]
    options = {"dropout_p": dropout, "softmax_scale": scaling, "causal": True, "alibi_slopes": alibi_slopes}

    if attention_mask is not None:
        query, key, value, tokens, cu_seq_lens, max_lengths = _upad_input(
            query, key, value, attention_mask, length, unpad
        )
        output = flash_varlen(query, key, value, *cu_seq_lens, *max_lengths, **options)  # (tokens, H, D)
        return pad(output, tokens, batch_size, length), None

    if cu_seq_lens_q is not None:
        query, key, value = (states.flatten(0, 1) for states in (query, key, value))  # (B * L, H, D)
        output = flash_varlen(
            query, key, value, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **options
        )  # (B * L, H, D)
        return output.unflatten(0, (batch_size, length)), None

    return flash(query, key, value, **options), None  # (B, Q, H, D)


# transformers' registry, with entries of this instance that know ALiBi; `set_attn_implementation` looks for the name
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS["sdpa"] = alibi_sdpa_forward
ALL_ATTENTION_FUNCTIONS["varlen_sdpa"] = alibi_sdpa_forward  # sample by sample anyway
ALL_ATTENTION_FUNCTIONS["flex_attention"] = alibi_flex_forward
ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = alibi_flash_forward
# where transformers gets FlashAttention-2 from if the flash-attn package is missing
ALL_ATTENTION_FUNCTIONS[FLASH_ATTN_KERNEL_FALLBACK["flash_attention_2"]] = alibi_flash_forward
