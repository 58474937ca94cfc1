"""Settings that must not change what is learned: loss and gradient norm step by step, and the weights at the end."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig


pytestmark = pytest.mark.invariant


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same(runs, tolerance=1e-4):
    first, *others = runs.values()
    for other in others:
        for key in ("loss", "grad_norm"):
            assert len(other[key]) == len(first[key]) > 0
            torch.testing.assert_close(torch.tensor(other[key]), torch.tensor(first[key]), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_accumulation(fit, record, packing):
    """8 samples are a step, however they are dealt out: the loss is a mean over the labels of all of them."""
    folders = {
        f"{batch} x {8 // batch}": fit(
            f"out{batch}",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            packing=packing,
            max_steps=3,
        )
        for batch in (1, 2, 8)
    }
    runs = record(f"batch x accumulation, {'packed' if packing else 'padded'}", folders)
    assert len(runs["1 x 8"]["loss"]) == 3
    assert_same(runs)


def test_packed_is_padded(fit, record):
    assert_same(record("packing", {"packed": fit("packed", packing=True), "padded": fit("padded", packing=False)}))


@pytest.mark.parametrize("frozen", [[], ["vision", "language"]])
def test_checkpointing(fit, record, frozen):
    folders = {
        str(on): fit(f"out{on}", activation_checkpointing=on, freeze=frozen, max_steps=3) for on in (False, True)
    }
    assert_same(record(f"activation checkpointing, freeze={frozen}", folders), tolerance=1e-5)


@pytest.mark.slow
def test_compiled(fit, record):
    """`torch_compile` goes through with batches of other shapes; its eager backend changes no number."""
    settings = {"max_steps": 3, "packing": False}
    compiled = fit("compiled", torch_compile=True, torch_compile_backend="eager", **settings)
    assert_same(record("torch.compile", {"compiled": compiled, "eager": fit("eager", **settings)}), tolerance=1e-5)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "packing": False, "max_steps": 5}])
def test_resumed_is_uninterrupted_to_the_bit(fit, ragged, record, settings):
    """Also with dropout, in the middle of the second epoch, and with length-sorted batches."""
    config = AutoConfig.from_pretrained(ragged / "base")
    config.text_config.attention_dropout = 0.1
    config.save_pretrained(ragged / "base")
    settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4, **settings}
    settings["train_sampling_strategy"] = "group_by_length"
    last = settings["max_steps"] // 4 * 4
    whole = fit("whole", **settings)
    resumed = fit("resumed", resume_from_checkpoint=str(whole / f"checkpoint-{last}"), **settings)
    runs = record(f"resumed, {settings}", {"whole": whole, "resumed": resumed})
    assert runs["whole"] == runs["resumed"]
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())
    states = [json.loads((folder / "trainer_state.json").read_text())["global_step"] for folder in (whole, resumed)]
    assert states == [settings["max_steps"]] * 2
