"""The numbers of transformers 4.35 and of the OtterHD code of 2023, reproduced."""

import hashlib
import json

import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import otter_hf.models.otterhd  # noqa: F401  registers the family


CASES = [
    ("single", ""),
    ("batch2", "left."),
    ("batch2", "right."),
    ("text_only", ""),
    ("hires", "left."),
    ("hires", "right."),
    ("box", ""),
    ("greedy", "left."),
    ("train", ""),
]
RENAMED = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_embed_tokens.": "model.vision_embed_tokens.",
}
# before Pillow 13 some pixels of tall pictures differ by up to 3 of 255 (findings/pillow_13_resizes_*.sh)
SHRINKS_AS_STORED = int(PIL.__version__.split(".")[0]) >= 13


class Case:
    def __init__(self, folder, prefix):
        self.name = folder.name
        self.folder = folder
        self.facts = json.loads((folder / "golden.json").read_text())
        # the names of a case without rows and sides have no prefix
        self.tensors = {
            name.removeprefix(prefix): tensor for name, tensor in load_file(folder / "golden.safetensors").items()
        }
        self.mask = self.tensors["attention_mask"]
        rows = range(len(self.tensors["input_ids"]))
        self.patches = [self.tensors[name] for i in rows if (name := f"image_patches_{i}") in self.tensors]
        self.images = [Image.open(path) for path in sorted(folder.glob("image_*.png"))] or None
        self.padding_side = "left" if prefix == "left." else "right"

    @property
    def inputs(self):
        inputs = {"input_ids": self.tensors["input_ids"], "attention_mask": self.mask}
        if self.patches:
            inputs["pixel_values"] = torch.cat([row[0] for row in self.patches])
        return inputs


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request, golden_case):
    name, prefix = request.param
    return Case(golden_case(f"otterhd/{name}"), prefix)


@pytest.fixture(scope="module")
def model(case):
    if not (case.folder / "model.safetensors").exists():
        pytest.skip("the extract of tests/golden has no weights of this case")
    model, info = AutoModelForImageTextToText.from_pretrained(case.folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def test_processor(case):
    processor = AutoProcessor.from_pretrained(case.folder)
    text = case.facts.get("prompts") or case.facts.get("texts") or case.facts["prompt"]
    options, images = {}, case.images
    if case.name == "train":
        # texts with answers, resized to one square; the row without an image had a black one
        options = {"resolution": (45, 45), "add_answer_token": True}
        images = images + [Image.new("RGB", (224, 224))]
    inputs = processor(text=text, images=images, padding_side=case.padding_side, **options)
    expected_ids = case.tensors.get("raw_input_ids", case.tensors["input_ids"])
    assert torch.equal(inputs["input_ids"], expected_ids)
    assert torch.equal(inputs["attention_mask"], case.mask)
    if case.images:
        expected = case.inputs["pixel_values"]
        torch.testing.assert_close(inputs["pixel_values"], expected, atol=0 if SHRINKS_AS_STORED else 0.03, rtol=0)
    else:
        assert "pixel_values" not in inputs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits(case, model, attention):
    model.set_attn_implementation(attention)
    with torch.no_grad():
        logits = model(**case.inputs).logits
    model.set_attn_implementation("sdpa")
    real = case.mask == 1
    torch.testing.assert_close(logits[real], case.tensors["logits"][real], atol=1e-4, rtol=0)


def test_image_inputs_of_2023(case, model):
    if not case.patches:
        pytest.skip("this case has no image")
    inputs = case.inputs
    expected = inputs.pop("pixel_values")
    legacy = {"image_patches": case.patches, "image_patches_indices": case.tensors["image_patches_indices"]}
    with torch.no_grad():
        logits = model(**inputs, **legacy).logits
        assert torch.equal(logits, model(**inputs, pixel_values=expected).logits)
    generated = model.generate(**inputs, **legacy, max_new_tokens=2, do_sample=False)
    assert torch.equal(generated, model.generate(**case.inputs, max_new_tokens=2, do_sample=False))


@pytest.mark.parametrize("cache", [True, False, "static"])
def test_greedy_generation(case, model, cache):
    expected = case.tensors.get("greedy_ids_nocache")
    if expected is None:
        pytest.skip("this case has no generated ids")
    options = {"cache_implementation": "static"} if cache == "static" else {"use_cache": cache}
    generated = model.generate(
        **case.inputs,
        max_new_tokens=expected.shape[1] - case.mask.shape[1],
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    assert torch.equal(generated, expected)


def test_generation_stops_at_end_of_text(golden):
    case = Case(golden / "otterhd" / "hires", "left.")
    model = AutoModelForCausalLM.from_pretrained(case.folder)
    expected = case.tensors["greedy_ids_with_eos_stop"]
    new_tokens = expected.shape[1] - case.mask.shape[1]
    generated = model.generate(**case.inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=5)
    new = slice(case.mask.shape[1], None)
    for row, expected_row in zip(generated[:, new].tolist(), expected[:, new].tolist(), strict=True):
        end = expected_row.index(5) + 1 if 5 in expected_row else new_tokens
        assert row[:end] == expected_row[:end]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("skip_logits", [True, False])
def test_loss_and_gradients(golden, attention, checkpointing, skip_logits):
    case = Case(golden / "otterhd" / "train", "")
    model = AutoModelForImageTextToText.from_pretrained(case.folder, attn_implementation=attention).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    loss = model(**case.inputs, labels=case.tensors["labels"], skip_logits=skip_logits).loss
    torch.testing.assert_close(loss, case.tensors["loss"], atol=1e-5, rtol=0)
    loss.backward()
    parameters = dict(model.named_parameters())
    compared = 0
    for name, expected in case.tensors.items():
        if name.startswith("grad."):
            name = name.removeprefix("grad.")
            for old, new in RENAMED.items():
                if name.startswith(old):
                    name = new + name.removeprefix(old)
            gradient = parameters[name].grad
            torch.testing.assert_close(gradient, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)
            compared += 1
    assert compared == 7


def test_locations_come_back(golden):
    case = Case(golden / "otterhd" / "box", "")
    processor = AutoProcessor.from_pretrained(case.folder)
    width, height = case.images[0].size
    rows = processor.post_process_box_coordinates(case.tensors["input_ids"], [(height, width)])
    assert processor.batch_decode(rows) == case.facts["post_processed_text"]


def test_processor_at_the_real_resolution(golden):
    folder = golden / "otterhd" / "proc_real"
    processor = AutoProcessor.from_pretrained(folder)
    tensors = load_file(folder / "golden.safetensors")
    source = Image.open(folder / "src.png")
    for fact in json.loads((folder / "golden.json").read_text()):
        name = fact["name"]
        image = source.resize(fact["wh"])
        options = {"size": {"height": 360, "width": 360}} if name == "360size" else {}
        inputs = processor(text="User: What is it? Assistant:", images=image, **options)
        assert torch.equal(inputs["input_ids"], tensors[f"{name}.input_ids"]), name
        patches = inputs["pixel_values"]
        assert list(patches.shape) == fact["patches"][1:], name
        if SHRINKS_AS_STORED or fact["wh"][1] <= 2 * fact["wh"][0]:
            assert hashlib.sha256(patches.numpy().tobytes()).hexdigest() == fact["sha256"], name
        counts = processor._get_num_multimodal_tokens([image.size[::-1]], **options)
        assert counts["num_image_patches"] == [len(patches)]
        assert counts["num_image_tokens"] == [len(patches) + fact["newlines"]]
