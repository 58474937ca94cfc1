"""Checkpoints that are there completely or not at all, and stopping and going on with training.

A folder `checkpoint-N` always holds a whole checkpoint: it is written under `_unfinished/` and gets its name when all
of it is on disk, so that a process may be killed at any moment; the model in the output folder likewise. `files.json`
holds sizes and checksums, by which a checkpoint that was damaged later is recognised. Otherwise the files are those of
transformers' `Trainer`: weights as safetensors, processor, optimizer, schedule, random generators and
`trainer_state.json`, from whose step the data are skipped to the right batch.
"""

import contextlib
import copy
import logging
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..files import claim, disk_full_told, move, remove, sync
from .arguments import TrainingArguments, refuse_lone_processes
from .manifest import MANIFEST, damage_of, write_manifest
from .run_record import RunRecord, read_run
from .trainable import TRAINABLE_INFO, TRAINABLE_WEIGHTS, read_trainable, save_trainable


logger = logging.getLogger(__name__)

UNFINISHED = "_unfinished"
# what a shell reports of a process that SIGTERM ended: training stopped early, its checkpoint is complete
STOPPED_EXIT_CODE = 128 + signal.SIGTERM


def find_checkpoint(resume: str | bool | None, output_dir: str | Path) -> str | None:
    """
    The checkpoint to go on from, or None to start from the beginning.

    Args:
        resume: `auto` or true, for the last undamaged checkpoint in `output_dir` of the run that was started there
            last, if there is one; the path of a checkpoint; None or false.
        output_dir: the output folder of the training.

    Raises:
        ValueError: if a path is given and there is no complete checkpoint, or a damaged one; if all are damaged.
    """
    wish = str(resume).lower()
    if resume is None or wish in ("false", "no", "none", ""):
        return None
    if wish not in ("auto", "true", "yes"):
        if not any((Path(resume) / name).is_file() for name in (TRAINER_STATE_NAME, MANIFEST)):
            raise ValueError(
                f"resume_from_checkpoint: {str(resume)!r} is no checkpoint folder (it has no {TRAINER_STATE_NAME}); "
                "name a checkpoint-N folder, or set it to auto for the last one of the output folder."
            )
        if damage := damage_of(resume):
            raise ValueError(f"resume_from_checkpoint: {resume} is damaged, {damage}: name another one, or auto.")
        return str(resume)
    steps, run, others = {}, read_run(output_dir), []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        if number and any((folder / name).exists() for name in (TRAINER_STATE_NAME, MANIFEST)):
            its_run = read_run(folder)
            # one whose record cannot be read is found damaged below
            if run is None or (its_run is None and (folder / MANIFEST).exists()) or its_run and its_run.id == run.id:
                steps[int(number[1])] = folder
            else:
                others.append(folder.name)
    if others:
        logger.warning(f"Of another run, and left alone: {', '.join(sorted(others))} in {output_dir}.")
    if not steps:
        logger.info(f"No checkpoint in {output_dir}: training starts from the beginning.")
        return None
    for step in sorted(steps, reverse=True):
        damage = damage_of(steps[step])
        if damage is None:
            logger.info(f"Going on from {steps[step]}.")
            return str(steps[step])
        logger.warning(f"{steps[step]} is damaged, {damage}: it is passed over.")
    raise ValueError(
        f"Every checkpoint in {output_dir} is damaged, of {steps[max(steps)].name} {damage_of(steps[max(steps)])}: "
        "restore one, or remove them to start from the beginning."
    )


def claim_output(training_args: TrainingArguments):
    """
    The output folder, for this run alone until the block ends; its other processes share it with the first one.

    Raises:
        OSError: if another run is there, with its process, host and time.
    """
    if training_args.process_index > 0:
        return contextlib.nullcontext()
    # by the run, and by its trainer
    return claim(Path(training_args.output_dir) / ".lock", training_args.output_dir, nested=True)


def resume(run: RunRecord, training_args: TrainingArguments) -> tuple[RunRecord, str | None, bool]:
    """
    Where a run begins: the run, as that of the checkpoint; the checkpoint or None; and whether all is done already.

    Raises:
        ValueError: as `find_checkpoint` and `RunRecord.going_on_from`; for a run without any step.
    """
    if run.steps is not None and run.steps < 1:
        raise ValueError(f"The run has {run.steps} steps, nothing would be trained: look at max_steps and the data.")
    # the first process looks, so that all go on from the same, also with a disk of its own on each node, and large
    # files are read once
    return _of_first_process(_resume, run, training_args)


def _resume(run: RunRecord, training_args: TrainingArguments) -> tuple[RunRecord, str | None, bool]:
    checkpoint = find_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)
    if checkpoint is not None:
        run = run.going_on_from(checkpoint, new_data=training_args.ignore_data_skip)
    asked = str(training_args.resume_from_checkpoint).lower() not in ("false", "no", "none", "")
    is_complete = asked and run.is_complete(checkpoint, training_args.output_dir)
    if is_complete:
        logger.info(f"The run of {run.steps} steps in {training_args.output_dir} is complete: nothing is left to do.")
    return run, checkpoint, is_complete


def _of_first_process(function: Callable, *args):
    """What a function returns or raises in the first process, in all."""
    outcome = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function(*args)
        except Exception as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


class CheckpointTrainer(Trainer):
    """
    A `Trainer` whose checkpoints are complete or absent, and which stops with one on SIGTERM.

    With `trainable_only` in its arguments, frozen weights are not written: see [`~otter_hf.training.load_trainable`].

    Args:
        run: what is written as `run.json` into the output folder and each checkpoint; None for none.

    Attributes:
        stopped (`bool`): whether SIGTERM ended the training early.

    Raises:
        ValueError: for `trainable_only` with FSDP or DeepSpeed, whose checkpoints hold all weights; for processes that
            would each train by itself.
    """

    def __init__(self, *args, run: RunRecord | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        refuse_lone_processes(self.args.world_size)
        self._use_one_gpu()
        self.run = run
        self.stopped = False
        self._staging: Path | None = None
        self._stop_on_sigterm = _StopOnSigterm(self)
        self.add_callback(self._stop_on_sigterm)
        if self._trainable_only and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "trainable_only is set, but checkpoints of FSDP and DeepSpeed hold all weights: unset it."
            )

    def _use_one_gpu(self):
        """The Trainer would cut batches up by `torch.nn.DataParallel`, and with them what tells samples apart."""
        if self.args.n_gpu > 1:
            logger.warning(
                f"{self.args.n_gpu} GPUs are there, and one of them is used: start a process for each with torchrun "
                f"--nproc-per-node {self.args.n_gpu}, or show one alone with CUDA_VISIBLE_DEVICES."
            )
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size

    @property
    def _trainable_only(self) -> bool:
        return getattr(self.args, "trainable_only", False)

    def train(self, *args, **kwargs):
        """
        As in the parent class; SIGTERM ends it after the step at hand.

        Raises:
            OSError: if another run is at work in the output folder, or the disk is full.
        """
        with claim_output(self.args), disk_full_told(self.args.output_dir):
            self.accelerator.wait_for_everyone()  # all have looked for a checkpoint
            if self.args.should_save:
                # that of an earlier run, which would tell that this one is complete
                (Path(self.args.output_dir) / TRAINER_STATE_NAME).unlink(missing_ok=True)
                if self.run is not None:
                    self.run.write(self.args.output_dir)
            with self._stop_on_sigterm.listening():
                return super().train(*args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        # gone on with from the last step, behind which the model was not saved
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        """As in the parent class."""
        with self._stop_on_sigterm.held_back():
            return super().evaluation_loop(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model, trial):
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = run_dir / UNFINISHED / name, run_dir / name
        if self.args.should_save:
            shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = run_dir / UNFINISHED
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        if not self.args.save_only_model:
            self.save_data_state(staged)
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.run is not None:
                self.run.write(staged)
            write_manifest(staged)
            self._discard(final)
            move(staged, final)
            self._remove_old_checkpoints(run_dir)
            shutil.rmtree(run_dir / UNFINISHED)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_checkpoint(final)

    def save_data_state(self, checkpoint: Path) -> None:
        """For data that know how far they have been read: called on all processes, to add to a checkpoint."""

    def _discard(self, checkpoint: Path):
        # renamed first: what is deleted by halves must not look like a checkpoint
        if checkpoint.exists():
            doomed = checkpoint.parent / UNFINISHED / f"old-{checkpoint.name}"
            checkpoint.rename(doomed)
            shutil.rmtree(doomed)

    def _remove_old_checkpoints(self, run_dir: Path):
        limit = self.args.save_total_limit
        if not limit or limit < 0:
            return
        best = self.state.best_model_checkpoint
        checkpoints = sort_checkpoints(str(run_dir), use_mtime=True, best_model_checkpoint=best)
        # the best one is next to last, and the last one is needed to go on
        keep = 2 if limit == 1 and best in checkpoints[:-1] else limit
        for checkpoint in checkpoints[:-keep]:
            if not self._is_in_use(Path(checkpoint)):
                self._discard(Path(checkpoint))

    def _is_in_use(self, checkpoint: Path) -> bool:
        """Whether an old checkpoint must not be removed yet."""
        return False

    def _push_from_checkpoint(self, checkpoint_folder: str):
        """The `Trainer` calls this while the folder has its temporary name: see `_push_checkpoint`."""

    def _push_checkpoint(self, checkpoint: Path):
        super()._push_from_checkpoint(str(checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """
        As in the parent class; with sharded FSDP too: whole weights as safetensors, and the processor. What is in the
        output folder is replaced when all is written.
        """
        final = Path(self.args.output_dir)
        if output_dir is not None and Path(output_dir) != final:
            return self._write_model(output_dir, _internal_call)
        staged = final / UNFINISHED / "model"
        with disk_full_told(final):
            if self.args.should_save:
                remove(staged)
            self.accelerator.wait_for_everyone()
            self._write_model(str(staged), True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save and staged.is_dir():
                _move_files(staged, final)
                remove(final / UNFINISHED)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_model(self, output_dir: str, _internal_call: bool):
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        if state_dict is not None:
            # gathered from shards, tied weights are no longer one tensor, and would be written twice
            tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", None) or {}
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        if not self._trainable_only or not isinstance(self.model, PreTrainedModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            output_dir = Path(output_dir or self.args.output_dir)
            save_trainable(self.model, output_dir, self.args.output_dir)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
            torch.save(self.args, output_dir / TRAINING_ARGS_NAME)
        path = Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME
        if self.args.hub_token is not None and path.is_file():
            arguments = copy.copy(self.args)
            arguments.hub_token = None  # a secret, and the folder may be pushed
            torch.save(arguments, path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        if (Path(resume_from_checkpoint) / TRAINABLE_WEIGHTS).is_file():
            read_trainable(self.model if model is None else model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result):
        """Refuses what the parent class warns of: training would go on with the weights it began with."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        wrong = [name for name in load_result.missing_keys if name not in tied] + list(load_result.unexpected_keys)
        if wrong:
            raise ValueError(
                f"A checkpoint of {self.args.output_dir} does not hold the weights of this model: {len(wrong)} differ "
                f"in name, as {wrong[0]}. Start anew with the checkpoint as model_name_or_path."
            )

    def _load_best_model(self):
        if (Path(self.state.best_model_checkpoint) / TRAINABLE_WEIGHTS).is_file():
            read_trainable(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


def _move_files(source: Path, target: Path) -> None:
    """Moves all that is in a folder into another one, and deletes there what is left of a model of another layout."""
    sync(source)
    paths = list(source.iterdir())
    if any(path.suffix == ".safetensors" for path in paths):
        for pattern in ("*.safetensors*", "adapter_config.json", TRAINABLE_INFO):
            for path in target.glob(pattern):
                if not (source / path.name).exists():
                    path.unlink()
    for path in paths:
        move(path, target / path.name)


class _StopOnSigterm(TrainerCallback):
    """
    Ends training after the step in which SIGTERM came, with a checkpoint.

    The signal often goes to all processes of a job. Data workers, whose death would end the training, are started
    while it is held back, which they inherit: they do not take it.
    """

    def __init__(self, trainer: CheckpointTrainer):
        self.trainer = trainer
        self.asked = self.listens = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGTERM for a wish to stop; an error in the training gives the signal back, too."""
        self.asked = self.trainer.stopped = False
        if threading.current_thread() is not threading.main_thread():  # to which signals belong
            yield
            return
        previous = signal.signal(signal.SIGTERM, self._ask)
        self.listens = True
        try:
            yield
        finally:
            self._hold_back(False)  # one that is waiting is taken now
            self.listens = False
            signal.signal(signal.SIGTERM, previous)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """While training, leaves SIGTERM waiting until the block ends."""
        self._hold_back(True)
        try:
            yield
        finally:
            self._hold_back(False)

    def _hold_back(self, is_held_back: bool):
        if self.listens and hasattr(signal, "pthread_sigmask"):  # not on Windows
            signal.pthread_sigmask(signal.SIG_BLOCK if is_held_back else signal.SIG_UNBLOCK, {signal.SIGTERM})

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._hold_back(True)  # workers start with the first batch

    def on_step_begin(self, args, state, control, **kwargs):
        self._hold_back(False)

    def on_epoch_end(self, args, state, control, **kwargs):
        # an epoch that was broken off is not evaluated: it would count for the best model, and takes time
        if self.trainer.stopped and state.epoch != int(state.epoch):
            control.should_evaluate = control.should_save = control.should_log = False

    def _ask(self, *signal_and_frame):
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        asked = self.asked
        if args.world_size > 1:
            # the signal reaches the ranks in different steps, and a checkpoint is written by all of them
            flag = torch.tensor(float(asked), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            asked = bool(flag)
        if asked and state.global_step < state.max_steps:
            self.trainer.stopped = control.should_save = control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning(f"SIGTERM: training stops after step {state.global_step}, with a checkpoint.")
