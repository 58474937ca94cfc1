"""DeepSpeed in two processes on the CPU (gloo): the same training as in one, saved, loaded and gone on with."""

import importlib.util
import json
import shutil

import pytest
import torch
from training_files import command, losses, torchrun, weights, write_training_files
from transformers import AutoModelForImageTextToText, AutoProcessor

from otter_hf.training.run import main


if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed: pip install deepspeed", allow_module_level=True)
if not shutil.which("ninja") or not (shutil.which("c++") or shutil.which("g++")):
    pytest.skip("deepspeed builds its operators with a C++ compiler and ninja on the PATH", allow_module_level=True)

pytestmark = pytest.mark.slow
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
STEPS = 6
TWO = {"per_device_train_batch_size": 1, "max_steps": STEPS}
BF16 = {"bf16": True, "learning_rate": 1e-3}
# name -> stage, precision
KINDS = {"zero1": (1, False), "zero2": (2, False), "zero3": (3, False), "zero3_bf16": (3, True)}


def deepspeed(folder, stage):
    """The path of a configuration: ZeRO of a stage, sizes and precision from the recipe."""
    path = folder / f"zero{stage}.json"
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings = {
        **dict.fromkeys(sizes, "auto"),
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    }
    path.write_text(json.dumps(settings))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with trainings in `one` process, in float32 and in bfloat16."""
    folder = write_training_files(tmp_path_factory.mktemp("runs"), text_only=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        main(command(folder, "one", per_device_train_batch_size=2, max_steps=STEPS))
        main(command(folder, "one_bf16", per_device_train_batch_size=2, max_steps=STEPS, **BF16))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def run(request, files):
    """Name of a training with two processes, saved in step 3 and 6; `resumed_` in front, that from step 3 on."""
    name = request.param
    stage, bf16 = KINDS[name]
    settings = {"save_strategy": "steps", "save_steps": 3, "deepspeed": deepspeed(files, stage), **TWO}
    settings |= BF16 if bf16 else {}
    for recipe in (
        command(files, name, **settings),
        command(files, f"resumed_{name}", resume_from_checkpoint=str(files / name / "checkpoint-3"), **settings),
    ):
        result = torchrun(files, recipe, timeout=600)  # the first one compiles
        assert result.returncode == 0, result.stderr[-6000:]
    return name


def test_same_trajectory_as_in_one_process(files, run):
    bf16 = KINDS[run][1]
    expected = losses(files / ("one_bf16" if bf16 else "one"))
    # DeepSpeed's bfloat16 weights are rounded in each step, those of autocast are not
    tolerance = {"rtol": 5e-2, "atol": 0} if bf16 else TOLERANCE
    torch.testing.assert_close(losses(files / run), expected, **tolerance)
    if not bf16:
        expected, trained = weights(files / "one"), weights(files / run)
        assert trained.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(trained[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


def test_saved_loaded_and_gone_on_with(files, run):
    for folder in (files / run, files / run / "checkpoint-6"):
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        AutoProcessor.from_pretrained(folder)
        torch.testing.assert_close(dict(model.state_dict()), weights(files / run), rtol=0, atol=0)
    torch.testing.assert_close(losses(files / f"resumed_{run}"), losses(files / run), rtol=1e-6, atol=1e-6)
