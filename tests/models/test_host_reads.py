"""The host does not wait for the device: not in a decoding step, and in training for nothing its batch can say."""

import functools
import sys
from pathlib import Path

import flash_stand_in
import pytest
import torch
from tiny_flamingo import GREEDY, IMAGE, assert_close, images, pad_rows, row, tiny_model
from transformers import StaticCache

from otter_hf.models.host_reads import known_on_host
from otter_hf.testing import otterhd as otterhd_tiny


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from _gpu_host import HostWaits  # noqa: E402


FAMILIES = ["llama", "otter_mpt", "gemma", "otterhd"]


def make_model(family):
    return otterhd_tiny.tiny_model(otterhd_tiny.tiny_processor()) if family == "otterhd" else tiny_model(family)


def prompt(family, model, padded):
    """Two rows with images, the second of them shorter if `padded`."""
    if family != "otterhd":
        rows = [row(1, 5), row(2, length=9 if padded else 12, seed=1)]
        ids, mask = pad_rows(rows, "left")
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": images(2, 2)}
    ids = torch.randint(110, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 4:7] = model.config.image_token_id
    mask = torch.ones_like(ids)
    mask[1, : 3 if padded else 0] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": patches(6)}


def patches(number):
    return torch.rand(number, 300, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_decoding_step_reads_nothing(family, padded, monkeypatch):
    model = make_model(family)
    inputs, steps, forward = prompt(family, model, padded), [], model.forward
    settings = {**GREEDY, "max_new_tokens": 4, "suppress_tokens": [model.config.image_token_id]}
    expected = model.generate(**inputs, **settings, use_cache=False)

    @functools.wraps(forward)
    def watched(**kwargs):
        decoding = kwargs["input_ids"].shape[1] == 1
        steps.append((decoding, kwargs.get("attention_mask") is not None))
        if not decoding:
            return forward(**kwargs)
        with HostWaits(forbid=True):
            return forward(**kwargs)

    monkeypatch.setattr(model, "forward", watched)
    assert torch.equal(model.generate(**inputs, **settings), expected)
    # where no row is padded, transformers leaves out the mask
    assert steps == [(False, padded)] + 3 * [(True, padded)]
    if family != "otterhd":  # a step by hand has the mask of its rows
        outputs = forward(**inputs, use_cache=True)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        watched(input_ids=expected[:, 12:13], attention_mask=mask, past_key_values=outputs.past_key_values)


@pytest.mark.parametrize("family", ["llama", "otterhd"])
@torch.no_grad()
def test_nor_does_one_with_a_static_cache(family):
    model = make_model(family)
    inputs = prompt(family, model, False)
    cache = StaticCache(model.config.get_text_config(), max_cache_len=16)
    model(**inputs, past_key_values=cache)
    mask = torch.ones(2, 1, 1, 16, dtype=torch.bool).tril(12)  # as `generate` makes it, for the thirteenth token
    with HostWaits(forbid=True):
        model(input_ids=torch.full((2, 1), 5), attention_mask=mask, past_key_values=cache)


def test_waits_are_seen():
    numbers = torch.arange(4)
    for wait in (
        lambda: numbers.tolist(),
        lambda: bool(numbers[0]),
        lambda: int(numbers[0]),
        lambda: numbers[0].item(),
        lambda: numbers.nonzero(),
        lambda: numbers.unique(),
        lambda: numbers[numbers > 1],
        lambda: torch.tensor([1], device="cpu"),
    ):
        with pytest.raises(AssertionError, match="would wait for the device: .*test_host_reads.py"):
            with HostWaits(forbid=True):
                wait()
    with HostWaits(forbid=True):
        numbers[numbers.argsort()].cumsum(0).clamp(max=3)


@torch.no_grad()
def test_an_image_token_on_top_of_a_cache_is_still_refused():
    model = tiny_model()
    cache = model(input_ids=row(1), pixel_values=images(), use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="input_ids holds an image token on top of a cache, but no pixel_values"):
        model(input_ids=torch.tensor([[IMAGE]]), past_key_values=cache)


def packed_batch(family, model):
    if family == "otterhd":
        image = model.config.image_token_id
        ids = torch.randint(110, 200, (1, 20), generator=torch.Generator().manual_seed(0))
        ids[:, 2:5] = ids[:, 14:16] = image
        batch = {"input_ids": ids, "pixel_values": patches(5), "labels": ids.masked_fill(ids == image, -100)}
    else:
        ids = torch.cat([row(1, 5), row(length=8, seed=2)], dim=1)  # the second sample sees none
        index = (ids == IMAGE).cumsum(1)
        index[:, 12:] = 0
        labels = ids.masked_fill(torch.rand(1, 20, generator=torch.Generator().manual_seed(0)) < 0.5, -100)
        batch = {"input_ids": ids, "pixel_values": images(1, 2), "media_index": index, "labels": labels}
    ends = torch.tensor([0, 12, 20], dtype=torch.int32)
    boundaries = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 12, "max_length_k": 12}
    return {**batch, **boundaries, "position_ids": torch.cat([torch.arange(12), torch.arange(8)])[None]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_training_step_on_a_card_reads_nothing(family, monkeypatch):
    model = make_model(family).train()
    model.set_attn_implementation({"": "varlen_sdpa", "text_config": "varlen_sdpa"})
    batch = packed_batch(family, model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = model(**batch).loss
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    flash_stand_in.pretend_cuda(monkeypatch)
    known = known_on_host(batch, model.config.image_token_id)
    with HostWaits(forbid=True, ignore=("flash_stand_in.py",)):
        loss = model(**batch, **known).loss
        ours = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert_close(loss, expected)
    for actual, reference in zip(ours, gradients, strict=True):
        assert (actual is None) == (reference is None)
        if actual is not None:
            assert_close(actual, reference)


@pytest.mark.parametrize("family", ["llama", "otterhd"])
def test_what_the_host_knows_changes_nothing_and_is_checked(family):
    model = make_model(family).train()
    inputs = prompt(family, model, True)
    ids, image = inputs["input_ids"], model.config.image_token_id
    inputs["labels"] = ids.masked_fill((inputs["attention_mask"] == 0) | (ids == image), -100)
    known = known_on_host(inputs, image)
    assert (
        known
        == ({"target_count": 17, "media_counts": [2, 1]}, {"target_count": 14, "media_counts": [3, 3]})[
            family == "otterhd"
        ]
    )
    expected = model(**inputs).loss
    assert torch.equal(model(**inputs, **known).loss, expected)
    # replicas of one process have a part of the rows, and all of the numbers
    assert torch.equal(model(**inputs, target_count=99, media_counts=[1]).loss, expected)
    with pytest.raises(ValueError, match="pixel_values"):
        model(**inputs, media_counts=[4, 4])
