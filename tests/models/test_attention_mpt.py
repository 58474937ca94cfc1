"""ALiBi on the attention implementations: precision of the SDPA channels, flash- and flex-attention against eager."""

import copy
import shutil

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from otter_hf.models.mpt import OtterMptConfig, OtterMptForCausalLM, attention_mpt
from otter_hf.models.mpt.attention_mpt import MASKED_SCORE, alibi_flex_forward, alibi_sdpa_forward, alibi_slopes


@pytest.mark.parametrize("n_heads, bias_max", [(1, 8), (2, 8), (8, 8), (12, 8), (25, 8), (32, 6)])
def test_slopes_equal_transformers(n_heads, bias_max):
    theirs = build_mpt_alibi_tensor(n_heads, 2, alibi_bias_max=bias_max)  # (H, 1, 2): slope * (-1, 0)
    torch.testing.assert_close(alibi_slopes(n_heads, bias_max), -theirs[:, 0, 0])


def exact_attention(query, key, value, slopes, scaling):
    """Causal ALiBi attention in float64 of the last Q tokens; `(B, H, Q or K, D)` in, `(B, Q, H, D)` out."""
    positions = torch.arange(key.shape[2], dtype=torch.float64)
    distance = positions - positions[-query.shape[2] :, None]
    scores = query.double() @ key.double().transpose(-1, -2) * scaling + slopes.double()[:, None, None] * distance
    weights = scores.masked_fill(distance > 0, -torch.inf).softmax(-1)
    return (weights @ value.double()).transpose(1, 2)


@pytest.mark.parametrize("n_heads", [4, 6])  # 6: slopes that no short float holds
@pytest.mark.parametrize("scaling", [0.25, 0.1, 1 / 256])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 3e-6), (torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
def test_sdpa_channels_are_exact_at_long_positions(n_heads, scaling, dtype, atol):
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, n_heads, 1500, 16, generator=generator).to(dtype).unbind(0)
    slopes = alibi_slopes(n_heads)
    got, _ = alibi_sdpa_forward(None, query, key, value, None, scaling=scaling, alibi_slopes=slopes)
    assert got.dtype == dtype
    for end in (90, 1500):
        states = query[:, :, end - 90 : end], key[:, :, :end], value[:, :, :end]
        expected = exact_attention(*states, slopes, scaling)
        torch.testing.assert_close(got[:, end - 90 : end].double(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("scaling", [0.25, 1 / 256])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 3e-6), (torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
def test_sdpa_padding_channel_hides_keys(dtype, atol, scaling):
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 64, 16, generator=generator).to(dtype).unbind(0)
    padding_mask = torch.ones(2, 64, dtype=torch.long)
    padding_mask[0, :40] = 0
    key[0, :, :40] = 20 * key[0, :, :40]  # loud padding
    slopes = alibi_slopes(4)
    got, _ = alibi_sdpa_forward(None, query, key, value, padding_mask, scaling=scaling, alibi_slopes=slopes)
    assert torch.isfinite(got).all()
    kept = exact_attention(query[:1, :, 40:], key[:1, :, 40:], value[:1, :, 40:], slopes, scaling)
    torch.testing.assert_close(got[:1, 40:].double(), kept, atol=atol, rtol=0)
    unpadded = exact_attention(query[1:], key[1:], value[1:], slopes, scaling)
    torch.testing.assert_close(got[1:].double(), unpadded, atol=atol, rtol=0)


# FlashAttention-2 needs a GPU; these two compute what its documentation says, with its argument names and order.


def reference_flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None
):
    assert alibi_slopes.dtype == torch.float32 and alibi_slopes.shape == (q.shape[2],)
    assert causal and dropout_p == 0.0 and window_size == (-1, -1) and softcap == 0.0
    rows = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]  # queries are aligned to the last keys
    distance = (rows - torch.arange(k.shape[1])).float()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale - alibi_slopes[:, None, None] * distance.abs()
    weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def reference_flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
):  # fmt: skip
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q and int(cu_seqlens_k.diff().max()) == max_seqlen_k
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    samples = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    outputs = [
        reference_flash_attn_func(
            *(states[None] for states in sample), dropout_p, softmax_scale, causal, alibi_slopes=alibi_slopes
        )[0]
        for sample in samples
    ]
    return torch.cat(outputs)


@pytest.fixture
def flash_calls(monkeypatch):
    calls = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return call

    functions = (
        counted(reference_flash_attn_func),
        counted(reference_flash_attn_varlen_func),
        None,
        _pad_input,
        _unpad_input,
    )
    monkeypatch.setattr(attention_mpt, "lazy_import_flash_attention", lambda implementation: (functions, None))
    return calls


def build_pair(implementation, d_model=48, **options):
    torch.manual_seed(0)
    config = OtterMptConfig(vocab_size=101, d_model=d_model, n_heads=3, n_layers=2, initializer_range=0.2, **options)
    eager = OtterMptForCausalLM._from_config(config, attn_implementation="eager").eval()
    other = copy.deepcopy(eager)
    other.config._attn_implementation = implementation
    return eager, other


def token_ids(rows=2, length=20):
    return torch.randint(1, 101, (rows, length), generator=torch.Generator().manual_seed(1))


def masks(ids):
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :6] = 0
    right[1, -7:] = 0
    return {"none": None, "ones": torch.ones_like(ids), "left": left, "right": right}


@pytest.mark.parametrize("padding", ["none", "ones", "left", "right"])
@pytest.mark.parametrize("options", [{}, {"qk_ln": True, "clip_qkv": 1.0, "softmax_scale": 0.3}])
def test_flash_equals_eager(flash_calls, padding, options):
    eager, flash = build_pair("flash_attention_2", **options)
    ids = token_ids()
    mask = masks(ids)[padding]
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    if padding == "left":
        labels[0, 6] = -100  # predicted from a padding token
    losses = [model(ids, attention_mask=mask, labels=labels).loss for model in (eager, flash)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    for expected, got in zip(eager.parameters(), flash.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-5, rtol=1e-4)
    padded = padding in ("left", "right")
    assert set(flash_calls) == {"reference_flash_attn_varlen_func" if padded else "reference_flash_attn_func"}


@pytest.mark.parametrize("rows", [[[8, 12]], [[7, 1, 12], [15, 5]]])
def test_flash_packed_rows_equal_eager(flash_calls, rows):
    eager, flash = build_pair("flash_attention_2")
    ids = token_ids(rows=len(rows))
    position_ids = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
    for model in (eager, flash):
        model(ids, position_ids=position_ids, labels=ids).loss.backward()
    for expected, got in zip(eager.parameters(), flash.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-5, rtol=1e-4)
    assert set(flash_calls) == {"reference_flash_attn_varlen_func"}


def test_flash_takes_the_lengths_of_a_padding_free_collator(flash_calls):
    eager, flash = build_pair("flash_attention_2")
    ids = token_ids(rows=1)
    position_ids = torch.cat([torch.arange(8), torch.arange(12)])[None]
    ends = torch.tensor([0, 8, 20], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 12, "max_length_k": 12}
    with torch.no_grad():
        expected = eager(ids, position_ids=position_ids).logits
        torch.testing.assert_close(flash(ids, **lengths).logits, expected, atol=1e-5, rtol=1e-5)
        with_positions = flash(ids, position_ids=position_ids, **lengths).logits
    torch.testing.assert_close(with_positions, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_flash_generation_equals_eager(flash_calls, padding):
    eager, flash = build_pair("flash_attention_2")
    ids = token_ids()
    options = {"attention_mask": masks(ids)[padding], "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(flash.generate(ids, **options), eager.generate(ids, use_cache=False, **options))


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention on CPU compiles C++ (g++)")


# torch's C++ code for flex_attention does not compile with dynamic shapes, so shapes stay the same between resets.
@needs_compiler
@pytest.mark.parametrize(
    "case",
    [
        pytest.param("left", marks=pytest.mark.slow),
        pytest.param("none", marks=pytest.mark.slow),
        pytest.param("packed", marks=pytest.mark.slow),
    ],
)
def test_flex_equals_eager(case):
    torch._dynamo.reset()
    eager, flex = build_pair("flex_attention", d_model=96, qk_ln=True)
    ids = token_ids()
    inputs = {"attention_mask": masks(ids).get(case)}
    if case == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(8), torch.arange(12)])[None].expand(2, -1)
    with torch.no_grad():
        expected, got = eager(ids, **inputs).logits, flex(ids, **inputs).logits
    kept = torch.ones_like(ids) if inputs["attention_mask"] is None else inputs["attention_mask"]
    torch.testing.assert_close(got[kept.bool()], expected[kept.bool()], atol=1e-5, rtol=1e-5)


@needs_compiler
@pytest.mark.slow
def test_flex_decodes_with_a_cache():
    eager, flex = build_pair("flex_attention", d_model=96)
    ids = token_ids()
    cache = DynamicCache(config=flex.config)
    with torch.no_grad():
        eager(ids[:, :15], past_key_values=cache, use_cache=True)
        torch._dynamo.reset()
        got = flex(ids[:, 15:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(got, eager(ids).logits[:, 15:], atol=1e-5, rtol=1e-5)


def test_flex_refuses_what_its_kernel_lacks():
    states = torch.zeros(3, 1, 2, 4, 8)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attn_pdrop \(0\.1\)"):
        alibi_flex_forward(None, *states, None, scaling=1.0, alibi_slopes=alibi_slopes(2), dropout=0.1)
    with pytest.raises(ValueError, match="4-D mask"):
        alibi_flex_forward(None, *states, mask, scaling=1.0, alibi_slopes=alibi_slopes(2))


def test_an_implementation_without_alibi_is_refused():
    _, model = build_pair("flash_attention_3")
    with pytest.raises(ValueError, match="'flash_attention_3' has no ALiBi bias"):
        model(token_ids())


def test_masked_score_has_no_softmax_weight():
    scores = torch.tensor([MASKED_SCORE, -4096.0])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.isfinite(scores.to(dtype)).all()
        assert nn.functional.softmax(scores.to(dtype), -1)[0] == 0
