"""Nothing to train, numbers that are none, and float16 that overflows: errors, not an untrained model."""

import pytest
import torch

from otter_hf.training.arguments import DataArguments, ModelArguments, TrainingArguments
from otter_hf.training.limits import check_numbers
from otter_hf.training.pretraining import main as pretrain
from otter_hf.training.run import main
from otter_hf.training.trainer import OtterTrainer


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", float("nan"), "learning_rate must be a number, got nan"),
        ("num_train_epochs", float("inf"), "num_train_epochs must be a number, got inf"),
        ("num_train_epochs", -1.0, "num_train_epochs must be at least 0, got -1.0"),
        ("max_steps", 0, "max_steps must be at least 1, got 0: leave it out to train whole epochs"),
        ("learning_rate", 0.0, "learning_rate is 0, with which nothing is trained: raise it"),
        ("max_steps", -2, "max_steps must be at least 1"),
        ("per_device_train_batch_size", 0, "per_device_train_batch_size must be at least 1"),
        ("report_samples", -1, "report_samples must be at least 0"),
        ("max_length", 0, "max_length must be at least 1"),
        ("num_frames", -8, "num_frames must be at least 1"),
        ("dynamic_resolution", [448, 0], "dynamic_resolution must be at least 1, got 0"),
        ("lora_dropout", float("nan"), "lora_dropout must be a number"),
    ],
)
def test_numbers_that_are_none(tmp_path, name, value, message):
    given = [ModelArguments("x"), DataArguments("t.yaml"), TrainingArguments(str(tmp_path), use_cpu=True)]
    check_numbers(*given)
    setattr(next(arguments for arguments in given if hasattr(arguments, name)), name, value)
    with pytest.raises(ValueError, match=message):
        check_numbers(*given)


@pytest.mark.parametrize(("command", "data"), [(main, "train_mixture"), (pretrain, "train_sets")])
def test_a_script_ends_in_one_sentence(tmp_path, capsys, command, data):
    arguments = ["--model_name_or_path", "x/y", f"--{data}", "gone.yaml", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        command([*arguments, "--use_cpu", "True", "--max_steps", "0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("otter-hf: max_steps must be at least 1, got 0")
    assert not (tmp_path / "out").exists()


def test_float16_that_overflows_in_each_step(ragged, fit, monkeypatch):
    # what scaling does with an overflow; on a CPU there is none
    monkeypatch.setattr("accelerate.Accelerator.optimizer_step_was_skipped", True)
    with pytest.raises(ValueError, match="In all of 2 steps float16 overflowed .* set bf16 to true"):
        fit(max_steps=2)
    assert not list((ragged / "out").glob("*.safetensors"))
    monkeypatch.setattr("otter_hf.training.trainer.MAX_OVERFLOW", 2)
    with pytest.raises(ValueError, match="In 2 steps in a row, up to step 2, float16 overflowed"):
        fit(max_steps=4)


def test_a_gradient_that_is_0_in_each_step(ragged, fit, model, monkeypatch):
    """Nothing of a resampler gets into the answers behind gates that are closed, and stay so."""
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.zero_()
    model.save_pretrained(ragged / "base")
    frozen = {"freeze": ["vision", "cross_attention", "language", "embeddings"]}
    with pytest.raises(ValueError, match="In all of 2 steps the gradient was 0, so that nothing was learned"):
        fit(max_steps=2, **frozen)
    assert not list((ragged / "out").glob("*.safetensors"))
    monkeypatch.setattr("otter_hf.training.trainer.MAX_EMPTY", 1)
    with pytest.raises(ValueError, match="In all of 1 steps the gradient was 0"):
        fit(max_steps=2, **frozen)


def test_float16_on_a_cpu_is_refused(fit):
    with pytest.raises(ValueError, match="fp16 is True, but on a CPU .* set bf16 to true"):
        fit(fp16=True)


def test_an_overflow_that_nobody_leaves_out(fit, monkeypatch):
    def overflow(self, model):
        model.lm_head.weight.grad[0, 0] = float("inf")
        return torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    monkeypatch.setattr(OtterTrainer, "_clip_grad_norm", overflow)
    with pytest.raises(ValueError, match="The gradient of step 1 is (inf|nan)"):
        fit(max_steps=1)
