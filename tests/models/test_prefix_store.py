"""Prompts that begin alike: found by tokens and pixels, read once, answered as before."""

import pytest
import torch
from test_skills import EXAMPLES, PICTURES, QUESTIONS, Work, generate, of_family, prompt, turn

from otter_hf.models import batch_media, prefix_store
from otter_hf.models.media_store import MediaStore
from otter_hf.models.prefix_store import PrefixStore


@pytest.fixture(scope="module", params=["otter", "otterhd"])
def family(request):
    return of_family(request.param)


def answer(model, inputs, cache):
    # generate writes into the cache it is given
    from otter_hf.models.prefix_cache import expand

    return generate(model, inputs, past_key_values=None if cache is None else expand(cache, [0]))


def test_examples_are_found_by_the_second_question(family):
    model, processor = family
    store = PrefixStore(model)
    prompts = [prompt(processor, EXAMPLES + question) for question in QUESTIONS]
    expected = [generate(model, inputs) for inputs in prompts]
    assert store.prefix_of(prompts[0]) is None
    lengths = []
    for inputs, known in zip(prompts[1:], expected[1:], strict=True):
        cache = store.prefix_of(inputs)
        lengths.append(cache.get_seq_length())
        given = answer(model, inputs, cache)
        assert torch.equal(given.sequences, known.sequences)
        torch.testing.assert_close(torch.stack(given.logits), torch.stack(known.logits), atol=1e-5, rtol=1e-5)
    own = prompt(processor, EXAMPLES + QUESTIONS[1])["input_ids"].shape[1]
    assert 0.5 * own < lengths[0] < own and store.nbytes > 0
    # by then it is there, the same object
    with Work(model) as work:
        assert store.prefix_of(prompts[0]) is store.prefix_of(prompts[0])
    assert work.columns <= prompts[0]["input_ids"].shape[1] - lengths[0]


def test_the_turns_of_a_conversation_are_read_once(family, monkeypatch):
    model, processor = family
    media = MediaStore(model) if hasattr(model.model, "vision_tower") else None
    store, messages, total = PrefixStore(model, media, piece_tokens=16), [], 0
    monkeypatch.setattr(prefix_store, "_LEAST_TOKENS", 8)
    with Work(model) as work:
        for question, picture in (("what is it?", PICTURES[0]), ("and this?", PICTURES[1]), ("sure?", None)):
            messages += turn(question, picture)
            inputs = prompt(processor, messages)
            cache = store.prefix_of(inputs)
            generate(model, inputs, past_key_values=None) if cache is None else answer(model, inputs, cache)
            messages += [{"role": "assistant", "content": "so it seems"}]
            total = inputs["input_ids"].shape[1]
    # the first prompt twice, as the second found it; six tokens for each answer
    first = prompt(processor, messages[:1])["input_ids"].shape[1]
    assert work.columns <= total + first + 3 * 6 + 8


def test_few_pictures_are_encoded_at_a_time(monkeypatch):
    """The batch waits for the store meanwhile."""
    model, processor = of_family("otter")
    inputs, frames = prompt(processor, EXAMPLES + QUESTIONS[0]), []
    monkeypatch.setattr(batch_media, "FRAMES_PER_STEP", 2)
    store = PrefixStore(model, MediaStore(model))
    assert store.prefix_of(inputs) is None
    hook = model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: frames.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    cache = store.prefix_of(inputs)
    hook.remove()
    assert sum(frames) == cache.num_media > 2 and max(frames) == 2


def test_other_pixels_are_another_beginning(family):
    model, processor = family
    store = PrefixStore(model)
    store.prefix_of(prompt(processor, EXAMPLES + QUESTIONS[0]))
    other = [*turn("what color?", PICTURES[4], "red"), *EXAMPLES[2:], *QUESTIONS[0]]
    assert store.prefix_of(prompt(processor, other)) is None
    assert store.prefix_of(prompt(processor, turn("hm"))) is None


def test_memory_is_bounded(family):
    model, processor = family
    inputs = prompt(processor, EXAMPLES + QUESTIONS[0])
    store = PrefixStore(model)
    store.prefix_of(inputs)
    assert store.prefix_of(inputs).get_seq_length() == inputs["input_ids"].shape[1] - 1
    kept = store.nbytes
    store = PrefixStore(model, max_bytes=kept - 1, piece_tokens=16)
    store.prefix_of(inputs)
    with Work(model) as work:
        assert store.prefix_of(inputs) is None and store.nbytes == 0
        # one that would be too large is left to the batch, after a piece tells so
        assert work.columns <= 2 * 16
        assert store.prefix_of(inputs) is None
        assert work.columns <= 2 * 16
    # a smaller one still finds room, and who is gone has nothing read
    short = prompt(processor, QUESTIONS[0])
    store = PrefixStore(model, max_bytes=kept)
    store.prefix_of(inputs)
    assert store.prefix_of(inputs, lambda: True) is None and store.nbytes == 0
    assert store.prefix_of(short) is None or store.nbytes <= kept
