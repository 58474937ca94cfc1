"""`otter-hf train`: fine-tune on MIMIC-IT data; see `otter_hf.training.run`."""


def add_parser(subparsers):
    """Add the `train` subcommand."""
    parser = subparsers.add_parser(
        "train",
        help="fine-tune on MIMIC-IT data",
        description="Fine-tune with the HF Trainer: `otter-hf train recipe.yaml [--learning_rate 1e-5 ...]`. "
        "`--plan` prints what would be trained and with what memory, `--help` every argument.",
        add_help=False,
    )
    parser.set_defaults(func=run, takes_rest=True)


def run(arguments) -> None:
    """Hand the arguments to the training entry point."""
    # torch and the Trainer are heavy: loaded only when training
    from accelerate import PartialState

    from ..training.run import main

    main(arguments.rest)
    # a process group that is still there at the exit may abort the process: torchrun would call the training failed
    PartialState().destroy_process_group()
