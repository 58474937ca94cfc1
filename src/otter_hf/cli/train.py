"""`otter-hf train`: fine-tune on MIMIC-IT data; see `otter_hf.training.run`."""

from .training_help import add_training_parser


def add_parser(subparsers):
    """Add the `train` subcommand."""
    add_training_parser(
        subparsers,
        "train",
        run,
        _groups,
        help="fine-tune on MIMIC-IT data",
        description="Fine-tune with the HF Trainer. `--plan` prints what would be trained and with what memory, and "
        "stops; docs/training.md explains.",
    )


def _groups() -> dict[str, type]:
    from ..training.fields import DataArguments, ModelArguments, TrainingFields

    return {"model": ModelArguments, "data": DataArguments, "training": TrainingFields}


def run(arguments) -> None:
    """Hand the arguments to the training entry point."""
    # torch and the Trainer are heavy: loaded only when training
    from accelerate import PartialState

    from ..training.run import run as fine_tune

    fine_tune(arguments.rest)
    # a process group that is still there at the exit may abort the process: torchrun would call the training failed
    PartialState().destroy_process_group()
