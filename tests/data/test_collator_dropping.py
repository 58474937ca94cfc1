import pytest
from transformers import IdeficsImageProcessorPil

from otter_hf.data.collator import OtterCollator
from otter_hf.data.collator_dropping import TokenDroppingCollator
from otter_hf.data.collator_idefics import IdeficsCollator, prepare_idefics_tokenizer


def samples(by_colour):
    red, blue = [by_colour["red"]], [by_colour["blue"]]
    return [
        {"id": "A", "turns": [("Q1", "A1"), ("Q2", "A2")], "media_per_turn": [1, 1], "media": [red, blue]},
        {"id": "B", "turns": [("Q", "a long answer")], "media_per_turn": [1], "media": [red]},
    ]


def rows(tokenizer, batch):
    """What each row says, and what is learned of it."""
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True):
        assert ((labels == -100) | (labels == ids)).all() and (labels[~mask] == -100).all()
        assert (mask.long().diff() <= 0).all() and (ids[~mask] == tokenizer.pad_token_id).all()
        yield tokenizer.decode(ids[mask]), tokenizer.decode(ids[labels != -100])


def test_ids_mask_and_labels_stay_aligned(tiny_processor, by_colour):
    tokenizer, collator = tiny_processor.tokenizer, OtterCollator(tiny_processor)
    expected = {
        ("<answer>",): [
            ("<s><image>User:Q1 GPT:A1<|endofchunk|><image>User:Q2 GPT:A2<|endofchunk|></s>", 2),
            ("<s><image>User:Q GPT:a long answer<|endofchunk|></s>", 1),
        ],
        ("<|endofchunk|>",): [
            ("<s><image>User:Q1 GPT:<answer>A1<image>User:Q2 GPT:<answer>A2</s>", 0),
            ("<s><image>User:Q GPT:<answer>a long answer</s>", 0),
        ],
        ("<answer>", "<|endofchunk|>"): [
            ("<s><image>User:Q1 GPT:A1<image>User:Q2 GPT:A2</s>", 0),
            ("<s><image>User:Q GPT:a long answer</s>", 0),
        ],
    }
    whole = collator(samples(by_colour))
    for tokens, texts in expected.items():
        batch = TokenDroppingCollator(collator, tokenizer, tokens)(samples(by_colour))
        found = list(rows(tokenizer, batch))
        assert [text for text, _ in found] == [text for text, _ in texts]
        assert [learned.count("<|endofchunk|>") for _, learned in found] == [count for _, count in texts]
        assert [learned.replace("<|endofchunk|>", "") for _, learned in found] == ["A1A2</s>", "a long answer</s>"]
        # as long as the longest row that is left
        assert batch["attention_mask"].sum(dim=1).max() == batch["input_ids"].shape[1]
        assert batch["pixel_values"].equal(whole["pixel_values"])


def test_image_attention_mask_goes_with_its_tokens(tiny_processor, by_colour):
    tokenizer = prepare_idefics_tokenizer(tiny_processor.tokenizer)
    collator = IdeficsCollator(tokenizer, IdeficsImageProcessorPil(size={"height": 28, "width": 28}))
    batch = TokenDroppingCollator(collator, tokenizer, ["<answer>"])(samples(by_colour))
    seen = (batch["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")).cumsum(dim=1) * batch["attention_mask"]
    assert batch["image_attention_mask"].shape == (*seen.shape, 2)
    assert (batch["image_attention_mask"].sum(dim=2) == (seen > 0)).all()
    assert (batch["image_attention_mask"][0].argmax(dim=1) == (seen[0] - 1).clamp(min=0)).all()


@pytest.mark.parametrize("tokens", [[], ["<nothing>"], ["<answer>", "<image>"]])
def test_wrong_tokens(tiny_processor, tokens):
    with pytest.raises(ValueError, match="must be some that|cannot be deleted"):
        TokenDroppingCollator(OtterCollator(tiny_processor), tiny_processor.tokenizer, tokens)


def test_packed_batches_are_refused(tiny_processor, by_colour):
    collator = OtterCollator(tiny_processor, packing=True)
    with pytest.raises(ValueError, match="packing=False"):
        TokenDroppingCollator(collator, tiny_processor.tokenizer, ["<answer>"])(samples(by_colour))
