"""Two processes on the CPU (gloo): the same training as in one, whatever shares the work."""

import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from training_files import PROGRAM, command, losses, torchrun, weights, write_training_files
from transformers import AutoModelForImageTextToText, AutoProcessor

from otter_hf.loading import read_model
from otter_hf.testing.otter import tiny_model, tiny_processor
from otter_hf.testing.otterhd import tiny_model as tiny_otterhd
from otter_hf.testing.otterhd import tiny_processor as tiny_otterhd_processor
from otter_hf.training.run import main


# every step takes the samples of the same two; sums of float32 in another order
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
STEPS = 9  # an epoch, whose last step has a text on one process and a picture on the other
FSDP = {"fsdp": "full_shard", "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """
    The folder of trainings in `one` process, with `ddp`, and with `fsdp`, saved in step 5 and 9, and `resumed`; and of
    a model whose output layer is its embedding, as MPT's, in one process and with FSDP.
    """
    folder = write_training_files(tmp_path_factory.mktemp("runs"), text_only=7)
    shutil.copytree(folder / "base", folder / "tied_base")
    tied = tiny_model(tiny_processor())
    tied.config.tie_word_embeddings = tied.config.text_config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(folder / "tied_base")
    tied = {"model_name_or_path": str(folder / "tied_base")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        main(command(folder, "one", per_device_train_batch_size=2, max_steps=STEPS))
        main(command(folder, "one_tied", per_device_train_batch_size=2, max_steps=STEPS, **tied))
    two = {"per_device_train_batch_size": 1, "max_steps": STEPS}
    recipes = command(folder, "ddp", ddp_find_unused_parameters=False, **two)
    recipes += command(folder, "fsdp", save_strategy="steps", save_steps=5, **two, **FSDP)
    checkpoint = str(folder / "fsdp" / "checkpoint-5")
    recipes += command(folder, "resumed", resume_from_checkpoint=checkpoint, **two, **FSDP)
    recipes += command(folder, "fsdp_tied", **two, **FSDP, **tied)
    # more than one chunk of logits on one process, and one on the other
    program = f"import fsdp_on_cpu\nimport otter_hf.models.lm_loss as loss\nloss.MAX_LOGITS = 1300\n{PROGRAM}"
    result = torchrun(folder, recipes, program=program)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "alone"), [("ddp", "one"), ("fsdp", "one"), ("fsdp_tied", "one_tied")])
def test_same_trajectory_as_in_one_process(runs, kind, alone):
    expected = losses(runs / alone)
    assert len(expected) == STEPS
    torch.testing.assert_close(losses(runs / kind), expected, **TOLERANCE)
    expected = weights(runs / alone)
    assert ("lm_head.weight" in expected) == (alone == "one")
    trained = weights(runs / kind)
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.slow
def test_fsdp_saves_what_everyone_loads(runs):
    """Whole weights and processor in the output folder and in each checkpoint, for a plain `from_pretrained`."""
    assert list((runs / "fsdp" / "checkpoint-9" / "pytorch_model_fsdp_0").glob("__1_*"))  # it was sharded
    for folder in (runs / "fsdp", runs / "fsdp" / "checkpoint-9"):
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        AutoProcessor.from_pretrained(folder)
        torch.testing.assert_close(dict(model.state_dict()), weights(runs / "fsdp"), rtol=0, atol=0)


@pytest.mark.slow
def test_fsdp_resumes(runs):
    torch.testing.assert_close(losses(runs / "resumed"), losses(runs / "fsdp"), rtol=1e-6, atol=1e-6)


LORA = {
    "lora": True,
    "lora_r": 4,
    "lora_dropout": 0.0,  # drawn in each process
    "lora_target_modules": ["q_proj", "v_proj"],
    "lora_train_groups": ["perceiver"],
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """The folder of adapters trained in `one` process, with `fsdp`, saved in step 3 and 6, and `resumed`."""
    folder = write_training_files(tmp_path_factory.mktemp("adapters"), text_only=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        main(command(folder, "one", per_device_train_batch_size=2, **LORA))
    two = LORA | FSDP | {"per_device_train_batch_size": 1}
    checkpoint = str(folder / "fsdp" / "checkpoint-3")
    recipes = command(folder, "fsdp", **two) + command(folder, "resumed", resume_from_checkpoint=checkpoint, **two)
    result = torchrun(folder, recipes, program=f"import fsdp_on_cpu\n{PROGRAM}")
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_adapters_with_fsdp(adapters):
    """LoRA and a whole resampler: the losses of one process; saved whole, loaded by PEFT and by transformers."""
    torch.testing.assert_close(losses(adapters / "fsdp"), losses(adapters / "one"), **TOLERANCE)
    torch.testing.assert_close(losses(adapters / "resumed"), losses(adapters / "fsdp"), rtol=1e-6, atol=1e-6)
    expected = load_file(adapters / "one" / "adapter_model.safetensors")
    for folder in ("fsdp", "fsdp/checkpoint-6", "resumed"):
        assert not list((adapters / folder).glob("model*.safetensors"))
        saved = load_file(adapters / folder / "adapter_model.safetensors")
        assert saved.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(saved[name], tensor, rtol=1e-2, atol=1e-3, msg=name)
    base = AutoModelForImageTextToText.from_pretrained(adapters / "base")
    by_peft = get_peft_model_state_dict(PeftModel.from_pretrained(base, adapters / "fsdp"))
    saved = load_file(adapters / "fsdp" / "adapter_model.safetensors")
    assert by_peft.keys() == saved.keys() and all(torch.equal(by_peft[name], saved[name]) for name in saved)
    read_model(str(adapters / "fsdp"))


def test_otterhd_has_all_gradients_without_a_picture():
    """A process with text only must not leave the others waiting for the gradient of the patch embedding."""
    processor = tiny_otterhd_processor()
    model = tiny_otterhd(processor).train()
    inputs = processor(text="User:2 plus 2? Assistant:\x04 4", return_tensors="pt")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not model.model.vision_embed_tokens.weight.grad.any()
