"""Instructions and answers about pictures, written by a language model from annotations."""

import json
import sys

from .engine_options import add_engine_options, engine_of, tell_submitted
from .numbers import not_negative, number, positive
from .parsing import add_command


def add_parser(subparsers) -> None:
    """Add the command and its subcommands; each sets `func` to a function of the parsed arguments."""
    parser = subparsers.add_parser("syphus", help="let a language model write instructions", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _run(commands)
    _resume(commands)
    _build(commands)
    _cold_start(commands)


def _asking_arguments(parser) -> None:
    parser.add_argument("--base-url", help="of the endpoint (default: that of the run, OPENAI_BASE_URL, or OpenAI's)")
    parser.add_argument("--concurrency", type=positive, help="requests at a time (default: 8)")
    parser.add_argument("--timeout", type=number(float, above=0), help="seconds for an answer (default: 120)")
    parser.add_argument("--max-attempts", type=positive, help="attempts per query (default: 6)")
    parser.add_argument(
        "--first-pause", type=number(float, least=0), help="seconds before the second one (default: 1); then doubled"
    )
    parser.add_argument("--max-requests", type=not_negative, help="budget: requests, failed ones included")
    parser.add_argument("--max-tokens", type=not_negative, help="budget: tokens of prompts and replies")
    parser.add_argument("--max-cost", type=number(float, least=0), help="budget: money; needs the prices")
    parser.add_argument(
        "--prompt-price", type=number(float, least=0), default=0, help="of a million tokens of prompts"
    )
    parser.add_argument(
        "--completion-price", type=number(float, least=0), default=0, help="of a million tokens of replies"
    )


def _offline_arguments(parser) -> None:
    parser.add_argument("--batch-files", action="store_true", help="write files for a batch API, do not ask")
    parser.add_argument(
        "--batch-command",
        nargs="?",
        const="",
        metavar="COMMAND",
        help="write them, have this command answer each, and take up the results; {input}, {output} and {model} stand "
        "for the files and the model (without COMMAND: vllm run-batch)",
    )
    parser.add_argument("--batch-requests", type=positive, metavar="N", help="in a batch file (default: 50000)")
    add_engine_options(parser)


def _run(commands) -> None:
    parser = add_command(
        commands, "run", run_new, "ask a language model about annotations, with OPENAI_API_KEY if set"
    )
    parser.add_argument("dataset", metavar="NAME", help="kind of annotations, such as video.DenseCaptions")
    parser.add_argument("--annotations", required=True, metavar="PATH", help="the annotations")
    parser.add_argument("--model", required=True, help="name of the model at the endpoint")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder of the run")
    parser.add_argument("--prompt", metavar="PATH", help="prompt file (default: that of the package)")
    parser.add_argument("--no-in-context", action="store_true", help="the system message alone, for a cold start")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=JSON",
        help="option of the requests, such as temperature=0; null leaves out a default; repeat it",
    )
    parser.add_argument("--slice-start", type=not_negative, default=0, help="first query (default: 0)")
    parser.add_argument("--slice-end", type=not_negative, help="query to stop in front of (default: none)")
    parser.add_argument("--shard", default="0/1", metavar="K/N", help="of these, part K of N, counted from 0")
    parser.add_argument("--random-sample", type=int, metavar="SEED", help="shuffle the queries before slicing")
    _offline_arguments(parser)
    parser.add_argument(
        "--with-pictures", nargs="+", metavar="PATH", help="show the pictures of these image stores too"
    )
    parser.add_argument("--image-prefix", help="what image ids begin with (default: such as DC_IMG_)")
    parser.add_argument("--max-pictures", type=positive, help="of a query, at even distances (default: 8)")
    parser.add_argument("--picture-size", type=positive, help="longer side in pixels, at most (default: 512)")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="ask each pair again, without and with its pictures, within the same budget; needs --with-pictures",
    )
    _asking_arguments(parser)


def run_new(args) -> int:
    """Make a run, and ask or write batch files; status 1 if something is left to do."""
    from ..production.syphus import SyphusRun, find_dataset, load_prompt
    from ..production.syphus.prompts import without_examples

    budget = _budget(args)
    _check_offline(args)
    prompt = load_prompt(args.prompt or find_dataset(args.dataset).prompt)
    run = SyphusRun.create(
        args.output,
        args.dataset,
        args.annotations,
        args.model,
        prompt=without_examples(prompt) if args.no_in_context else prompt,
        base_url=args.base_url,
        options=_options(args.option),
        start=args.slice_start,
        end=args.slice_end,
        shard=_shard(args.shard),
        shuffle_seed=args.random_sample,
        pictures=_picture_options(args),
        verify=args.verify,
    )
    return _go_on(run, args, budget, False)


def _picture_options(args):
    from ..production.syphus import PictureOptions

    options = {"prefix": args.image_prefix, "max_pictures": args.max_pictures, "size": args.picture_size}
    given = {name: value for name, value in options.items() if value is not None}
    if not args.with_pictures:
        if given or args.verify:
            raise ValueError("--verify, --image-prefix, --max-pictures and --picture-size need --with-pictures.")
        return None
    return PictureOptions(args.with_pictures, **given)


def _resume(commands) -> None:
    parser = add_command(commands, "resume", run_resume, "go on with a run, or take up the results of a batch")
    parser.add_argument("run", metavar="FOLDER", help="folder of the run")
    parser.add_argument("--retry-failed", action="store_true", help="also ask what was given up, or is in a batch")
    _offline_arguments(parser)
    parser.add_argument("--batch-results", nargs="+", metavar="PATH", help="results and errors of batches; do not ask")
    parser.add_argument(
        "--keep-queries", action="store_true", help="go on though the annotations or pictures have changed since"
    )
    _asking_arguments(parser)


def run_resume(args) -> int:
    """Go on with a run; status 1 if something is left to do."""
    from ..production.syphus import SyphusRun
    from ..production.syphus.batch import read_batch_results

    run, budget = SyphusRun(args.run), _budget(args)
    _check_offline(args)
    if not args.keep_queries and (changes := run.changes()):
        raise ValueError(
            f"{changes}, and the queries of {run.folder} are those of then: make a new run in another folder, or go "
            "on with these (--keep-queries)."
        )
    if args.batch_results:
        summary, new = read_batch_results(run, args.batch_results, budget)
        print(f"{new:,} new results")
        return _print_summary(summary)
    return _go_on(run, args, budget, args.retry_failed)


_OF_TRANSLATIONS = ("instructions", "train_config", "languages")


def _build(commands) -> None:
    parser = add_command(commands, "build", run_build, "replies of runs to a MIMIC-IT dataset")
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="folders of runs, such as all shards")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder for the dataset")
    parser.add_argument("--name", help="of the dataset (default: that of the kind, such as DC)")
    parser.add_argument("--images", nargs="+", default=[], metavar="PATH", help="image stores")
    parser.add_argument("--image-prefix", help="what image ids begin with (default: such as DC_IMG_)")
    parser.add_argument("--max-words", type=positive, default=300, help="longest question or answer (default: 300)")
    parser.add_argument(
        "--forbid", action="append", metavar="REGEX", help="in place of the forbidden words; repeat it"
    )
    parser.add_argument("--keep-repeated", action="store_true", help="keep pairs that are the same")
    parser.add_argument(
        "--agreement", type=number(float, least=0, most=1), help="of verified answers: share of words (default: 0.5)"
    )
    parser.add_argument("--instructions", metavar="PATH", help="original of a translation (default: the annotations)")
    parser.add_argument("--train-config", metavar="PATH", help="train config of the original of a translation")
    parser.add_argument("--languages", nargs="+", help="of a translation (default: zh es ja de fr ko ar)")
    parser.add_argument("--cache-dir", help="where index files are kept (default: the cache of datasets)")


def run_build(args) -> None:
    """Build the dataset of runs, or the translations."""
    from ..production.syphus import LANGUAGES, FilterRules, SyphusRun, build_dataset, build_translations
    from ..production.syphus.filters import FORBIDDEN

    runs = [SyphusRun(folder) for folder in args.runs]
    for run in runs:
        if changes := run.changes():
            print(f"{changes}: what {run.folder} holds was asked before", file=sys.stderr)
    are_translations = runs[0].dataset.parse is None
    others = ("image_prefix", "forbid", "keep_repeated", "agreement") if are_translations else _OF_TRANSLATIONS
    for name in others:
        if getattr(args, name):
            option, kind = name.replace("_", "-"), runs[0].settings["dataset"]
            raise ValueError(f"--{option} means nothing for runs of {kind}: leave it out.")
    if are_translations:
        report = build_translations(
            runs,
            args.instructions or runs[0].settings["annotations"],
            args.output,
            args.name or runs[0].dataset.short_name,
            args.images,
            train_config_path=args.train_config,
            languages=args.languages or tuple(LANGUAGES),
            cache_dir=args.cache_dir,
        )
        for language, files in report.files.items():
            left_out = sum(report.left_out[language].values())
            print(f"{language}: {report.records[language]:,} records, {left_out:,} left out, {files[0]}")
        return
    rules = FilterRules(args.max_words, tuple(args.forbid or FORBIDDEN), not args.keep_repeated)
    report = build_dataset(
        runs,
        args.output,
        args.name,
        args.images,
        rules=rules,
        image_prefix=args.image_prefix,
        cache_dir=args.cache_dir,
        **({} if args.agreement is None else {"agreement": args.agreement}),
    )
    print(f"{report.records:,} records of {report.replies:,} replies to {report.queries:,} queries")
    for reason, count in report.left_out.items():
        print(f"left out: {count:,} ({reason})")
    print("\n".join(str(path) for path in (*report.files, report.invalid_path) if path))


def _cold_start(commands) -> None:
    parser = add_command(commands, "cold-start", run_cold_start, "replies of a short run to a draft of a prompt file")
    parser.add_argument("run", metavar="FOLDER", help="folder of a run with --no-in-context")
    parser.add_argument("--output", required=True, metavar="PATH", help="the new prompt file, to be corrected by hand")


def run_cold_start(args) -> None:
    """Write the draft."""
    from ..production.syphus import SyphusRun
    from ..production.syphus.cold_start import write_draft_prompt

    count = write_draft_prompt(SyphusRun(args.run), args.output)
    print(f"{count} examples in {args.output}: keep the good ones, correct them, and use it with --prompt")


_HOW = ("concurrency", "max_attempts", "first_pause")
_OF_ENDPOINTS = (*_HOW, "timeout", "max_requests", "max_tokens", "max_cost")


def _check_offline(args) -> None:
    """`ValueError` for options that do not go together."""
    from ..data.engine import Engine

    results = bool(getattr(args, "batch_results", None))
    given = {
        "--batch-files": args.batch_files,
        "--batch-command": args.batch_command is not None,
        "--batch-results": results,
    }
    ways = [name for name, is_given in given.items() if is_given]
    if len(ways) > 1:
        raise ValueError(f"{' and '.join(ways)} are two ways to go on: choose one.")
    if engine_of(args) != Engine() and not given["--batch-command"]:
        raise ValueError("--executor, --workers and what belongs to them are for --batch-command.")
    if args.batch_requests and ways not in (["--batch-files"], ["--batch-command"]):
        raise ValueError("--batch-requests is for --batch-files and --batch-command.")
    # a new run keeps its address for later
    of_endpoints = (*_OF_ENDPOINTS, *(("base_url",) if "batch_results" in args else ()))
    useless = [name.replace("_", "-") for name in of_endpoints if getattr(args, name) is not None]
    if useless and ways:
        raise ValueError(f"--{useless[0]} is for requests to an endpoint, and {ways[0]} makes none: leave it out.")
    if results and args.retry_failed:
        raise ValueError("--batch-results asks nothing: retry what failed with --retry-failed behind it, by itself.")
    if args.batch_files and (args.prompt_price or args.completion_price):
        raise ValueError("Prices are of replies, and --batch-files has none: give them with --batch-results.")


def _go_on(run, args, budget, retry_failed: bool) -> int:
    """Write batch files, or ask, or have a command answer; status 1 if something is left to do."""
    if args.batch_files:
        return _write_batches(run, args, retry_failed)
    ask = _asking(run, args, retry_failed) if args.batch_command is None else _offline(args, retry_failed)
    return _ask(run, ask, budget)


def _asking(run, args, retry_failed: bool):
    """What asks the endpoint all queries of a run within a budget."""
    try:
        client = run.client(args.base_url, **_given(args, "timeout"))
    except ImportError as error:
        raise ValueError(error) from None
    how = _given(args, *_HOW)
    return lambda one, budget: one.ask(client, budget, retry_failed=retry_failed, **how)


def _given(args, *names: str) -> dict:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _offline(args, retry_failed: bool):
    """What has a command answer all queries of a run."""
    from ..production.syphus.batch import MAX_REQUESTS
    from ..production.syphus.offline import VLLM, answer_offline

    how = {
        "engine": engine_of(args),
        "max_requests": args.batch_requests or MAX_REQUESTS,
        "retry_failed": retry_failed,
    }
    return lambda one, budget: answer_offline(one, args.batch_command or VLLM, budget=budget, **how)


def _ask(run, ask, budget) -> int:
    from ..production.syphus import make_verification, verifications

    summary = ask(run, budget)
    if summary is None:
        tell_submitted("`otter-hf syphus resume` with these options")
        return 0
    status = _print_summary(summary)
    if not run.settings.get("verify"):
        return status
    if summary.pending or summary.in_batch:
        print("pairs are verified when all queries are answered: go on with `otter-hf syphus resume`")
        return status
    make_verification(run)
    budget = budget.behind(summary)
    for verification in verifications(run):
        summary = ask(verification, budget)
        if summary is None:
            tell_submitted("`otter-hf syphus resume` with these options")
            return status
        budget = budget.behind(summary)
        print(f"verification {verification.folder.name}:")
        status = max(status, _print_summary(summary))
    return status


def _write_batches(run, args, retry_failed: bool) -> int:
    from ..production.syphus.batch import MAX_REQUESTS, write_batch_files

    paths = write_batch_files(run, max_requests=args.batch_requests or MAX_REQUESTS, retry_failed=retry_failed)
    print("\n".join(map(str, paths)) or "every query has its reply, or is in a batch file")
    return 0


def _print_summary(summary) -> int:
    print(
        f"{summary.replies:,} of {summary.queries:,} queries answered, {summary.failed:,} failed, "
        f"{summary.in_batch:,} in a batch, {summary.pending:,} to ask"
    )
    print(
        f"{summary.requests:,} requests, {summary.errors:,} errors, {summary.lost:,} lost; tokens: "
        f"{summary.prompt_tokens:,} of prompts, {summary.completion_tokens:,} of replies; cost: {summary.cost:.4f}"
    )
    for reason, count in summary.reasons.items():
        print(f"failed: {count:,} ({reason})")
    if summary.stopped:
        print(f"stopped: {summary.stopped}")
    return 1 if summary.pending or summary.failed else 0


def _budget(args):
    from ..production.syphus import Budget

    return Budget(args.max_requests, args.max_tokens, args.max_cost, args.prompt_price, args.completion_price)


def _options(settings: list[str]) -> dict:
    options = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        try:
            if not separator:
                raise ValueError
            options[key] = json.loads(value)
        except ValueError:
            raise ValueError(f"--option must be KEY=JSON, such as temperature=0, got {setting!r}.") from None
    return options


def _shard(text: str) -> tuple[int, int]:
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal()):
        raise ValueError(f"--shard must be K/N, such as 0/8, got {text!r}.")
    return int(number), int(total)
