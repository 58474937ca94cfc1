"""Media of different numbers of frames in one batch: each gives what it gives alone."""

import pytest
import torch
from tiny_flamingo import GREEDY, IMAGE, SIZE, assert_close, images, pad_rows, row, tiny_model


ROWS = [row(1, 5), row(3, length=10, seed=1), row(length=7, seed=2), row(2, 4, 6, length=14, seed=3)]
MEDIA = [
    [images(frames=3, seed=4)[0, 0], images(frames=1, seed=5)[0, 0]],
    [images(frames=5, seed=6)[0, 0]],
    [],
    [images(frames=1, seed=7)[0, 0], images(frames=5, seed=8)[0, 0], images(frames=1, seed=9)[0, 0]],
]  # (F, 3, SIZE, SIZE) each


def pack(media, filling=0.0) -> dict[str, torch.Tensor]:
    shape = len(media), max(map(len, media)), max(len(medium) for of_row in media for medium in of_row)
    pixels, mask = torch.full((*shape, 3, SIZE, SIZE), filling), torch.zeros(shape, dtype=torch.long)
    for i, of_row in enumerate(media):
        for j, medium in enumerate(of_row):
            pixels[i, j, : len(medium)], mask[i, j, : len(medium)] = medium, 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def alone(i) -> dict[str, torch.Tensor]:
    return {"input_ids": ROWS[i], **(pack([MEDIA[i]]) if MEDIA[i] else {})}


def batch(side="left", filling=0.0) -> dict[str, torch.Tensor]:
    ids, mask = pad_rows(ROWS, side)
    return {"input_ids": ids, "attention_mask": mask, **pack(MEDIA, filling)}


@pytest.fixture(scope="module", params=[None, 6], ids=["plain", "frame_embs"])
def model(request):
    return tiny_model(max_num_frames=request.param)


@pytest.mark.parametrize("way", ["sdpa", "eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_row_gives_what_it_gives_alone(model, way):
    inputs = batch("left", filling=7.0)  # padding may hold anything
    model.set_attn_implementation("eager" if way == "eager" else "sdpa")
    forward = torch.compile(model, backend="eager", fullgraph=True) if way == "compiled" else model
    with torch.no_grad():
        together = forward(**inputs).logits
        for i, ids in enumerate(ROWS):
            assert_close(together[i, -ids.shape[1] :], model(**alone(i)).logits[0])
        # and it is the frames that count
        assert not torch.allclose(model(**{**inputs, "pixel_attention_mask": None}).logits, together, atol=1e-2)
    model.set_attn_implementation("sdpa")


def test_only_real_frames_of_referenced_media_are_encoded(model):
    counts = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    with torch.no_grad():
        model(**batch())
        model(**{**batch(), "media_index": (batch()["input_ids"] == IMAGE).long().cumsum(1).clamp(max=1)})
    hook.remove()
    assert counts == [4 + 5 + 7, 3 + 5 + 1]


def test_media_are_encoded_once_for_all_answers(model):
    counts = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    for settings in ({"num_beams": 3}, {"num_beams": 2, "use_cache": False}, {"num_return_sequences": 2}):
        settings["do_sample"] = "num_return_sequences" in settings
        model.generate(**batch("left"), max_new_tokens=2, **{**GREEDY, **settings})
    hook.remove()
    assert counts == [4 + 5 + 7] * 3


def test_equal_frame_counts_are_computed_as_without_a_mask(model):
    ids, pixels = torch.cat([row(1, 5), row(3, seed=1)]), images(2, 2, frames=3)
    mask = torch.tensor([[1, 1], [1, 0]])[..., None].expand(2, 2, 3)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels, pixel_attention_mask=mask).logits
        assert torch.equal(logits, model(input_ids=ids, pixel_values=pixels).logits)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}],
)
def test_generation(model, settings):
    inputs = batch()
    tokens = model.generate(**inputs, max_new_tokens=5, **GREEDY, **settings)[:, inputs["input_ids"].shape[1] :]
    for i, ids in enumerate(ROWS):
        expected = model.generate(**alone(i), max_new_tokens=5, **GREEDY, **settings)
        assert torch.equal(tokens[i], expected[0, ids.shape[1] :])


@pytest.mark.parametrize("only_new", [True, False])
def test_a_chat_goes_on_with_a_film(model, only_new):
    turn = torch.cat([row(1, length=5, seed=9), row(length=5, seed=8)])
    ids = torch.cat([torch.cat([ROWS[0], row(1, seed=3)]), turn], dim=1)
    first = [MEDIA[0], [MEDIA[3][0]]]
    new, whole = [MEDIA[1], []], [MEDIA[0] + MEDIA[1], [MEDIA[3][0]]]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :12], use_cache=True, **pack(first)).past_key_values
        expected = model.generate(input_ids=ids, max_new_tokens=4, **GREEDY, **pack(whole))
        tokens = model.generate(
            input_ids=ids, past_key_values=cache, max_new_tokens=4, **GREEDY, **pack(new if only_new else whole)
        )
    assert torch.equal(tokens, expected)
    assert cache.media_key_values[1].shape[1:3] == (3, model.config.perceiver_num_latents)


def test_what_does_not_fit_is_refused(model):
    inputs = batch()
    with pytest.raises(ValueError, match=r"pixel_attention_mask has shape \(4, 3\); expected \(4, 3, 5\)"):
        model(**{**inputs, "pixel_attention_mask": inputs["pixel_attention_mask"][:, :, 0]})
    fewer = inputs["pixel_attention_mask"].clone()
    fewer[3, 2] = 0
    with pytest.raises(ValueError, match="row 3 refers to 3 new media, but pixel_attention_mask holds 2"):
        model(**{**inputs, "pixel_attention_mask": fewer})
    with pytest.raises(ValueError, match="0 everywhere"):
        model.get_image_features(images()[0], torch.zeros(1, 1))
    # prompts are cut in front, behind the first `<image>` of the first row: its pictures would shift
    cut = {**inputs, **{name: inputs[name][:, 4:] for name in ("input_ids", "attention_mask")}}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="row 0 .* (holds 2|which has 1)"):
            call(**cut)


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_pictures_that_no_image_token_stands_for(model, given):
    ids = row(seed=4)
    inputs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, **GREEDY}
    inputs[given] = ids if given == "input_ids" else model.get_input_embeddings()(ids).detach()
    with pytest.raises(ValueError, match="holds 1 media for row 0 of the prompt, which has 0 new `<image>`"):
        model.generate(pixel_values=images(), **inputs)
    index = torch.ones_like(ids)
    assert model.generate(pixel_values=images(), media_index=index, **inputs).shape[1] >= 2
    assert model.generate(pixel_values=torch.zeros_like(images()), **inputs).shape[1] >= 2  # padding
    one = {**inputs, given: row(3) if given == "input_ids" else model.get_input_embeddings()(row(3)).detach()}
    with pytest.raises(ValueError, match="holds 2 media for row 0 of the prompt, which has 1 new"):
        model.generate(pixel_values=images(1, 2), **one)
