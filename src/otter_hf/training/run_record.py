"""What a run was asked for, kept in each of its checkpoints, so that going on compares and never takes another run's.

`run.json` holds an id, new with every training that starts from the beginning, and the settings that decide which
steps are made. The output folder holds that of the run that was started there last.
"""

import dataclasses
import json
import logging
import uuid
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from ..files import write_json
from ..made_from import differences
from .arguments import ModelArguments, TrainingArguments


logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
# of the model and data arguments what changes no step; where data lie may change, what they are is compared
_FREE = (
    "attn_implementation",
    "media_store",
    "media_store_gb",
    "cache_text_states",
    "train_mixture",
    "eval_mixture",
    "train_sets",
)
# decided by the data, which may be others on demand
_OF_DATA = ("data", "samples_per_step", "seed", "data_seed")
_TRAINING = (
    "learning_rate",
    "learning_rates",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "neftune_noise_alpha",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "dataloader_drop_last",
    "train_sampling_strategy",
)


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """
    Args:
        settings: name -> value of what decides the steps of a run, in JSON's types.
        steps: optimizer steps of the whole run.
        id: of the run.
    """

    settings: dict
    steps: int | None
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def of(
        cls,
        model_args: ModelArguments,
        data_args: object,
        training_args: TrainingArguments,
        *,
        data: object,
        samples_per_step: int,
        steps: int | None,
    ) -> "RunRecord":
        """
        Args:
            data_args: `DataArguments` or those of pretraining.
            data: what the data are, see `MimicitMixture.digest`.
            samples_per_step, steps: of the plan.
        """
        settings = {}
        for arguments in (model_args, data_args):
            for field in dataclasses.fields(arguments):
                if field.name not in _FREE:
                    settings[field.name] = getattr(arguments, field.name)
        for name in ("model_name_or_path", "tokenizer"):
            settings[name] = settings[name] and Path(settings[name]).name
        for name in _TRAINING:
            settings[name] = getattr(training_args, name)
        settings |= {"samples_per_step": samples_per_step, "data": data}
        return cls(json.loads(json.dumps(settings, default=str)), steps)

    def write(self, folder: str | Path) -> None:
        """Puts `run.json` into a folder, complete or not at all."""
        write_json(Path(folder) / RUN_FILE, dataclasses.asdict(self))

    def going_on_from(self, checkpoint: str | Path, *, new_data: bool = False) -> "RunRecord":
        """
        This run as that of a checkpoint; a number of steps that differs is honoured, and told.

        Args:
            new_data: whether the data start anew (`ignore_data_skip`), and so may be others.

        Raises:
            ValueError: naming what differs, or if the checkpoint was saved without what it takes to go on.
        """
        if not any(next(Path(checkpoint).glob(name), None) for name in ("optimizer*", "global_step*")):
            raise ValueError(
                f"{checkpoint} has no optimizer, as with save_only_model: its schedule and moments cannot be gone on "
                "with. Start anew with it as model_name_or_path, or train with save_only_model set to false."
            )
        before = read_run(checkpoint)
        if before is None:
            logger.warning(f"{checkpoint} does not say what its run was asked for: nothing could be compared.")
            return self
        compared = [name for name in self.settings if name in before.settings and not (new_data and name in _OF_DATA)]
        if told := differences(*({name: one.settings[name] for name in compared} for one in (before, self))):
            raise ValueError(
                f"{checkpoint} is of a run with other settings: {'; '.join(told)}. Set back what differs, or start "
                "anew in another output_dir (a changed model, with the checkpoint as model_name_or_path)."
            )
        if before.steps != self.steps:
            logger.warning(
                f"The run was planned for {before.steps} steps and is now for {self.steps}: the learning rate follows "
                "the schedule of the new number from here on."
            )
        return dataclasses.replace(self, id=before.id)

    def is_complete(self, checkpoint: str | Path | None, output_dir: str | Path) -> bool:
        """
        Whether nothing is left to do: the checkpoint to go on from, if there is one, is of the last step, and the
        output folder holds the model of it, which a checkpoint alone does not tell. The last step may be one at which
        the run ended by itself, as early stopping has it, if it was for as many steps.
        """
        there = read_run(output_dir)
        if self.steps is None or there is None:
            return False
        if there.settings != self.settings if checkpoint is None else there.id != self.id:
            return False
        paths = [Path(folder, TRAINER_STATE_NAME) for folder in (output_dir, checkpoint) if folder is not None]
        try:
            states = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            # written behind the model, and only then
            last = states[0]["global_step"] if states[0].get("max_steps") == self.steps else self.steps
            return all(state["global_step"] >= last for state in states)
        except (OSError, ValueError, KeyError, TypeError):
            return False


def read_run(folder: str | Path) -> RunRecord | None:
    """The record in a folder, or None: of a run of an earlier version, or of none."""
    try:
        fields = json.loads((Path(folder) / RUN_FILE).read_text(encoding="utf-8"))
        return RunRecord(fields["settings"], fields["steps"], fields["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


__all__ = ["RUN_FILE", "RunRecord", "read_run"]
