"""`otter-hf data convert-it`: pictures and videos of public sets to MIMIC-IT image stores."""

from .engine_options import add_engine_options, engine_of, tell_submitted
from .numbers import number, positive


# the converters themselves load PyAV and pandas
_NAMES = ("LA", "DC", "TVC", "VST", "SN", "SD", "CGD", "E4D")


def add_parser(commands) -> None:
    """Add the command to those of `otter-hf data`."""
    parser = commands.add_parser(
        "convert-it",
        help="pictures and videos of a public set to an image store",
        description="Pictures and videos of a public set to a folder of parquet shards, with the original's image "
        "ids. A run that was stopped goes on where it ended.",
    )
    parser.add_argument(
        "name", metavar="NAME", help=f"{', '.join(_NAMES)}; also the original's names, such as video.DenseCaptions"
    )
    parser.add_argument("--image-path", required=True, metavar="PATH", help="folder or JSON file, as the set has it")
    parser.add_argument("--image-root", metavar="FOLDER", help="folder of the pictures (LA only)")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder for the store and the report")
    parser.add_argument(
        "--size", default="224", help="squares of PNG of this many pixels, or 'original' (default: 224)"
    )
    parser.add_argument("--base64", action="store_true", help="store base64 text, as the loader of 2023 needs it")
    parser.add_argument("--sources-per-shard", type=positive, help="videos, clips or pictures per shard")
    parser.add_argument("--retry", action="store_true", help="also try again what an earlier run left out")
    parser.add_argument(
        "--timeout", type=number(float, above=0), help="seconds to wait for an answer (VST only; default: 20)"
    )
    parser.add_argument("--attempts", type=positive, help="attempts per link (VST only; default: 4)")
    add_engine_options(parser, threads=8)
    parser.set_defaults(func=run)


def run(args) -> int:
    """Convert, and say how much was written and left out; status 1 if there is no picture at all."""
    from ..production.convert_it import Llava, VisualStoryTelling, convert, find_converter

    if args.size != "original" and not args.size.isdecimal():
        raise ValueError(f"--size must be a number of pixels or 'original', got {args.size!r}.")
    kind = find_converter(args.name)
    network = {"timeout": args.timeout, "attempts": args.attempts}
    network = {key: value for key, value in network.items() if value is not None}
    if network and kind is not VisualStoryTelling:
        raise ValueError(f"--timeout and --attempts are for downloads; {kind.short_name} reads files.")
    if args.image_root and kind is not Llava:
        raise ValueError(f"--image-root is for LA; {kind.short_name} reads --image-path alone.")
    report = convert(
        kind(args.image_path, args.image_root, **network),
        args.output,
        size=None if args.size == "original" else int(args.size),
        encoding="base64" if args.base64 else "bytes",
        engine=engine_of(args),
        sources_per_shard=args.sources_per_shard,
        retry=args.retry,
    )
    if report is None:
        tell_submitted()
        return 0
    print(f"{report.images:,} pictures of {report.sources:,} sources in {report.store}")
    for left_out, count in report.kinds().items():
        print(f"left out: {count:,} ({left_out})")
    return 0 if report.images else 1
