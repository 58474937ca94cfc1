"""Fine-tuning from files to a saved model, on a tiny random Otter and six pictures."""

import json

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from otter_hf.data import render, write_mimicit
from otter_hf.evaluation.model import ConversationModel
from otter_hf.training.run import run as main


COLOURS = ["red", "green", "blue", "yellow", "black", "white"]


@pytest.fixture
def files(model, processor, tmp_path, monkeypatch):
    """A model folder and a training YAML, and a function that trains with them and more arguments."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    records, images, turns, shots = {}, {}, {}, {}
    for i, colour in enumerate(COLOURS):
        images[f"IMG_{i}"] = Image.new("RGB", (20, 24), colour)
        records[f"INS_{i}_a"] = {"instruction": "what color?", "answer": colour, "image_ids": [f"IMG_{i}"]}
        records[f"INS_{i}_b"] = {"instruction": f"is it {colour}?", "answer": "yes", "image_ids": [f"IMG_{i}"]}
        turns[f"INS_{i}_b"] = [f"INS_{i}_a"]
        shots[f"INS_{i}_a"] = [f"INS_{(i + 1) % 6}_a"]
    paths = write_mimicit(tmp_path, "six", records, images, turns)
    (tmp_path / "shots_train.json").write_text(json.dumps(shots))
    entry = {"mimicit_path": str(paths.instructions_path), "images_path": str(paths.images_path)}
    mixture = {
        "IMAGE_TEXT": {"turns": {**entry, "train_config_path": str(paths.train_config_path)}},
        "IMAGE_TEXT_IN_CONTEXT": {"shots": {**entry, "train_config_path": str(tmp_path / "shots_train.json")}},
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(mixture))
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump({"IMAGE_TEXT": {"questions": entry}}))
    return tmp_path


def train(files, *flags: str, **kwargs):
    paths = {"model_name_or_path": "base", "train_mixture": "data.yaml", "output_dir": "out"}
    arguments = [part for name, path in paths.items() for part in (f"--{name}", str(files / path))]
    fixed = "--use_cpu True --per_device_train_batch_size 3 --dataloader_num_workers 0 --disable_tqdm True"
    main([*arguments, *fixed.split(), "--logging_steps", "1", *flags], **kwargs)
    return files / "out"


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_train_evaluate_save_reload(files, model):
    flags = "--max_steps 3 --learning_rate 1e-2 --eval_strategy steps --eval_steps 2 --save_steps 2"
    out = train(files, *flags.split(), "--eval_mixture", str(files / "eval.yaml"))

    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    evaluations = [entry for entry in state["log_history"] if "eval_answer_accuracy" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 3]
    assert 0 <= evaluations[0]["eval_answer_accuracy"] <= 1
    assert Image.open(out / "training.png").width > 500

    trained, processor = load(out)
    text = render([("what color?", None)])
    inputs = processor(text=text, images=Image.new("RGB", (20, 24), "red"), return_tensors="pt")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color?"}]}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == text
    with torch.no_grad():
        before, after = model(**inputs).logits, trained(**inputs).logits
        checkpoint = load(out / "checkpoint-2")[0](**inputs).logits
    assert (before - after).abs().max() > 1e-2
    assert (checkpoint - after).abs().max() > 1e-4
    answer = trained.generate(**inputs, max_new_tokens=3)
    # what the Trainer would change: where answers end, and that generation has a cache
    assert processor.end_of_chunk_token_id in trained.generation_config.eos_token_id
    assert trained.config.use_cache is True
    assert isinstance(processor.post_process_image_text_to_text(answer)[0], str)


def test_the_tokenizer_of_another_folder(files):
    (files / "elsewhere").mkdir()
    for path in (files / "base").glob("*token*"):
        path.rename(files / "elsewhere" / path.name)
    out = train(files, "--max_steps", "1", "--tokenizer", str(files / "elsewhere"), "--peak_flops", "0")
    assert load(out)[1].tokenizer.get_vocab() == AutoTokenizer.from_pretrained(files / "elsewhere").get_vocab()
    with pytest.raises(ValueError, match="tokenizer_reference is '4.35', but .* no tokenizer of 2023"):
        train(files, "--tokenizer", str(files / "elsewhere"), "--tokenizer_reference", "4.35")
    asked = ConversationModel(files / "base", dtype="float32", device="cpu", tokenizer=str(files / "elsewhere"))
    assert asked.generate([[{"role": "user", "content": "hi"}]], max_new_tokens=1)


def test_saved_model_has_the_logits_of_the_trained_one(files, monkeypatch):
    trainers = []
    monkeypatch.setattr("otter_hf.training.run._plot", lambda history, path: None)
    monkeypatch.setattr(
        "otter_hf.training.run.OtterTrainer.save_state", lambda self: trainers.append(self), raising=True
    )
    out = train(files, "--max_steps", "2", "--learning_rate", "1e-2")
    trained = trainers[0].model.eval()
    reloaded, processor = load(out)
    inputs = processor(text=render([("what color?", None)]), images=Image.new("RGB", (9, 9)), return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(trained(**inputs).logits, reloaded(**inputs).logits)


def test_resumed_training_ends_where_an_unbroken_one_does(files):
    flags = "--max_steps 4 --save_steps 2 --learning_rate 1e-2 --lr_scheduler_type constant"
    unbroken, _ = load(train(files, *flags.split()))
    checkpoint = str(files / "out" / "checkpoint-2")
    resumed, _ = load(train(files, *flags.split(), "--resume_from_checkpoint", checkpoint))
    for (name, expected), parameter in zip(unbroken.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, msg=name, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packing", ["True", "False"])
def test_training_without_the_tokens_of_the_format(files, packing):
    flags = f"--max_steps 2 --remove_answer_token --remove_eos_token --packing {packing} --report_samples 1"
    out = train(files, *flags.split(), "--eval_mixture", str(files / "eval.yaml"), "--eval_strategy", "epoch")
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert [entry["loss"] for entry in state["log_history"] if "loss" in entry] == pytest.approx([5.9, 5.9], abs=0.5)
    # what it was trained on is what it will be asked, and EOS ends its answers
    trained, processor = load(out)
    messages = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}]
    text = processor.apply_chat_template([*messages, {"role": "user", "content": "Q2"}], add_generation_prompt=True)
    assert text == "User:Q1 GPT:A1User:Q2 GPT:"
    assert trained.generation_config.eos_token_id == [processor.tokenizer.eos_token_id]


def test_frozen_groups_do_not_change(files, model):
    trained, _ = load(train(files, "--max_steps", "2", "--freeze", "vision", "language", "--learning_rate", "1e-2"))
    before = dict(model.named_parameters())
    for name, parameter in trained.named_parameters():
        if ".vision_tower." in name or ".decoder_layer." in name:
            assert torch.equal(parameter, before[name]), name
    assert not torch.equal(trained.model.perceiver.latents, model.model.perceiver.latents)
    assert not torch.equal(trained.lm_head.weight, model.lm_head.weight)


def test_batches_are_of_one_group_and_samples_are_transformed(files, monkeypatch):
    seen = []

    def transform(sample, generator):
        seen.append((sample["task_group"], sample["id"], generator.random()))
        return sample

    train(files, "--num_train_epochs", "2", transform=transform)
    assert len(seen) == 24
    groups = [group for group, _, _ in seen]
    assert all(len(set(groups[i : i + 3])) == 1 for i in range(0, 24, 3))
    draws = {(id, group): set() for group, id, _ in seen}
    for group, id, draw in seen:
        draws[id, group].add(draw)
    # each sample once per epoch, with other random choices in the second
    assert len(draws) == 12
    assert all(len(values) == 2 for values in draws.values())


@pytest.mark.parametrize(
    ("yaml_text", "message"),
    [
        ("PICTURES: {a: {mimicit_path: x}}", "data.yaml: 'PICTURES' is no task group"),
        ("IMAGE_TEXT: {a: {mimicit_path: gone.json}}", "IMAGE_TEXT/a: the path gone.json does not exist"),
    ],
)
def test_mistakes_in_the_mixture_leave_nothing_behind(files, yaml_text, message):
    (files / "data.yaml").write_text(yaml_text)
    with pytest.raises(ValueError, match=message):
        train(files, "--max_steps", "1")
    assert not (files / "out").exists()


def test_evaluation_needs_data(files, caplog):
    with pytest.raises(ValueError, match="eval_strategy is 'epoch': name an eval_mixture or eval_fraction"):
        train(files, "--eval_strategy", "epoch")
    assert not (files / "out").exists()
    train(files, "--eval_mixture", str(files / "eval.yaml"), "--plan", "True")
    assert "eval_mixture will not be evaluated: set eval_strategy" in caplog.text


@pytest.mark.parametrize("more", [["--report_samples", "0", "--eval_strategy", "epoch"], []])
def test_controls_need_samples_that_are_answered(files, more):
    with pytest.raises(ValueError, match="report_controls asks the samples that are answered at evaluations"):
        train(files, "--report_controls", "True", "--eval_mixture", str(files / "eval.yaml"), *more)
    assert not (files / "out").exists()


def test_trained_weights_in_16_bits_are_told(files, caplog):
    for dtype in ("float32", "bfloat16"):
        caplog.clear()
        train(files, "--dtype", dtype, "--plan", "True")
        assert ("What is trained is kept in bfloat16" in caplog.text) == (dtype == "bfloat16")
    # the scaler would refuse them in the first step, without saying what to do
    with pytest.raises(ValueError, match="kept in float16: set dtype to float32, or fp16 to false"):
        train(files, "--dtype", "float16", "--fp16", "True", "--plan", "True")
    train(files, "--dtype", "float32", "--fp16", "True", "--plan", "True")
