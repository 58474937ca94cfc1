"""A store of latents: the same answers, every medium encoded once, memory within its bound."""

import pytest
import torch
from test_frames import MEDIA, ROWS, batch, pack
from tiny_flamingo import GREEDY, assert_close, tiny_model

from otter_hf.models.media_store import MediaStore


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def frames(model):
    """How many frames each call of the tower got."""
    counts = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    yield counts
    hook.remove()


def test_the_same_answers_from_media_encoded_once(model, frames):
    inputs, store = batch(), MediaStore(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        tokens = model.generate(**inputs, **GREEDY)
        frames.clear()
        for _ in range(2):
            given = store.encode(inputs)
            assert "pixel_values" not in given
            assert_close(model(**given).logits, expected)
        assert torch.equal(model.generate(**given, **GREEDY), tokens)
        # alone and in another batch they are the same media
        alone = {"input_ids": ROWS[3], **pack([MEDIA[3]])}
        assert_close(model(**store.encode(alone)).logits[0], expected[3, -ROWS[3].shape[1] :])
    assert frames == [16]
    assert (store.hits, store.misses) == (9, 6)


def test_media_are_known_by_their_pixels(model, frames):
    store = MediaStore(model)
    medium = MEDIA[1][0]
    for frames_of in (medium, medium[:3], medium.flip(0), medium + 0.01, medium.clone()):
        store.encode({"input_ids": ROWS[1], **pack([[frames_of]])})
    assert (store.hits, store.misses) == (1, 4)
    # twice in one batch is once encoded
    frames.clear()
    new = medium * 2
    given = store.encode({"input_ids": torch.cat([ROWS[1], ROWS[1]]), **pack([[new], [new]])})
    assert frames == [len(new)]
    assert torch.equal(*given["image_hidden_states"])


def test_text_alone_stays_as_it_is(model):
    inputs = {"input_ids": ROWS[2], "attention_mask": torch.ones_like(ROWS[2])}
    assert MediaStore(model).encode(inputs) == inputs


def test_memory_and_folder_are_bounded(model, tmp_path):
    size = model.config.perceiver_num_latents * model.config.vision_hidden_size * 4
    store = MediaStore(model, max_bytes=2 * size)
    of = [{"input_ids": ROWS[1], **pack([[MEDIA[1][0] + i]])} for i in range(3)]
    for i in (0, 1, 0, 2, 0, 1):  # the second is the one that goes
        store.encode(of[i])
    assert (store.hits, store.misses) == (2, 4)
    # a batch with more than fits is answered all the same
    small = MediaStore(model, max_bytes=size)
    given = small.encode(batch())
    assert given["image_hidden_states"].abs().sum(dim=(2, 3)).bool().tolist() == [
        [True, True, False],
        [True, False, False],
        [False, False, False],
        [True, True, True],
    ]
    # nothing goes into a folder that is full, and what is in it is read
    folder, inputs = tmp_path / "store", of[0]
    expected = MediaStore(model, folder=folder, folder_bytes=0).encode(inputs)
    assert not [*folder.rglob("*.safetensors")]
    for hits in (0, 1):
        store = MediaStore(model, folder=folder, folder_bytes=size + 600)
        assert torch.equal(store.encode(inputs)["image_hidden_states"], expected["image_hidden_states"])
        store.encode(of[1])
        assert store.hits == hits and len([*folder.rglob("*.safetensors")]) == 1
