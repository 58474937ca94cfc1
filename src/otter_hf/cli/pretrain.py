"""`otter-hf pretrain`: train a Flamingo or Otter on shards of MMC4, LAION and their like."""

from .training_help import add_training_parser


def add_parser(subparsers):
    """Add the `pretrain` subcommand."""
    add_training_parser(
        subparsers,
        "pretrain",
        run,
        _groups,
        help="pretrain on shards of interleaved documents and of pairs",
        description="Pretrain a Flamingo or Otter with the HF Trainer on WebDataset shards; docs/pretraining.md "
        "explains. The flags of 2023 (--mmc4_shards, --laion_shards, ...) are understood.",
    )


def _groups() -> dict[str, type]:
    from ..training.fields import ModelArguments, PretrainingDataArguments, TrainingFields

    return {"model": ModelArguments, "data": PretrainingDataArguments, "training": TrainingFields}


def run(arguments) -> None:
    """Hand the arguments to the entry point of pretraining."""
    from accelerate import PartialState

    from ..training.pretraining import run as pretrain

    pretrain(arguments.rest)
    PartialState().destroy_process_group()
