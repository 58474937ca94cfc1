"""States of frozen decoder layers below the first gated block, kept by text."""

import json

import pytest
import torch

from otter_hf.models import OtterMptConfig
from otter_hf.training.freezing import freeze
from otter_hf.training.text_states import TextStateCache


@pytest.fixture
def frozen(model):
    freeze(model, ["vision", "language", "embeddings"])
    return model.train()


def batch(config, seed=0):
    """Rows of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (3, 7), generator=generator)
    ids[:, 0] = config.image_token_id
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    pixels = torch.randn(3, 1, 1, 3, 28, 28, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels,
        "labels": ids.masked_fill(mask == 0, -100),
    }


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_loss_and_gradients_are_those_without_and_rows_are_computed_once(frozen, checkpointing):
    if checkpointing is not None:
        frozen.activation_checkpointing_enable(checkpointing)
    ran = []
    frozen.model.decoder_layers[0].decoder_layer.register_forward_hook(
        lambda module, args, out: ran.append(len(args[0]))
    )

    def step(inputs):
        frozen.zero_grad()
        loss = frozen(**inputs).loss
        loss.backward()
        trained = {name: p.grad.clone() for name, p in frozen.named_parameters() if p.grad is not None}
        return loss.detach(), trained

    first, second = batch(frozen.config), batch(frozen.config, seed=1)
    second["input_ids"][1], second["attention_mask"][1] = first["input_ids"][1], first["attention_mask"][1]
    expected = [step(first), step(second)]
    assert not any(".decoder_layer." in name for _, gradients in expected for name in gradients)
    cache = TextStateCache(frozen)
    ran.clear()
    for inputs, (loss, gradients) in 2 * list(zip((first, second), expected, strict=True)):
        found, found_gradients = step(inputs)
        torch.testing.assert_close(found, loss)
        torch.testing.assert_close(found_gradients, gradients)
    assert ran == [3, 2]  # of the second batch a row was known, of the last two all
    assert (cache.hits, cache.misses) == (7, 5)


def test_what_is_of_heads_is_not_of_rows(model):
    """ALiBi has a number for each head, and here as many heads as rows, one of which is known already."""
    text = OtterMptConfig(d_model=24, n_heads=3, n_layers=4, vocab_size=model.config.text_config.vocab_size)
    model.config.text_config = text
    model = type(model)(model.config)
    freeze(model, ["vision", "language", "embeddings"])
    first, second = batch(model.config), batch(model.config, seed=1)
    second["input_ids"][0] = first["input_ids"][0]
    expected = [model(**one).loss.detach() for one in (first, second)]
    cache = TextStateCache(model)
    torch.testing.assert_close([model(**one).loss.detach() for one in (first, second)], expected)
    assert (cache.hits, cache.misses) == (1, 5)


def test_padding_is_no_part_of_a_text(frozen):
    """What a batch is padded to changes from batch to batch."""
    inputs = batch(frozen.config)
    filler = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    longer = {name: torch.nn.functional.pad(inputs[name], (0, 3), value=value) for name, value in filler.items()}
    longer["pixel_values"] = inputs["pixel_values"]
    expected = [frozen(**one).loss.detach() for one in (inputs, longer)]
    cache = TextStateCache(frozen)
    torch.testing.assert_close([frozen(**one).loss.detach() for one in (inputs, longer)], expected)
    assert (cache.hits, cache.misses) == (3, 3)


def test_generation_and_hidden_states_run_every_layer(frozen):
    frozen.eval()
    inputs = {name: value for name, value in batch(frozen.config).items() if name not in ("labels", "attention_mask")}
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    with torch.no_grad():
        answers = frozen.generate(**inputs, **settings)
        states = frozen(**inputs, output_hidden_states=True).hidden_states
        cache = TextStateCache(frozen)
        frozen(**inputs, use_cache=False)
        assert torch.equal(frozen.generate(**inputs, **settings), answers)
        again = frozen(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(again, states, strict=True))
    assert cache.misses == 3


def test_memory_is_bounded(frozen):
    inputs = [batch(frozen.config, seed) for seed in range(3)]
    row = 7 * frozen.config.text_config.hidden_size * 4
    cache = TextStateCache(frozen, max_bytes=4 * row)
    for one in (*inputs, *inputs):
        frozen(**one)
    assert 3 * row < cache._bytes <= 4 * row
    assert cache._bytes == sum(states.nbytes for states in cache._states.values())
    # what fitted is found in every epoch, though the epoch is larger
    assert (cache.hits, cache.misses) == (4, 14)


def test_what_would_change_is_refused(model, fit):
    with pytest.raises(ValueError, match="needs a frozen decoder: add language and embeddings to freeze"):
        TextStateCache(model)
    freeze(model, ["language", "embeddings"])
    model.config.text_config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="draws at random \\(attention_dropout=0.1\\)"):
        TextStateCache(model)
    model.config.text_config.attention_dropout, model.config.text_config.attn_pdrop = 0.0, 0.1  # as MPT calls it
    with pytest.raises(ValueError, match="draws at random \\(attn_pdrop=0.1\\)"):
        TextStateCache(model)
    del model.config.text_config.attn_pdrop
    model.config.text_config.classifier_dropout = 0.1  # of GPT-NeoX, for something else
    attention = model.model.language_model.config
    attention._attn_implementation, given = "flex_attention", attention._attn_implementation
    with pytest.raises(ValueError, match="the masks of flex_attention are of whole batches"):
        TextStateCache(model)
    attention._attn_implementation = given
    model.config.text_config.layer_types = ["full_attention", "sliding_attention"] * 2
    model.model.decoder_layers[1].gated_cross_attn_layer = None
    with pytest.raises(ValueError, match="of several kinds \\(full_attention, sliding_attention\\)"):
        TextStateCache(model)
    with pytest.raises(ValueError, match="which packing and lora do not leave"):
        fit(cache_text_states=True, freeze=["language", "embeddings"])


def test_training_is_the_same(fit):
    def losses(output, **more):
        settings = {"freeze": ["language", "embeddings"], "packing": False, "max_steps": 8}
        history = json.loads((fit(output, **settings, **more) / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    assert losses("cached", cache_text_states=True) == pytest.approx(losses("plain"), abs=1e-6)
