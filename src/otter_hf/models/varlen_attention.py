"""
Variable-length attention on torch's own kernels, in the calling convention of transformers' flash attention.

Samples packed into one row need no mask if each is computed by itself; `cu_seq_lens_q` and `cu_seq_lens_k` say where
they begin. `attn_implementation="varlen_sdpa"` takes the variable-length kernel that comes with torch
(`torch.nn.attention.varlen`, FlashAttention-2 without a package to build) in 16 bits on CUDA, and elsewhere one call
of `scaled_dot_product_attention` per sample. Without these boundaries it is transformers' `sdpa`.
"""

import functools
import inspect

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


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
        attention_mask: `(B, 1, Q, K)`; not looked at if `cu_seq_lens_q` is given and no sample exceeds
            `sliding_window`.
        scaling, dropout, is_causal: see transformers' `sdpa_attention_forward`.
        cu_seq_lens_q, cu_seq_lens_k: `(samples + 1,)` int32, where samples begin and end among the B*Q queries and the
            B*K keys, row after row.
        max_length_q, max_length_k: length of the longest sample, or more; without them it is read from the device.
        sliding_window: of the layer, in tokens.

    Returns:
        `(B, Q, H, d)` and None.
    """
    options = {"scaling": scaling, "dropout": dropout, "is_causal": is_causal}
    if cu_seq_lens_q is not None and max_length_q is None:
        max_length_q, max_length_k = (int(ends.diff().max()) for ends in (cu_seq_lens_q, cu_seq_lens_k))
    if cu_seq_lens_q is None or (sliding_window is not None and max_length_q > sliding_window):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)
    rows = query.shape[0]
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))  # (B*., H, d)
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
