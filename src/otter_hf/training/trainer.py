"""The HF `Trainer` for MIMIC-IT mixtures."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback

from ..data.mixture import GroupedSampler
from ..data.samples import Sample
from .flops import TrainingFlops, measure_peak_flops
from .optimizer import decayed_parameter_names
from .publish import PublishingTrainer
from .throughput import Throughput


class OtterTrainer(PublishingTrainer):
    """
    A `Trainer` for a `MimicitMixture`.

    The samples of an optimizer step are of one task group, as those of a batch in Otter's training, so that rows with
    one image are not padded to those with several; with `train_sampling_strategy="group_by_length"` they are of about
    the same length, too.
    Weight decay is for linear and convolutional layers, see `decayed_parameter_names`. A loss or gradient that is not
    finite ends the training with the ids of its samples, before the optimizer takes it in. What is logged besides: see
    `Throughput`.

    Args:
        flops: operations of a step, for `mfu` in the logs; see `count_training_flops`.

    Raises:
        ValueError: in training, when a loss or gradient is not finite.
    """

    def __init__(self, *args, flops: TrainingFlops | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.data_collator = NamingCollator(self.data_collator)
        groups = getattr(self.train_dataset, "task_groups", ())
        self.throughput = Throughput(groups, flops, getattr(self.args, "peak_flops", 0))
        self.add_callback(self.throughput)
        self.add_callback(_TellEpoch(self))
        self._sampler: GroupedSampler | None = None
        self._names: list[str] = []  # of the samples since the last optimizer step

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """See `decayed_parameter_names`."""
        return decayed_parameter_names(model)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        by_length = self.args.train_sampling_strategy == "group_by_length"
        self._sampler = GroupedSampler(
            dataset.task_groups,
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            seed,
            lengths=dataset.text_lengths if by_length else None,
        )
        return self._sampler

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """As in the parent class, timed."""
        return super().get_batch_samples(self.throughput.timed(epoch_iterator), num_batches, device)

    def _prepare_inputs(self, inputs: dict) -> dict:
        return super()._prepare_inputs({key: value for key, value in inputs.items() if key not in _NAMES})

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """As in the parent class; counts the batch, and refuses a loss that is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        names = inputs["sample_ids"]
        self._names += names
        if not torch.isfinite(loss):
            self._refuse("loss", loss, names)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # the Trainer multiplied it by the number of processes, over which gradients are averaged
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        self.throughput.add(inputs, inputs["task_groups"], loss, num_items_in_batch)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        names, self._names = self._names, []
        # in float16 a gradient may overflow: the scaler then leaves out the step, and scales less
        if grad_norm is not None and not self.args.fp16 and not math.isfinite(grad_norm):
            self._refuse("gradient", float(grad_norm), names)
        return grad_norm

    def _refuse(self, what: str, value, names: list[str]):
        raise ValueError(
            f"The {what} of step {self.state.global_step + 1} is {float(value)}, with the samples "
            f"{', '.join(map(repr, names))}: look at these, or lower learning_rate or max_grad_norm."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the parent class, with the values of `Throughput` beside the training loss."""
        if "loss" in logs:
            logs |= self.throughput.collect(self.accelerator.gather, self.args.device)
        super().log(logs, start_time)


_NAMES = ("sample_ids", "task_groups")


class NamingCollator:
    """Adds to the batches of a collator who is in them: `sample_ids` and `task_groups`, lists of text."""

    def __init__(self, collator: Callable[[Sequence[Sample]], dict]):
        self.collator = collator

    def __call__(self, samples: Sequence[Sample]) -> dict:
        return self.collator(samples) | {
            "sample_ids": [sample["id"] for sample in samples],
            "task_groups": [sample.get("task_group", "") for sample in samples],
        }


class _TellEpoch(TrainerCallback):
    def __init__(self, trainer: OtterTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        throughput = self.trainer.throughput
        if throughput.flops is not None and throughput.peak_flops is None:
            dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else self.trainer.model.dtype
            throughput.peak_flops = measure_peak_flops(args.device, dtype)

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # accelerate tells the epoch to the dataset or to the sampler, and to the sampler not on every path
        train_dataloader.dataset.set_epoch(int(state.epoch))
        self.trainer._sampler.set_epoch(int(state.epoch))
