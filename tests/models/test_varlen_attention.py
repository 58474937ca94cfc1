"""Variable-length attention: torch's kernels, and the flash kernel, which a stand-in computes on the CPU."""

import functools

import flash_stand_in
import pytest
import torch
from tiny_flamingo import assert_close, images, pad_rows, row, tiny_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModel, LlamaConfig, MistralConfig, PersimmonConfig, masking_utils

from otter_hf.models import varlen_attention
from otter_hf.models.varlen_attention import varlen_sdpa_attention_forward


@pytest.fixture
def flash_calls(monkeypatch):
    return flash_stand_in.install(monkeypatch)


class Layer:
    """What attention functions read of a layer."""

    is_causal = True
    num_key_value_groups = 2


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("window", [None, 20])
def test_samples_are_computed_by_themselves(rows, window):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, 4, 12, 8, generator=generator)
    key, value = torch.randn(2, rows, 2, 12, 8, generator=generator).unbind(0)
    bounds = torch.tensor([0, 5, 6, 12] if rows == 1 else [0, 5, 6, 12, 20, 24], dtype=torch.int32)
    flash_kwargs = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 8, "max_length_k": 8}
    got, _ = varlen_sdpa_attention_forward(
        Layer(), query, key, value, "not looked at", sliding_window=window, **flash_kwargs
    )
    sample = (torch.arange(rows * 12)[:, None] >= bounds[1:]).sum(1).view(rows, 12)
    mask = (sample[:, :, None] == sample[:, None]) & torch.ones(12, 12).tril().bool()
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], enable_gqa=True)
    assert_close(got, expected.transpose(1, 2))


def test_without_boundaries_or_with_a_shorter_window_the_mask_counts():
    query, mask = torch.randn(1, 4, 6, 8), torch.ones(1, 1, 6, 6).tril().bool().triu(-1)
    expected = scaled_dot_product_attention(query, query, query, attn_mask=mask).transpose(1, 2)
    layer = Layer()
    layer.num_key_value_groups = 1
    assert_close(varlen_sdpa_attention_forward(layer, query, query, query, mask)[0], expected)
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    flash_kwargs = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6}
    got = varlen_sdpa_attention_forward(layer, query, query, query, mask, sliding_window=2, **flash_kwargs)[0]
    assert_close(got, expected)


@pytest.mark.parametrize("config_class", [LlamaConfig, PersimmonConfig])
def test_under_autocast_packed_rows_go_through_torchs_kernel(config_class, monkeypatch):
    """Rotary embeddings and norms leave queries and keys in float32, which the kernel does not take."""
    calls = []

    def kernel(query, key, value, *args, **kwargs):
        calls.append({query.dtype, key.dtype, value.dtype})
        return flash_stand_in.varlen_attn(query, key, value, *args, **kwargs)

    monkeypatch.setattr(varlen_attention, "has_varlen_kernel", lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(varlen_attention, "torch_varlen_kernel", lambda: kernel)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = AutoModel.from_config(config_class(vocab_size=30, **small), attn_implementation="varlen_sdpa").eval()
    ids, positions = torch.arange(12)[None] + 5, torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).last_hidden_state
        assert not calls
        with torch.autocast("cpu", torch.bfloat16):
            got = model(ids, position_ids=positions, use_cache=False).last_hidden_state
    assert calls == [{torch.bfloat16}] * 2
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("config_class", [LlamaConfig, PersimmonConfig, MistralConfig])
@pytest.mark.parametrize("window", [None, 5, 20])
@torch.no_grad()
def test_a_decoder_of_transformers_needs_no_mask_for_packed_rows(config_class, window, monkeypatch):
    if window is not None and config_class is not MistralConfig:
        pytest.skip("only Mistral has a window")
    config = config_class(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=window,
    )  # fmt: skip
    model = AutoModel.from_config(config, attn_implementation="sdpa").eval()
    lengths = [3, 9, 1, 11]
    inputs = {
        "input_ids": torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(0)),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).view(2, 12),
    }
    expected = model(**inputs, use_cache=False).last_hidden_state
    model.set_attn_implementation("varlen_sdpa")
    if window != 5:  # all samples are shorter
        monkeypatch.setattr(varlen_attention, "sdpa_mask", None)
    assert_close(model(**inputs, use_cache=False).last_hidden_state, expected)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 11, "max_length_k": 11}
    assert_close(model(**inputs, **given, use_cache=False).last_hidden_state, expected)


def test_masks_that_are_no_packing_are_made():
    make = functools.partial(varlen_attention.varlen_mask, 1, 6, 6, allow_is_causal_skip=False)
    assert torch.equal(make(), torch.ones(6, 6).tril().bool()[None, None])
    images_see_ahead = masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, -1, -1, -1]]))
    mask = make(mask_function=masking_utils.or_masks(masking_utils.causal_mask_function, images_see_ahead))
    assert mask.shape == (1, 1, 6, 6) and mask[0, 0, 1, 2] and not mask[0, 0, 2, 3]


def media_cases():
    """Rows with different numbers of images: seen in order, seen in any order, one row without any."""
    ids, mask = pad_rows([row(1, 5, 6, length=14), row(2, length=9, seed=1), row(length=4, seed=2)], "left")
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(0, 4, ids.shape, generator=generator)
    some[2] = 0
    return {"running": (ids, mask, None), "any": (ids, mask, some)}


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", "varlen_sdpa", "flash_attention_2"])
@pytest.mark.parametrize("case", ["running", "any"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_cross_attention_equals_eager_forward_and_backward(flash_calls, implementation, case, checkpointing):
    ids, mask, media_index = media_cases()[case]
    pixels = images(3, 3)
    results = []
    for name in ("eager", implementation):
        model = tiny_model().train()
        model.config._attn_implementation = name
        if name == "flex_attention":  # its kernel, which we do not use, has no backward pass on a CPU
            model.config.text_config._attn_implementation = model.config.vision_config._attn_implementation = "sdpa"
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "media_index": media_index}
        logits = model(**inputs).logits[mask.bool()]
        logits.square().mean().backward()
        results.append((logits, [p.grad for p in model.parameters() if p.grad is not None]))
    assert_close(results[1][0], results[0][0])
    assert len(results[0][1]) == len(results[1][1])
    for ours, reference in zip(results[1][1], results[0][1], strict=True):
        assert_close(ours, reference)
    assert ("flash_attn_varlen_func" in flash_calls) == (implementation == "flash_attention_2")


@torch.no_grad()
def test_generation_through_the_flash_kernel(flash_calls):
    ids, mask, _ = media_cases()["running"]
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": images(3, 3)}
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": -1, "pad_token_id": 0}
    model = tiny_model()
    expected = model.generate(**inputs, **settings)
    model.config._attn_implementation = "flash_attention_2"
    assert torch.equal(model.generate(**inputs, **settings), expected)
    assert flash_calls
