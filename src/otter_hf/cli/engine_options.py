"""The options of the commands that work on many items: where, and in how many parts."""

from .numbers import positive


EXECUTORS = ("local", "slurm", "ray")


def add_engine_options(parser, *, threads: int | None = None) -> None:
    """
    Add `--executor` and what belongs to it.

    Args:
        threads: default of `--threads`; without, there is no such option.
    """
    group = parser.add_argument_group("where it runs (what is written does not depend on it)")
    group.add_argument(
        "--executor",
        choices=EXECUTORS,
        default="local",
        help="processes of this machine, an array job, or a Ray cluster (default: local)",
    )
    group.add_argument(
        "--tasks", type=positive, metavar="N", help="parts of the work, for several workers (default: 4 for each)"
    )
    group.add_argument("--workers", type=positive, default=1, metavar="W", help="parts at a time (default: 1)")
    if threads is not None:
        group.add_argument(
            "--threads", type=positive, default=threads, help=f"items at a time, of each worker (default: {threads})"
        )
    group.add_argument("--logging-dir", metavar="FOLDER", help="where logs and statistics of the parts are kept")
    group.add_argument(
        "--executor-options",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="of datatrove's executor; Slurm needs time and partition: time=12:00:00 partition=cpu mem_per_cpu_gb=4",
    )


def engine_of(args):
    """The `Engine` that the arguments ask for; ValueError for an option without a value."""
    from ..data.engine import Engine

    options = {}
    for option in args.executor_options:
        name, sign, value = option.partition("=")
        if not sign:
            raise ValueError(f"--executor-options are written NAME=VALUE, got {option!r}.")
        options[name] = _value(value)
    return Engine(
        executor=args.executor,
        tasks=args.tasks,
        workers=args.workers,
        threads=getattr(args, "threads", 1),
        logging_dir=args.logging_dir,
        options=options,
    )


def _value(text: str) -> str | int | float | bool:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), text)


def tell_submitted(command: str = "the same command") -> None:
    """Say how it goes on when all was handed to Slurm, with which command."""
    print(f"handed to Slurm: {command} tells what was written when its jobs have ended, and goes on if need be")
