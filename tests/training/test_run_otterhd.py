"""Fine-tuning an OtterHD with a recipe: the model itself, and LoRA."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from otter_hf import OtterHDProcessor
from otter_hf.data import write_mimicit
from otter_hf.models.quantization import quantization_config
from otter_hf.testing.otterhd import tiny_model, tiny_processor
from otter_hf.training.arguments import parse_arguments
from otter_hf.training.run import run as main


TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A model folder, four pictures with a question each, and a recipe to which to add."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    processor = tiny_processor()
    tiny_model(processor).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    records, images = {}, {}
    for i, colour in enumerate(["red", "green", "blue", "black"]):
        images[f"IMG_{i}"] = Image.new("RGB", (35, 24), colour)
        records[f"INS_{i}"] = {"instruction": "what color?", "answer": colour, "image_ids": [f"IMG_{i}"]}
    paths = write_mimicit(tmp_path, "four", records, images)
    entry = {"mimicit_path": str(paths.instructions_path), "images_path": str(paths.images_path)}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"IMAGE_TEXT": {"colours": entry}}))
    return tmp_path


def train(files, **recipe):
    fixed = {
        "model_name_or_path": str(files / "base"),
        "train_mixture": str(files / "data.yaml"),
        "output_dir": str(files / "out"),
        "instruction_format": "fuyu",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (files / "recipe.yaml").write_text(yaml.safe_dump(fixed | recipe))
    main([str(files / "recipe.yaml")])
    return files / "out"


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def logits(model, processor):
    image = Image.new("RGB", (35, 24), "red")
    return model(**processor(text="User:what color? Assistant:", images=image)).logits


def test_train_the_whole_model(files):
    out = train(files, dynamic_resolution=[20, 40], eval_mixture=str(files / "data.yaml"), eval_strategy="steps")
    base, processor = load(files / "base")
    trained, saved_processor = load(out)
    assert isinstance(saved_processor, OtterHDProcessor)
    assert saved_processor.chat_template == processor.chat_template
    assert processor.end_of_text_id in trained.generation_config.eos_token_id
    before = dict(base.named_parameters())
    unchanged = [name for name, parameter in trained.named_parameters() if torch.equal(parameter, before[name])]
    assert not unchanged
    assert (logits(base, processor) - logits(trained, processor)).abs().max() > 1e-2
    inputs = processor(text="User:what color? Assistant:", images=Image.new("RGB", (35, 24), "red"))
    answer = trained.generate(**inputs, max_new_tokens=3)
    assert isinstance(saved_processor.post_process_image_text_to_text(answer)[0], str)


def test_a_resumed_training_has_the_weights_of_its_checkpoint(files, caplog):
    """Also the best checkpoint, which is read back at the end."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    best = {"eval_mixture": str(files / "data.yaml"), "eval_strategy": "steps", "eval_steps": 2, "report_samples": 0}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    out = train(files, **settings)
    expected = dict(load(out)[0].named_parameters())
    shutil.rmtree(out / "checkpoint-4")
    (out / "trainer_state.json").unlink()
    again = load(train(files, **settings, resume_from_checkpoint="auto"))[0]
    assert all(torch.equal(parameter, expected[name]) for name, parameter in again.named_parameters())

    train(files, **settings | best, output_dir=str(files / "best"))
    out = files / "best"
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2
    best = dict(load(state["best_model_checkpoint"])[0].named_parameters())
    assert all(torch.equal(parameter, best[name]) for name, parameter in load(out)[0].named_parameters())
    assert "keys in the checkpoint" not in caplog.text

    file = Path(state["best_model_checkpoint"]) / "model.safetensors"
    save_file({f"other.{name}": tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    (file.parent / "files.json").unlink()
    for name in ("trainer_state.json", "run.json"):
        (out / name).unlink()
    with pytest.raises(ValueError, match="does not hold the weights of this model"):
        train(files, **settings | {"max_steps": 6}, output_dir=str(out), resume_from_checkpoint=str(file.parent))


def test_frozen_patch_embedding(files):
    trained, _ = load(train(files, freeze=["vision"]))
    base, _ = load(files / "base")
    assert torch.equal(trained.model.vision_embed_tokens.weight, base.model.vision_embed_tokens.weight)
    assert not torch.equal(trained.lm_head.weight, base.lm_head.weight)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(files, caplog, checkpointing):
    with caplog.at_level(logging.INFO, logger="otter_hf.training.run"):
        out = train(
            files,
            lora=True,
            lora_r=4,
            lora_target_modules=TARGETS,
            activation_checkpointing=checkpointing,
        )
    # hidden 32, intermediate 64, 2 layers, of 4 (in + out) weights for each rank
    trained = 4 * 2 * ((32 + 96) + (32 + 32) + (32 + 64) + (64 + 32))
    (language,) = re.findall(r"^language .*$", caplog.text, re.MULTILINE)
    assert language.endswith(f" {trained:,}")
    # only the updates are saved, and the folder loads like any other
    assert (out / "adapter_model.safetensors").stat().st_size < 8 * trained
    assert not (out / "model.safetensors").exists()
    base, processor = load(files / "base")
    tuned, _ = load(out)
    assert (logits(base, processor) - logits(tuned, processor)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"instruction_format": "simple"}, "instruction_format is 'simple', which OtterHD does not know"),
        ({"lora": True}, "lora needs lora_target_modules"),
        (
            {"lora": True, "lora_target_modules": TARGETS, "freeze": ["vision"]},
            "freeze=.* and lora cannot be combined",
        ),
        ({"lora": True, "lora_target_modules": ["q_proj"]}, "q_proj"),
        ({"load_in_4bit": True}, "load_in_4bit needs lora"),
        ({"resolution": 20, "dynamic_resolution": [20]}, "Give resolution or dynamic_resolution, not both"),
    ],
)
def test_mistakes_leave_nothing_behind(files, recipe, message):
    with pytest.raises(ValueError, match=message):
        train(files, **recipe)
    assert not (files / "out").exists()


@pytest.mark.parametrize(("name", "lora", "quantized"), [("full", 0, 0), ("lora", 1, 0), ("qlora", 1, 1)])
def test_recipes(name, lora, quantized):
    flags = "--use_cpu True --bf16 False"  # the machine of the tests may know no bfloat16
    model_args, data_args, _ = parse_arguments([str(RECIPES / f"otterhd_{name}.yaml"), *flags.split()])
    assert (model_args.lora, model_args.load_in_4bit) == (lora, quantized)
    assert (model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout) == (64, 32, 0.05)
    assert model_args.lora_target_modules == (TARGETS if lora else [])
    assert (data_args.instruction_format, data_args.dynamic_resolution) == ("fuyu", [448, 512, 768])


def test_four_bits_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr("otter_hf.models.quantization.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match="load_in_4bit needs bitsandbytes"):
        quantization_config()
