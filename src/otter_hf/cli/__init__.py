"""The `otter-hf` command: one module per subcommand, each with `add_parser(subparsers)`."""

import os
import sys

from .. import __version__
from ..errors import sentence_of
from . import chat, convert, data, demo, eval, memory, pretrain, serve, skill, syphus, train
from .parsing import Parser


# what a shell reports of a process that SIGPIPE ended
_BROKEN_PIPE = 128 + 13
SUBCOMMANDS = (chat, serve, skill, demo, train, pretrain, eval, convert, data, syphus, memory)


def build_parser() -> Parser:
    """The parser of the whole command."""
    parser = Parser(
        prog="otter-hf",
        description="Otter, Flamingo and OtterHD. `otter-hf SUBCOMMAND --help` says more.",
    )
    parser.add_argument("--version", action="version", version=f"otter-hf {__version__}")
    subparsers = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
    for module in SUBCOMMANDS:
        module.add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """
    Run `otter-hf SUBCOMMAND ...`; returns the exit status.

    Bad input (a ValueError or OSError anywhere below) ends in its one sentence and status 2, without a traceback, and
    so does output that the disk has no room for; a device whose memory is full in one and status 1. Where nobody reads
    the output any more, as behind `| head`, it ends as a shell expects it.
    """
    parser = build_parser()
    # `train` hands its arguments on to HfArgumentParser
    arguments, arguments.rest = parser.parse_known_args(argv)
    try:
        status = arguments.func(arguments) or 0
        sys.stdout.flush()
        return status
    except (ValueError, OSError) as error:
        if _drop_output() and isinstance(error, BrokenPipeError):
            return _BROKEN_PIPE
        print(f"otter-hf: {sentence_of(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # of torch, which is not imported for this
            raise
        told = str(error).partition(". ")[0].strip().rstrip(".")
        advice = "take smaller batches, fewer pictures, or weights of fewer bits"
        print(f"otter-hf: The device's memory is full ({told}): {advice}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _drop_output() -> bool:
    """
    Whether there is output that cannot be written, which then is not tried again when Python ends, with a traceback.
    """
    try:
        sys.stdout.flush()
        return False
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True


if __name__ == "__main__":
    sys.exit(main())
