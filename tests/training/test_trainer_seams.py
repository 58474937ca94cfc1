"""What of transformers' `Trainer` is replaced that is not public: the next version may call it otherwise."""

import inspect

import pytest
from transformers import Trainer

from otter_hf.training.checkpoints import CheckpointTrainer
from otter_hf.training.pretraining import PretrainingTrainer
from otter_hf.training.publish import PublishingTrainer
from otter_hf.training.trainer import OtterTrainer


# those of checkpoints: written under another name, of trained weights only, pushed when they are complete; and no step
# behind the last
PRIVATE = {
    CheckpointTrainer: {
        "_get_output_dir": "trial",
        "_issue_warnings_after_load": "load_result",
        "_load_best_model": "",
        "_load_from_checkpoint": "resume_from_checkpoint, model",
        "_push_from_checkpoint": "checkpoint_folder",
        "_run_epoch": "model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
        "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch",
        "_save": "output_dir, state_dict",
        "_save_checkpoint": "model, trial",
    },
    PublishingTrainer: {},
    OtterTrainer: {"_get_grad_norm": "model, grad_norm"},
    PretrainingTrainer: {},
}


@pytest.mark.parametrize("trainer", PRIVATE)
def test_private_methods_that_are_replaced(trainer):
    replaced = [name for name in vars(trainer) if name.startswith("_") and not name.startswith("__")]
    signatures = {
        name: ", ".join([*inspect.signature(getattr(Trainer, name)).parameters][1:])
        for name in replaced
        if hasattr(Trainer, name)
    }
    assert signatures == PRIVATE[trainer]
