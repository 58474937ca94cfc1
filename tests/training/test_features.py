"""Training from a store on disk of what is frozen of a model's eyes."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from otter_hf.models.media_folder import MediaFolder
from otter_hf.models.media_store import MediaStore, fingerprint_of_eyes
from otter_hf.training.features import store_media


def pixels(count, seed=0):
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def core(model):
    model.model.vision_tower.requires_grad_(False)
    return model.model


def twin(core):
    """The same weights in another object, as another process has them."""
    other = core.__class__(core.config).eval()
    other.load_state_dict(core.state_dict())
    other.vision_tower.requires_grad_(False)
    return other


def test_each_frame_is_computed_once(core, tmp_path):
    tower, other = core.vision_tower, twin(core)
    expected = tower(pixels(3)).last_hidden_state
    store = store_media(core, tmp_path)
    assert torch.equal(tower(pixels(3)).last_hidden_state, expected)
    again = tower(torch.cat([pixels(3), pixels(1, seed=1)]), return_dict=True).last_hidden_state
    assert torch.equal(again[:3], expected)
    assert (store.hits, store.misses) == (3, 4)
    assert not again.requires_grad
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 4 == len([path for path in tmp_path.rglob("*") if path.is_file()])
    with safe_open(files[0], "pt") as opened:
        assert opened.get_slice("media").get_shape() == [5, 32]
    files[0].write_bytes(files[0].read_bytes()[:40])  # as after a loss of power
    # another process reads what this one wrote
    store = store_media(other, tmp_path)
    assert torch.equal(other.vision_tower(pixels(3)).last_hidden_state, expected)
    assert store.hits + store.misses == 3 and store.misses <= 1


def test_a_frozen_resampler_gives_latents(core, tmp_path):
    """Pictures and films of one batch; what evaluation keeps of the same weights is read, and the other way round."""
    core.perceiver.requires_grad_(False)
    media = torch.stack([pixels(3), pixels(3, seed=1), pixels(3, seed=2)])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 1]])
    expected = core.get_image_features(media, mask).pooler_output
    other = twin(core)
    store = store_media(core, tmp_path)
    for _ in range(2):
        given = core.get_image_features(media, mask).pooler_output
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
    assert (store.hits, store.misses) == (3, 3) and not given.requires_grad
    other.perceiver.requires_grad_(False)
    assert fingerprint_of_eyes(other) == fingerprint_of_eyes(core) != fingerprint_of_eyes(other, torch.bfloat16)
    read = MediaFolder(tmp_path, fingerprint_of_eyes(other))
    assert len(list(read.folder.rglob("*.safetensors"))) == 3


def test_evaluation_keeps_latents_on_disk(model, tmp_path):
    inputs = {"input_ids": torch.ones(2, 4, dtype=torch.long), "pixel_values": pixels(4).view(2, 2, 1, 3, 28, 28)}
    stores = [MediaStore(model, folder=tmp_path) for _ in range(2)]
    first, second = (store.encode(inputs)["image_hidden_states"] for store in stores)
    assert torch.equal(first, second)
    assert [store.misses for store in stores] == [4, 0] and stores[1].folder.hits == 4


def test_the_folder_is_bounded(tmp_path):
    """What other weights made goes first, then nothing more is written."""
    size = 4096
    of_others = tmp_path / "model" / "model.safetensors"
    of_others.parent.mkdir()
    of_others.write_bytes(bytes(4 * size))
    old, new = (MediaFolder(tmp_path, name * 32, max_bytes=3 * size) for name in "01")
    for name in "ab":
        old.put(name, torch.ones(size // 8))
    for name in "abcdef":
        new.put(name, torch.ones(size // 8) * ord(name))
    assert old.get("a") is None
    kept = [name for name in "abcdef" if new.get(name) is not None]
    assert kept == list("abcde") and float(new.get("b")[0]) == ord("b")
    of_others.rename(tmp_path / "safe")  # what is no store is neither counted nor deleted
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 3 * size
    careful = MediaFolder(tmp_path, "2" * 32, max_bytes=3 * size, evicts=False)
    careful.put("a", torch.ones(size // 8))
    assert careful.get("a") is None and new.get("b") is not None
    with pytest.raises(ValueError, match="made_by must be 32 hexadecimal digits, got 'new'"):
        MediaFolder(tmp_path, "new")


def test_a_store_that_another_process_deletes_ends_no_training(tmp_path, monkeypatch):
    store = MediaFolder(tmp_path, "0" * 32)

    def save(tensors, path):
        shutil.rmtree(store.folder)
        save_file(tensors, path)

    monkeypatch.setattr("otter_hf.models.media_folder.save_file", save)
    store.put("a", torch.ones(2))
    monkeypatch.undo()
    store.put("a", torch.ones(2))
    assert store.get("a") is not None


def test_folders_by_weights(core, tmp_path):
    before = fingerprint_of_eyes(core, resampler=False)
    assert before != fingerprint_of_eyes(core)
    with torch.no_grad():
        core.vision_tower.embeddings.class_embedding.add_(1)
    assert fingerprint_of_eyes(core, resampler=False) != before


def test_a_trained_tower_is_refused(model, tmp_path, fit):
    with pytest.raises(ValueError, match="media_store needs a vision tower that is not trained: add vision"):
        store_media(model.model, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    with pytest.raises(ValueError, match="add vision to freeze"):
        fit(media_store=str(tmp_path / "store"))


@pytest.mark.parametrize("frozen", [["vision"], ["vision", "perceiver"]], ids=["features", "latents"])
def test_two_epochs_are_the_same_and_the_second_encodes_nothing(frozen, fit, tmp_path, monkeypatch):
    from otter_hf.models.flamingo.modeling_flamingo import PerceiverResampler

    stores, resampled = [], []
    get, resample = MediaFolder.get, PerceiverResampler.forward

    def count(self, name):
        stores.append(self) if self not in stores else None
        return get(self, name)

    def counted(self, *args, **kwargs):
        resampled.append(1)
        return resample(self, *args, **kwargs)

    monkeypatch.setattr(MediaFolder, "get", count)
    monkeypatch.setattr(PerceiverResampler, "forward", counted)
    settings = {"freeze": frozen, "num_train_epochs": 2}

    def losses(output, **more):
        history = json.loads((fit(output, **settings, **more) / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    plain = losses("plain")
    steps = len(resampled)
    del resampled[:]
    stored = losses("stored", media_store=str(tmp_path / "store"))
    assert stored == pytest.approx(plain, abs=1e-5) and len(plain) > 2
    (store,) = stores
    assert store.misses <= 9 and store.hits > 0  # 8 pictures, and the blank one of batches without any
    # what is encoded at all is each medium once
    assert len(resampled) <= store.misses if len(frozen) > 1 else len(resampled) == steps


def test_a_frozen_tower_builds_no_graph_and_stays_as_it_is(fit, ragged, monkeypatch):
    from otter_hf import OtterForConditionalGeneration
    from otter_hf.models.flamingo.modeling_flamingo import PerceiverResampler

    entering = []
    original = PerceiverResampler.forward
    monkeypatch.setattr(
        PerceiverResampler, "forward", lambda self, x, **kw: (entering.append(x), original(self, x, **kw))[1]
    )
    towers = []
    compute = OtterForConditionalGeneration.forward
    monkeypatch.setattr(
        OtterForConditionalGeneration,
        "forward",
        lambda self, **inputs: (towers.append(self.model.vision_tower.training), compute(self, **inputs))[1],
    )
    fit("checkpointed", freeze=["vision"], max_steps=1, activation_checkpointing=True)
    fit("plain", freeze=["vision"], max_steps=1)
    # reentrant checkpointing may ask a gradient of what enters the resampler, but none goes on into the tower
    assert entering and all(features.grad_fn is None for features in entering)
    assert towers == [False, False]
    fit("trained", max_steps=1)
    assert entering[-1].requires_grad
    assert towers[-1]
