import dataclasses

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.models.idefics.processing_idefics import image_attention_mask_for_packed_input_ids

from otter_hf.data.collator_idefics import IdeficsCollator, idefics_loss, prepare_idefics_tokenizer


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


@pytest.mark.parametrize("removed", [False, True])
def test_image_attention_mask_is_that_of_transformers(collator, samples, removed):
    if removed:
        collator = dataclasses.replace(collator, remove_answer_token=True, remove_end_of_turn_token=True)
    batch = collator(samples)
    assert removed != (batch["input_ids"] == collator.tokenizer.convert_tokens_to_ids("<answer>")).any()
    theirs, _ = image_attention_mask_for_packed_input_ids(batch["input_ids"].clone(), collator.tokenizer, "pt")
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        seen = torch.where(
            batch["image_attention_mask"][row].any(-1), batch["image_attention_mask"][row].argmax(-1), -1
        )
        assert torch.equal(seen[real], theirs[row][real])


def tiny_idefics(vocab_size, added=0):
    """An Idefics; `added` tokens have rows of their own, as in the published ones."""
    vision = {"embed_dim": 16, "image_size": 28, "patch_size": 14, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = IdeficsConfig(
        vocab_size=vocab_size,
        additional_vocab_size=added,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        cross_layer_interval=1,
        alpha_initializer="ones",
        vision_config={**vision, "intermediate_size": 16},
        use_resampler=False,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return IdeficsForVisionText2Text(config)


def test_pixels_reach_the_rows_with_pictures_alone(collator, samples):
    model = tiny_idefics(len(collator.tokenizer)).eval()
    batch = collator(samples)
    with torch.no_grad():
        logits = model(**batch).logits
        batch["pixel_values"] = batch["pixel_values"].flip(1) + 1
        changed = model(**batch).logits
    assert not torch.allclose(logits[0], changed[0]) and torch.allclose(logits[2], changed[2])


def like_a_published_one(image_processor):
    """A model with three added tokens, none of which is `<answer>`, and a collator for it."""
    words = ["<unk>", "<s>", "</s>", "User", "Assistant", ":", "?", "r", "g", "b"]
    backend = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    added = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer = prepare_idefics_tokenizer(tokenizer)
    return tiny_idefics(len(words), len(added)), IdeficsCollator(tokenizer, image_processor, remove_answer_token=True)


@pytest.mark.parametrize("published", [False, True])
def test_a_model_learns_to_tell_pictures_apart(tmp_path, collator, by_colour, published):
    """Fine-tuning with the `Trainer`."""
    data = [
        sample(name, [("?", answer)], [1], [[by_colour[name]]])
        for name, answer in (("red", "r"), ("green", "g"), ("blue", "b"))
    ]
    model = tiny_idefics(len(collator.tokenizer))
    if published:
        model, collator = like_a_published_one(collator.image_processor)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        max_steps=80,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_steps=20,
    )
    loss = idefics_loss if published else None
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator, compute_loss_func=loss)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.2 * losses[0]
    batch = collator(data)
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        predicted = model.eval()(**batch).logits[:, :-1].argmax(dim=-1)
    # the prompts are the same: the answers come from the pictures
    assert torch.equal(predicted[labels != -100], labels[labels != -100])


def test_tokens_of_the_format_are_needed(tiny_processor_without_bos):
    tokenizer = tiny_processor_without_bos.tokenizer
    with pytest.raises(ValueError, match="no '<end_of_utterance>' token"):
        IdeficsCollator(tokenizer, IdeficsImageProcessorPil())
