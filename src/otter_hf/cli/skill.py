"""`otter-hf skill`: worked examples that a model reads once."""

import argparse

from ..model_names import check_model_name
from .chat import add_loading_arguments, loading_options
from .numbers import positive


def add_parser(subparsers) -> None:
    """Add the `skill` subcommand."""
    parser = subparsers.add_parser(
        "skill",
        help="let a model read worked examples once",
        description="Worked examples with pictures, read once and kept in a file, for `otter-hf chat --skill`, "
        "`otter-hf serve --skill` and Python (docs/skills.md).",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    make = commands.add_parser(
        "make",
        help="read examples and write a skill",
        description="Read the examples of a YAML file with a model and write what it made of them.",
    )
    make.add_argument("examples", help="YAML list of {image_path, question, answer}, or {system, examples}")
    make.add_argument("--model", required=True, help="folder or Hub id; the skill is for this model only")
    make.add_argument("--output", required=True, metavar="FILE", help="e.g. counting.safetensors")
    make.add_argument("--num-frames", type=positive, help="read of a film (default: as in training, else 16)")
    add_loading_arguments(make)
    make.set_defaults(func=run_make)
    show = commands.add_parser("show", help="say what a skill holds", description="Say what a skill holds.")
    show.add_argument("skill", help="a file that `otter-hf skill make` wrote")
    show.set_defaults(func=run_show)


def run_make(arguments: argparse.Namespace) -> None:
    """Read the examples and write the file."""
    check_model_name(arguments.model, weights=True)
    # heavy imports wait until the model's name is known to be good
    from ..loading import load, read_num_frames
    from ..models.skills import Skill, check_skill_path, describe_skill
    from ..serving.examples import read_examples
    from ..serving.media import fit_media

    check_skill_path(arguments.output)
    messages = read_examples(arguments.examples, arguments.num_frames or read_num_frames(arguments.model))
    model, processor = load(arguments.model, **loading_options(arguments))
    Skill.compile(model, processor, fit_media(messages, processor)).save(arguments.output)
    told = describe_skill(arguments.output)
    print(f"wrote {arguments.output}: {told['tokens']} tokens and {told['media']} pictures and films are read")


def run_show(arguments: argparse.Namespace) -> None:
    """Print the examples and what the skill was made with."""
    from ..models.skills import describe_skill

    told = describe_skill(arguments.skill)
    for message in told["messages"]:
        parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
        words = " ".join(part.get("text") or f"<{part['type']}>" for part in parts)
        print(f"{message['role']}: {words}")
    print(f"{told['tokens']} tokens, {told['media']} pictures and films")
    print(", ".join(f"{name} {value}" for name, value in told["made_from"].items()))
