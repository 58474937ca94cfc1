"""Arguments of fine-tuning: three dataclasses for `HfArgumentParser`, from a YAML file, from flags, or both."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from transformers import HfArgumentParser
from transformers.integrations import get_reporting_integration_callbacks

from ..errors import did_you_mean
from ..reading import load_yaml
from .devices import find_device
from .fields import PARAMETER_GROUPS, PARTS, DataArguments, ModelArguments, PretrainingDataArguments, TrainingFields
from .limits import refuse_label_smoothing
from .upstream import RENAMED, Option, add_unsaid, translate


logger = logging.getLogger(__name__)


@dataclass
class TrainingArguments(TrainingFields, transformers.TrainingArguments):
    """Those of transformers, with defaults that fit samples of text and images."""

    def __post_init__(self):
        if self.accelerator_config is None and self.dataloader_pin_memory and not self.use_cpu:
            self.accelerator_config = {"non_blocking": True}  # batches come while the device computes
        if self.early_stopping_patience is not None and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        self._take_precision()
        self._check_plan()
        self._connect()
        try:
            super().__post_init__()
        except TypeError as error:  # of a key in a mapping that transformers hands on
            raise ValueError(f"The training arguments hold what nothing takes: {error}.") from error
        if self.accelerator_config.split_batches or self.accelerator_config.dispatch_batches:
            raise ValueError(
                "accelerator_config: split_batches and dispatch_batches cut batches up by rows, of which packed ones "
                "have one: leave them out."
            )
        self.learning_rates = read_rates(self.learning_rates)
        self._check_early_stopping()
        self._check_float16()
        refuse_lone_processes(self.world_size)
        self._tell_restarts()
        self._check_trackers()
        self._tell_wandb()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay False: the collator takes the samples' columns.")
        if self.train_sampling_strategy not in ("random", "group_by_length"):
            raise ValueError(
                f"train_sampling_strategy is {self.train_sampling_strategy!r}, but steps are of one task group: "
                "set it to random or group_by_length."
            )
        refuse_label_smoothing(self)

    def _take_precision(self):
        """`mixed_precision` of `accelerate launch` is what transformers' Trainer computes in, and says nowhere."""
        told = os.environ.get("ACCELERATE_MIXED_PRECISION")
        if told in ("bf16", "fp16") and not self.bf16 and not self.fp16:
            setattr(self, told, True)

    def _connect(self):
        """On CPUs the parent class would connect processes without `ddp_timeout`, and without telling DeepSpeed."""
        if not self.use_cpu and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("true", "1"):
            return
        PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        if self.deepspeed and torch.distributed.is_initialized():
            import deepspeed

            # ZeRO-3 counts processes when the model is loaded, and would find one
            deepspeed.init_distributed(timeout=timedelta(seconds=self.ddp_timeout), verbose=False)

    def _tell_restarts(self):
        """After a restart torch 2.13 reads the addresses of processes that are gone from the store of all attempts."""
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0)
        if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and self.process_index == 0:
            logger.warning(
                "torchrun --max-restarts: processes that are started again may look for those that died, and fail or "
                "wait. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in front of torchrun, on each node, with the "
                "rendezvous c10d."
            )

    def _tell_wandb(self):
        """W&B takes project and entity from the environment, and transformers nothing else."""
        for name in ("wandb_project", "wandb_entity"):
            value = getattr(self, name)
            if value is not None and "wandb" in self.report_to:
                os.environ[name.upper()] = value
            elif value is not None:
                logger.warning(f"{name} has no effect without report_to wandb (2023: report_to_wandb).")

    @property
    def planned_world_size(self) -> int:
        """Devices of the plan: `nodes` times `gpus` where one is given, else those of this process group."""
        if self.nodes is None and self.gpus is None:
            return self.world_size
        return (self.nodes or 1) * (self.gpus or 1)

    def _check_plan(self):
        for name in ("plan_device", "nodes", "gpus"):
            if getattr(self, name) is not None and not self.dry_run:
                raise ValueError(f"{name} is for a plan: add --plan, or start processes with torchrun or accelerate.")
        for name in ("nodes", "gpus"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu must be above 0 and at most 1, got {self.mfu}.")
        if self.plan_device is not None:
            find_device(self.plan_device)
        if self.dry_run and (self.plan_device is not None or not torch.accelerator.is_available()):
            self.use_cpu = True  # a plan needs no device, whatever precision the training has
            self.tf32 = None

    def _check_float16(self):
        if self.fp16 and not self.dry_run and self.device.type == "cpu":
            raise ValueError(
                "fp16 is True, but on a CPU transformers' Trainer computes in float32 all the same: leave it out, or "
                "set bf16 to true."
            )

    def _check_early_stopping(self):
        patience = self.early_stopping_patience
        if patience is None and self.early_stopping_threshold:
            raise ValueError("early_stopping_threshold needs early_stopping_patience: set it, or leave both out.")
        if patience is not None and patience < 1:
            raise ValueError(f"early_stopping_patience must be at least 1 evaluation, got {patience}.")
        if patience is not None and self.eval_strategy == "no":
            raise ValueError("early_stopping_patience needs evaluations: set eval_strategy to epoch or steps.")

    def _check_trackers(self):
        for name in self.report_to:
            try:
                for callback in get_reporting_integration_callbacks([name]):
                    callback()
            except (ImportError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"report_to: {name} cannot be used ({error}): install it, or set report_to to none."
                ) from None


# as accelerate and DeepSpeed are told it, by torchrun, deepspeed or MPI
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def refuse_lone_processes(world_size: int) -> None:
    """
    Raises ValueError if more processes were started than the `world_size` that train together.

    So it is on a CPU without `use_cpu`: transformers' Trainer then counts one process, under DeepSpeed too, whose
    engine counts all.
    """
    started = max(int(os.environ.get(name) or 1) for name in _COUNTS)
    if started > world_size:
        raise ValueError(
            f"{started} processes were started, but each would train by itself, on the same samples and into the same "
            "folder: set use_cpu to true to train on a CPU, or start one process."
        )


def read_rates(given: str | dict | None) -> dict[str, float] | None:
    """
    `learning_rates` by group of parameters, from `part=rate,...`, a JSON object or a mapping.

    Raises:
        ValueError: naming the part or rate that is wrong.
    """
    if given is None:
        return None
    if isinstance(given, str):
        try:
            pairs = [*json.loads(given).items()] if given.lstrip().startswith("{") else None
        except ValueError as error:
            raise ValueError(f"learning_rates: {given!r} cannot be read: {error}.") from None
        pairs = [pair.partition("=")[::2] for pair in given.split(",")] if pairs is None else pairs
    else:
        pairs = [*given.items()]
    rates = {}
    for part, value in pairs:
        group = PARTS.get(part.strip(), part.strip())
        if group not in PARAMETER_GROUPS:
            raise ValueError(
                f"learning_rates: {part.strip()!r} is no part, use some of {', '.join(PARAMETER_GROUPS)}."
            )
        if group in rates:
            raise ValueError(f"learning_rates: {group} has two rates.")
        try:
            rates[group] = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"learning_rates: {value!r} of {group} is no number; write {group}=1e-5.") from None
        if not 0 < rates[group] < float("inf"):
            raise ValueError(f"learning_rates: the rate of {group} must be above 0, got {value}; else freeze it.")
    return rates


class ArgumentParser(HfArgumentParser):
    """Raises what argparse would print below the list of all arguments."""

    def error(self, message: str):
        raise ValueError(message)


def parse_arguments(
    argv: Sequence[str], kinds: tuple[type, ...] = (ModelArguments, DataArguments, TrainingArguments)
) -> tuple:
    """
    Reads `[recipe.yaml] [--flag value ...]`; a flag wins over the same key of the YAML, a flat map of argument names.

    Returns one instance of each of `kinds`, dataclasses for `HfArgumentParser`.

    Flags of the original training script are understood too, see `otter_hf.training.upstream`; what has no effect any
    more is logged.

    Raises:
        ValueError: naming the file and key, or the flag, that is unknown or has an unusable value.
    """
    argv = list(argv)
    parser = ArgumentParser(kinds, prog="otter-hf train [recipe.yaml]")
    options: list[Option] = []
    if argv and not argv[0].startswith("-"):
        path = argv.pop(0)
        options = _read_recipe(Path(path), parser)
        _check_names(options, kinds, parser, f"{path}: {{!r}} is no argument".format)
    given = _read_flags(argv)
    _check_names(given, kinds, parser, "there is no --{}".format)
    unsaid = add_unsaid(options + given, logger.info)
    options = [option for option in options if option[1]] + given  # an empty list in a recipe is no bare flag
    options = unsaid + translate(options, logger.warning, pretraining=PretrainingDataArguments in kinds)
    last = {f"--{name.replace('-', '_')}": place for place, (name, _) in enumerate(options)}
    flags: list[str] = []
    for flag, place in sorted(last.items(), key=lambda item: item[1]):
        values, nargs = options[place][1], parser._option_string_actions[flag].nargs
        if len(values) > 1 and nargs in (None, "?"):
            several = "; several datasets stand in one YAML, or in one folder" if flag.endswith("_mixture") else ""
            raise ValueError(f"{flag} takes one value, and is given {', '.join(values)}{several}.")
        # argparse has no word for an empty list, which is the default of all
        if values or nargs != "+":
            flags += [flag, *values]
    return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)


def call(function: Callable, argv: Sequence[str] | None, kinds: tuple[type, ...], **options):
    """`function(*arguments, **options)` with the arguments of a command, by default those of the process."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("otter_hf").setLevel(logging.INFO)
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv, kinds)
    if arguments[-1].process_index > 0:
        logging.getLogger("otter_hf").setLevel(logging.WARNING)  # one process tells the plan
    return function(*arguments, **options)


def _check_names(
    options: list[Option], kinds: tuple[type, ...], parser: ArgumentParser, sentence: Callable[[str], str]
) -> None:
    """
    argparse would take the beginning of a name for the whole, name what is unknown without a hint, and of two names
    of an argument take the last.
    """
    known = [flag.lstrip("-") for flag in parser._option_string_actions if flag.startswith("--")]
    said: dict[str, Option] = {}
    for option in options:
        given = option[0].replace("-", "_")
        first, values = said.setdefault(RENAMED.get(given, given), (given, option[1]))
        if first != given and values != option[1]:
            raise ValueError(
                f"{first} is {' '.join(values)}, and {given} {' '.join(option[1])}, which are the same argument: give "
                "one of them."
            )
        for name, _ in translate([option], lambda note: None, pretraining=PretrainingDataArguments in kinds):
            if name not in known:
                hint = did_you_mean(name, known, "`otter-hf train --help` lists them.")
                raise ValueError(f"{sentence(name)}; {hint}")


def _read_flags(argv: Iterable[str]) -> list[Option]:
    options: list[Option] = []
    for part in argv:
        if part.startswith("--") or part == "-h":
            name, equals, value = part.lstrip("-").partition("=")
            options.append(("help" if name == "h" else name, [value] if equals else []))
        elif options:
            options[-1][1].append(part)
        else:
            raise ValueError(f"{part!r} belongs to no flag: flags start with --.")
    return options


def _read_recipe(path: Path, parser: ArgumentParser) -> list[Option]:
    try:
        recipe = load_yaml(path)
    except FileNotFoundError:
        raise ValueError(f"The recipe {path} does not exist.") from None
    except ValueError as error:
        raise ValueError(f"The recipe {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {path} must map argument names to values, got {recipe!r:.80}.")
    options: list[Option] = []
    for key, value in recipe.items():
        if value is None:
            _refuse_null(str(key), path, parser)
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        options.append((str(key), [*map(str, values)]))
    return options


def _refuse_null(key: str, path: Path, parser: ArgumentParser) -> None:
    """A key without value is as good as none, but for a number: elsewhere null says that there is no limit."""
    action = parser._option_string_actions.get(f"--{RENAMED.get(key, key)}")
    default = getattr(action, "default", None)
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        raise ValueError(f"{path}: {key} is null, and must be a number; leave the line out for {default}.")
