"""`otter-hf data mmc4-to-tar`, `laion-to-tar` and `obelics-to-tar`: published data to WebDataset shards."""

from .engine_options import add_engine_options, engine_of, tell_submitted
from .numbers import positive


def add_parser(commands) -> None:
    """Add the commands to those of `otter-hf data`."""
    mmc4 = commands.add_parser(
        "mmc4-to-tar",
        help="MMC4 documents and pictures to shards",
        description="MMC4 documents and their pictures to WebDataset shards. A run that was stopped goes on where it "
        "ended.",
    )
    mmc4.add_argument(
        "--doc-shards",
        required=True,
        nargs="+",
        metavar="PATTERN",
        help="docs_shard_{0..99}_v2.jsonl, also .zip; {0,2,5}, * and lists are understood, missing numbers left out",
    )
    mmc4.add_argument(
        "--image-shards", required=True, nargs="+", metavar="PATTERN", help="shard_{0..99}_images_v2.tar, likewise"
    )
    mmc4.set_defaults(func=run_mmc4)
    laion = commands.add_parser(
        "laion-to-tar",
        help="TSV files of LAION to shards",
        description="TSV files of LAION to WebDataset shards. A run that was stopped goes on where it ended.",
    )
    laion.add_argument("folder", help="with *image*.tsv and *text*.tsv")
    laion.set_defaults(func=run_laion)
    obelics = commands.add_parser(
        "obelics-to-tar",
        help="OBELICS documents and pictures to shards",
        description="OBELICS documents and their pictures, as img2dataset downloads them, to WebDataset shards. A run "
        "that was stopped goes on where it ended.",
    )
    obelics.add_argument("files", nargs="+", help="parquet files of OBELICS, or folders of them")
    obelics.add_argument("--image-shards", required=True, nargs="+", metavar="PATH", help="what img2dataset wrote")
    obelics.set_defaults(func=run_obelics)
    for parser in (mmc4, laion, obelics):
        parser.add_argument(
            "--output", required=True, metavar="FOLDER", help="for the shards; also an address: s3://..."
        )
        parser.add_argument("--max-samples", type=positive, help="of a shard (default: laion 500,000, else 30,000)")
        add_engine_options(parser)


def run_mmc4(args) -> None:
    """Convert, and say how much was written and left out."""
    from ..data.pretraining.converters import mmc4_to_tar

    _report(mmc4_to_tar(args.doc_shards, args.image_shards, args.output, **_options(args)), args.output)


def run_laion(args) -> None:
    """As `run_mmc4`."""
    from ..data.pretraining.converters import laion_to_tar

    _report(laion_to_tar(args.folder, args.output, **_options(args)), args.output)


def run_obelics(args) -> None:
    """As `run_mmc4`."""
    from ..data.pretraining.obelics import obelics_to_tar

    _report(obelics_to_tar(args.files, args.image_shards, args.output, **_options(args)), args.output)


def _options(args) -> dict:
    return {"engine": engine_of(args)} | ({} if args.max_samples is None else {"max_samples": args.max_samples})


def _report(counts, output: str) -> None:
    if counts is None:
        return tell_submitted()
    print(f"{counts.samples:,} samples with {counts.images:,} pictures in {output}")
    for reason, count in sorted(counts.left_out.items()):
        print(f"left out: {count:,} ({reason})")
