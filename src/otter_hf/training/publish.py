"""Pushing to the Hub during and after training, and the card of what was trained.

A push that fails, for whatever reason a network may have, costs a warning and is made up for at the next checkpoint;
training goes on. The last push, at the end, must succeed, or says what to do.
"""

import dataclasses
import json
import logging
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils.hub import PushInProgress

from ..conversion.model_card import trainable_usage, usage
from .checkpoints import UNFINISHED, CheckpointTrainer
from .manifest import MANIFEST
from .report import REPORT_FILE, curves_svg, final_values
from .run_record import RUN_FILE


logger = logging.getLogger(__name__)

# what a checkpoint holds beside the model: needed to go on with training, not to use it
_STATE_FILES = [
    MANIFEST,
    RUN_FILE,
    "pretraining_stream_*",
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "trainer_state.json",
    "training_args.bin",
    "pytorch_model_fsdp*",
    "global_step*",
    "latest",
    "zero_to_fp32.py",
]


class PublishingTrainer(CheckpointTrainer):
    """
    A `Trainer` whose `push_to_hub` survives a Hub that does not, with a card of the training.

    `hub_strategy` is as in transformers: `end`, `every_save` (model, processor and card of each checkpoint),
    `checkpoint` (besides, all of the last checkpoint in `last-checkpoint/`, to go on from) and `all_checkpoints`.
    Uploads run beside the training; a checkpoint that is written during one is not pushed.

    Args:
        recipe: what was asked for, name by name, for the card.

    Raises:
        ValueError: where the repository cannot be created, or not be pushed to at the end.
    """

    def __init__(self, *args, recipe: dict | None = None, **kwargs):
        self.recipe = recipe or {}
        self._pushed: Path | None = None
        super().__init__(*args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None):
        """As in the parent class; a failure is told in one sentence."""
        try:
            super().init_hf_repo(token, private)
        except Exception as error:
            raise ValueError(
                f"push_to_hub is set, but the repository {self.args.hub_model_id or self.args.output_dir!r} cannot be "
                f"created or reached ({_reason(error)}): check the token and the name, or set push_to_hub to false."
            ) from error

    def _push_checkpoint(self, checkpoint: Path):
        if self.args.hub_strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        if self._is_pushing:
            if not self.args.hub_always_push:
                logger.info(f"The last push is still under way: {checkpoint.name} is not pushed.")
                return
            self.push_in_progress.wait_until_done()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # the card goes into the checkpoint, which is what is pushed: the output folder gets its model at the end
        (checkpoint / "README.md").write_text(self.make_card(), encoding="utf-8")
        self._pushed = checkpoint
        # as the parent class keeps it, which waits for it at the end
        self.push_in_progress = PushInProgress(
            [self._api.run_as_future(self._upload_checkpoint, checkpoint, self.state.global_step)]
        )

    @property
    def _is_pushing(self) -> bool:
        push = getattr(self, "push_in_progress", None)
        return push is not None and not push.is_done()

    @property
    def _api(self) -> HfApi:
        return HfApi(token=self.args.hub_token)

    def _upload_checkpoint(self, checkpoint: Path, step: int):
        common = {"repo_id": self.hub_model_id, "folder_path": checkpoint, "revision": self.args.hub_revision}
        message = f"Training in progress, step {step}"
        strategy = self.args.hub_strategy
        try:
            self._api.upload_folder(**common, commit_message=message, ignore_patterns=_STATE_FILES)
            if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
                self._api.upload_folder(**common, commit_message=f"{message}, checkpoint", path_in_repo=name)
        except Exception as error:
            logger.warning(
                f"{checkpoint.name} could not be pushed to {self.hub_model_id} ({_reason(error)}): training goes on, "
                "the next push takes all of it."
            )

    def _is_in_use(self, checkpoint: Path) -> bool:
        return checkpoint == self._pushed and self._is_pushing

    def push_to_hub(self, commit_message: str | None = "End of training", blocking: bool = True, **kwargs):
        """
        As in the parent class: saves the model, and pushes the output folder with card and curves.

        Raises:
            ValueError: if that fails, with the command that pushes the folder later.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if getattr(self, "hub_model_id", None) is None:
            self.init_hf_repo()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        self.create_model_card()
        try:
            return self._api.upload_folder(
                repo_id=self.hub_model_id,
                folder_path=self.args.output_dir,
                commit_message=commit_message,
                # hidden is the lock, which names this machine
                ignore_patterns=[f"{PREFIX_CHECKPOINT_DIR}-*", f"{UNFINISHED}/**", ".*"],
                revision=kwargs.get("revision") or self.args.hub_revision,
                run_as_future=not blocking,
            )
        except Exception as error:
            raise ValueError(
                f"The trained model is complete in {self.args.output_dir}, but could not be pushed to "
                f"{self.hub_model_id} ({_reason(error)}); push it with: hf upload {self.hub_model_id} "
                f"{self.args.output_dir} . --exclude '{PREFIX_CHECKPOINT_DIR}-*'"
            ) from error

    def create_model_card(self, *args, **kwargs):
        """Writes `README.md` of the output folder, see `make_card`, and its curves."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            (folder / "README.md").write_text(self.make_card(), encoding="utf-8")
            (folder / "training.svg").write_text(curves_svg(self.state.log_history), encoding="utf-8")

    def make_card(self) -> str:
        """The model card as Markdown: base, data mixture, what was asked for, curves and the last values measured."""
        config = self.accelerator.unwrap_model(self.model).config
        adapters = hasattr(self.accelerator.unwrap_model(self.model), "peft_config")
        base = config.name_or_path
        name = (self.args.hub_model_id or Path(self.args.output_dir).name).split("/")[-1]
        metadata = {
            "library_name": "peft" if adapters else "otter-hf",
            "pipeline_tag": "image-text-to-text",
            "tags": [config.model_type, "generated-by-otter-hf"],
        }
        if base and not Path(base).exists():
            metadata["base_model"] = base
        front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())
        sections = [
            f"---\n{front}\n---",
            f"# {name}",
            f"`{Path(base).name if Path(base).exists() else base}` fine-tuned with otter-hf: "
            f"{self.state.global_step:,} of {self.state.max_steps:,} steps.",
        ]
        if hasattr(self.train_dataset, "summary"):
            sections.append(f"## Data\n\n```\n{self.train_dataset.summary()}\n```")
        values = final_values(self.state.log_history)
        if values:
            rows = "\n".join(f"| {key} | {value:.6g} | {step:,} |" for key, (value, step) in values.items())
            sections.append(f"## Results\n\n| value | last | step |\n|---|---:|---:|\n{rows}")
        if self.state.global_step == self.state.max_steps:
            sections.append(f"![curves](training.svg)\n\nAll curves and sample answers: `{REPORT_FILE}`.")
        if adapters:
            sections.append("Adapters of the base model: loading them as below loads the base model too.")
        repository, use = getattr(self, "hub_model_id", None) or name, usage
        if self._trainable_only and not adapters:
            sections.append("Weights that were trained, without the frozen ones of the base model.")
            use = partial(trainable_usage, base=Path(base).name if Path(base).exists() else base)
        sections.append(f"## Use\n\n{use(repository)}")
        rows = "\n".join(f"| `{key}` | `{value}` |" for key, value in self.settings().items())
        sections.append(f"## Settings\n\n| argument | value |\n|---|---|\n{rows}")
        return "\n\n".join(sections) + "\n"

    def settings(self) -> dict:
        """What was asked for, and the arguments of the `Trainer` that are not at their defaults."""
        return self.recipe | given_arguments(self.args) | {"devices": self.args.world_size}


# a secret, places on the machine, and what is of no use to a reader
_NOT_SHOWN = (
    "hub_token",
    "output_dir",
    "logging_dir",
    "run_name",
    "hub_model_id",
    "resume_from_checkpoint",
    "disable_tqdm",
    "train_mixture",
    "eval_mixture",
    "media_store",
    "media_store_gb",
    "cache_text_states",
    "dataloader_pin_memory",
    "do_eval",
    "gradient_checkpointing",  # the old name of activation_checkpointing
    "peak_flops",
    "push_to_hub",
    "report_to",
)


def given_arguments(arguments) -> dict:
    """The values of a dataclass that are not its defaults, without folders of this machine and secrets."""
    given = {}
    for field in dataclasses.fields(arguments):
        value, default = getattr(arguments, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        value = getattr(value, "value", value)  # of an enumeration
        if value in (default, []) or field.name in _NOT_SHOWN or not isinstance(value, (bool, int, float, str, list)):
            continue
        given[field.name] = Path(value).name if isinstance(value, str) and Path(value).exists() else value
    return given


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no details'}"
