"""The data loaders of `OtterTrainer`."""

import pytest
from torch.utils.data import SequentialSampler

from otter_hf.data import MimicitMixture, OtterCollator
from otter_hf.training.arguments import TrainingArguments
from otter_hf.training.metrics import most_likely_tokens
from otter_hf.training.trainer import OtterTrainer


@pytest.mark.parametrize("packing", [False, True])
def test_predictions_are_rows_of_samples(ragged, model, processor, tmp_path, packing):
    """By which the Trainer leaves out samples that fill up the last batch of several processes."""
    mixture = MimicitMixture(ragged / "data.yaml")
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none")
    trainer = OtterTrainer(
        model.eval(),
        arguments,
        OtterCollator(processor, packing=packing),
        train_dataset=mixture,
        preprocess_logits_for_metrics=most_likely_tokens,
    )
    samples = [mixture[index] for index in (0, 9, 3)]
    batch = trainer.data_collator(samples)
    loss, tokens, labels = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
    assert tokens.shape == labels.shape == (3, tokens.shape[1])
    for sample, of_sample, expected in zip(samples, tokens, labels, strict=True):
        _, alone, its_labels = trainer.prediction_step(
            trainer.model, trainer.data_collator([sample]), prediction_loss_only=False
        )
        length = alone.shape[1]
        assert of_sample[:length].tolist() == alone[0].tolist()
        assert expected[:length].tolist() == its_labels[0].tolist()
        assert (expected[length:] == -100).all()
    assert trainer.prediction_step(trainer.model, batch, prediction_loss_only=True) == (loss, None, None)


def test_loaders_of_evaluation(ragged, model, processor, tmp_path):
    mixture = MimicitMixture(ragged / "data.yaml")
    for persistent in (False, True):
        workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": persistent}
        workers["dataloader_drop_last"] = persistent
        arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", **workers)
        trainer = OtterTrainer(
            model, arguments, OtterCollator(processor), train_dataset=mixture, eval_dataset={"held out": mixture}
        )
        loader = trainer.get_eval_dataloader("held out")
        assert isinstance(loader.sampler, SequentialSampler)
        assert trainer.get_train_dataloader().batch_sampler.drop_last == persistent
        assert not loader.batch_sampler.drop_last  # all samples are evaluated
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
