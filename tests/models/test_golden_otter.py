"""The numbers of the 2023 code, reproduced: logits, loss, gradients, greedy tokens."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import otter_hf  # noqa: F401  registers the families


CASES = ["otter_llama_image", "otter_llama_image_every4", "otter_llama_video", "flamingo_llama"]
RENAMED = {"lang_encoder.model.": "model.language_model.", "perceiver.": "model.perceiver."}


@pytest.fixture(scope="module", params=CASES)
def case(request, golden):
    folder = golden / "otter" / request.param
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model, load_file(folder / "golden.safetensors"), json.loads((folder / "golden.json").read_text())


def test_forward_and_loss(case):
    model, tensors, facts = case
    inputs = {"input_ids": tensors["lang_x"], "pixel_values": tensors["vision_x"]}
    mask = tensors["attention_mask"]
    with torch.no_grad():
        output = model(**inputs, attention_mask=mask, labels=tensors["labels"])
    torch.testing.assert_close(output.logits[mask == 1], tensors["logits"][mask == 1], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.loss.item(), facts["loss"], atol=1e-5, rtol=0)


def test_left_padding(case):
    model, tensors, _ = case
    if "lang_x_left" not in tensors:
        pytest.skip("this case has no left-padded batch")
    mask = tensors["attention_mask_left"]
    with torch.no_grad():
        logits = model(input_ids=tensors["lang_x_left"], pixel_values=tensors["vision_x"], attention_mask=mask).logits
    torch.testing.assert_close(logits[mask == 1], tensors["logits_left"][mask == 1], atol=1e-4, rtol=0)


def test_gradients(case):
    model, tensors, facts = case
    gradients = {name.removeprefix("grad::"): value for name, value in tensors.items() if name.startswith("grad::")}
    if not gradients:
        pytest.skip("this case has no gradients")
    model.zero_grad()
    model(
        input_ids=tensors["lang_x"],
        pixel_values=tensors["vision_x"],
        attention_mask=tensors["attention_mask"],
        labels=tensors["labels"],
    ).loss.backward()
    parameters = dict(model.named_parameters())

    def ours(name):
        for old, new in RENAMED.items():
            if name.startswith(old):
                return parameters[new + name.removeprefix(old)].grad
        return parameters[name.replace("lang_encoder.lm_head", "lm_head")].grad

    for name, expected in gradients.items():
        error = (ours(name) - expected).norm() / expected.norm()
        assert error < 1e-4, (name, error)
    for name, norm in facts["train"]["grad_norms"].items():
        if not name.startswith("vision_encoder"):
            assert ours(name).norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens(case, use_cache):
    model, tensors, _ = case
    settings = {"do_sample": False, "use_cache": use_cache, "eos_token_id": -1, "pad_token_id": 0}
    rows = [name.split(".")[1] for name in tensors if name.startswith("gen_truth.")]
    assert rows
    for row in rows:
        prompt, truth = tensors[f"gen_lang_x.{row}"], tensors[f"gen_truth.{row}"]
        pixels = tensors["vision_x"][int(row) : int(row) + 1]
        output = model.generate(input_ids=prompt, pixel_values=pixels, max_new_tokens=truth.shape[1], **settings)
        assert output[:, prompt.shape[1] :].tolist() == truth.tolist()
    if "gen_left_lang_x" in tensors:
        prompt, truth = tensors["gen_left_lang_x"], tensors["gen_left_truth"]
        output = model.generate(
            input_ids=prompt,
            attention_mask=tensors["gen_left_attention_mask"],
            pixel_values=tensors["vision_x"],
            max_new_tokens=truth.shape[1],
            **settings,
        )
        assert output[:, prompt.shape[1] :].tolist() == truth.tolist()
