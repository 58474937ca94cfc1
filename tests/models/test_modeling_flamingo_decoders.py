"""The same expectations on every decoder a Flamingo can stand on."""

import pytest
import torch
from tiny_flamingo import DECODERS, GREEDY, IMAGE, assert_close, images, pad_rows, row, tiny_config, tiny_model
from transformers import AutoConfig

from otter_hf import FlamingoForConditionalGeneration
from otter_hf.models.flamingo.decoders_flamingo import SUPPORTED_DECODERS


@pytest.fixture(scope="module", params=sorted(DECODERS))
def model(request):
    return tiny_model(request.param)


def test_every_supported_decoder_is_tested():
    assert set(DECODERS) == set(SUPPORTED_DECODERS)


@torch.no_grad()
def test_images_reach_the_logits(model):
    ids, pixels = row(3, 7), images(1, 2)
    base = model(input_ids=ids, pixel_values=pixels).logits
    for place, start in ((0, 3), (1, 7)):
        swapped = pixels.clone()
        swapped[:, place] = images(seed=9)[:, 0]
        changed = (model(input_ids=ids, pixel_values=swapped).logits - base).abs().amax(-1)[0]
        assert changed[:start].eq(0).all() and changed[start:].gt(1e-4).all()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model, side):
    rows = [row(1, 5), row(2, length=7, seed=1)]
    ids, mask = pad_rows(rows, side)
    pixels = images(2, 2)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batched = model(input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=pixels).logits
    for i, single in enumerate(rows):
        alone = model(input_ids=single, pixel_values=pixels[i : i + 1]).logits
        assert_close(batched[i][mask[i] == 1], alone[0], 2e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}], ids=str
)
def test_cached_generation(model, settings):
    rows = [row(1, 5), row(2, length=7, seed=1)]
    ids, mask = pad_rows(rows, "left")
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": images(2, 2), "max_new_tokens": 8}
    cached = model.generate(**inputs, **GREEDY, **settings)
    settings = {key: value for key, value in settings.items() if key == "num_beams"}
    assert torch.equal(cached, model.generate(**inputs, **GREEDY, **settings, use_cache=False))


def test_gradient_checkpointing(model):
    def gradients():
        model.zero_grad()
        ids = torch.cat([row(1, 5), row(3, seed=1)])
        loss = model(input_ids=ids, pixel_values=images(2, 2), labels=ids.masked_fill(ids == IMAGE, -100)).loss
        loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    model.train()
    expected = gradients()
    assert len(expected) == sum(p.requires_grad for p in model.parameters())
    for use_reentrant in (False, True):
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()
        for ours, reference in zip(gradients(), expected, strict=True):
            assert_close(ours, reference, 1e-6)
        model.activation_checkpointing_disable()
    model.disable_input_require_grads()
    model.eval()
    model.zero_grad()


@torch.no_grad()
def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = FlamingoForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    inputs = {"input_ids": row(1, 5), "pixel_values": images(1, 2)}
    assert_close(loaded(**inputs).logits, model(**inputs).logits, 1e-6)


@torch.no_grad()
def test_hidden_states_start_in_front_of_the_gated_block(model):
    model.set_attn_implementation("eager")
    output = model(input_ids=row(1), pixel_values=images(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 5 and len(output.attentions) == 4 and len(output.cross_attentions) == 2
    # OPT projects its last state after its last layer
    if output.hidden_states[-1].shape == output.hidden_states[0].shape and model.lm_head.in_features == 32:
        assert_close(model.lm_head(output.hidden_states[-1]), output.logits, 1e-4)


@torch.no_grad()
def test_attention_implementations_agree(model):
    inputs = {"input_ids": torch.cat([row(1, 5), row(3, seed=1)]), "pixel_values": images(2, 2)}
    logits = {}
    for implementation in ("eager", "varlen_sdpa", "sdpa"):
        model.set_attn_implementation(implementation)
        logits[implementation] = model(**inputs).logits
    assert_close(logits["sdpa"], logits["eager"], 2e-5)
    assert_close(logits["varlen_sdpa"], logits["eager"], 2e-5)


@pytest.mark.parametrize("model_type", ["bloom", "gptj", "phi", "mpt"])
def test_a_decoder_images_cannot_reach_is_refused(model_type):
    config = tiny_config()
    config.text_config = AutoConfig.for_model(model_type)
    with pytest.raises(ValueError, match=f"model_type is '{model_type}', a decoder .*; use one of falcon, .*llama"):
        FlamingoForConditionalGeneration(config)


def test_falcon_with_alibi_is_refused():
    with pytest.raises(ValueError, match="text_config.alibi is True"):
        tiny_model("falcon", text={"alibi": True})


@torch.no_grad()
def test_gemma_softcap_and_mpt_scale_reach_the_loss():
    for decoder, text in (("gemma3_text", {"final_logit_softcapping": 2.0}), ("otter_mpt", {"logit_scale": 0.5})):
        model, plain = tiny_model(decoder, text=text), tiny_model(decoder)
        inputs = {"input_ids": row(1), "pixel_values": images(), "labels": row(1)}
        raw, output = plain(**inputs).logits, model(**inputs)
        expected = raw * 0.5 if decoder == "otter_mpt" else torch.tanh(raw / 2) * 2
        assert_close(output.logits, expected)
        assert_close(model(**inputs, skip_logits=True).loss, output.loss, 1e-6)
