import pytest
import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text, IdeficsImageProcessorPil
from transformers.models.idefics.processing_idefics import image_attention_mask_for_packed_input_ids

from otter_hf.data.collator_idefics import IdeficsCollator, prepare_idefics_tokenizer


@pytest.fixture
def collator(tiny_processor):
    tokenizer = prepare_idefics_tokenizer(tiny_processor.tokenizer)
    return IdeficsCollator(tokenizer, IdeficsImageProcessorPil(size={"height": 28, "width": 28}))


def sample(id, turns, media_per_turn, media):
    return {"id": id, "turns": turns, "media_per_turn": media_per_turn, "media": media}


@pytest.fixture
def samples(by_colour):
    return [
        sample("in-context", [("Q1", "A1"), ("Q2", "A2")], [1, 1], [[by_colour["red"]], [by_colour["blue"]]]),
        sample("video", [("Q", "A")], [1], [[by_colour["red"], by_colour["green"], by_colour["blue"]]]),
        sample("text", [("Q", "A")], [0], []),
    ]


def test_batch(collator, samples):
    batch = collator(samples)
    rows, length = batch["input_ids"].shape
    assert batch["pixel_values"].shape == (3, 3, 3, 28, 28)
    assert batch["image_attention_mask"].shape == (rows, length, 3)
    present = batch["pixel_values"].abs().sum(dim=(2, 3, 4)) > 0
    assert present.sum(dim=1).tolist() == [2, 3, 0]
    assert not batch["image_attention_mask"][2].any()
    text = collator.tokenizer.decode(batch["input_ids"][0][batch["labels"][0] != -100])
    assert text == "A1<end_of_utterance>A2<end_of_utterance></s>"


def test_image_attention_mask_is_that_of_transformers(collator, samples):
    batch = collator(samples)
    theirs, _ = image_attention_mask_for_packed_input_ids(batch["input_ids"].clone(), collator.tokenizer, "pt")
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        seen = torch.where(
            batch["image_attention_mask"][row].any(-1), batch["image_attention_mask"][row].argmax(-1), -1
        )
        assert torch.equal(seen[real], theirs[row][real])


def test_a_model_learns_from_it(collator, samples, by_colour):
    torch.manual_seed(0)
    vision = {"embed_dim": 16, "image_size": 28, "patch_size": 14, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = IdeficsConfig(
        vocab_size=len(collator.tokenizer),
        additional_vocab_size=0,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        cross_layer_interval=1,
        alpha_initializer="ones",
        vision_config={**vision, "intermediate_size": 16},
        use_resampler=False,
        pad_token_id=0,
    )
    model = IdeficsForVisionText2Text(config)
    batch = collator(samples)
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    gates = [value.grad for name, value in model.named_parameters() if "alpha" in name]
    assert gates and any(grad.abs().sum() > 0 for grad in gates)
    with torch.no_grad():
        logits = model(**batch).logits
        batch["pixel_values"] = batch["pixel_values"].flip(1) + 1
        changed = model(**batch).logits
    assert not torch.allclose(logits[0], changed[0]) and torch.allclose(logits[2], changed[2])


def test_tokens_of_the_format_are_needed(tiny_processor_without_bos):
    tokenizer = tiny_processor_without_bos.tokenizer
    with pytest.raises(ValueError, match="no '<end_of_utterance>' token"):
        IdeficsCollator(tokenizer, IdeficsImageProcessorPil())
