"""
FlashAttention-2 needs a GPU. These two compute what its documentation says, with its argument names and order, and
`install` puts them where transformers finds the package's.
"""

import torch
from transformers import modeling_flash_attention_utils
from transformers.modeling_flash_attention_utils import _lazy_define_process_function, _pad_input, _unpad_input


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    """`(B, Q, H, d)`, `(B, K, H', d)` -> `(B, Q, H, d)`; queries are aligned to the last keys."""
    assert dropout_p == 0.0 and softcap == 0.0
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])  # (Q, K)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden |= distance < 0
    if window_size[0] >= 0:
        hidden |= distance > window_size[0]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    """`(tokens, H, d)`, all samples in one row."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q and int(cu_seqlens_k.diff().max()) == max_seqlen_k
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert min(lengths_q) > 0  # older kernels leave the gradients of unseen keys as they find them
    samples = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat(
        [
            flash_attn_func(*(states[None] for states in sample), dropout_p, softmax_scale, causal, window_size)[0]
            for sample in samples
        ]
    )


def install(monkeypatch) -> list[str]:
    """Returns the list to which every call's name is added."""
    calls = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return call

    functions = (counted(flash_attn_func), counted(flash_attn_varlen_func), None, _pad_input, _unpad_input)
    process = _lazy_define_process_function(flash_attn_varlen_func)
    monkeypatch.setattr(
        modeling_flash_attention_utils,
        "lazy_import_flash_attention",
        lambda implementation, **kwargs: (functions, (process, process)),
    )
    return calls
