"""What is one rule for all families: samples are whole, and what becomes of those that are too long."""

import pytest
from collators_tiny import COLLATORS
from PIL import Image

from otter_hf.data.samples import SampleError


@pytest.fixture(scope="module", params=COLLATORS)
def make(request):
    return COLLATORS[request.param]


def sample(id, *turns, media=1):
    picture = [Image.new("RGB", (20, 24), "red")]
    return {"id": id, "turns": list(turns), "media": [picture] * media, "media_per_turn": [1] + [0] * (len(turns) - 1)}


def tokens_of(make, one):
    """As `max_length` counts them: with the tokens that the batch is without."""
    collator = make()
    removed = len(one["turns"]) * len(getattr(collator, "removed_tokens", ()))
    return collator([one])["input_ids"].shape[1] + removed


@pytest.mark.parametrize(
    "change, message",
    [
        ({"media_per_turn": [2]}, "'S1' places 2 images or videos in its turns but holds 1"),
        ({"media_per_turn": [0]}, "'S1' places 0 images or videos in its turns but holds 1"),
        ({"media": [[]]}, "'S1' has a video without frames"),
        ({"media": None}, "lacks media: with the Trainer, set remove_unused_columns=False"),
    ],
)
def test_samples_that_are_not_whole(make, change, message):
    whole = sample("S1", ("Q", "A")) | change
    with pytest.raises(SampleError, match=message):
        make()([{key: value for key, value in whole.items() if value is not None}])


def test_what_is_too_long(make):
    short, long = sample("short", ("Q", "A")), sample("long", ("Q", "an answer"))
    limit = {"max_length": tokens_of(make, short) + 4}
    message = f"'long' has {tokens_of(make, long)} tokens .*, the limit is max_length={limit['max_length']}: "
    with pytest.raises(SampleError, match=message):
        make(**limit)([short, long])
    skipped = make(**limit, on_overlong="skip")([short, long])
    assert skipped["labels"].equal(make()([short])["labels"])
    with pytest.raises(SampleError, match="'long' and the rest of its batch are longer than max_length="):
        make(**limit, on_overlong="skip")([long])
    cut, whole = make(**limit, on_overlong="truncate")([long]), make()([long])
    left = whole["input_ids"].shape[1] - cut["input_ids"].shape[1]
    assert left == tokens_of(make, long) - limit["max_length"]
    assert 0 < (cut["labels"] != -100).sum() < (whole["labels"] != -100).sum()
    with pytest.raises(
        SampleError, match="'long' and the rest of its batch are cut before their answers .* max_length=3 "
    ):
        make(max_length=3, on_overlong="truncate")([long])
    asks_much = sample("much", ("Q" * 50, "A"))  # nothing of its answer is left, and it alone is left out
    kept = make(**limit, on_overlong="truncate")([short, asks_much])
    assert kept["labels"].equal(make()([short])["labels"])
    with pytest.raises(ValueError, match="on_overlong must be one of error, truncate, skip, got 'drop'"):
        make(on_overlong="drop")


def test_the_oldest_turns_go_first(make):
    conversation = sample("S1", ("Q1", "A1"), ("Q2", "A2"), ("Q3", "A3"))
    two = sample("S1", ("Q2", "A2"), ("Q3", "A3"))
    batch, expected = make(max_length=tokens_of(make, two))([conversation]), make()([two])
    assert batch.keys() == expected.keys()
    assert all(batch[key].equal(expected[key]) for key in ("input_ids", "labels", "pixel_values"))


def test_a_flamingo_has_no_answer_token():
    with pytest.raises(ValueError, match="remove_answer_token is False, but a Flamingo has no <answer> token"):
        COLLATORS["flamingo"](remove_answer_token=False)
