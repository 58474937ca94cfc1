"""Checkpoints of 2023 to today's folders, and back."""

import json
import sys
from pathlib import Path

from .. import conversion
from ..model_names import check_model_name
from .chat import add_reference_argument
from .numbers import not_negative, number, positive
from .parsing import Parser


def add_parser(subparsers) -> None:
    """Add the command and its subcommands; each sets `func` to a function of the parsed arguments."""
    parser = subparsers.add_parser("convert", help="convert checkpoints of 2023, and back", description=__doc__)
    commands = parser.add_subparsers(metavar="CONVERSION", required=True)
    for name, add in _COMMANDS.items():
        command = commands.add_parser(name, help=add.__doc__, description=add.__doc__)
        add(command)


def main(name: str) -> int:
    """Run one conversion with the arguments of the process: for the scripts in `conversion/`."""
    add = _COMMANDS[name]
    parser = Parser(description=add.__doc__)
    add(parser)
    args = parser.parse_args()
    try:
        return args.func(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _add_output(parser, run, *, verify: bool = True) -> None:
    parser.add_argument("--output", required=True, help="new or empty folder")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of the result; by default as stored"
    )
    parser.add_argument("--allow", action="store_true", help="convert even if a tensor is unexplained, or not finite")
    parser.add_argument(
        "--max-shard-size", type=number(float, above=0), default=5.0, help="of a weight file, in GB (default: 5)"
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="repository to upload the result to")
    if verify:
        parser.add_argument(
            "--verify",
            action="store_true",
            help="load the result and compare its logits with the sources' (2x memory)",
        )
    parser.set_defaults(func=lambda args: _report(run, args))


# the arguments that name models
_MODELS = ("source", "base", "other", "language_model", "vision_tower", "tokenizer")


def _report(run, args) -> int:
    for name in _MODELS:
        value = getattr(args, name, None)
        if value and not Path(value).exists():
            check_model_name(value, f"--{name.replace('_', '-')}", config=False)
    report = run(args)
    print(report.summary())
    print(f"written to {args.output}")
    return 0


def _options(args) -> dict:
    """What all conversions take; `verify` where there is such an option."""
    verify = {"verify": args.verify} if hasattr(args, "verify") else {}
    size = int(args.max_shard_size * 10**9)
    return {
        "dtype": args.dtype,
        "allow": args.allow,
        "max_shard_size": size,
        "push_to_hub": args.push_to_hub,
        **verify,
    }


def _finish(job, args):
    return conversion.finish(job, args.output, **_options(args))


def _add_tokenizer(parser) -> None:
    parser.add_argument("--tokenizer", help="folder or repository of the tokenizer, where the source has none")
    add_reference_argument(parser)


def _openflamingo(parser) -> None:
    """an OpenFlamingo checkpoint.pt (v1 or v2) with its language model and CLIP -> Flamingo"""
    parser.add_argument("--checkpoint", required=True, help="checkpoint.pt, or a repository with one")
    parser.add_argument("--language-model", required=True, help="folder or repository it was trained on")
    parser.add_argument("--vision-tower", required=True, help="folder or repository of the CLIP, or an open_clip file")
    _add_tokenizer(parser)
    parser.add_argument("--open-clip-head-dim", type=positive, default=64, help="of an open_clip file (default: 64)")
    parser.add_argument(
        "--open-clip-activation", default="quick_gelu", help="for OpenAI's weights quick_gelu, the default, or gelu"
    )
    _add_output(
        parser,
        lambda args: _finish(
            conversion.plan_openflamingo(
                args.checkpoint,
                args.language_model,
                args.vision_tower,
                args.tokenizer,
                args.open_clip_head_dim,
                args.open_clip_activation,
                args.tokenizer_reference,
            ),
            args,
        ),
    )


def _flamingo_to_otter(parser) -> None:
    """a Flamingo folder -> Otter: adds <answer> and a row for it"""
    parser.add_argument("--source", required=True, help="Flamingo folder or repository, of 2023 or of today")
    _add_tokenizer(parser)
    parser.add_argument(
        "--answer-init", default="mean", help="'mean' of all rows (default), or a text whose mean row <answer> gets"
    )
    _add_output(
        parser,
        lambda args: _finish(
            conversion.plan_flamingo_to_otter(args.source, args.tokenizer, args.answer_init, args.tokenizer_reference),
            args,
        ),
    )


def _inject_lm(parser) -> None:
    """a language model and a vision tower -> a Flamingo or Otter to be trained"""
    parser.add_argument("--language-model", required=True, help="folder or repository")
    parser.add_argument("--vision-tower", required=True, help="folder or repository, or an open_clip file")
    _add_tokenizer(parser)
    parser.add_argument("--model-type", choices=("flamingo", "otter"), default="flamingo", help="default: flamingo")
    parser.add_argument("--cross-attn-every-n-layers", type=positive, default=4, help="of gated blocks (default: 4)")
    parser.add_argument("--max-num-frames", type=positive, help="frame embeddings for videos")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the new weights (default: 0)")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="further fields of the configuration, such as perceiver_num_latents=16 cross_attn_gate_init=0.5",
    )
    parser.add_argument(
        "--init-rows",
        nargs="+",
        default=[],
        metavar="TOKEN=TEXT",
        help="start the row of a new token from the mean of a text's, such as '<|endofchunk|>=</s>' (default: of all)",
    )
    parser.add_argument(
        "--resampler-from",
        help="a Flamingo or Otter behind the same tower: start from its trained resampler",
    )
    _add_output(
        parser,
        lambda args: _finish(
            conversion.plan_inject_lm(
                args.language_model,
                args.vision_tower,
                args.tokenizer,
                args.model_type,
                args.cross_attn_every_n_layers,
                args.max_num_frames,
                args.seed,
                args.tokenizer_reference,
                dict(_pairs("--init-rows", args.init_rows)),
                args.resampler_from,
                **{field: _read_value(value) for field, value in _pairs("--set", args.set)},
            ),
            args,
        ),
    )


def _pairs(option: str, given: list[str]) -> list[tuple[str, str]]:
    """What `NAME=VALUE` say."""
    pairs = [pair.partition("=") for pair in given]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise ValueError(f"{option} takes NAME=VALUE, got {name + equals + value!r}.")
    return [(name, value) for name, _, value in pairs]


def _read_value(text: str):
    """A value as in JSON, or a plain word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _trainer_pt(parser) -> None:
    """final_weights.pt or checkpoint_*.pt of the 2023 training scripts, on the model they started from"""
    parser.add_argument("--checkpoint", required=True, help="final_weights.pt or checkpoint_*.pt")
    parser.add_argument("--base", required=True, help="folder or repository of the model that was trained")
    _add_tokenizer(parser)
    _add_output(
        parser,
        lambda args: _finish(
            conversion.plan_trainer_pt(args.checkpoint, args.base, args.tokenizer, args.tokenizer_reference), args
        ),
    )


def _lora(parser) -> None:
    """an Otter folder of 2023 with LoRA factors -> a merged model, or the model and a PEFT adapter"""
    parser.add_argument("--source", required=True, help="folder or repository")
    _add_tokenizer(parser)
    parser.add_argument(
        "--adapter", action="store_true", help="keep the factors apart, as a PEFT adapter in OUTPUT/adapter"
    )

    def run(args):
        if not args.adapter:
            return _finish(conversion.plan_lora(args.source, args.tokenizer, args.tokenizer_reference), args)
        job, adapter, adapter_config = conversion.lora_adapter(args.source, args.tokenizer, args.tokenizer_reference)
        return conversion.finish_with_adapter(job, adapter, adapter_config, args.output, **_options(args))

    _add_output(parser, run)


def _delta(parser) -> None:
    """tuned model minus base (make), or base plus that difference (apply)"""
    parser.add_argument("action", choices=("make", "apply"))
    parser.add_argument("--base", required=True, help="folder or repository of the base model")
    parser.add_argument("--other", required=True, help="the tuned model (make) or the difference (apply)")

    def run(args):
        combine = conversion.make_delta if args.action == "make" else conversion.apply_delta
        return combine(args.base, args.other, args.output, **_options(args))

    _add_output(parser, run, verify=False)


def _dtype(parser) -> None:
    """any Flamingo or Otter folder -> today's names, in another dtype or the same"""
    parser.add_argument("--source", required=True, help="folder or repository, of 2023 or of today")
    _add_tokenizer(parser)
    _add_output(
        parser,
        lambda args: _finish(
            conversion.plan_folder(args.source, args.tokenizer, tokenizer_reference=args.tokenizer_reference), args
        ),
    )


def _export_legacy(parser) -> None:
    """back to the weight names and the configuration that Otter's code of 2023 reads"""
    parser.add_argument("--source", required=True, help="folder or repository")
    _add_tokenizer(parser)
    parser.add_argument("--language-model-name", help="where that code finds the base tokenizer")

    def run(args):
        return conversion.export_legacy(
            args.source,
            args.output,
            tokenizer=args.tokenizer,
            tokenizer_reference=args.tokenizer_reference,
            language_model_name=args.language_model_name,
            **_options(args),
        )

    _add_output(parser, run, verify=False)


def _fuyu_to_otterhd(parser) -> None:
    """Fuyu-8B or OtterHD-8B as published in 2023 -> an OtterHD folder: RoPE base, names, processor stated"""
    parser.add_argument("--source", required=True, help="folder or repository, with its tokenizer")
    _add_output(parser, lambda args: _finish(conversion.plan_fuyu(args.source), args))


_COMMANDS = {
    "openflamingo": _openflamingo,
    "flamingo-to-otter": _flamingo_to_otter,
    "inject-lm": _inject_lm,
    "trainer-pt": _trainer_pt,
    "lora": _lora,
    "delta": _delta,
    "dtype": _dtype,
    "fuyu-to-otterhd": _fuyu_to_otterhd,
    "export-legacy": _export_legacy,
}
