"""Features of a frozen vision tower, kept on disk."""

import json

import pytest
import torch
from safetensors import safe_open

from otter_hf.training.features import VisionFeatureCache


@pytest.fixture
def tower(model):
    return model.model.vision_tower.requires_grad_(False)


def pixels(count, seed=0):
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def test_each_frame_is_computed_once(tower, tmp_path):
    expected = tower(pixels(3)).last_hidden_state
    cache = VisionFeatureCache(tmp_path, tower)
    assert torch.equal(tower(pixels(3)).last_hidden_state, expected)
    again = tower(torch.cat([pixels(3), pixels(1, seed=1)]), return_dict=True).last_hidden_state
    assert torch.equal(again[:3], expected)
    assert (cache.hits, cache.misses) == (3, 4)
    assert not again.requires_grad
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 4 == len([path for path in tmp_path.rglob("*") if path.is_file()])
    with safe_open(files[0], "pt") as opened:
        assert opened.get_slice("features").get_shape() == [5, 32]


def test_another_process_reads_what_one_wrote(tower, tmp_path):
    VisionFeatureCache(tmp_path, tower)
    expected = tower(pixels(2)).last_hidden_state
    other = tower.__class__(tower.config).requires_grad_(False).eval()
    other.load_state_dict(tower.state_dict())
    second = VisionFeatureCache(tmp_path, other)
    assert torch.equal(other(pixels(2)).last_hidden_state, expected)
    assert (second.hits, second.misses) == (2, 0)


def test_folders_by_weights_and_precision(tower, tmp_path):
    folders = {VisionFeatureCache(tmp_path, tower, dtype).folder for dtype in (None, torch.bfloat16, None)}
    assert len(folders) == 2
    with torch.no_grad():
        tower.embeddings.class_embedding.add_(1)
    assert VisionFeatureCache(tmp_path, tower).folder not in folders


def test_a_trained_tower_is_refused(model, tmp_path, fit):
    with pytest.raises(ValueError, match="cache_vision_features needs a vision tower that is not trained: add vision"):
        VisionFeatureCache(tmp_path / "cache", model.model.vision_tower)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="add vision to freeze"):
        fit(cache_vision_features=str(tmp_path / "cache"))


def test_training_is_the_same(fit, tmp_path, monkeypatch):
    """The second run reads all; both learn what a run without cache learns."""
    caches = []
    original = VisionFeatureCache.__init__

    def remember(self, *args):
        original(self, *args)
        caches.append(self)

    monkeypatch.setattr(VisionFeatureCache, "__init__", remember)
    settings = {"freeze": ["vision"], "max_steps": 6}

    def losses(output, **more):
        history = json.loads((fit(output, **settings, **more) / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    plain = losses("plain")
    cached = [losses(name, cache_vision_features=str(tmp_path / "features")) for name in ("first", "second")]
    assert cached[0] == pytest.approx(plain, abs=1e-6)
    assert cached[1] == pytest.approx(plain, abs=1e-6)
    first, second = caches
    assert first.misses == 9  # 8 pictures, and the blank one of batches without any
    assert first.hits > 0
    assert second.misses == 0


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
