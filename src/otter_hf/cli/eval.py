"""`otter-hf eval`: benchmarks from a YAML file."""

import argparse
from pathlib import Path

from ..model_names import check_model_name
from .numbers import positive


def add_parser(subparsers):
    """Add the `eval` subcommand."""
    parser = subparsers.add_parser(
        "eval",
        help="run benchmarks",
        description="Evaluate models on benchmarks as a YAML file says (docs/evaluation.md); that of the 2023 code "
        "works as it is. Keys are read from the environment: OPENAI_API_KEY, OPENAI_BASE_URL.",
    )
    parser.add_argument("config", type=Path, nargs="?", help="YAML with models, datasets, output")
    parser.add_argument("--config", "-c", type=Path, dest="config_of_2023", help="the same, as the 2023 code had it")
    parser.add_argument("--output", type=Path, default=None, help="folder for the results, over that of the file")
    parser.add_argument("--limit", type=positive, default=None, help="rows per dataset, over those of the file")
    parser.add_argument(
        "--training-data",
        metavar="MIXTURE",
        default=None,
        help="training YAML, or rows of messages: first list the pictures and questions that the model was trained on",
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="ask everything with the picture of another row and with a blank one, too: what the right one is worth",
    )
    parser.add_argument("--verbose", action="store_true", help="show what lmms-eval has to say")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate and print the table."""
    from ..evaluation.config import load_config

    given = [path for path in (arguments.config, arguments.config_of_2023) if path is not None]
    if len(given) != 1:
        raise ValueError(f"otter-hf eval needs one configuration: a YAML file (docs/evaluation.md); got {len(given)}.")
    config = load_config(given[0])
    for spec in config.models:
        if spec.path is not None:
            check_model_name(spec.path, weights=True)
    if arguments.output is not None:
        config.output = arguments.output
    if arguments.training_data is not None:
        config.training_data = arguments.training_data
    if arguments.limit is not None:
        for dataset in config.datasets:
            dataset.limit = arguments.limit
            if dataset.fewshot is not None:
                dataset.fewshot["num_samples"] = arguments.limit
    config.controls |= arguments.controls
    if not arguments.verbose:
        quiet_lmms_eval()
    # heavy imports wait until the file is known to be good
    from accelerate import PartialState

    from ..evaluation.report import table
    from ..evaluation.run import evaluate

    results = evaluate(config)
    if PartialState().is_main_process:
        print(table(results), end="")
        print(f"results: {config.output / 'results.json'}")


def quiet_lmms_eval() -> None:
    """lmms-eval logs every step to the terminal; leave its warnings."""
    import sys

    try:
        from loguru import logger
    except ImportError:  # `evaluate` will say what to install
        return
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
