"""
FlashAttention-2 needs a GPU. These compute what its documentation says, with its argument names and order; `install`
puts them where transformers finds the package's, `pretend_cuda` where ours finds torch's.
"""

import torch
from transformers import modeling_flash_attention_utils
from transformers.modeling_flash_attention_utils import _lazy_define_process_function, _pad_input, _unpad_input

from otter_hf.models import media_attention, varlen_attention
from otter_hf.models.flamingo import layers_flamingo
from otter_hf.models.mpt import attention_mpt


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
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q and int(cu_seqlens_k.diff().max()) <= max_seqlen_k
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    unseen = (cu_seqlens_q.diff() == 0).repeat_interleave(cu_seqlens_k.diff())  # (tokens,)
    for states in (k, v):
        if states.requires_grad:  # older kernels leave the gradients of unseen keys as they find them
            states.register_hook(lambda grad: grad.masked_fill(unseen[:, None, None], torch.nan))
    samples = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat(
        [
            flash_attn_func(*(states[None] for states in sample), dropout_p, softmax_scale, causal, window_size)[0]
            for sample in samples
        ]
    )


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """torch's own, `torch.nn.attention.varlen`, which knows no CPU: a window is `(-1, 0)` for causal attention."""
    assert window_size in ((-1, -1), (-1, 0)) and query.shape[1] == key.shape[1]
    causal = window_size == (-1, 0)
    return flash_attn_varlen_func(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, 0.0, scale, causal)


def pretend_cuda(monkeypatch) -> None:
    """As on a CUDA device: reading is not free, and torch has a variable-length kernel."""
    for module in (media_attention, layers_flamingo, attention_mpt):
        monkeypatch.setattr(module, "reads_are_free", lambda tensor: False)
    for module in (varlen_attention, layers_flamingo):
        monkeypatch.setattr(module, "has_varlen_kernel", lambda device, dtype: True)
    monkeypatch.setattr(varlen_attention, "torch_varlen_kernel", lambda: varlen_attn)


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
