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


def deepspeed(folder, stage):
    """The path of a configuration: ZeRO of a stage, sizes and precision from the recipe."""
    path = folder / f"zero{stage}.json"
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    settings = {
        **dict.fromkeys(auto, "auto"),
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    path.write_text(json.dumps(settings))
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of trainings in `one` process and with `zero1` to `zero3`, saved in step 3 and 6, and `resumed3`."""
    folder = write_training_files(tmp_path_factory.mktemp("runs"), text_only=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        main(command(folder, "one", per_device_train_batch_size=2, max_steps=STEPS))
    two = {"per_device_train_batch_size": 1, "max_steps": STEPS}
    for stage in (1, 2, 3):
        saving = {"save_strategy": "steps", "save_steps": 3, "deepspeed": deepspeed(folder, stage)}
        recipes = command(folder, f"zero{stage}", **two, **saving)
        result = torchrun(folder, recipes)
        assert result.returncode == 0, result.stderr[-6000:]
        checkpoint = str(folder / f"zero{stage}" / "checkpoint-3")
        recipes = command(folder, f"resumed{stage}", resume_from_checkpoint=checkpoint, **two, **saving)
        result = torchrun(folder, recipes)
        assert result.returncode == 0, result.stderr[-6000:]
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_same_trajectory_as_in_one_process(runs, stage):
    torch.testing.assert_close(losses(runs / f"zero{stage}"), losses(runs / "one"), **TOLERANCE)
    expected, trained = weights(runs / "one"), weights(runs / f"zero{stage}")
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name].float(), tensor, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_saved_loaded_and_gone_on_with(runs, stage):
    for folder in (runs / f"zero{stage}", runs / f"zero{stage}" / "checkpoint-6"):
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        AutoProcessor.from_pretrained(folder)
        torch.testing.assert_close(dict(model.state_dict()), weights(runs / f"zero{stage}"), rtol=0, atol=0)
    torch.testing.assert_close(losses(runs / f"resumed{stage}"), losses(runs / f"zero{stage}"), rtol=1e-6, atol=1e-6)
