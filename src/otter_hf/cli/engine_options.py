"""The options of the commands that work on many items: where, and in how many parts."""

from .numbers import positive


EXECUTORS = ("local", "slurm", "ray")


def add_engine_options(parser, *, threads: int | None = None) -> None:
    """
    Add `--executor` and what belongs to it.

    Args:
        threads: default of `--threads`, which workers of this machine share; without, there is no such option.
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
            "--threads",
            type=positive,
            help=f"items at a time, of each worker (default: {threads} in all; on Slurm and Ray cpus_per_task)",
        )
        parser.set_defaults(all_threads=threads)
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
        threads=getattr(args, "threads", None) or _threads(args, options),
        logging_dir=args.logging_dir,
        options=options,
    )


def _threads(args, options) -> int:
    """Threads of a worker where none are given: no more at work than there are processors for."""
    threads = getattr(args, "all_threads", 1)
    if args.executor == "local":
        return max(1, threads // args.workers)
    processors = options.get("cpus_per_task", 1)  # another kind of value is refused by the executor
    return min(threads, processors) if isinstance(processors, int) and processors > 0 else 1


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
