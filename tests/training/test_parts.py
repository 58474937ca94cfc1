"""Parts of a model with rates and updates of their own, parts of the data kept for evaluation, and plain Flamingo."""

import json
from types import SimpleNamespace

import pytest
import torch
from training_files import command, write_training_files
from transformers import AutoModelForImageTextToText, AutoProcessor, EarlyStoppingCallback, TrainerState

from otter_hf import FlamingoForConditionalGeneration, FlamingoProcessor
from otter_hf.data import MimicitMixture, SampleOptions
from otter_hf.data.collator_flamingo import FlamingoCollator
from otter_hf.testing.otter import tiny_model, tiny_processor
from otter_hf.training import run
from otter_hf.training.arguments import parse_arguments, read_rates
from otter_hf.training.lora import with_updates
from otter_hf.training.optimizer import set_learning_rates
from otter_hf.training.trainer import OtterTrainer


@pytest.fixture
def flamingo(tmp_path, monkeypatch):
    """A folder with a plain Flamingo and a mixture."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_training_files(tmp_path)
    processor = tiny_processor(FlamingoProcessor)
    tiny_model(processor, FlamingoForConditionalGeneration).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return tmp_path


def test_early_stopping_counts_on_from_a_checkpoint(tmp_path):
    stopping = EarlyStoppingCallback(3)
    stopping.early_stopping_patience_counter = 2
    TrainerState(stateful_callbacks=[stopping]).save_to_json(str(tmp_path / "trainer_state.json"))
    arguments = SimpleNamespace(early_stopping_patience=3, early_stopping_threshold=0.5)
    counted = [run._early_stopping(arguments, folder).state() for folder in (str(tmp_path), None)]
    assert [state["attributes"]["early_stopping_patience_counter"] for state in counted] == [2, 0]
    assert counted[0]["args"] == {"early_stopping_patience": 3, "early_stopping_threshold": 0.5}


def test_flamingo_on_what_is_not_held_out(flamingo, monkeypatch, caplog):
    trained, step = [], OtterTrainer.training_step

    def spy(self, model, inputs, *args):
        trained.extend(inputs["sample_ids"])
        return step(self, model, inputs, *args)

    monkeypatch.setattr(OtterTrainer, "training_step", spy)
    settings = {
        "eval_fraction": 0.4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 1e-30,  # nothing gets better
        "learning_rates": {"resampler": 1e-29, "language": 2e-30},
        "early_stopping_patience": 1,
        "early_stopping_threshold": 0.01,
        "max_steps": 6,
    }
    with caplog.at_level("INFO", logger="otter_hf"):
        run.main(command(flamingo, **settings))
        # one that stopped early is complete
        steps = len(trained)
        run.main(command(flamingo, **settings, resume_from_checkpoint="auto"))
        assert len(trained) == steps and "The run of 6 steps in" in caplog.text
    assert "learning rate: language 2e-30, perceiver 1e-29, others 1e-30" in caplog.text
    history = json.loads((flamingo / "out" / "trainer_state.json").read_text())["log_history"]
    assert max(entry["step"] for entry in history) == 2
    kept = MimicitMixture(flamingo / "data.yaml", eval_fraction=0.4, held_out=True)
    held_out = {sample["id"] for sample in kept}
    assert held_out and not held_out & {*trained}
    processor = AutoProcessor.from_pretrained(flamingo / "out")
    assert type(processor) is FlamingoProcessor
    assert type(AutoModelForImageTextToText.from_pretrained(flamingo / "out")) is FlamingoForConditionalGeneration
    assert "<answer>" not in processor.tokenizer.get_vocab()
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color?"}]}]
    asked = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert asked == "<image>User:what color? GPT:"
    # the prompt's tokens are those in front of the learned ones
    (sample, *_) = kept
    batch = FlamingoCollator(processor)([sample])
    learned = batch["labels"][0] != -100
    prompt = f"<image>User:{sample['turns'][0][0]} GPT:"
    assert processor.tokenizer(prompt)["input_ids"] == batch["input_ids"][0][: int(learned.nonzero()[0])].tolist()
    end = processor.tokenizer.eos_token
    assert processor.decode(batch["input_ids"][0][learned]) == f"{sample['turns'][0][1]}<|endofchunk|>{end}"


def test_a_fraction_is_held_out_for_good(flamingo):
    def ids(**options):
        return [sample["id"] for sample in MimicitMixture(flamingo / "data.yaml", SampleOptions(), **options)]

    everything, kept = ids(), ids(eval_fraction=0.4, held_out=True)
    rest = ids(eval_fraction=0.4)
    assert sorted(kept + rest) == sorted(everything)
    assert kept
    assert {*kept} <= {*ids(eval_fraction=0.6, held_out=True)}
    # nor is it context of what is trained on
    shots = {key: [other for other in everything if other != key] for key in everything}
    (flamingo / "shots_train.json").write_text(json.dumps(shots))
    mixture = (flamingo / "data.yaml").read_text().replace("IMAGE_TEXT:", "IMAGE_TEXT_IN_CONTEXT:")
    mixture += f"    train_config_path: {flamingo / 'shots_train.json'}\n"
    (flamingo / "shots.yaml").write_text(mixture)
    samples = [*MimicitMixture(flamingo / "shots.yaml", eval_fraction=0.4)]
    assert {len(sample["turns"]) for sample in samples} == {len(rest)}
    whole = [*MimicitMixture(flamingo / "shots.yaml", eval_fraction=0.4, held_out=True)]
    assert {len(sample["turns"]) for sample in whole} == {len(everything)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--learning_rates ears=1e-4", "'ears' is no part, use some of vision, perceiver"),
        ("--learning_rates resampler=1e-4,perceiver=1e-4", "perceiver has two rates"),
        ("--learning_rates language=fast", "'fast' of language is no number"),
        ("--learning_rates language=0", "must be above 0, got 0; else freeze it"),
        ("--early_stopping_patience 2", "set eval_strategy to epoch or steps"),
        ("--early_stopping_threshold 0.1", "needs early_stopping_patience"),
        ("--eval_fraction 1.5", "at least 0 and less than 1, got 1.5"),
        ("--eval_fraction 0.5 --eval_mixture a.yaml", "leave one out"),
        ("--lora True --lora_target_modules ears:all-linear", "'ears:all-linear' names no part"),
    ],
)
def test_mistakes(flags, message):
    base = "--model_name_or_path a/b --train_mixture t.yaml --output_dir out --use_cpu True"
    with pytest.raises(ValueError, match=message):
        parse_arguments(f"{base} {flags}".split())


def test_learning_rates(model):
    assert read_rates('{"resampler": 1e-4}') == read_rates("resampler=1e-4") == {"perceiver": 1e-4}
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (decayed if name.endswith("weight") else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-5)
    set_learning_rates(optimizer, model, {"perceiver": 1e-4, "language": 1e-6})
    of = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        rate = 1e-4 if "perceiver." in name else 1e-6 if "decoder_layer." in name else None
        assert rate in (None, of[id(parameter)][0]), name
        assert of[id(parameter)][1] == (0.1 if name.endswith("weight") else 0.0)
    assert of[id(model.get_input_embeddings().weight)][0] == 1e-5
    for parameter in model.model.perceiver.parameters():
        parameter.requires_grad_(False)
    trained = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with pytest.raises(ValueError, match="nothing of perceiver is trained"):
        set_learning_rates(trained, model, {"perceiver": 1e-4})


def test_all_linear_layers_of_parts(model):
    flags = "--lora True --lora_target_modules resampler:all-linear vision:all-linear v_proj --lora_r 2"
    base = "--model_name_or_path a/b --train_mixture t.yaml --output_dir out --use_cpu True"
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    updated = with_updates(model, parse_arguments(f"{base} {flags}".split())[0])
    names = {name.removeprefix("base_model.model.") for name, _ in updated.named_modules()}
    names = {name.removesuffix(".lora_A") for name in names if name.endswith(".lora_A")}
    expected = {name for name in linear if name.startswith(("model.perceiver.", "model.vision_tower."))}
    text = {name for name in linear if ".language_model." in name and "gated_cross" not in name}
    assert names == expected | {name for name in text if name.endswith(".v_proj")}
