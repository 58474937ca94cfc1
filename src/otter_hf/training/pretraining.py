"""Pretraining of a Flamingo or Otter on streams of shards: each step has a batch of each set."""

import contextlib
import itertools
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..data.collator import IGNORE_INDEX
from ..data.pretraining import PretrainingSet, PretrainingStream, read_pretraining_sets
from ..errors import ending_in_a_sentence
from ..loading import read_config, read_model, read_processor
from ..models.attention_choice import read_attention
from ..models.flamingo import FlamingoProcessor
from ..models.generation import stop_generation_at
from ..models.host_reads import numbers_on
from .arguments import ModelArguments, TrainingArguments, call
from .checkpoints import STOPPED_EXIT_CODE, claim_output, resume
from .fields import PretrainingDataArguments
from .freezing import freeze, train_only_rows
from .limits import check_numbers, check_sharding
from .optimizer import check_precision
from .plan import sharding_of
from .run_record import RunRecord
from .trainer import OtterTrainer
from .vocabulary import check_vocabulary, ids_of_tokens


logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """
    `run` for scripts: bad input ends the process with its one sentence on stderr and status 2, without a traceback.
    """
    with ending_in_a_sentence():
        run(argv)


def run(argv: Sequence[str] | None = None) -> None:
    """
    Pretrains with the arguments `[recipe.yaml] [--flag value ...]`, by default those of the process.

    Raises:
        ValueError: one sentence on the argument, file or set which is wrong.
    """
    call(pretrain, argv, (ModelArguments, PretrainingDataArguments, TrainingArguments))


def pretrain(
    model_args: ModelArguments, data_args: PretrainingDataArguments, training_args: TrainingArguments
) -> "PretrainingTrainer | None":
    """
    Pretrains, and leaves model, processor and `trainer_state.json` in the output folder.

    Returns:
        The trainer, with its `model` and `state`; None after a `dry_run`, which ends with the table of the sets, and
        where a run that is gone on with is complete.
    """
    check_numbers(model_args, data_args, training_args)
    check_sharding(model_args, training_args, sharding_of(training_args))
    for name in ("lora", "media_store", "cache_text_states"):
        if getattr(model_args, name):
            raise ValueError(f"{name} is for fine-tuning: leave it out, and freeze what is not to be pretrained.")
    if training_args.report_controls:
        raise ValueError("report_controls is for fine-tuning, whose evaluations answer samples: leave it out.")
    for name in ("plan_device", "nodes", "gpus"):
        if getattr(training_args, name) is not None:
            raise ValueError(f"{name} is for the plan of a fine-tuning: leave it out.")
    set_seed(training_args.seed)
    processor = read_processor(model_args.model_name_or_path, model_args.tokenizer, model_args.tokenizer_reference)
    if not isinstance(processor, FlamingoProcessor):
        raise ValueError(f"model_name_or_path has a {type(processor).__name__}: Flamingo and Otter are pretrained.")
    check_vocabulary(processor.tokenizer, read_config(model_args.model_name_or_path, model_args.tokenizer))
    rows = ids_of_tokens(model_args.train_embedding_rows, processor.tokenizer)
    stream = PretrainingStream(
        read_pretraining_sets(data_args.train_sets),
        processor,
        num_workers=training_args.dataloader_num_workers,
        shard=(training_args.process_index, training_args.world_size),
        seed=training_args.seed if training_args.data_seed is None else training_args.data_seed,
        block_size=data_args.block_size,
    )
    # for the Trainer's messages and counts: its batch is one of each set
    batch_size = sum(one.batch_size for one in stream.sets)
    if training_args.per_device_train_batch_size not in (batch_size, TrainingArguments.per_device_train_batch_size):
        logger.warning("per_device_train_batch_size has no effect: each set has a batch_size.")
    training_args.per_device_train_batch_size = batch_size
    logger.info(_table(stream))
    if training_args.dry_run:
        return None
    record = _run_record(model_args, data_args, training_args, stream)
    with claim_output(training_args):
        record, checkpoint, is_complete = resume(record, training_args)
        if is_complete:
            return None
        model = read_model(
            model_args.model_name_or_path,
            model_args.tokenizer,
            dtype=model_args.dtype,
            attn_implementation=read_attention(model_args.attn_implementation),
        )
        stop_generation_at(model, processor.end_of_chunk_token_id)
        freeze(model, model_args.freeze)
        if rows:
            train_only_rows(model, rows)
        check_precision(model, training_args.fp16, sharding_of(training_args))
        trainer = PretrainingTrainer(
            model=model, args=training_args, train_dataset=stream, processing_class=processor, run=record
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.stopped:
            raise SystemExit(STOPPED_EXIT_CODE)
        trainer.save_model()
        if trainer.is_world_process_zero():
            trainer.save_state()
            logger.info(f"left out in this process: {stream.skipped or 'nothing'}")
        return trainer


def _run_record(model_args, data_args, training_args, stream: PretrainingStream) -> RunRecord:
    accumulated = training_args.gradient_accumulation_steps
    steps = training_args.max_steps
    if steps <= 0:
        steps = math.ceil(max(1, math.ceil(len(stream) / accumulated)) * training_args.num_train_epochs)
    sets = [
        [one.name, one.kind, len(one.paths), sum(one.sizes), one.batch_size, one.loss_weight] for one in stream.sets
    ]
    samples = training_args.per_device_train_batch_size * accumulated * training_args.world_size
    return RunRecord.of(model_args, data_args, training_args, data=sets, samples_per_step=samples, steps=steps)


def _table(stream: PretrainingStream) -> str:
    lines = [f"{'set':<12}{'kind':<14}{'shards':>8}{'samples':>14}{'batch':>8}{'weight':>8}"]
    for one in stream.sets:
        lines.append(
            f"{one.name:<12}{one.kind:<14}{len(one.paths):>8,}{sum(one.sizes):>14,}{one.batch_size:>8}"
            f"{one.loss_weight:>8}"
        )
    return "\n".join([*lines, f"{len(stream):,} batches of each set in an epoch, on each process"])


class PretrainingTrainer(OtterTrainer):
    """
    An `OtterTrainer` for a `PretrainingStream`.

    The loss of a step is the sum over the sets of `loss_weight` times the mean loss of their labels, each mean taken
    over all batches that are accumulated and over all devices, so that neither accumulation nor the lengths of texts
    move the weights; 2023 took the mean of each batch on each device. Sets are computed one after the other, and their
    gradients are exchanged once. Logged are `loss` (of the step) and `loss/<set>` (without weight).

    Checkpoints hold how far each process has read; training goes on from them to the bit. With `ignore_data_skip` the
    data start anew.
    """

    train_dataset: PretrainingStream

    def get_train_dataloader(self) -> DataLoader:
        """The stream's own: it divides the samples among the processes by itself."""
        self._sampler = self.train_dataset  # is told the epoch
        return self.train_dataset.dataloader(
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=self.args.dataloader_persistent_workers,
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """As in the parent class, noting how far the data have been read; with the divisors of the sets' losses."""
        items = self.throughput.timed(self.train_dataset.track(epoch_iterator))
        batches = list(itertools.islice(items, num_batches))
        return batches, self._loss_divisors(batches, device)

    def _loss_divisors(self, batch_samples: list, device: torch.device) -> dict[str, torch.Tensor]:
        """What divides the summed loss of each set: the labels of the step, on all devices, over the set's weight."""
        counts = torch.stack(
            [
                sum((batches[one.name]["labels"][:, 1:] != IGNORE_INDEX).sum() for batches in batch_samples)
                for one in self.train_dataset.sets
            ]
        )  # (sets,)
        counts = numbers_on(device, counts.tolist())
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts).view(self.args.world_size, -1).sum(dim=0)
        weights = numbers_on(device, [one.loss_weight for one in self.train_dataset.sets])
        divisors = counts.clamp(min=1) / weights
        return {one.name: divisor for one, divisor in zip(self.train_dataset.sets, divisors, strict=True)}

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward pass of each set; the weighted sum of their losses."""
        state = self.accelerator.gradient_state
        is_last_of_step, last = state.sync_gradients, next(reversed(inputs))
        losses = []
        for name, batch in inputs.items():
            # gradients are exchanged with those of the last set, also by DeepSpeed, which has no `no_sync`
            state._set_sync_gradients(is_last_of_step and name == last)
            with contextlib.nullcontext() if name == last else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, batch, num_items_in_batch[name]))
        return torch.stack(losses).sum()

    def floating_point_ops(self, inputs: dict) -> int:
        """As in the parent class, of all sets."""
        return sum(super(PretrainingTrainer, self).floating_point_ops(batch) for batch in inputs.values())

    def save_data_state(self, checkpoint: Path) -> None:
        """How far this process has read."""
        state = json.dumps(self.train_dataset.state_dict())
        self._state_file(checkpoint).write_text(state + "\n", encoding="utf-8")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in the parent class, with the data of the checkpoint."""
        if resume_from_checkpoint is True:
            # where there is none, the parent class says so
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if resume_from_checkpoint not in (None, False, True) and not self.args.ignore_data_skip:
            self._load_data_state(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_data_state(self, checkpoint: str) -> None:
        path = self._state_file(checkpoint)
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} has no {path.name}: it was written by another number of processes. Go on with the "
                "same, or set ignore_data_skip to start the data anew."
            )
        state = json.loads(path.read_text(encoding="utf-8"))
        self.train_dataset.load_state_dict(state, leave_out=state["taken"] < len(self.train_dataset))

    def _state_file(self, folder: str) -> Path:
        return Path(folder) / f"pretraining_stream_{self.args.process_index}.json"


__all__ = ["PretrainingDataArguments", "PretrainingSet", "PretrainingTrainer", "main", "pretrain", "run"]
