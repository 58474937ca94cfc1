"""The data loaders of `OtterTrainer`, and the trainer in Python."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler, Subset

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


def test_a_trainer_in_python_as_users_of_transformers_have_it(ragged, model, processor, tmp_path):
    """Two evaluation sets, a metric of one's own, the best model at the end, early stopping."""
    mixture = MimicitMixture(ragged / "data.yaml")
    options = {
        **{"max_steps": 4, "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "learning_rate": 1e-3},
        **{"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True},
        **{"metric_for_best_model": "eval_b_likes", "greater_is_better": True, "dataloader_num_workers": 0},
    }
    trainer = OtterTrainer(
        model,
        TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none", disable_tqdm=True, **options),
        OtterCollator(processor, packing=True),
        train_dataset=Subset(mixture, range(1, len(mixture))),
        eval_dataset={"a": [mixture[0]], "b": mixture},
        processing_class=processor,
        compute_metrics=lambda predicted: {"likes": -len(predicted.label_ids)},
        callbacks=[transformers.EarlyStoppingCallback(2)],
    )
    trainer.train()
    assert trainer.state.best_metric == -len(mixture) and trainer.state.global_step == 3
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-1")
    expected = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(tensor, trainer.model.state_dict()[name]) for name, tensor in expected.items())
    with pytest.raises(ValueError, match="label_smoothing_factor is 0.1"):
        smoothed = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", label_smoothing_factor=0.1
        )
        OtterTrainer(model, smoothed, OtterCollator(processor), train_dataset=mixture)
