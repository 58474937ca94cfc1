"""What the model computes: who sees which image, padding, saving, outputs, errors."""

import copy
import pickle

import pytest
import torch
from tiny_flamingo import GREEDY, IMAGE, SIZE, assert_close, images, pad_rows, row, tiny_config, tiny_model
from transformers import AutoModel, AutoModelForImageTextToText, GenerationConfig

from otter_hf import FlamingoForConditionalGeneration, FlamingoModel


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_gates_of_a_new_model_and_of_one_put_on_a_language_model(tmp_path):
    """Closed by default (Alayrac et al. 2022): the language model starts unchanged."""
    from transformers import LlamaForCausalLM

    language_model = LlamaForCausalLM(tiny_config().text_config)
    language_model.save_pretrained(tmp_path)
    fresh = FlamingoForConditionalGeneration(tiny_config(cross_attn_gate_init=0.0))
    loaded = FlamingoForConditionalGeneration.from_pretrained(
        tmp_path,
        config=tiny_config(cross_attn_gate_init=0.0),
        key_mapping={
            r"^model\.layers\.(\d+)\.": r"model.language_model.layers.\1.decoder_layer.",
            r"^model\.(?=embed|norm)": "model.language_model.",
        },
    )
    for model in (fresh, loaded):
        for name, parameter in model.named_parameters():
            assert parameter.isfinite().all()
            assert not name.endswith("_gate") or parameter.item() == 0
    with torch.no_grad():
        assert_close(logits_of(loaded, row(1), images()), language_model.eval()(row(1)).logits)


def logits_of(model, ids, pixels, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels, **kwargs).logits


def test_a_token_sees_the_last_image_before_it_and_no_other(model):
    ids = torch.cat([row(3, 7), row(3, 7, seed=1)])
    pixels, other = images(2, 3), images(2, 3, seed=9)
    base = logits_of(model, ids, pixels)

    def changed(place):
        swapped = pixels.clone()
        swapped[0, place] = other[0, place]
        return (logits_of(model, ids, swapped) - base).abs().amax(-1)  # (B, L)

    first, second, unreferenced = changed(0), changed(1), changed(2)
    assert first[0, :3].eq(0).all() and first[0, 3:].gt(1e-3).all()  # later tokens through self-attention
    assert second[0, :7].eq(0).all() and second[0, 7:].gt(1e-3).all()
    assert unreferenced.eq(0).all()
    assert first[1].eq(0).all() and second[1].eq(0).all()  # rows do not mix


def test_unreferenced_media_may_hold_anything(model):
    pixels = images(2, 2)
    expected = logits_of(model, torch.cat([row(1, 5), row(2)]), pixels)
    pixels[1, 1] = torch.nan
    assert_close(logits_of(model, torch.cat([row(1, 5), row(2)]), pixels), expected)


def test_text_without_images_equals_text_with_unseen_ones(model):
    assert_close(logits_of(model, row(), images()), logits_of(model, row(), None))


@pytest.mark.parametrize("num_media", [1, 2], ids=["blocks", "segments"])
def test_text_keeps_the_decoder_where_the_gated_blocks_are_not_on_text(num_media):
    """Published blocks act on all text; without, what sees no image is to the bit what the decoder makes of it."""
    model, published = tiny_model(cross_attn_on_text=False), tiny_model()
    closed = tiny_model(cross_attn_on_text=False)
    for layer in closed.model.decoder_layers:
        if layer.gated_cross_attn_layer is not None:
            for gate in (layer.gated_cross_attn_layer.attn_gate, layer.gated_cross_attn_layer.ff_gate):
                torch.nn.init.zeros_(gate)
    text = row()
    ids = row(*(4, 8)[:num_media])
    with torch.no_grad():
        assert torch.equal(model(input_ids=text).logits, closed(input_ids=text).logits)
        assert not torch.allclose(published(input_ids=text).logits, closed(input_ids=text).logits)
        pixels = images(num_media=num_media)
        seeing, blind = (m(input_ids=ids, pixel_values=pixels).logits for m in (model, closed))
        assert_close(seeing[:, :4], blind[:, :4])
        assert (seeing[:, 4:] - blind[:, 4:]).abs().amax(-1).min() > 1e-3
        whole = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=5, use_cache=False, **GREEDY)
        cached = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=5, use_cache=True, **GREEDY)
        assert torch.equal(whole, cached)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_single_rows(model, side):
    rows = [row(1, 5, length=12), row(2, length=7, seed=1), row(length=9, seed=2)]
    pixels = images(3, 2)
    ids, mask = pad_rows(rows, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batched = logits_of(model, ids, pixels, attention_mask=mask, position_ids=positions)
    for i, (single, num_media) in enumerate(zip(rows, (2, 1, 0), strict=True)):
        alone = logits_of(model, single, pixels[i : i + 1, :num_media] if num_media else None)
        assert_close(batched[i][mask[i] == 1], alone[0])


def test_layouts_of_pixel_values(model):
    pixels = images(2, 1)
    ids = torch.cat([row(1), row(2, seed=1)])
    expected = logits_of(model, ids, pixels)
    assert_close(logits_of(model, ids, pixels[:, :, 0]), expected)
    assert_close(logits_of(model, ids, pixels[:, 0, 0]), expected)


def test_frames_of_a_video():
    model = tiny_model(max_num_frames=4)
    video = images(1, 1, frames=3)
    assert_close(logits_of(model, row(1), video), logits_of(model, row(1), video))
    assert (logits_of(model, row(1), video) - logits_of(model, row(1), video.flip(2))).abs().max() > 1e-3
    with pytest.raises(ValueError, match="5 frames per medium, but the model has embeddings for 4"):
        logits_of(model, row(1), images(1, 1, frames=5))


def test_media_index_given(model):
    ids, pixels = row(3, 7), images(1, 2)
    default = torch.tensor([[0] * 3 + [1] * 4 + [2] * 5])
    assert_close(logits_of(model, ids, pixels, media_index=default), logits_of(model, ids, pixels))
    # both images swapped, and who sees what with them
    swapped = torch.tensor([[0] * 3 + [2] * 4 + [1] * 5])
    assert_close(logits_of(model, ids, pixels.flip(1), media_index=swapped), logits_of(model, ids, pixels))
    # it rules over the `<image>` tokens
    none = logits_of(model, ids, pixels, media_index=torch.zeros(1, 12, dtype=torch.long))
    assert_close(none, logits_of(model, ids, images(1, 2, seed=8), media_index=torch.zeros(1, 12, dtype=torch.long)))


def test_inputs_embeds(model):
    ids, pixels = row(1, 5), images(1, 2)
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        assert_close(model(inputs_embeds=embeds, pixel_values=pixels).logits, logits_of(model, ids, pixels))


def test_wrong_input_gets_one_clear_sentence(model):
    with pytest.raises(ValueError, match="row 1 refers to 2 new media, but pixel_values holds 1 for it; pass one"):
        model(input_ids=torch.cat([row(1), row(1, 5)]), pixel_values=images(2, 1))
    with pytest.raises(ValueError, match="row 0 refers to 1 new media, but pixel_values holds 0"):
        model(input_ids=row(1))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(pixel_values=images())
    with pytest.raises(ValueError, match=r"pixel_values has shape \(2, 1, 1, 3, 16, 16\).* B = 1"):
        model(input_ids=row(1), pixel_values=images(2))
    with pytest.raises(ValueError, match=r"media_index has shape \(1, 5\); expected \(1, 12\), one number per token"):
        model(input_ids=row(1), pixel_values=images(), media_index=torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="skip_logits is True, but there are no labels"):
        model(input_ids=row(1), pixel_values=images(), skip_logits=True)


@pytest.mark.parametrize("tie", [False, True])
def test_save_and_load(tmp_path, tie):
    model = tiny_model(tie_word_embeddings=tie, max_num_frames=2)
    model.save_pretrained(tmp_path)
    for cls in (FlamingoForConditionalGeneration, AutoModelForImageTextToText):
        loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        assert_close(logits_of(loaded, row(1), images()), logits_of(model, row(1), images()), 1e-6)
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tie
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, FlamingoModel)
    with torch.no_grad():
        hidden = base(input_ids=row(1), pixel_values=images()).last_hidden_state
        assert_close(loaded.lm_head(hidden), logits_of(model, row(1), images()), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, dtype):
    tiny_model().to(dtype).save_pretrained(tmp_path)
    for wanted in ("auto", dtype):
        model = FlamingoForConditionalGeneration.from_pretrained(tmp_path, dtype=wanted)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        logits = logits_of(model, row(1), images())  # pixels are float32, as processors make them
        assert logits.dtype == dtype and logits.isfinite().all()
    assert_close(logits.float(), logits_of(model.float(), row(1), images()), 0.1)


def test_copies_are_independent(model):
    expected = logits_of(model, row(1), images())
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(logits_of(clone, row(1), images()), expected, 0)
        with torch.no_grad():
            for parameter in clone.parameters():
                parameter.zero_()
    assert_close(logits_of(model, row(1), images()), expected, 0)


def test_nothing_is_left_on_modules():
    model = tiny_model()

    def attributes():
        # transformers marks models it has hooked for output_hidden_states; that is not state of a call
        return {name: set(vars(m)) - {"_output_capturing_hooks_installed"} for name, m in model.named_modules()}

    before = attributes()
    model(input_ids=row(1), pixel_values=images(), output_hidden_states=True, output_attentions=True)
    model.generate(input_ids=row(1), pixel_values=images(), max_new_tokens=3)
    assert attributes() == before


@pytest.mark.parametrize("every_n", [1, 2])
def test_hidden_states_and_attentions(every_n):
    model = tiny_model(cross_attn_every_n_layers=every_n)
    model.set_attn_implementation("eager")
    ids, pixels = torch.cat([row(1, 5), row(3, seed=1)]), images(2, 2)
    with torch.no_grad():
        output = model(
            input_ids=ids, pixel_values=pixels, output_hidden_states=True, output_attentions=True, return_dict=True
        )
    assert_close(output.hidden_states[0], model.get_input_embeddings()(ids))
    assert len(output.hidden_states) == 5 and len(output.attentions) == 4
    assert len(output.cross_attentions) == 4 // every_n
    seen = torch.tensor([[0] + [1] * 4 + [1] * 7, [0] * 3 + [1] * 9]).float()
    for weights in output.cross_attentions:
        assert weights.shape == (2, 2, 12, 3)  # rows, heads, tokens, latents
        assert_close(weights.sum(-1), seen[:, None].expand(-1, 2, -1))
    assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    # by the configuration, and only some of them
    model.config.output_hidden_states = True
    with torch.no_grad():
        assert len(model(input_ids=ids, pixel_values=pixels).hidden_states) == 5
        some = model(input_ids=ids, pixel_values=pixels, output_hidden_states=[-1]).hidden_states
    assert some[0] is None and some[-1] is not None


def test_sdpa_equals_eager():
    model = tiny_model()
    ids, pixels = torch.cat([row(1, 5), row(3, seed=1)]), images(2, 2)
    results = {}
    for implementation in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation({"": implementation, "vision_config": "eager", "text_config": "eager"})
        assert model.config._attn_implementation == implementation
        results[implementation] = logits_of(model, ids, pixels)
    assert_close(results["sdpa"], results["eager"])
    assert_close(results["flex_attention"], results["eager"])


def test_resize_token_embeddings():
    for tie in (False, True):
        model = tiny_model(tie_word_embeddings=tie)
        expected = logits_of(model, row(1), images())
        model.resize_token_embeddings(120)
        assert model.config.text_config.vocab_size == 120
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie
        logits = logits_of(model, row(1), images())
        assert logits.shape[-1] == 120
        assert_close(logits[..., :99], expected)
        model.train()
        loss = model(input_ids=row(1), pixel_values=images(), labels=row(1)).loss
        assert loss.isfinite()


def test_generation_may_choose_tokens_that_were_added():
    model = tiny_model(tokenizer_vocab_size=90)
    for size, padded in ((None, 99), (110, 128)):
        if size is not None:
            model.resize_token_embeddings(size, pad_to_multiple_of=64)
        scores = model._get_logits_processor(GenerationConfig())(row(), torch.zeros(1, padded))
        assert set(scores.isfinite().nonzero()[:, 1].tolist()) == set(range(size or 90)) - {IMAGE}


def test_image_features(model):
    media = images(2, 3).flatten(0, 1)
    output = model.get_image_features(media, output_hidden_states=True)
    assert output.pooler_output.shape == (6, 3, 24) and len(output.hidden_states) == 3
    assert_close(model.get_image_features(media[:, 0]).pooler_output, output.pooler_output)
    states = model(input_ids=torch.cat([row(1, 3, 5)] * 2), pixel_values=images(2, 3)).image_hidden_states
    assert_close(states, output.pooler_output.unflatten(0, (2, 3)))


def test_vision_towers_of_other_kinds():
    for siglip in ({}, {"vision_use_head": False}):  # the second is PaliGemma's
        siglip["model_type"] = "siglip_vision_model"
        model = tiny_model(vision=siglip, vision_feature_select_strategy="full")
        assert logits_of(model, row(1), images()).isfinite().all()
    config = tiny_config().to_dict()
    config["vision_config"] = {
        "model_type": "convnext",
        "hidden_sizes": [8, 24],
        "depths": [1, 1],
        "num_stages": 2,
        "image_size": SIZE,
    }
    model = FlamingoForConditionalGeneration(type(tiny_config()).from_dict(config)).eval()
    assert logits_of(model, row(1), images()).isfinite().all()


def test_offload_to_disk(tmp_path, model):
    from accelerate import cpu_offload, disk_offload

    ids, pixels = torch.cat([row(1, 5), row(3, seed=1)]), images(2, 2)
    expected = logits_of(model, ids, pixels)
    tokens = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=4)
    for offload in (cpu_offload, lambda m: disk_offload(m, str(tmp_path / "off"))):
        offloaded = copy.deepcopy(model)
        offload(offloaded)
        assert_close(logits_of(offloaded, ids, pixels), expected, 0)
        assert torch.equal(offloaded.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=4), tokens)


def test_device_map(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    device_map = {
        "model.vision_tower": "disk",
        "model.perceiver": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "model.language_model.norm": "cpu",
        "model.language_model.layers.0": "cpu",
        **{f"model.language_model.layers.{i}": "disk" for i in (1, 2, 3)},
        "lm_head": "disk",
    }
    placed = FlamingoForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "off"
    )
    ids, pixels = row(1, 5), images(1, 2)
    assert_close(logits_of(placed, ids, pixels), logits_of(model, ids, pixels), 0)
    output = placed(input_ids=ids, pixel_values=pixels, output_hidden_states=True)
    assert len(output.hidden_states) == 5
    assert placed._no_split_modules >= {"FlamingoDecoderLayer", "PerceiverBlock"}
    assert "LlamaDecoderLayer" not in placed._no_split_modules


def test_tensor_parallel_plan_names_the_wrapped_layers(model):
    names = {name for name, _ in model.named_parameters()}
    for plan in (model._tp_plan, model._ep_plan, model._fsdp_plan):
        # transformers' own plan of a vision tower may name what this one lacks
        for pattern in [key for key in plan if "language_model" in key or "lm_head" in key]:
            assert any(pattern.replace("*", "0") in name for name in names), pattern
    assert "model.language_model.layers.*.decoder_layer.self_attn.q_proj" in model._tp_plan


def test_legacy_argument_names(model, caplog):
    from transformers.utils import logging

    logging.get_logger("otter_hf").propagate = True
    logging.get_logger("transformers").propagate = True
    expected = logits_of(model, row(1), images())
    with torch.no_grad():
        for _ in range(2):
            assert_close(model(vision_x=images(), lang_x=row(1)).logits, expected, 0)
            assert model.model(vision_x=images(), lang_x=row(1)).last_hidden_state.shape == (1, 12, 32)
    tokens = model.generate(vision_x=images(), lang_x=row(1), attention_mask=torch.ones(1, 12), max_new_tokens=3)
    assert torch.equal(tokens, model.generate(input_ids=row(1), pixel_values=images(), max_new_tokens=3))
    with pytest.raises(ValueError, match="Both input_ids and lang_x"):
        model(input_ids=row(1), lang_x=row(1), pixel_values=images())
    warnings = [r for r in caplog.records if "vision_x and lang_x are deprecated" in r.message]
    assert len(warnings) == 1


def test_image_token_id_is_optional():
    model = tiny_model(image_token_id=None)
    ids = row(1)
    assert_close(logits_of(model, ids, None), logits_of(model, ids, images()))
    index = (ids == IMAGE).long().cumsum(1)
    assert (logits_of(model, ids, images(), media_index=index) - logits_of(model, ids, None)).abs().max() > 1e-3


@pytest.mark.slow
def test_scoring_compiles_without_graph_breaks(model):
    """As called by default, so with a cache; left-padded rows too."""
    step = torch.compile(model, fullgraph=True, backend="eager")
    ids, mask = pad_rows([row(1, 5), row(2, length=9, seed=1)], "left")
    for kwargs in ({}, {"attention_mask": mask}):
        expected = logits_of(model, ids, images(2, 2), **kwargs)
        assert_close(logits_of(step, ids, images(2, 2), **kwargs), expected)
