"""Media that were encoded before, given back as latents in place of pixels."""

import pytest
import torch
from test_frames import MEDIA, ROWS, batch, pack
from tiny_flamingo import GREEDY, pad_rows, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def encoded(model, inputs, **other) -> dict[str, torch.Tensor]:
    """The inputs with latents in place of pixels."""
    pixels, mask = inputs["pixel_values"], inputs["pixel_attention_mask"]
    with torch.no_grad():
        latents = model.get_image_features(pixels.flatten(0, 1), mask.flatten(0, 1)).pooler_output
    inputs = {name: value for name, value in inputs.items() if name != "pixel_values"}
    return {**inputs, "image_hidden_states": latents.unflatten(0, pixels.shape[:2]), **other}


@pytest.fixture
def no_tower(model, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("nothing is to be encoded")

    return lambda: monkeypatch.setattr(model.model.vision_tower, "forward", refuse)


@pytest.mark.parametrize("mask", [{}, {"pixel_attention_mask": None}], ids=["mask", "none"])
def test_the_same_logits(model, no_tower, mask):
    inputs = batch()
    with torch.no_grad():
        expected = model(**inputs)
        given = encoded(model, inputs, **mask)
        no_tower()
        assert torch.equal(model(**given).logits, expected.logits)
        # what one call returns the next one takes
        given["image_hidden_states"] = expected.image_hidden_states
        assert torch.equal(model(**given).logits, expected.logits)
        given["image_hidden_states"] = expected.image_hidden_states.flip(0)
        assert not torch.allclose(model(**given).logits, expected.logits, atol=1e-2)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}],
    ids=["cached", "uncached", "beams", "static"],
)
def test_the_same_tokens(model, no_tower, settings):
    inputs = batch()
    expected = model.generate(**inputs, **GREEDY, **settings)
    given = encoded(model, inputs)
    no_tower()
    assert torch.equal(model.generate(**given, **GREEDY, **settings), expected)


def test_a_chat_goes_on_with_all_media_or_the_new_ones(model, no_tower):
    ids = torch.cat([ROWS[0], ROWS[3]], dim=1)
    media = [MEDIA[0] + MEDIA[3]]
    expected = model.generate(ids, **pack(media), **GREEDY)
    first = encoded(model, {"input_ids": ROWS[0], **pack([MEDIA[0]])})
    whole, new = (encoded(model, {"input_ids": ids, **pack([some])}) for some in (media[0], MEDIA[3]))
    no_tower()
    for given in (whole, new):
        cache = model(**first, use_cache=True).past_key_values
        assert torch.equal(model.generate(**given, past_key_values=cache, **GREEDY), expected)


def test_one_encoding_serves_many_rows(model, no_tower):
    """Worked examples that all rows share are encoded once; gradients flow into them."""
    ids, mask = pad_rows([ROWS[0]] * 3, "left")
    one = encoded(model, {"input_ids": ROWS[0], **pack([MEDIA[0]])})["image_hidden_states"].requires_grad_()
    no_tower()
    loss = model(ids, attention_mask=mask, image_hidden_states=one.expand(3, -1, -1, -1), labels=ids).loss
    loss.backward()
    assert one.grad.abs().sum() > 0
    model.zero_grad()


def test_what_does_not_fit_is_refused(model):
    inputs = batch()
    given = encoded(model, inputs)
    states = given["image_hidden_states"]
    for wrong, message in (
        ({**given, "pixel_values": inputs["pixel_values"]}, "either pixel_values or image_hidden_states"),
        ({**given, "image_hidden_states": states[:, :, :-1]}, r"image_hidden_states has shape \(4, 3, .*expected"),
        ({**given, "image_hidden_states": states[:2]}, r"image_hidden_states has shape \(2, "),
        ({**given, "image_hidden_states": states[:, :2]}, r"pixel_attention_mask has shape \(4, 3, 5\)"),
        (
            {**given, "image_hidden_states": states[:, :1], "pixel_attention_mask": None},
            "row 0 refers to 2 new media, but image_hid",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(**wrong)
        with pytest.raises(ValueError, match=message.replace("row 0 refers to 2 new media, but ", "")):
            model.generate(**wrong, **GREEDY)
    one = {"input_ids": ROWS[1], "image_hidden_states": states[:1, :2]}
    with pytest.raises(ValueError, match="image_hidden_states holds 2 media for row 0"):
        model.generate(**one, attention_mask=torch.ones_like(ROWS[1]), **GREEDY)
