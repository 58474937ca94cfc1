"""`otter-hf chat`: ask a model about pictures and videos in the terminal."""

import argparse

from ..model_names import check_model_name
from .chat_commands import HELP
from .numbers import not_negative, number, positive


def add_parser(subparsers):
    """Add the `chat` subcommand."""
    parser = subparsers.add_parser(
        "chat",
        help="ask a model about pictures",
        description="Chat with an image-text-to-text model, streaming its answers. Without --prompt it asks you, and "
        f"takes {HELP}.",
    )
    parser.add_argument("model", help="folder or Hub id, e.g. out/demo/model; a revision may follow an @")
    add_loading_arguments(parser)
    media = parser.add_argument_group("the first message")
    media.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="a picture, or its URL; repeat it for more"
    )
    media.add_argument("--video", action="append", default=[], metavar="PATH", help="a video, or its URL")
    media.add_argument(
        "--num-frames", type=positive, help="evenly spaced frames read of a video (default: as in training, else 16)"
    )
    media.add_argument(
        "--example",
        action="append",
        nargs=3,
        default=[],
        metavar=("IMAGE", "QUESTION", "ANSWER"),
        help="a worked example in front of the conversation; repeat it for more",
    )
    media.add_argument(
        "--skill", metavar="FILE", help="worked examples that `otter-hf skill make` wrote, in front of all of it"
    )
    media.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="ask this and end; repeat it for several turns. With an <image> for each picture these stand there, else "
        "in front",
    )
    media.add_argument(
        "--controls",
        action="store_true",
        help="say after each answer what it would be with a blank picture and with another: did it look?",
    )
    batch = parser.add_argument_group("many questions")
    batch.add_argument(
        "--yaml-file",
        metavar="PATH",
        help="answer a YAML list of {image_path, question} and write the answers as JSON",
    )
    batch.add_argument("--output-dir", default="logs", help="where inference_log_TIME.json goes (default: logs)")
    batch.add_argument(
        "--batch-size", type=positive, default=8, help="questions of the list that are answered at a time (default: 8)"
    )
    generation = parser.add_argument_group("answers")
    generation.add_argument("--max-new-tokens", type=positive, default=256, help="longest answer (default: 256)")
    generation.add_argument(
        "--temperature", type=number(float, least=0), default=0.0, help="0, the default, decodes greedily"
    )
    generation.add_argument(
        "--top-p", type=number(float, least=0, most=1), help="with a temperature: likeliest tokens of this probability"
    )
    generation.add_argument("--top-k", type=not_negative, help="with a temperature: this many likeliest tokens")
    generation.add_argument(
        "--num-beams", type=positive, default=1, help="more than 1 prints answers when they are whole (default: 1)"
    )
    generation.add_argument("--no-repeat-ngram-size", type=not_negative, help="so many tokens in a row come once only")
    generation.add_argument("--length-penalty", type=number(float), help="of beams: above 0 for longer answers")
    generation.add_argument(
        "--repetition-penalty", type=number(float, above=0), help="above 1 against repeated tokens"
    )
    generation.add_argument("--stop", action="append", metavar="TEXT", help="an answer ends before it; repeatable")
    generation.add_argument("--seed", type=not_negative, help="for sampling")
    parser.set_defaults(func=run)


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """How `otter_hf.loading` loads a model."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights (default: as they are stored)",
    )
    parser.add_argument(
        "--device-map",
        "--device",
        metavar="DEVICE",
        help="a device such as cuda or cpu, or auto to spread over several; by default the accelerator, if any",
    )
    parser.add_argument(
        "--attn-implementation",
        metavar="NAME",
        help="eager, sdpa, flash_attention_2, ..., or by part: text_config=sdpa,vision_config=eager",
    )
    parser.add_argument("--load-in-4bit", action="store_true", help="quantise with bitsandbytes")
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="folder or Hub id of the tokenizer, for a repository of 2023 without one"
    )
    add_reference_argument(parser)
    parser.add_argument("--chat-template", metavar="NAME", help="a Jinja file, or an instruction format by name")


def add_reference_argument(parser: argparse.ArgumentParser) -> None:
    """Which reading of a LLaMA tokenizer of 2023, see `otter_hf.models.legacy_tokens`."""
    parser.add_argument(
        "--tokenizer-reference",
        metavar="VERSION",
        help="for a LLaMA tokenizer of 2023: give the ids of transformers 4.28 (default), with which Otter was "
        "trained, or of 4.35",
    )


def loading_options(arguments: argparse.Namespace) -> dict:
    """The keyword arguments of `otter_hf.loading.load` among the parsed ones."""
    names = ("dtype", "device_map", "attn_implementation", "load_in_4bit")
    names += ("tokenizer", "tokenizer_reference", "chat_template")
    return {name: getattr(arguments, name) for name in names}


def generation_options(arguments: argparse.Namespace) -> dict:
    """The keyword arguments of `generate` among the parsed ones; what was not said is left to the model."""
    options = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.temperature > 0}
    if options["do_sample"]:
        options |= {"temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": arguments.top_k}
    for name in ("num_beams", "no_repeat_ngram_size", "length_penalty", "repetition_penalty"):
        options[name] = getattr(arguments, name)
    options["stop_strings"] = arguments.stop
    return {name: value for name, value in options.items() if value is not None}


def run(arguments: argparse.Namespace) -> None:
    """Load the model and talk until the prompts, or the user's patience, end."""
    for option, value in (("--top-p", arguments.top_p), ("--top-k", arguments.top_k)):
        if value is not None and arguments.temperature == 0:
            raise ValueError(f"{option} {value} is for sampling: give a --temperature above 0, or leave it out.")
    if arguments.stop is not None and "" in arguments.stop:
        raise ValueError("--stop '' is no text, and every answer would end before it: leave it out.")
    if arguments.yaml_file is not None:
        # the list has pictures and questions of its own, and no answers to compare
        for name in ("image", "video", "prompt", "example", "controls"):
            if getattr(arguments, name):
                raise ValueError(f"--{name} belongs to a conversation, and --yaml-file was given: leave one out.")
    check_model_name(arguments.model, weights=True)
    # heavy imports wait until someone chats
    import torch

    from ..loading import load, read_num_frames
    from ..models.skills import Skill, describe_skill
    from ..serving.batch import read_questions
    from ..serving.session import ChatSession
    from .chat_commands import media_parts
    from .chat_terminal import Chat

    arguments.num_frames = arguments.num_frames or read_num_frames(arguments.model)
    # opened before the model loads: a mistyped path should not cost a minute
    entries = read_questions(arguments.yaml_file) if arguments.yaml_file else None
    media = media_parts(arguments.image, arguments.video, arguments.num_frames)
    examples = [(media_parts([path]), question, answer) for path, question, answer in arguments.example]
    if arguments.skill is not None:
        describe_skill(arguments.skill)
    model, processor = load(arguments.model, **loading_options(arguments))
    skill = None if arguments.skill is None else Skill.load(arguments.skill, model, processor)
    session = ChatSession(model, processor, skill=skill)
    options = generation_options(arguments)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)

    if entries is not None:
        answer_list(arguments, model, processor, entries, options, () if skill is None else skill.messages)
        return
    for pictures, question, answer in examples:
        session.add_example(question, answer, pictures)
    chat = Chat(session, media, options, arguments.num_frames, arguments.controls)
    for prompt in arguments.prompt:
        print(f"> {prompt}")
        chat.ask(prompt)
    if not arguments.prompt:
        chat.interact(arguments.model)


def answer_list(
    arguments: argparse.Namespace, model, processor, entries: list[dict], options: dict, examples: list[dict] = ()
) -> None:
    """The answers to a YAML list; those that were there when a run was interrupted are not asked for again."""
    from ..evaluation.model import ConversationModel
    from ..made_from import state, state_of_model
    from ..serving.batch import answer_questions, kept_replies, write_log

    asked = ConversationModel.of(arguments.model, model, processor)
    until = options.pop("stop_strings", ())
    context = [arguments.model, state_of_model(arguments.model), loading_options(arguments), options, until]
    if arguments.skill is not None:
        context.append(state(arguments.skill))
    with kept_replies(arguments.output_dir, [*context, arguments.seed, arguments.num_frames]) as replies:
        answered = answer_questions(
            asked,
            entries,
            arguments.num_frames,
            arguments.batch_size,
            replies=replies,
            until=until,
            examples=examples,
            seed=arguments.seed,
            **options,
        )
        path = write_log(arguments.output_dir, model.config.model_type, arguments.model, answered, print_answer)
    print(f"wrote {path}")


def print_answer(entry: dict, answer: str) -> None:
    """One entry of a batch, as it is answered."""
    print(f"> {entry['question']}\n{answer}")
