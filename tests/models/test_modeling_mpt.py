"""The MPT decoder against transformers' own, and against a plain transcription of the MPT formulas."""

import copy
import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, MptConfig, MptForCausalLM, StaticCache

from otter_hf.models.mpt import MOSAIC_GPT_RENAMES, OtterMptConfig, OtterMptForCausalLM, OtterMptModel


TINY = {"vocab_size": 101, "d_model": 48, "n_heads": 3, "n_layers": 3, "max_seq_len": 64}
VARIANTS = {
    "mpt": {},
    "mpt_1b": {"qk_ln": True},
    "mpt_30b": {"clip_qkv": 0.5},
    "all_options": {
        "qk_ln": True,
        "clip_qkv": 1,
        "softmax_scale": 0.2,
        "alibi_bias_max": 6,
        "expansion_ratio": 2,
        "no_bias": False,
        "logit_scale": "inv_sqrt_d_model",
    },
}


def build(implementation="sdpa", seed=0, **options):
    torch.manual_seed(seed)
    config = OtterMptConfig(**{**TINY, **options})
    model = OtterMptForCausalLM._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough weights, biases and norms for every term to matter
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def with_implementation(model, implementation):
    model = copy.deepcopy(model)
    model.config._attn_implementation = implementation
    return model


def random_ids(rows=2, length=20, seed=1):
    return torch.randint(1, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def formula_logits(model, input_ids):
    """MPT written out with plain tensor operations in float64; one unpadded row."""
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def linear(x, name):
        return nn.functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x, name):
        shape = (config.d_model,)
        return nn.functional.layer_norm(x, shape, weights[f"{name}.weight"], weights.get(f"{name}.bias"), 1e-5)

    length, n_heads = input_ids.shape[1], config.n_heads
    power = 2 ** math.ceil(math.log2(n_heads))
    slopes = [2 ** (-config.alibi_bias_max * i / power) for i in range(1, power + 1)]
    if power != n_heads:
        slopes = (slopes[1::2] + slopes[::2])[:n_heads]
    scale = config.softmax_scale or 1 / math.sqrt(config.d_model / n_heads)

    x = weights["transformer.wte.weight"][input_ids[0]]  # (L, D)
    for i in range(config.n_layers):
        block = f"transformer.blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm_1"), f"{block}.attn.Wqkv")
        if config.clip_qkv is not None:
            qkv = qkv.clamp(-config.clip_qkv, config.clip_qkv)
        q, k, v = qkv.chunk(3, dim=-1)
        if config.qk_ln:
            q, k = norm(q, f"{block}.attn.q_ln"), norm(k, f"{block}.attn.k_ln")
        heads = []
        for h, (q_h, k_h, v_h) in enumerate(zip(*(t.chunk(n_heads, dim=-1) for t in (q, k, v)), strict=True)):
            scores = scale * q_h @ k_h.T  # (L, L)
            for row in range(length):
                scores[row] += slopes[h] * (torch.arange(length) - row)
                scores[row, row + 1 :] = -torch.inf
            heads.append(scores.softmax(-1) @ v_h)
        x = x + linear(torch.cat(heads, dim=-1), f"{block}.attn.out_proj")
        x = x + linear(
            nn.functional.gelu(linear(norm(x, f"{block}.norm_2"), f"{block}.ffn.up_proj")), f"{block}.ffn.down_proj"
        )
    logits = norm(x, "transformer.norm_f") @ weights["lm_head.weight"].T
    return logits * (config.logit_scale or 1)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_follow_the_formulas(variant, implementation):
    model = build(implementation, **VARIANTS[variant])
    ids = random_ids(rows=1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[0].double(), formula_logits(model, ids), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model = MptForCausalLM(MptConfig(**TINY, attn_config={"clip_qkv": 1.0, "softmax_scale": 0.3})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def ours(theirs, request):
    config = OtterMptConfig.from_legacy(theirs.config.to_dict())
    model = OtterMptForCausalLM._from_config(config, attn_implementation=request.param).eval()
    model.load_state_dict(theirs.state_dict())
    return model


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_logits_equal_transformers(theirs, ours, padding):
    ids = random_ids()
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :6] = 0
    if padding == "right":
        mask[0, -6:] = 0
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        got = ours(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


def test_cached_chunks_equal_transformers(theirs, ours):
    ids = random_ids()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        cache, got = DynamicCache(config=ours.config), []
        for start, end in [(0, 9), (9, 15), (15, 16), (16, 20)]:
            chunk = ours(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            got.append(chunk.logits)
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


def test_loss_and_gradients_equal_transformers(theirs, ours):
    ids = random_ids()
    labels = ids.clone()
    labels[:, :5] = -100
    theirs, ours = copy.deepcopy(theirs), copy.deepcopy(ours)
    expected, got = theirs(ids, labels=labels).loss, ours(ids, labels=labels).loss
    expected.backward()
    got.backward()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sdpa_equals_eager_forward_and_backward(variant):
    eager = build("eager", **VARIANTS[variant]).train()
    sdpa = with_implementation(eager, "sdpa")
    ids = random_ids(rows=3, length=33)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    mask[1, 25:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 7] = -100  # predicted from a padding token
    losses = [model(ids, attention_mask=mask, labels=labels).loss for model in (eager, sdpa)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    for (name, expected), got in zip(eager.named_parameters(), sdpa.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_attention_implementation_can_be_changed():
    model = build("sdpa")
    model.set_attn_implementation("eager")
    assert model(random_ids(), output_attentions=True).attentions[0].shape == (2, 3, 20, 20)
    model.set_attn_implementation("flex_attention")
    assert model.transformer.blocks[0].attn.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_on_either_side_changes_nothing(implementation):
    model = build(implementation)
    ids = random_ids(rows=1, length=12)
    padding = torch.zeros(1, 5, dtype=torch.long)
    ones = torch.ones_like(ids)
    with torch.no_grad():
        expected = model(ids).logits
        left = model(torch.cat([padding, ids], 1), attention_mask=torch.cat([padding, ones], 1)).logits[:, 5:]
        right = model(torch.cat([ids, padding], 1), attention_mask=torch.cat([ones, padding], 1)).logits[:, :12]
    torch.testing.assert_close(left, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(right, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", [{"use_cache": True}, {"cache_implementation": "static", "disable_compile": True}])
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_generation_equals_uncached(implementation, cache, beams):
    model = build(implementation, qk_ln=True)
    ids = random_ids(length=9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **cache, **options), expected)
    alone = model.generate(ids[:1, 4:], use_cache=False, **{**options, "attention_mask": None})
    assert torch.equal(alone[0, 5:], expected[0, 9:])  # the padded row is not affected by its padding


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_static_cache_forward_equals_uncached(implementation):
    model = build(implementation)
    ids = random_ids()
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        expected = model(ids).logits
        got = [
            model(ids[:, start:end], past_key_values=cache, use_cache=True).logits
            for start, end in [(0, 12), (12, 13), (13, 20)]
        ]
    torch.testing.assert_close(torch.cat(got, 1), expected, atol=1e-5, rtol=1e-5)


def packed_row(lengths):
    return torch.cat([torch.arange(length) for length in lengths])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_samples_equal_separate_ones(implementation):
    model = build(implementation)
    lengths = [[7, 1, 12], [15, 5]]
    ids = random_ids()
    position_ids = torch.stack([packed_row(row) for row in lengths])
    with torch.no_grad():
        packed = model(ids, position_ids=position_ids).logits
        for row, row_lengths in enumerate(lengths):
            samples = zip(ids[row].split(row_lengths), packed[row].split(row_lengths), strict=True)
            for sample, got in samples:
                torch.testing.assert_close(got, model(sample[None]).logits[0], atol=1e-5, rtol=1e-5)


def test_packed_gradients_equal_eager():
    eager = build("eager").train()
    sdpa = with_implementation(eager, "sdpa")
    ids = random_ids(rows=1)
    position_ids = packed_row([7, 13])[None]
    for model in (eager, sdpa):
        model(ids, position_ids=position_ids, labels=ids).loss.backward()
    for expected, got in zip(eager.parameters(), sdpa.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-5, rtol=1e-4)


def test_a_mask_of_four_dimensions_is_obeyed():
    eager = build("eager")
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    mask[:, :, 10:, 3:6] = False
    ids = random_ids()
    with torch.no_grad():
        got = with_implementation(eager, "sdpa")(ids, attention_mask=mask).logits
        additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        torch.testing.assert_close(got, eager(ids, attention_mask=additive).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(got, eager(ids).logits, atol=1e-2)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_sequences_longer_than_max_seq_len(implementation):
    model = build(implementation, max_seq_len=8)
    ids = random_ids(rows=1, length=40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[0].double(), formula_logits(model, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    plain = build().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    ids = random_ids()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for model in (plain, checkpointed):
        model(ids, attention_mask=mask, labels=ids).loss.backward()
    for expected, got in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(got.grad, expected.grad)


def test_embeddings_are_tied_through_save_load_and_resize(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = random_ids()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        headless = AutoModel.from_pretrained(tmp_path)
        assert isinstance(headless, OtterMptModel)
        states = model.transformer(ids).last_hidden_state
        torch.testing.assert_close(headless(ids).last_hidden_state, states)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    loaded.resize_token_embeddings(120)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.config.vocab_size == 120 and loaded(ids).logits.shape[-1] == 120


def test_untied_head_stays_apart(tmp_path):
    model = build(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded = OtterMptForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(loaded.lm_head.weight, loaded.transformer.wte.weight)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_half_precision(tmp_path, dtype, implementation):
    model = build(qk_ln=True)
    model.save_pretrained(tmp_path)
    half = OtterMptForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation=implementation)
    assert half.transformer.wte.weight.dtype == dtype
    ids = random_ids()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        got = half(ids, attention_mask=mask).logits.float()
        assert torch.isfinite(got).all()
        error = (got - expected)[mask.bool()].abs().mean() / expected[mask.bool()].abs().mean()
    assert error < (0.01 if dtype is torch.float16 else 0.06)
    tokens = half.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 23)


def test_autocast_trains_in_bfloat16():
    model = build(qk_ln=True).train()
    ids = random_ids()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = model(ids, attention_mask=mask, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=0.1, rtol=0.05)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_without_graph_breaks(padded):
    torch._dynamo.reset()
    model = build(n_layers=1).train()  # all are alike, and each takes seconds
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    ids = random_ids()
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
    for m in (model, compiled):
        m(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    for expected, got in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiled_packed_rows_do_not_leak():
    torch._dynamo.reset()
    model = build()
    ids, position_ids = random_ids(rows=1), packed_row([7, 13])[None]
    with torch.no_grad():
        expected = model(ids, position_ids=position_ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        got = compiled(ids, position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_decoding_with_a_static_cache():
    torch._dynamo.reset()
    model = build()
    ids = random_ids()
    cache = StaticCache(config=model.config, max_cache_len=32)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(ids).logits
        got = [model(ids[:, :15], past_key_values=cache, use_cache=True).logits]
        for i in range(15, 20):
            got.append(compiled(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(got, 1), expected, atol=1e-5, rtol=1e-5)


def test_keyword_arguments_reach_every_block():
    model = build()
    seen = []
    for block in model.transformer.blocks:
        block.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["vision"]), with_kwargs=True)
    vision = torch.ones(1)
    model(random_ids(), vision=vision)
    assert len(seen) == 3 and all(value is vision for value in seen)


def test_hidden_states_and_attentions_are_recorded():
    model = build("eager")
    ids = random_ids()
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 4 and outputs.hidden_states[0].shape == (2, 20, 48)
    assert len(outputs.attentions) == 3 and outputs.attentions[0].shape == (2, 3, 20, 20)
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 3, 20))


def test_logits_to_keep_and_inputs_embeds():
    model = build()
    ids = random_ids()
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
        torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, logits)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


def test_loss_is_divided_by_num_items_in_batch():
    model = build()
    ids = random_ids()
    with torch.no_grad():
        mean, total = model(ids, labels=ids).loss, model(ids, labels=ids, num_items_in_batch=1).loss
    torch.testing.assert_close(total, mean * 2 * 19)


def test_dropouts_act_in_training_only():
    for name in ("attn_pdrop", "resid_pdrop", "emb_pdrop"):
        model = build(**{name: 0.5})
        ids = random_ids()
        with torch.no_grad():
            assert torch.equal(model(ids).logits, model(ids).logits)
            model.train()
            assert not torch.equal(model(ids).logits, model(ids).logits), name


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_mosaic_gpt_names_load(tmp_path, prefix):
    model = build(qk_ln=True)
    if not prefix:
        model = model.transformer
    names = {"norm_1": "ln_1", "norm_2": "ln_2", "ffn.up_proj": "mlp.mlp_up", "ffn.down_proj": "mlp.mlp_down"}
    state_dict = {}
    for name, tensor in model.state_dict().items():
        for new, old in {**names, "norm_f": "ln_f"}.items():
            name = name.replace(f"{new}.", f"{old}.")
        if name != "lm_head.weight":
            state_dict[name] = tensor
    assert f"{prefix}ln_f.weight" in state_dict and f"{prefix}blocks.0.attn.q_ln.weight" in state_dict
    torch.save(state_dict, tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, key_mapping=MOSAIC_GPT_RENAMES, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for saved, folder in ((loaded, "read"), (model, "new")):
        saved.save_pretrained(tmp_path / folder, save_original_format=True)
        assert load_file(tmp_path / folder / "model.safetensors").keys() == state_dict.keys()


@pytest.mark.parametrize("folder", ["otter_mpt1b_redpajama", "otter_mpt_image"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_blocks_compute_what_the_original_code_computed(folder, implementation, golden_case):
    path = golden_case(f"otter/{folder}")
    golden = load_file(path / "golden.safetensors")
    weights = {}
    for shard in sorted([*path.glob("model*.safetensors"), *path.glob("*.bin")]):
        weights |= load_file(shard) if shard.suffix == ".safetensors" else torch.load(shard, weights_only=True)
    for old, new in MOSAIC_GPT_RENAMES.items():
        weights = {re.sub(old, new, name): tensor for name, tensor in weights.items()}

    config = OtterMptConfig.from_legacy(json.loads((path / "config.json").read_text())["text_config"])
    n_layers, config.n_layers = config.n_layers, 1
    model = OtterMptModel._from_config(config, attn_implementation=implementation, dtype=torch.float32).eval()
    model.norm_f = nn.Identity()
    states = weights["lang_encoder.transformer.wte.weight"][golden["lang_x"]]  # (B, L, D)
    mask = golden["attention_mask"]
    for i in range(n_layers):
        prefix = f"lang_encoder.transformer.blocks.{i}.decoder_layer."
        block = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        model.blocks[0].load_state_dict(block)
        states = golden.get(f"xattn_outputs.{i}", states)  # what the gated layer in front of the block gave
        with torch.no_grad():
            states = model(inputs_embeds=states, attention_mask=mask).last_hidden_state
        expected = golden[f"layer_outputs.{i}"]
        torch.testing.assert_close(states[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
        states = expected
