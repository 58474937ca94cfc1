"""The parsers of `otter-hf train` and `otter-hf pretrain`, whose help shows what recipes set, by what it is for.

Arguments of transformers are named here with their defaults, since asking transformers for them takes seconds.
"""

import argparse
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from inspect import formatannotation


# of transformers' own arguments those that recipes set: name -> (default there, what it does)
COMMON = {
    "output_dir": (None, "Folder of checkpoints, model, processor and report."),
    "num_train_epochs": (3.0, "Passes over the samples."),
    "max_steps": (-1, "Optimizer steps, in place of num_train_epochs."),
    "per_device_train_batch_size": (8, "Samples that a device takes at a time."),
    "gradient_accumulation_steps": (1, "Batches of a step."),
    "learning_rate": (5e-5, "Highest rate."),
    "lr_scheduler_type": ("linear", "Its course: linear, cosine, constant_with_warmup, ..."),
    "warmup_steps": (0, "Steps in which it rises; below 1 a share of all."),
    "weight_decay": (0.0, "Of the weights that decay: docs/training.md."),
    "bf16": (False, "Compute in bfloat16, keep weights as they are."),
    "activation_checkpointing": (None, "Compute activations again to save memory."),
    "eval_strategy": ("no", "When to evaluate: no, steps, epoch."),
    "eval_steps": (None, "Steps between two evaluations."),
    "save_strategy": ("steps", "When to write checkpoints: no, steps, epoch, best."),
    "save_steps": (500, "Steps between two checkpoints."),
    "save_total_limit": (None, "Checkpoints that are kept."),
    "report_to": ("none", "Trackers: tensorboard, wandb, trackio, ..."),
    "run_name": (None, "Name of the run in the trackers."),
    "push_to_hub": (False, "Upload the result, as hub_model_id."),
    "seed": (42, "Of the order, the new weights and dropout."),
    "use_cpu": (False, "Train on the CPU though there is another device."),
    "deepspeed": (None, "File of DeepSpeed's settings."),
    "fsdp": (None, "Shard by FSDP; also `accelerate launch`."),
    "optim": ("adamw_torch_fused", "Optimizer."),
}


def add_training_parser(subparsers, name: str, run: Callable, groups: Callable[[], dict[str, type]], **texts: str):
    """
    Add a command that hands its arguments, `[recipe.yaml] [--flag value ...]`, on to `HfArgumentParser`.

    Args:
        name, texts: as for argparse's `add_parser`.
        run: takes the parsed arguments, whose `rest` are those to hand on.
        groups: gives the dataclasses of the arguments by their titles in the help.
    """
    parser = subparsers.add_parser(name, add_help=False, allow_abbrev=False, **texts)
    helps = {
        ("-h", "--help"): lambda: short_help(parser, groups()),
        ("--help-all",): lambda: full_help(parser, groups()),
    }
    for flags, text in helps.items():
        parser.add_argument(*flags, action=_Print, nargs=0, const=text)
    parser.set_defaults(func=run, takes_rest=True)


class _Print(argparse.Action):
    """Print what the function `const` returns, and end."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(self.const(), end="")
        parser.exit()


def short_help(command: argparse.ArgumentParser, groups: dict[str, type]) -> str:
    """What recipes set: all that is ours, and of transformers the `COMMON` ones."""
    parser = argparse.ArgumentParser(
        prog=command.prog,
        usage=f"{command.prog} [recipe.yaml] [--flag value ...]",
        description=command.description,
        add_help=False,
    )
    for title, kind in groups.items():
        group = parser.add_argument_group(title)
        for one in sorted(fields(kind), key=lambda one: _default(one) is not MISSING):
            names = [*one.metadata.get("aliases", ()), f"--{one.name}"]
            _add(group, names, _default(one), one.metadata["help"], formatannotation(one.type))
    group = parser.add_argument_group("training, with transformers")
    for name, (default, text) in COMMON.items():
        _add(group, [f"--{name}"], default, text, type(default).__name__)
    parser.add_argument_group("more").add_argument(
        "--help-all", action="store_true", help="every argument, also the other ones of transformers"
    )
    return parser.format_help()


def full_help(command: argparse.ArgumentParser, groups: dict[str, type]) -> str:
    """Every argument, in the words of `HfArgumentParser`."""
    from ..training.arguments import ArgumentParser, TrainingArguments
    from ..training.fields import TrainingFields

    kinds = [TrainingArguments if kind is TrainingFields else kind for kind in groups.values()]
    return ArgumentParser(kinds, prog=command.prog, description=command.description).format_help()


def _default(one: Field):
    """MISSING for an argument that must be given."""
    return one.default if one.default_factory is MISSING else one.default_factory()


def _add(group, names: list[str], default, text: str, kind: str) -> None:
    letters = {"bool": "BOOL", "int": "N", "float": "X", "list": "WORD ..."}
    metavar = next((letter for start, letter in letters.items() if kind.startswith(start)), "WORD")
    told = " Needed." if default is MISSING else "" if default in (None, [], False) else f" Default: {default}."
    group.add_argument(*names, metavar=metavar, help=(text + told).replace("%", "%%"))
