"""Check, look at, convert and exchange MIMIC-IT data."""

import argparse
import os
from pathlib import Path

from ..model_names import check_model_name
from . import convert_it, pretraining_data
from .engine_options import add_engine_options, engine_of, tell_submitted
from .numbers import not_negative, positive
from .parsing import add_command


_IMAGE_SOURCES = {
    "llava": "LLaVA",
    "llavar": "LLaVAR",
    "lrv": "LRV-Instruction",
    "svit": "SVIT",
    "messages": "rows of messages (TRL, LLaMA-Factory, ms-swift)",
}
_SELF_CONTAINED_SOURCES = {"m3it": "M3IT", "sharegpt": "ShareGPT", "lima": "LIMA", "alpaca": "Alpaca"}


def add_parser(subparsers) -> None:
    """Add the command and its subcommands; each sets `func` to a function of the parsed arguments."""
    parser = subparsers.add_parser("data", help="check, show and convert MIMIC-IT data", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_check, _show, _stats, _to_parquet, _train_config, _merge, _neighbours, _to_hub, _from_hub, _download):
        add(commands)
    for name, title in {**_IMAGE_SOURCES, **_SELF_CONTAINED_SOURCES}.items():
        _source(commands, name, title, "to-mimicit" if name == "messages" else f"from-{name}")
    convert_it.add_parser(commands)
    pretraining_data.add_parser(commands)


def _command(commands, name: str, run, help: str) -> argparse.ArgumentParser:
    parser = add_command(commands, name, run, help)
    parser.add_argument("--cache-dir", help="where index files are kept (default: the cache of datasets)")
    return parser


def _check(commands) -> None:
    parser = _command(commands, "check", _run_check, "find all that is wrong with a training YAML and its files")
    parser.add_argument("mixture", help="the training YAML, or rows of messages (.jsonl, .json, .parquet, a folder)")
    parser.add_argument("--strict", action="store_true", help="fail at warnings too")
    parser.add_argument("--json", metavar="PATH", help="write the report there, with every id concerned")
    parser.add_argument("--skip-images", action="store_true", help="do not decode the pictures")
    parser.add_argument("--populate-rel-ins", action="store_true", help="contexts come from rel_ins_ids")
    parser.add_argument("--max-length", type=positive, help="warn of longer examples, in tokens; needs --tokenizer")
    parser.add_argument("--tokenizer", metavar="MODEL", help="folder or Hub id of the tokenizer that counts")
    parser.add_argument(
        "--max-image-pixels", type=positive, help="pictures with more are errors, as in training (default: 89 million)"
    )
    parser.add_argument(
        "--against",
        metavar="MIXTURE",
        help="an evaluation set in one of these forms: list the pictures and questions that are in both; this part "
        "runs in this process with --threads, whatever --executor and --workers say",
    )
    add_engine_options(parser, threads=os.cpu_count() or 1)


def _run_check(args) -> int:
    from ..data.validate import check_mixture
    from ..files import write_json

    report = check_mixture(
        args.mixture,
        populate_rel_ins=args.populate_rel_ins,
        decode_images=not args.skip_images,
        engine=engine_of(args),
        cache_dir=args.cache_dir,
        tokenizer=_tokenizer(args.tokenizer),
        max_length=args.max_length,
        max_image_pixels=args.max_image_pixels,
    )
    if args.against:
        from ..data.contamination import find_overlap, mixture_questions

        sides = (
            mixture_questions(path, args.cache_dir, not args.skip_images) for path in (args.mixture, args.against)
        )
        try:
            report.overlap = find_overlap(*sides, num_threads=args.threads)
        except (ValueError, OSError) as error:  # what the check has found does not go with it
            report.add("error", "not compared", str(error))
    print(report.table())
    if args.json:
        write_json(args.json, report.to_dict())
    return 0 if report.ok(args.strict) else 1


def _show(commands) -> None:
    parser = _command(commands, "show", _run_show, "show a sample as the model is given it")
    parser.add_argument("mixture", help="the training YAML, or rows of messages (.jsonl, .json, .parquet, a folder)")
    parser.add_argument("index", type=int, nargs="?", default=0, help="number of the sample (default: 0)")
    parser.add_argument(
        "--processor", metavar="MODEL", help="folder or Hub id of a model: also show tokens and labels"
    )
    parser.add_argument("--format", help="instruction format (default: that of the model, simple without one)")
    parser.add_argument("--png", metavar="PATH", help="write the pictures there, as a contact sheet")
    parser.add_argument("--no-colour", action="store_true", help="mark with brackets in place of colours")
    parser.add_argument("--populate-rel-ins", action="store_true", help="contexts come from rel_ins_ids")


def _run_show(args) -> None:
    from ..data.mixture import MimicitMixture
    from ..data.preview import contact_sheet, describe_sample, text_of_sample

    if args.processor:
        check_model_name(args.processor, "--processor", config=False)
    mixture = MimicitMixture(args.mixture, populate_rel_ins=args.populate_rel_ins, cache_dir=args.cache_dir)
    if not 0 <= args.index < len(mixture):
        raise ValueError(f"sample {args.index} does not exist: the mixture has {len(mixture)}, counted from 0.")
    sample = mixture[args.index]
    if args.processor:
        from transformers import AutoProcessor

        import otter_hf  # noqa: F401  registers the processors

        processor = AutoProcessor.from_pretrained(args.processor)
        print(describe_sample(sample, processor, args.format, colour=not args.no_colour))
    else:
        print(text_of_sample(sample, args.format or "simple"))
    if args.png:
        Path(args.png).parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(sample).save(args.png, "PNG")


def _stats(commands) -> None:
    parser = _command(commands, "stats", _run_stats, "lengths of prompts and sizes of pictures")
    parser.add_argument("mixture", help="the training YAML, or rows of messages (.jsonl, .json, .parquet, a folder)")
    parser.add_argument("--tokenizer", metavar="MODEL", help="count tokens with that of this folder or Hub id")
    parser.add_argument(
        "--limit", type=not_negative, default=1000, help="samples to look at, 0 for all (default: 1000)"
    )
    parser.add_argument("--png", metavar="PATH", help="write histograms there")


def _run_stats(args) -> None:
    from ..data.mixture import MimicitMixture
    from ..data.preview import mixture_statistics, statistics_table, write_histograms
    from ..extras import require

    if args.png:
        require("--png", "plots")
    tokenizer = _tokenizer(args.tokenizer)
    mixture = MimicitMixture(args.mixture, on_error="skip", cache_dir=args.cache_dir)
    print(mixture.summary())
    values = mixture_statistics(mixture, tokenizer, args.limit)
    print(statistics_table(values, in_tokens=tokenizer is not None))
    if mixture.skipped:
        print("skipped: " + ", ".join(f"{count} {reason}" for reason, count in mixture.skipped.items()))
    if args.png:
        write_histograms(values, args.png)


def _tokenizer(name: str | None):
    if name is None:
        return None
    check_model_name(name, "--tokenizer", config=False)
    from ..models.legacy import find_raw_config, is_legacy_config
    from ..models.legacy_tokens import load_tokenizer

    return load_tokenizer(name, legacy=is_legacy_config(find_raw_config(name)))


def _to_parquet(commands) -> None:
    parser = _command(commands, "to-parquet", _run_to_parquet, "image store of any kind to fast parquet")
    parser.add_argument("images", nargs="+", help="image stores")
    parser.add_argument("--output", required=True, help="the new .parquet, a folder of parts if it is large")
    parser.add_argument(
        "--resize", type=positive, metavar="PIXELS", help="to squares of PNG (default: bytes as they are)"
    )
    parser.add_argument("--base64", action="store_true", help="one file of base64 text, for the loader of 2023")
    add_engine_options(parser, threads=os.cpu_count() or 1)


def _run_to_parquet(args) -> None:
    from ..data.to_parquet import store_to_parquet

    done = store_to_parquet(
        args.images,
        args.output,
        resize=args.resize,
        encoding="base64" if args.base64 else "bytes",
        engine=engine_of(args),
        cache_dir=args.cache_dir,
    )
    if done is None:
        tell_submitted()
        return
    written, left_out = done
    print(f"{written:,} pictures in {args.output}, {len(left_out):,} left out that cannot be decoded")


def _train_config(commands) -> None:
    parser = _command(commands, "make-train-config", _run_train_config, "derive a train config from rel_ins_ids")
    parser.add_argument("instructions", help="the instructions file")
    parser.add_argument("--output", required=True, help="the new file")
    parser.add_argument("--remove-rel-ins-ids", action="store_true", help="leave all contexts empty")


def _run_train_config(args) -> None:
    from ..data.tools import write_train_config

    count = write_train_config(args.instructions, args.output, keep_context=not args.remove_rel_ins_ids)
    print(f"{count:,} examples in {args.output}")


def _merge(commands) -> None:
    parser = _command(commands, "merge", _run_merge, "several MIMIC-IT datasets to one")
    parser.add_argument("--name", required=True, help="of the new dataset")
    parser.add_argument("--output", required=True, help="folder for it")
    parser.add_argument(
        "--dataset",
        action="append",
        nargs="+",
        required=True,
        metavar="PATH",
        help="instructions, images and train config of one, in this order; '-' for none; repeat it",
    )


def _run_merge(args) -> None:
    from ..data.formats import MimicitFiles
    from ..data.tools import merge_datasets

    datasets = []
    for paths in args.dataset:
        if len(paths) > 3:
            raise ValueError(f"--dataset takes instructions, images and train config, got {len(paths)} paths.")
        instructions, images, config = (*(None if path == "-" else path for path in paths), None, None)[:3]
        if instructions is None:
            raise ValueError("--dataset needs an instructions file as its first path.")
        datasets.append(MimicitFiles(instructions, images or (), config))
    _print_files(merge_datasets(datasets, args.output, args.name, args.cache_dir))


def _neighbours(commands) -> None:
    parser = _command(
        commands, "neighbours", _run_neighbours, "give each record its most similar ones as in-context examples"
    )
    parser.add_argument("instructions", help="the instructions file")
    parser.add_argument("--output", required=True, help="path of the new files without _instructions.json")
    parser.add_argument("--encoder", required=True, help="folder or Hub id of a text encoder, or a CLIP for images")
    parser.add_argument("--by", choices=("text", "image"), default="text", help="default: text")
    parser.add_argument("--images", nargs="*", default=[], help="image stores, with --by image")
    parser.add_argument("--k", type=positive, default=10, help="neighbours of each record (default: 10)")
    parser.add_argument("--context", type=not_negative, default=2, help="of them in the train config (default: 2)")
    add_engine_options(parser)


def _run_neighbours(args) -> None:
    from ..data.neighbours import write_neighbours

    written = write_neighbours(
        args.instructions,
        args.output,
        args.encoder,
        by=args.by,
        images_path=args.images,
        k=args.k,
        context=args.context,
        engine=engine_of(args),
        cache_dir=args.cache_dir,
    )
    if written is None:
        tell_submitted()
        return
    print("\n".join(map(str, written)))


def _to_hub(commands) -> None:
    parser = _command(commands, "to-hub", _run_to_hub, "write a mixture as a Hub dataset, and upload it")
    parser.add_argument("mixture", help="the training YAML, or rows of messages (.jsonl, .json, .parquet, a folder)")
    parser.add_argument("--output", required=True, help="folder to write; if it is there, it is only uploaded")
    parser.add_argument("--push-to-hub", metavar="REPO", help="dataset repository to upload to")
    parser.add_argument("--private", action="store_true", help="if the repository is new")


def _run_to_hub(args) -> None:
    from ..data.hub import push_mixture, write_hub_form

    if args.push_to_hub:
        names = push_mixture(
            args.mixture, args.push_to_hub, args.output, private=args.private, cache_dir=args.cache_dir
        )
    else:
        names = write_hub_form(args.mixture, args.output, args.cache_dir)
    print("\n".join(names))


def _from_hub(commands) -> None:
    parser = _command(commands, "from-hub", _run_from_hub, "a Hub dataset like pufanyi/MIMICIT to MIMIC-IT files")
    parser.add_argument("repository", help="dataset repository, or a folder like one")
    parser.add_argument("--name", required=True, help="of the dataset in it, such as CGD")
    parser.add_argument("--output", required=True, help="folder for the files")
    parser.add_argument("--revision", help="branch, tag or commit")


def _run_from_hub(args) -> None:
    from ..data.hub import read_hub_form

    _print_files(read_hub_form(args.repository, args.name, args.output, args.revision))


def _download(commands) -> None:
    parser = _command(
        commands, "download", _run_download, "MIMIC-IT from its copy on the Hub, or --check of a folder that is there"
    )
    parser.add_argument("name", nargs="?", help="subset, such as CGD; on the Hub its terms have to be accepted first")
    parser.add_argument("--output", metavar="FOLDER", help="folder for its files")
    parser.add_argument("--check", metavar="FOLDER", help="compare a folder with what was published; download nothing")
    parser.add_argument("--repository", default="pufanyi/MIMICIT", help="default: pufanyi/MIMICIT")
    parser.add_argument("--revision", help="branch, tag or commit")


def _run_download(args) -> int:
    from ..data.hub import read_hub_form
    from ..data.mimicit_subsets import check_folder

    if bool(args.check) == bool(args.name) or bool(args.name) != bool(args.output):
        raise ValueError("download needs the name of a subset and an --output, or --check FOLDER.")
    if args.name:
        _print_files(read_hub_form(args.repository, args.name, args.output, args.revision))
        return 0
    report = check_folder(args.check)
    for kind, lines in (("", report.files), ("warning: ", report.warnings), ("error: ", report.errors)):
        for line in lines:
            print(f"{kind}{line}")
    print(f"{len(report.errors)} errors, {len(report.warnings)} warnings; ids and pictures: otter-hf data check")
    return 1 if report.errors else 0


def _source(commands, name: str, title: str, command: str) -> None:
    parser = _command(commands, command, _run_source, f"{title} to MIMIC-IT files")
    parser.add_argument("input", help=f"file of {title}, JSON or JSON lines")
    if name in _IMAGE_SOURCES:
        # parquet of LLaVA's form may hold them
        needed = name in ("lrv", "svit")
        parser.add_argument("--images", required=needed, metavar="FOLDER", help="folder of its pictures")
        parser.add_argument(
            "--allow-outside", action="store_true", help="read pictures whose names or links lead out of that folder"
        )
    parser.add_argument("--name", default=name.upper(), help=f"of the new dataset (default: {name.upper()})")
    parser.add_argument("--output", required=True, help="folder for the files")
    parser.add_argument("--max-tokens", type=positive, help="leave out longer conversations; needs --tokenizer")
    parser.add_argument("--tokenizer", metavar="MODEL", help="folder or Hub id of the tokenizer that counts")
    parser.add_argument("--skip-missing", action="store_true", help="leave out conversations without their picture")
    parser.add_argument(
        "--skip-invalid",
        action="store_true",
        help="leave out, and count, what a record cannot keep, such as films, and malformed rows",
    )
    parser.add_argument("--overwrite", action="store_true", help="write again what an earlier run has completed")
    parser.set_defaults(source=name)


def _run_source(args) -> None:
    from ..data import sources

    kind = {"llavar": "llava", "messages": "chats"}.get(args.source, args.source)
    reader = getattr(sources, f"read_{kind}")
    inputs = (args.input, args.images) if args.source in _IMAGE_SOURCES else (args.input,)
    outside = {"allow_outside": args.allow_outside} if args.source in _IMAGE_SOURCES else {}

    def read():
        return reader(*inputs, on_invalid="skip" if args.skip_invalid else "raise", **outside)

    mixture = Path(args.output, f"{args.name}.yaml")  # written last: with it, all is there
    instructions = Path(args.output, f"{args.name}_instructions.json")
    made_from = _made_from(args, read)
    if instructions.exists() and not args.overwrite:
        if changes := made_from.changes(sources.origin_of(instructions)):
            raise ValueError(f"{instructions} is not of what is given now: {changes}; --overwrite writes it again.")
        if _is_whole(mixture):
            print(f"{instructions} is complete; --overwrite writes it again")
            return
    counts = sources.write_conversations(
        args.output,
        args.name,
        read,
        max_tokens=args.max_tokens,
        tokenizer=_tokenizer(args.tokenizer),
        on_error="skip" if args.skip_missing else "raise",
        made_from=made_from.to_json(),
    )
    print(f"{counts.conversations:,} conversations, {counts.records:,} records, {counts.images:,} pictures")
    for reason, count in counts.left_out.items():
        print(f"left out: {count:,} ({reason})")
    for name, count in counts.unused.items():
        print(f"not used: {count:,} ({name})")
    _print_files(counts.files)
    sources.write_mixture(mixture, counts.files)
    print(mixture)


def _is_whole(mixture: Path) -> bool:
    """Whether a training YAML and all that it names are there."""
    from ..data.mixture_yaml import read_mixture

    try:
        return bool(read_mixture(mixture))
    except ValueError:
        return False


def _made_from(args, read):
    """What a conversion is made from: the file, the pictures it names, and all options that change the result."""
    from ..made_from import MadeFrom, state_of_all, state_of_model

    options = {
        "the form": args.source,
        "--max-tokens": args.max_tokens,
        "--tokenizer": args.tokenizer and [args.tokenizer, state_of_model(args.tokenizer)],
        "--skip-missing": args.skip_missing,
        "--skip-invalid": args.skip_invalid,
    }
    made_from = MadeFrom.of([args.input], **options)
    if not getattr(args, "images", None):
        return made_from
    pictures = (file for one in read() for _, file in one.pictures if isinstance(file, Path))
    return MadeFrom({**made_from.files, str(Path(args.images).resolve()): state_of_all(pictures)}, options)


def _print_files(files) -> None:
    print("\n".join(str(path) for path in files if path))
