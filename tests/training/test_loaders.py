"""The data loaders of `OtterTrainer`."""

import pytest
from torch.utils.data import SequentialSampler

from otter_hf.data import MimicitMixture, OtterCollator
from otter_hf.training.arguments import TrainingArguments
from otter_hf.training.trainer import OtterTrainer


def test_loaders_of_evaluation(ragged, model, processor, tmp_path):
    mixture = MimicitMixture(ragged / "data.yaml")
    for persistent in (False, True):
        workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": persistent}
        arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", **workers)
        trainer = OtterTrainer(
            model, arguments, OtterCollator(processor), train_dataset=mixture, eval_dataset={"held out": mixture}
        )
        loader = trainer.get_eval_dataloader("held out")
        assert isinstance(loader.sampler, SequentialSampler)
        assert loader.collate_fn.dataset is mixture  # where others are found for samples that cannot be used
        # else each evaluation would start workers that stay
        assert (trainer.get_eval_dataloader("held out") is loader) == persistent
        assert (trainer.get_test_dataloader(mixture) is loader) == persistent
        # nor do those of other data stay when these are gone
        other = MimicitMixture(mixture.entries)
        assert trainer.get_test_dataloader(other) is not trainer.get_test_dataloader(other)
    with pytest.raises(ValueError, match="Evaluation needs an eval_dataset"):
        OtterTrainer(model, arguments, OtterCollator(processor), train_dataset=mixture).get_eval_dataloader()
    with pytest.raises(ValueError, match="Training needs a train_dataset"):
        OtterTrainer(model, arguments, OtterCollator(processor), eval_dataset=mixture).get_train_dataloader()
