"""The HF `Trainer` for MIMIC-IT mixtures."""

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler, Subset
from transformers import TrainerCallback
from transformers.trainer_utils import seed_worker

from ..data.collator import IGNORE_INDEX
from ..data.mixture import GroupedSampler
from ..data.samples import Sample, SampleError
from ..models.host_reads import accepts_known_numbers, known_on_host, reads_are_free
from .flops import TrainingFlops, measure_peak_flops
from .limits import refuse_label_smoothing
from .lora import refuse_tied_head
from .optimizer import decayed_parameter_names, set_learning_rates
from .publish import PublishingTrainer
from .throughput import Throughput, count_batch


class OtterTrainer(PublishingTrainer):
    """
    A `Trainer` for a `MimicitMixture`, a `Subset` or `ConcatDataset` of torch made of some, or a list of samples.

    The samples of an optimizer step are of one task group, as those of a batch in Otter's training, so that rows with
    one image are not padded to those with several; with `train_sampling_strategy="group_by_length"` they are of about
    the same length, too.
    Weight decay is for linear and convolutional layers, see `decayed_parameter_names`. A loss or gradient that is not
    finite ends the training with the ids of its samples, before the optimizer takes it in: both are read from the
    device together, once a step, and nothing else is until the next log. What is logged besides: see `Throughput`.

    Args:
        flops: operations of a step, for `mfu` in the logs; see `count_training_flops`.

    Raises:
        ValueError: for LoRA on an output layer that is tied to the input embedding, and for label smoothing; in
            training, when a loss or gradient is not finite.
    """

    def __init__(self, *args, flops: TrainingFlops | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        refuse_label_smoothing(self.args)
        refuse_tied_head(self.model)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        # a compiled graph would be made anew for each of the numbers
        self._counts_for_model = accepts_known_numbers(base) and not self.args.torch_compile
        self.data_collator = NamingCollator(
            self.data_collator, getattr(base.config, "image_token_id", None) if self._counts_for_model else None
        )
        groups = () if self.train_dataset is None else _of_samples(self.train_dataset, "task_groups", "")
        self.throughput = Throughput(groups, flops, getattr(self.args, "peak_flops", 0))
        self.add_callback(self.throughput)
        self.add_callback(_TellEpoch(self))
        self.add_callback(_RefuseNothing(self))
        self._sampler: GroupedSampler | None = None
        self._eval_loaders: dict[int, DataLoader] = {}
        # done in `prediction_step`, before anything as large as logits is padded
        self._reduce_logits, self.preprocess_logits_for_metrics = self.preprocess_logits_for_metrics, None
        # loss and sample ids of each batch since the last optimizer step
        self._losses: list[tuple[torch.Tensor, list[str]]] = []
        # whether the gradient of any step was other than 0
        self.has_learned = False

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """See `decayed_parameter_names`."""
        return decayed_parameter_names(model)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """As in the parent class, with the `learning_rates` of parts."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = getattr(self.args, "learning_rates", None)
        if is_new and rates:
            set_learning_rates(optimizer, self.model, rates)
        return optimizer

    def create_scheduler(self, *args, **kwargs):
        """As in the parent class; ValueError for `lr_scheduler_kwargs` that are not of this schedule."""
        try:
            return super().create_scheduler(*args, **kwargs)
        except TypeError as error:
            given, name = self.args.lr_scheduler_kwargs, self.args.lr_scheduler_type.value
            raise ValueError(f"lr_scheduler_kwargs {given} are not those of the schedule {name}: {error}.") from error

    def get_train_dataloader(self) -> DataLoader:
        """As in the parent class, with a `GroupedSampler`."""
        dataset, args = self.train_dataset, self.args
        if dataset is None:
            raise ValueError("Training needs a train_dataset: give one to the trainer.")
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"train_dataset is a {type(dataset).__name__}, of which steps of one task group cannot be made: give "
                "a MimicitMixture, or a stream to transformers' Trainer."
            )
        self._sampler = GroupedSampler(
            _of_samples(dataset, "task_groups", ""),
            args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            args.seed if args.data_seed is None else args.data_seed,
            lengths=_of_samples(dataset, "text_lengths", 0)
            if args.train_sampling_strategy == "group_by_length"
            else None,
        )
        seed = functools.partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index)
        return self._loader(dataset, self._train_batch_size, self._sampler, worker_init_fn=seed)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """As in the parent class, in the order of the dataset."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset if eval_dataset is None else self.eval_dataset[eval_dataset]
        if eval_dataset is None:
            raise ValueError("Evaluation needs an eval_dataset: give one to the trainer or to evaluate.")
        key = id(eval_dataset)
        if key in self._eval_loaders:
            return self._eval_loaders[key]
        loader = self._loader(eval_dataset, self.args.eval_batch_size)
        # workers of the first evaluation work in the next one; of data that only one evaluation is given none stay
        own = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if self.args.dataloader_persistent_workers and any(eval_dataset is one for one in own):
            self._eval_loaders[key] = loader
        return loader

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """As in the parent class, in the order of the dataset."""
        return self.get_eval_dataloader(test_dataset)

    def _loader(self, dataset: Dataset, batch_size: int, sampler: Sampler | None = None, **options) -> DataLoader:
        """A loader whose collator finds other samples in `dataset` for unusable ones."""
        args = self.args
        loader = DataLoader(
            dataset,
            batch_size,
            sampler=sampler,
            collate_fn=self.data_collator.on(dataset),
            drop_last=args.dataloader_drop_last and sampler is not None,  # an evaluation is of all samples
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            **options,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """As in the parent class, timed."""
        return super().get_batch_samples(self.throughput.timed(epoch_iterator), num_batches, device)

    def _model_inputs(self, inputs: dict) -> dict:
        """What the model is given of a batch."""
        known = self._on_host(inputs).get("known", {})
        return {key: value for key, value in inputs.items() if key not in _NAMES} | known

    def prediction_step(self, model: nn.Module, inputs: dict, *args, **kwargs):
        """
        As in the parent class, with `preprocess_logits_for_metrics` applied. Packed samples are rows again, by which
        the parent class leaves out those that fill up a last batch of several processes.
        """
        loss, logits, labels = super().prediction_step(model, self._model_inputs(inputs), *args, **kwargs)
        if logits is not None and self._reduce_logits is not None:
            logits = self._reduce_logits(logits, labels)
        if "cu_seq_lens_q" in inputs:
            ends = inputs["cu_seq_lens_q"].tolist()
            logits, labels = _unpacked(logits, ends), _unpacked(labels, ends)
        return loss, logits, labels

    def _on_host(self, inputs: dict) -> dict:
        """What is known of a batch without reading it from a device, see `NamingCollator`."""
        if "on_host" not in inputs and "labels" in inputs and reads_are_free(inputs["labels"]):
            return self.data_collator.look(inputs)  # from a loader with a collator of its own
        return inputs.get("on_host", {})

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """As in the parent class; counts the batch."""
        loss = super().training_step(model, self._model_inputs(inputs), num_items_in_batch)
        self._losses.append((loss, inputs["sample_ids"]))
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # the Trainer multiplied it by the number of processes, over which gradients are averaged
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        counts = self._on_host(inputs).get("counts") or count_batch(inputs)
        self.throughput.add(counts, inputs["task_groups"], loss, num_items_in_batch)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        """As in the parent class; refuses losses and gradients that are not finite, before the optimizer's step."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        (losses, names), self._losses = zip(*self._losses, strict=True), []
        values = [*losses]
        if type(grad_norm) is torch.Tensor and grad_norm.device == losses[0].device:
            values.append(grad_norm)
        values = torch.stack([value.float() for value in values]).tolist()  # the one wait of a step
        for value, of_batch in zip(values, names, strict=False):
            if not math.isfinite(value):
                self._refuse("loss", value, of_batch)
        if grad_norm is not None:
            grad_norm = values[-1] if len(values) > len(losses) else float(grad_norm)
            if not math.isfinite(grad_norm) and not self._leaves_out_overflow:
                self._refuse("gradient", grad_norm, [name for of_batch in names for name in of_batch])
        self.has_learned |= grad_norm != 0
        return grad_norm

    @property
    def _leaves_out_overflow(self) -> bool:
        """Whether a step in which float16 overflows is left out, and the next scaled less."""
        scaler = self.accelerator.scaler
        return self.args.fp16 and (self.is_deepspeed_enabled or (scaler is not None and scaler.is_enabled()))

    def _refuse(self, what: str, value: float, names: list[str]):
        raise ValueError(
            f"The {what} of step {self.state.global_step + 1} is {value}, with the samples "
            f"{', '.join(map(repr, names))}: look at these, or lower learning_rate or max_grad_norm."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the parent class, with the values of `Throughput` beside the training loss."""
        if "loss" in logs:
            logs |= self.throughput.collect(self.accelerator.gather, self.args.device)
        super().log(logs, start_time)


def _unpacked(values, ends: list[int]):
    """`(1, L, ...)` -> `(samples, l, ...)`, padded with -100; also of a tuple, of which all else stays."""
    if isinstance(values, tuple):
        return tuple(_unpacked(value, ends) for value in values)
    if not isinstance(values, torch.Tensor) or values.shape[:2] != (1, ends[-1]):
        return values
    rows = [values[0, start:end] for start, end in pairwise(ends)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)


_NAMES = ("sample_ids", "task_groups", "on_host")


def _mixtures_in(dataset: Dataset) -> list[Dataset]:
    """What a dataset is made of by `torch.utils.data`."""
    if isinstance(dataset, Subset):
        return _mixtures_in(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return [mixture for part in dataset.datasets for mixture in _mixtures_in(part)]
    return [dataset]


def _of_samples(dataset: Dataset, name: str, default: Any) -> Sequence:
    """Of each sample what a mixture tells of its own under this name."""
    if isinstance(dataset, Subset):
        values = _of_samples(dataset.dataset, name, default)
        return [values[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return [value for part in dataset.datasets for value in _of_samples(part, name, default)]
    if hasattr(dataset, name) or isinstance(dataset, IterableDataset):
        return getattr(dataset, name, ())
    return [default] * len(dataset)


class NamingCollator:
    """
    A collator in which no sample ends a run that leaves out what it cannot use, and whose batches say who is in them.

    Where a batch is refused, and the mixture's `on_error` is `skip` (or for what is too long the collator's
    `on_overlong` not `error`), or lacks a sample that is too long, its samples are tried one by one, and others of the
    same data take the place of those that are unusable, always the same. They are counted in `MimicitMixture.skipped`.

    Batches have `sample_ids` and `task_groups`, lists of text, and as `on_host` what would have to be read back later
    from the device: `counts` of `count_batch`, and `known`, the arguments of `known_on_host` for a model that takes
    them.

    Args:
        collator: of a batch of samples.
        image_token_id: of the model; None if it does not take these arguments.
        dataset: where to find samples for unusable ones.

    Raises:
        SampleError: as the collator, where nothing is to be left out, or if no sample of the data can be used.
    """

    def __init__(
        self,
        collator: Callable[[Sequence[Sample]], dict],
        image_token_id: int | None = None,
        dataset: Dataset | None = None,
    ):
        self.collator = collator
        self.image_token_id = image_token_id
        self.dataset = dataset
        # a list of samples does not say what to do with one that cannot be used, and counts none
        self._mixtures = [] if dataset is None else [one for one in _mixtures_in(dataset) if hasattr(one, "on_error")]

    def on(self, dataset: Dataset) -> "NamingCollator":
        """The same for samples of `dataset`."""
        return NamingCollator(self.collator, self.image_token_id, dataset)

    def __call__(self, samples: Sequence[Sample]) -> dict:
        try:
            batch = self.collator(samples)
            # processes that evaluate gather as many rows from each
            is_whole = self.dataset is None or _num_samples(batch) == len(samples)
        except SampleError as error:
            if not self._leaves_out(error):
                raise
            is_whole = False
        if not is_whole:
            samples = [self._usable(sample) for sample in samples]
            batch = self.collator(samples)
        return {
            **batch,
            **({"on_host": self.look(batch)} if "labels" in batch else {}),
            "sample_ids": [sample["id"] for sample in samples],
            "task_groups": [sample.get("task_group", "") for sample in samples],
        }

    def look(self, batch: dict) -> dict[str, dict]:
        """`counts` and `known` of a batch on the CPU."""
        known = {} if self.image_token_id is None else known_on_host(batch, self.image_token_id, IGNORE_INDEX)
        return {"counts": count_batch(batch), "known": known}

    def _leaves_out(self, error: SampleError) -> bool:
        if self.dataset is None:  # where no other sample could be found
            return False
        if error.reason == "overlong" and getattr(self.collator, "on_overlong", "error") != "error":
            return True
        return bool(self._mixtures) and all(mixture.on_error == "skip" for mixture in self._mixtures)

    def _usable(self, sample: Sample) -> Sample:
        start = zlib.crc32(sample["id"].encode())
        for number in range(len(self.dataset) + 1):
            candidate = self.dataset[(start + number) % len(self.dataset)] if number else sample
            try:
                self.collator([candidate])
                return candidate
            except SampleError as error:
                if not self._leaves_out(error):
                    raise
                for mixture in self._mixtures[:1]:
                    mixture.skip(error)
        raise SampleError(f"None of the {len(self.dataset)} samples can be used: look at the reasons above.")


def _num_samples(batch: dict) -> int:
    return len(batch["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in batch else len(batch["input_ids"])


# so many times in a row a scale is halved from 2^16 down to where nothing overflows that could be learned from
MAX_OVERFLOW = 32
# steps at the beginning that may have a gradient of 0
MAX_EMPTY = 32


class _RefuseNothing(TrainerCallback):
    """Refuses a training of which nothing would come: float16 overflows in each step, or the gradient is 0 in each."""

    def __init__(self, trainer: OtterTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.left_out, self.in_a_row = state.global_step, 0, 0

    def on_step_end(self, args, state, control, **kwargs):
        is_left_out = self.trainer.accelerator.optimizer_step_was_skipped
        self.left_out += is_left_out
        self.in_a_row = self.in_a_row + 1 if is_left_out else 0
        if self.in_a_row == MAX_OVERFLOW:
            self._refuse_overflow(f"In {MAX_OVERFLOW} steps in a row, up to step {state.global_step},")
        if self.start == 0 and state.global_step == MAX_EMPTY:
            self._refuse_no_gradient(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if self.start == 0 and state.global_step > 0 and not self.trainer.stopped:
            if state.global_step == self.left_out:
                self._refuse_overflow(f"In all of {state.global_step} steps")
            self._refuse_no_gradient(state.global_step)

    def _refuse_no_gradient(self, steps: int):
        if not self.trainer.has_learned:
            raise ValueError(
                f"In all of {steps} steps the gradient was 0, so that nothing was learned: either no sample has a "
                "label, or what is trained has no part in the answers, such as a resampler behind closed gates that "
                "are frozen (freeze)."
            )

    def _refuse_overflow(self, where: str):
        raise ValueError(
            f"{where} float16 overflowed and the step was left out, so that nothing was learned: set bf16 to true in "
            "place of fp16, or both to false."
        )


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
        for mixture in _mixtures_in(train_dataloader.dataset):
            if hasattr(mixture, "set_epoch"):
                mixture.set_epoch(int(state.epoch))
        self.trainer._sampler.set_epoch(int(state.epoch))
