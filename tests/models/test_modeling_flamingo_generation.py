"""`generate` in every mode against the plain forward pass repeated token by token."""

import contextlib

import pytest
import torch
from tiny_flamingo import GREEDY, IMAGE, assert_close, images, pad_rows, row, tiny_config, tiny_model
from transformers import DynamicCache, QuantizedCache, StaticCache

from otter_hf.models.generation import fp8_is_bounded
from otter_hf.models.media_cache import MediaCacheMixin


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def greedy_truth(model, ids, pixels, num_tokens, media_index=None):
    """Greedy tokens `(B, num_tokens)` by whole forward passes."""
    start = ids.shape[1]
    for _ in range(num_tokens):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixels, media_index=media_index, use_cache=False).logits[:, -1]
        logits[:, model.config.image_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        if media_index is not None:
            media_index = torch.cat([media_index, media_index[:, -1:]], dim=1)
    return ids[:, start:]


@pytest.fixture(scope="module")
def batch(model):
    ids = torch.cat([row(1, 5), row(3, seed=1)])
    pixels = images(2, 2)
    return ids, pixels, greedy_truth(model, ids, pixels, 8)


def generate_all(model, ids, pixels, num_tokens=8, **kwargs):
    kwargs = {**GREEDY, "attention_mask": torch.ones_like(ids), **kwargs}
    return model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=num_tokens, **kwargs)


def generate(model, ids, pixels, num_tokens=8, **kwargs):
    return generate_all(model, ids, pixels, num_tokens, **kwargs)[:, ids.shape[1] :]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=str,
)
def test_greedy(model, batch, settings):
    ids, pixels, truth = batch
    assert torch.equal(generate(model, ids, pixels, **settings), truth)


def test_the_image_matters_while_decoding(model, batch):
    ids, pixels, truth = batch
    for use_cache in (True, False):
        assert not torch.equal(generate(model, ids, images(2, 2, seed=4), use_cache=use_cache), truth)


def test_every_step_has_the_logits_of_the_whole_pass(model, batch):
    ids, pixels, truth = batch
    output = model.generate(
        input_ids=ids,
        pixel_values=pixels,
        max_new_tokens=8,
        output_logits=True,
        return_dict_in_generate=True,
        output_hidden_states=True,
        **GREEDY,
    )
    with torch.no_grad():
        whole = model(input_ids=output.sequences, pixel_values=pixels).logits[:, 11:-1]
    assert_close(torch.stack(output.logits, dim=1), whole)
    assert len(output.hidden_states) == 8


@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padded_rows(model, use_cache):
    rows = [row(1, 5), row(2, length=8, seed=1), row(length=5, seed=2)]
    ids, mask = pad_rows(rows, "left")
    pixels = images(3, 2)
    tokens = generate(model, ids, pixels, attention_mask=mask, use_cache=use_cache)
    for i, (single, num_media) in enumerate(zip(rows, (2, 1, 0), strict=True)):
        truth = greedy_truth(model, single, pixels[i : i + 1, :num_media] if num_media else None, 8)
        assert torch.equal(tokens[i : i + 1], truth)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams(model, batch, cache):
    ids, pixels, _ = batch
    settings = {"num_beams": 3, "num_return_sequences": 2, "disable_compile": True}
    tokens = generate(model, ids, pixels, cache_implementation=cache, **settings)
    assert tokens.shape == (4, 8)
    assert torch.equal(tokens, generate(model, ids, pixels, use_cache=False, **settings))


@pytest.mark.parametrize("use_cache", [True, False])
def test_sampling_with_a_seed(model, batch, use_cache):
    ids, pixels, _ = batch
    settings = {"do_sample": True, "num_return_sequences": 3, "top_k": 0, "use_cache": use_cache}
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(generate(model, ids, pixels, **settings))
    assert runs[0].shape == (6, 8) and torch.equal(*runs)
    torch.manual_seed(0)
    settings["use_cache"] = not use_cache
    assert torch.equal(runs[0], generate(model, ids, pixels, **settings))


def test_assisted_and_prompt_lookup(model):
    ids, pixels = row(1, 5, length=14), images(1, 2)
    truth = greedy_truth(model, ids, pixels, 12)
    for settings in ({"assistant_model": tiny_model(seed=3)}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(generate(model, ids, pixels, 12, **settings), truth)
        index = (ids == IMAGE).long().cumsum(1)
        assert torch.equal(generate(model, ids, pixels, 12, media_index=index, **settings), truth)


@pytest.mark.parametrize("kind", ["assistant_model", "prompt_lookup_num_tokens"])
def test_assisted_decoding_goes_on_from_a_cache(model, kind):
    """Of what the cache holds nothing is read again (transformers 5.23 reads all of it on top)."""
    ids, pixels = row(1, 8, length=14), images(1, 2)
    expected = generate(model, ids, pixels, 8)
    assisted = {kind: tiny_model(seed=3) if kind == "assistant_model" else 3}
    for given in (pixels, pixels[:, 1:]):
        with torch.no_grad():
            cache = model(input_ids=ids[:, :6], pixel_values=pixels[:, :1], use_cache=True).past_key_values
        if given is not pixels and kind == "assistant_model":
            continue  # which starts without a cache, and needs all
        assert torch.equal(generate(model, ids, given, 8, past_key_values=cache, **assisted), expected)
        assert cache.get_seq_length() == 21


class NoStream(contextlib.nullcontext):
    """A CPU has no streams; offloading needs nothing else of CUDA."""

    def __init__(self, *args):
        super().__init__()

    def wait_stream(self, stream):
        pass


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("beams", [1, 2])
def test_offloaded_caches(monkeypatch, model, batch, kind, beams):
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", NoStream)
    ids, pixels, _ = batch
    settings = {"num_beams": beams, "return_dict_in_generate": True, "disable_compile": True}
    expected = generate_all(model, ids, pixels, **settings)
    output = generate_all(model, ids, pixels, cache_implementation=kind, **settings)
    assert torch.equal(output.sequences, expected.sequences)
    assert output.past_key_values.offloading and isinstance(output.past_key_values, MediaCacheMixin)


@torch.no_grad()
@pytest.mark.parametrize(
    "backend, settings",
    [("fp8", {}), ("quanto", {"nbits": 4}), ("hqq", {"nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 16})],
)
def test_quantized_caches(backend, settings):
    """The text is quantized, the images are not; what was said before is close, and no image is lost."""
    package = {"quanto": "optimum.quanto", "hqq": "hqq.core.quantize"}.get(backend)
    if package is not None:
        pytest.importorskip(package)
    if backend == "fp8" and not fp8_is_bounded("cpu"):
        pytest.skip("float8 needs torch 2.13")
    model = tiny_model(text={"num_attention_heads": 2, "head_dim": 32})  # quanto packs groups of 64
    ids, pixels = row(1, 5, length=40), images(1, 2)
    exact, cache = DynamicCache(), QuantizedCache(backend=backend, config=model.config.text_config, **settings)
    logits = []
    for past in (exact, cache):
        steps = [model(input_ids=ids[:, :30], pixel_values=pixels, past_key_values=past).logits[:, -1:]]
        steps += [model(input_ids=ids[:, i : i + 1], past_key_values=past).logits for i in range(30, 40)]
        logits.append(torch.cat(steps, dim=1).flatten())
    assert torch.corrcoef(torch.stack(logits))[0, 1] > 0.95
    for layer, key_values in exact.media_key_values.items():
        assert_close(cache.media_key_values[layer][:, :1], key_values[:, :1])
    quantized = {"cache_implementation": "quantized", "cache_config": {"backend": backend, **settings}}
    answer = generate(model, ids, pixels, 12, **quantized)
    assert not torch.equal(answer, generate(model, ids, images(1, 2, seed=4), 12, **quantized))
    assert generate(model, ids, pixels, 12, num_beams=2, **quantized).shape == (1, 12)


@pytest.mark.parametrize("made", ["by name", "by hand"])
def test_float8_without_bounds_is_refused(monkeypatch, model, batch, made):
    monkeypatch.setattr("otter_hf.models.generation.fp8_is_bounded", lambda device: False)
    ids, pixels, _ = batch
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    if made == "by hand":
        options = {"past_key_values": QuantizedCache(backend="fp8", config=model.config.text_config)}
    with pytest.raises(ValueError, match="'fp8' needs torch 2.13"):
        generate(model, ids, pixels, **options)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 2])
def test_explicit_media_index(model, use_cache, beams):
    ids, pixels = row(1, 5), images(1, 2)
    # the last token, and so all generated ones, look at the first image
    media_index = torch.tensor([[0] + [1] * 4 + [2] * 4 + [1] * 3])
    tokens = generate(model, ids, pixels, media_index=media_index, use_cache=use_cache, num_beams=beams)
    if beams == 1:
        assert torch.equal(tokens, greedy_truth(model, ids, pixels, 8, media_index))
    else:
        other = generate(model, ids, pixels, media_index=media_index, use_cache=not use_cache, num_beams=beams)
        assert torch.equal(tokens, other)
    swapped = pixels.clone()
    swapped[:, 1] = images(seed=7)[:, 0]
    last = media_index[:, -1:].expand_as(media_index)
    assert torch.equal(
        generate(model, ids, swapped, media_index=last, use_cache=use_cache),
        generate(model, ids, pixels, media_index=last, use_cache=use_cache),
    )


@pytest.mark.parametrize("only_new", [True, False])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_chat_goes_on_with_new_images(model, only_new, kind):
    """Three turns on one cache, rows with different numbers of images, against one pass over everything."""
    config = tiny_config().text_config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=40)
    turns = [
        (torch.cat([row(1, 4, length=6), row(2, length=6, seed=1)]), [2, 1]),
        (torch.cat([row(0, length=5, seed=2), row(1, 3, length=5, seed=3)]), [1, 2]),
        (torch.cat([row(length=4, seed=4), row(length=4, seed=5)]), [0, 0]),
    ]
    pixels = images(2, 3)
    ids, done = torch.zeros(2, 0, dtype=torch.long), [0, 0]
    for turn, new in turns:
        done_before, done = done, [a + b for a, b in zip(done, new, strict=True)]
        ids = torch.cat([ids, turn], dim=1)
        if only_new:
            given = torch.zeros(2, max(new), *pixels.shape[2:]) if max(new) else None
            for i in range(2):
                if new[i]:
                    given[i, : new[i]] = pixels[i, done_before[i] : done[i]]
        else:
            given = pixels[:, : max(done)]
        tokens = generate(model, ids, given, 3, past_key_values=cache, disable_compile=True)
        assert torch.equal(tokens, greedy_truth(model, ids, pixels, 3))
        ids = torch.cat([ids, tokens], dim=1)


def test_text_only(model):
    ids = row()
    assert torch.equal(generate(model, ids, None), greedy_truth(model, ids, None, 8))


def test_no_image_token_is_generated(model):
    eager = tiny_model()
    with torch.no_grad():
        eager.lm_head.weight[IMAGE] = 10 * eager.lm_head.weight.sum(0)
    ids = row(1)
    torch.manual_seed(0)
    tokens = generate(eager, ids, images(), 20, do_sample=True, num_return_sequences=8, top_k=0)
    assert not (tokens == IMAGE).any()
    assert not eager.generation_config.suppress_tokens  # the model's own settings are left alone


def test_inputs_embeds(model, batch):
    ids, pixels, truth = batch
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, pixel_values=pixels, max_new_tokens=8, **GREEDY), truth)


def test_inputs_embeds_go_on_with_new_images(model):
    """As transformers has it, they are those of the whole conversation."""
    ids, pixels = row(1, 8), images(1, 2)
    embeds = model.get_input_embeddings()(ids)
    expected = generate(model, ids, pixels, 4)
    for given in (pixels, pixels[:, 1:]):
        with torch.no_grad():
            cache = model(input_ids=ids[:, :6], pixel_values=pixels[:, :1], use_cache=True).past_key_values
        tokens = model.generate(
            inputs_embeds=embeds, pixel_values=given, past_key_values=cache, max_new_tokens=4, **GREEDY
        )
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("only_new", [True, False])
@pytest.mark.parametrize("mask", [None, torch.ones(1, 2, 1)])
def test_only_the_new_tokens_of_a_chat(model, only_new, mask):
    """transformers also takes these alone, with the attention mask of the whole conversation."""
    ids, pixels = row(1, 8), images(1, 2)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :6], pixel_values=pixels[:, :1], use_cache=True).past_key_values
    given = {"pixel_values": pixels, "pixel_attention_mask": mask}
    given = {key: value[:, only_new:] for key, value in given.items() if value is not None}
    settings = {"attention_mask": torch.ones_like(ids), "past_key_values": cache, "max_new_tokens": 4, **GREEDY}
    tokens = model.generate(ids[:, 6:], **given, **settings)[:, 6:]
    assert torch.equal(tokens, generate(model, ids, pixels, 4))
    with pytest.raises(ValueError, match="holds 3 media for row 0 of the prompt, which has 0 new"):
        model.generate(tokens, **{**settings, "attention_mask": torch.ones(1, 20)}, pixel_values=images(1, 3))


def test_images_without_a_prompt_are_refused(model):
    with pytest.raises(ValueError, match="There are media but no prompt: pass input_ids with one `<image>`"):
        model.generate(pixel_values=images())


@pytest.mark.slow
def test_compiled_decoding_with_a_static_cache(model, batch):
    ids, pixels, truth = batch
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=tiny_config().text_config, max_cache_len=32)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels, past_key_values=cache, use_cache=True).logits
        tokens = []
        for _ in range(8):
            logits[:, -1, IMAGE] = -torch.inf
            tokens.append(logits[:, -1].argmax(-1, keepdim=True))
            logits = step(input_ids=tokens[-1], past_key_values=cache, use_cache=True).logits
    assert torch.equal(torch.cat(tokens, dim=1), truth)
