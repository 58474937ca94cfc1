"""`otter-hf memory`: what a model takes, from its configuration alone."""

import json
from pathlib import Path

from ..model_names import check_model_name


def add_parser(subparsers) -> None:
    """Add the command; it sets `func` to a function of the parsed arguments."""
    parser = subparsers.add_parser(
        "memory", help="memory of a model by dtype", description="Memory of a model by dtype, from its config.json."
    )
    parser.add_argument("config", help="config.json, or a folder or Hub repository with one")
    parser.add_argument("--json", action="store_true", help="numbers for programs: bytes")
    parser.set_defaults(func=run)


def run(args) -> int:
    """Print the table."""
    if not Path(args.config).is_file():
        check_model_name(args.config)
    from ..conversion.memory import estimate_memory, load_model_config, memory_table

    config = load_model_config(args.config)
    print(json.dumps(estimate_memory(config)) if args.json else memory_table(config))
    return 0
