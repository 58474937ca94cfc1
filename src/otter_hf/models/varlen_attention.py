"""
Variable-length attention on torch's own kernels, in the calling convention of transformers' flash attention.

Samples packed into one row need no mask if each is computed by itself. FlashAttention does that on CUDA, told by
`cu_seq_lens_q` and `cu_seq_lens_k` where samples begin; `attn_implementation="varlen_sdpa"` does it everywhere, with
one call of `scaled_dot_product_attention` per sample. Without these boundaries it is transformers' `sdpa`.
"""

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def varlen_sdpa_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
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
        cu_seq_lens_q, cu_seq_lens_k: `(samples + 1,)` int32, where samples begin and end among the B*Q queries and the
            B*K keys, row after row.
        max_length_q, max_length_k: length of the longest sample, which only flash attention wants to know.
        sliding_window: of the layer, in tokens.
        kwargs: `scaling`, `dropout`, `is_causal`; see transformers' `sdpa_attention_forward`.

    Returns:
        `(B, Q, H, d)` and None.
    """
    lengths_q = None if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    if lengths_q is None or (sliding_window is not None and max(lengths_q) > sliding_window):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths_k = cu_seq_lens_k.diff().tolist()
    samples = zip(
        *(
            states.transpose(1, 2).flatten(0, 1).split(lengths)  # each (l, H, d)
            for states, lengths in ((query, lengths_q), (key, lengths_k), (value, lengths_k))
        ),
        strict=True,
    )
    outputs = [
        sdpa_attention_forward(module, *(states.transpose(0, 1)[None] for states in sample), None, **kwargs)[0]
        for sample in samples
    ]  # each (1, l, H, d)
    return torch.cat(outputs, dim=1).view(query.shape[0], -1, *outputs[0].shape[2:]), None
