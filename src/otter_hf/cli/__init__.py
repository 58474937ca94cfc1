"""The `otter-hf` command: one module per subcommand, each with `add_parser(subparsers)`."""

import sys

from .. import __version__
from ..errors import sentence_of
from . import chat, convert, data, demo, eval, memory, pretrain, serve, skill, syphus, train
from .parsing import Parser


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

    Bad input (a ValueError or OSError anywhere below) ends in its one sentence and status 2, without a traceback; a
    device whose memory is full in one and status 1.
    """
    parser = build_parser()
    # `train` hands its arguments on to HfArgumentParser
    arguments, arguments.rest = parser.parse_known_args(argv)
    try:
        return arguments.func(arguments) or 0
    except (ValueError, OSError) as error:
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


if __name__ == "__main__":
    sys.exit(main())
