"""Fine-tuning transformers' Idefics with a recipe, as Otter is: whole, frozen in parts, with LoRA, resumed."""

import json

import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText

from otter_hf.data import write_mimicit
from otter_hf.evaluation.model import ConversationModel
from otter_hf.testing import write_tiny
from otter_hf.testing.idefics import tiny_config
from otter_hf.training.arguments import parse_arguments
from otter_hf.training.freezing import parameter_groups
from otter_hf.training.optimizer import decayed_parameter_names
from otter_hf.training.plan import make_plan, meta_model
from otter_hf.training.run import run as main
from otter_hf.training.run import train


COLOURS = ["red", "green", "blue", "black"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A model folder, four pictures with a question each, one film and one text."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tiny("idefics", tmp_path / "base")
    images = {colour: Image.new("RGB", (35, 24), colour) for colour in COLOURS}
    records = {c: {"instruction": "what color?", "answer": c, "image_ids": [c]} for c in COLOURS}
    records["text"] = {"instruction": "say yes", "answer": "yes", "image_ids": []}
    paths = write_mimicit(tmp_path, "four", records, images)
    film = {"film": {"instruction": "how many?", "answer": "two", "image_ids": ["red", "blue"]}}
    film_paths = write_mimicit(tmp_path, "film", film, images)
    entry, film_entry = (
        {"mimicit_path": str(made.instructions_path), "images_path": str(made.images_path)}
        for made in (paths, film_paths)
    )
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump({"IMAGE_TEXT": {"colours": entry}}))
    mixture = {"IMAGE_TEXT": {"colours": entry}, "VIDEO_TEXT": {"film": film_entry}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(mixture))
    return tmp_path


def recipe(files, **more) -> list[str]:
    fixed = {
        "model_name_or_path": str(files / "base"),
        "train_mixture": str(files / "data.yaml"),
        "output_dir": str(files / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "num_frames": 2,
        "dataloader_num_workers": 0,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (files / "recipe.yaml").write_text(yaml.safe_dump(fixed | more))
    return [str(files / "recipe.yaml")]


def history(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_trained_evaluated_resumed_and_asked(files):
    settings = {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "eval_mixture": str(files / "eval.yaml")}
    main(recipe(files, **settings))
    out = files / "out"
    losses = [entry["loss"] for entry in history(out) if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert [entry["step"] for entry in history(out) if "eval_answer_accuracy" in entry] == [2, 4]
    answers = [entry["sample_answers"] for entry in history(out) if "sample_answers" in entry]
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers[0])

    trained = AutoModelForImageTextToText.from_pretrained(out)
    before = AutoModelForImageTextToText.from_pretrained(files / "base").state_dict()
    changed = {name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, before[name])}
    for name in ("lm_head.additional_fc.weight", "model.embed_tokens.additional_embedding.weight"):
        assert name in changed
    assert any("vision_model" in name for name in changed) and any("perceiver" in name for name in changed)

    # the same run in two halves
    halves = {**settings, "output_dir": str(files / "halves")}
    main(recipe(files, **halves))
    for name in ("checkpoint-4", "trainer_state.json", "model.safetensors"):
        path = files / "halves" / name
        (path / "trainer_state.json").unlink() if path.is_dir() else path.unlink()
    main(recipe(files, **halves, resume_from_checkpoint="auto"))
    again = AutoModelForImageTextToText.from_pretrained(files / "halves").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in trained.state_dict().items())

    asked = ConversationModel(out, dtype="float32", device="cpu")
    picture = {"type": "image", "image": Image.new("RGB", (35, 24), "red")}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "what color?"}]}]
    assert isinstance(asked.generate([messages], max_new_tokens=3)[0], str)
    end = asked.processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    assert end in trained.generation_config.eos_token_id


def test_the_prompt_it_is_trained_on_is_the_one_it_is_asked_in(files):
    trainer = train(*parse_arguments(recipe(files, max_steps=1)))
    sample = next(s for s in (trainer.train_dataset[i] for i in range(6)) if s["id"].endswith("red"))
    batch = trainer.data_collator([sample])
    asked = ConversationModel(files / "base", dtype="float32", device="cpu")
    content = [{"type": "image", "image": sample["media"][0][0]}, {"type": "text", "text": "what color?"}]
    prompt = asked.prepare([[{"role": "user", "content": content}]])
    start = prompt["input_ids"].shape[1]
    assert batch["input_ids"][0, :start].tolist() == prompt["input_ids"][0].tolist()
    assert (batch["labels"][0, :start] == -100).all() and batch["labels"][0, start] != -100
    torch.testing.assert_close(batch["pixel_values"], prompt["pixel_values"])
    assert torch.equal(batch["image_attention_mask"][:, :start].bool(), prompt["image_attention_mask"].bool())


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"freeze": ["vision", "language"]}, {"perceiver", "cross_attention", "embeddings"}),
        ({"freeze": ["embeddings", "cross_attention", "perceiver"]}, {"vision", "language"}),
        ({"activation_checkpointing": True, "learning_rates": "language=1e-4"}, None),
    ],
)
def test_parts(files, settings, trained):
    model = train(*parse_arguments(recipe(files, max_steps=2, **settings))).model
    before = dict(AutoModelForImageTextToText.from_pretrained(files / "base").named_parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group, parameters in parameter_groups(model).items():
        moved = any(not torch.equal(parameter, before[names[id(parameter)]]) for parameter in parameters)
        assert moved == (trained is None or group in trained), group


def test_groups_and_decay(files):
    model = AutoModelForImageTextToText.from_pretrained(files / "base")
    groups = parameter_groups(model)
    assert sum(map(len, groups.values())) == len(list(model.parameters())) and all(groups.values())
    assert len(groups["embeddings"]) == 4
    decayed = decayed_parameter_names(model)
    assert "model.layers.0.self_attn.q_proj.weight" in decayed
    assert not any("embed" in name and "patch" not in name or "lm_head" in name for name in decayed)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_target_modules": ["q_proj", "v_proj"], "activation_checkpointing": True},
        {"lora_target_modules": ["language:all-linear", "vision:all-linear"], "lora_dora": True},
        {"lora_target_modules": ["q_proj"], "lora_train_groups": ["perceiver", "cross_attention"]},
    ],
)
def test_lora(files, settings):
    trainer = train(*parse_arguments(recipe(files, lora=True, lora_r=4, **settings)))
    names = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert any(".layers.0.self_attn.q_proj.lora_B" in name for name in names)
    whole = bool(settings.get("lora_train_groups"))
    assert any("gated_cross_attn_layers.1" in name for name in names) == whole
    assert not any("lm_head" in name for name in names)
    base = AutoModelForImageTextToText.from_pretrained(files / "base")
    ids = torch.arange(20)[None]
    inputs = {"input_ids": ids, "pixel_values": torch.rand(1, 1, 3, 28, 28)}
    inputs["image_attention_mask"] = torch.ones(1, 20, 1, dtype=torch.long)
    with torch.no_grad():
        plain = base(**inputs).logits
        merged = PeftModel.from_pretrained(base, files / "out").merge_and_unload().eval()(**inputs).logits
        adapted = trainer.model.eval().float()(**inputs).logits
    assert not torch.allclose(plain, merged, atol=1e-3)
    torch.testing.assert_close(merged, adapted, atol=1e-3, rtol=1e-3)


def test_plan(files, caplog):
    caplog.set_level("INFO")
    main(recipe(files, dry_run=True, freeze=["vision"]))
    assert "perceiver" in caplog.text
    parsed = parse_arguments(recipe(files, freeze=["vision"], max_length=40, packing=False))
    config = tiny_config(100)
    plan = make_plan(meta_model(parsed[0], config), *parsed)
    assert plan.groups["vision"][1] == 0 < plan.groups["perceiver"][1]
    assert plan.flops is None and plan.memory["activations"] > 0
    # deeper checkpointing keeps less
    parsed[2].activation_checkpointing = True
    assert make_plan(meta_model(parsed[0], config), *parsed).memory["activations"] < plan.memory["activations"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": True}, "Idefics is not: set it to false"),
        ({"instruction_format": "simple"}, "set it to idefics"),
        ({"train_embedding_rows": ["<image>"]}, "train_embedding_rows is for"),
        ({"media_store": "store"}, "media_store is for"),
        ({"remove_answer_token": True}, "remove_answer_token is for Otter"),
        ({"resolution": 64}, "resolution is for OtterHD"),
        ({"lora": True, "lora_target_modules": ["q_proj", "lm_head"]}, "take lm_head out"),
        ({"tokenizer": "."}, "which has its own tokenizer"),
    ],
)
def test_what_idefics_cannot_have_is_refused(files, settings, message):
    with pytest.raises(ValueError, match=message):
        main(recipe(files, **settings))
    assert not (files / "out").exists()
