"""
Variable-length attention on torch's own kernels, in the calling convention of transformers' flash attention.

Samples packed into one row need no mask if each is computed by itself; `cu_seq_lens_q` and `cu_seq_lens_k` say where
they begin. `attn_implementation="varlen_sdpa"` takes the variable-length kernel that comes with torch
(`torch.nn.attention.varlen`, FlashAttention-2 without a package to build) in 16 bits on CUDA, and elsewhere one call
of `scaled_dot_product_attention` per sample. Without these boundaries it is transformers' `sdpa`. A decoder of
transformers that is given nothing but `position_ids` that restart hands them over in the place of its mask.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, find_packed_sequence_indices, sdpa_mask
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils.import_utils import is_torchdynamo_compiling, is_tracing


@functools.cache
def torch_varlen_kernel():
    """torch's `varlen_attn`, or None where this torch has none that takes a scale and a window (before 2.11)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys() else None


def has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's own variable-length kernel runs on the device (CUDA from Ampere on) in this precision."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and torch_varlen_kernel() is not None
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def packed_boundaries(position_ids: torch.Tensor) -> FlashAttentionKwargs:
    """
    Where the samples packed into `position_ids (B, L)` begin and end, row after row, as variable-length attention
    takes it: a sample starts wherever positions do not go up by one. Empty if no row holds more than one sample. Reads
    the tensor, so it waits for the device.
    """
    samples = find_packed_sequence_indices(position_ids)  # (B, L): 0-based sample of each token in its row
    if samples is None:
        return FlashAttentionKwargs()
    rows = torch.arange(samples.shape[0], device=samples.device)[:, None] * samples.shape[1]
    starts = (samples + rows).flatten().diff() != 0  # (B*L - 1,)
    ends = _ends(starts)
    longest = int(ends.diff().max())
    return FlashAttentionKwargs(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest)


def may_be_packed(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, cu_seq_lens: torch.Tensor | None
) -> bool:
    """
    Whether rows hold several samples by transformers' rule: `position_ids (B, L)` restart, and nothing is masked. A
    cache would hide that from a decoder, so that they saw each other. A traced graph cannot look, and says yes.
    """
    if attention_mask is not None or position_ids is None:
        return False
    if cu_seq_lens is not None or is_tracing(position_ids):
        return True
    return find_packed_sequence_indices(position_ids) is not None


def _ends(starts: torch.Tensor) -> torch.Tensor:
    """`(samples + 1,)` int32: 0, each index behind which `starts (N - 1,)` says that a sample starts, and N."""
    ends = starts.nonzero().flatten() + 1
    return torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(starts) + 1)]).to(torch.int32)


def varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor | None:
    """
    What transformers makes for `varlen_sdpa` in the place of a mask; the arguments are those of its `sdpa_mask`.

    Returns:
        For packed rows where samples begin and end, `(samples + 1,)` int32, and nothing of the size L x L is made;
        otherwise what `sdpa_mask` returns, `(B, 1, Q, K)` bool or None.
    """
    # whoever adds a function to the mask has it called by vmap
    whole = attention_mask is None and q_length == kv_length > 1 and not allow_is_causal_skip and not use_vmap
    if whole and not is_torchdynamo_compiling():
        rows = torch.arange(batch_size, device=device)[:, None]
        earlier = torch.arange(q_length - 1, device=device)[None]
        apart = ~mask_function(rows, 0, earlier + 1, earlier)  # (B, L-1): a token that does not see the one before it
        ahead = mask_function(rows, 0, earlier, earlier + 1)  # blocks that see ahead are no samples
        starts = nn.functional.pad(apart.expand(batch_size, -1), (1, 0), value=True).flatten()[1:]  # (B*L - 1,)
        ends = _ends(starts)
        longest = ends.diff().max()
        if apart.any() and not ahead.any() and (local_size is None or longest <= local_size):
            return ends
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def varlen_sdpa_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Args:
        query, key, value: `(B, H, Q, d)`, and twice `(B, H', K, d)` where H' divides H.
        attention_mask: `(B, 1, Q, K)`, or the boundaries that [`varlen_mask`] makes; not looked at if
            `cu_seq_lens_q` is given and no sample exceeds `sliding_window`.
        scaling, dropout, is_causal: see transformers' `sdpa_attention_forward`.
        cu_seq_lens_q, cu_seq_lens_k: `(samples + 1,)` int32, where samples begin and end among the B*Q queries and the
            B*K keys, row after row.
        max_length_q, max_length_k: length of the longest sample, or more; without them it is read from the device.
        sliding_window: of the layer, in tokens.

    Returns:
        `(B, Q, H, d)` and None.
    """
    options = {"scaling": scaling, "dropout": dropout, "is_causal": is_causal}
    if cu_seq_lens_q is None and attention_mask is not None and attention_mask.ndim == 1:
        cu_seq_lens_q = cu_seq_lens_k = attention_mask
    if cu_seq_lens_q is not None and max_length_q is None:
        max_length_q, max_length_k = (int(ends.diff().max()) for ends in (cu_seq_lens_q, cu_seq_lens_k))
    if cu_seq_lens_q is None or (sliding_window is not None and max_length_q > sliding_window):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)
    rows = query.shape[0]
    query, key, value = (_as_autocast(states).transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    # (B*Q, H, d), and twice (B*K, H', d)
    if dropout == 0 and query.shape[-1] % 8 == 0 and has_varlen_kernel(query.device, query.dtype):
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        output = torch_varlen_kernel()(
            query,
            key,
            value,
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_length_q,
            max_length_k,
            scale=scaling,
            window_size=(-1, 0) if causal else (-1, -1),
        )  # (B*Q, H, d)
        return output.unflatten(0, (rows, -1)), None
    lengths_q, lengths_k = cu_seq_lens_q.diff().tolist(), cu_seq_lens_k.diff().tolist()
    samples = zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True)
    outputs = [
        sdpa_attention_forward(module, *(s.transpose(0, 1)[None] for s in sample), None, **options, **kwargs)[0]
        for sample, length in zip(samples, lengths_q, strict=True)
        if length > 0
    ]  # each (1, l, H, d)
    return torch.cat(outputs, dim=1).view(rows, -1, *outputs[0].shape[2:]), None


def _as_autocast(states: torch.Tensor) -> torch.Tensor:
    """
    In the precision of autocast, as torch has it for its own attention: rotary embeddings and norms of queries and
    keys leave these in float32, which no kernel for several samples takes.
    """
    kind = states.device.type
    if states.dtype == torch.float32 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return states.to(torch.get_autocast_dtype(kind))
    return states
