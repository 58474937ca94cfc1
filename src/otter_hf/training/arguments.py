"""Arguments of fine-tuning: three dataclasses for `HfArgumentParser`, from a YAML file, from flags, or both."""

import difflib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import transformers
import yaml
from transformers import HfArgumentParser
from transformers.integrations import get_reporting_integration_callbacks

from ..data.prompts import FORMATS, get_format
from .freezing import PARAMETER_GROUPS, PARTS
from .upstream import Option, translate


logger = logging.getLogger(__name__)

# behind the name of a part in lora_target_modules
ALL_LINEAR = ":all-linear"
# what an evaluation gives
METRICS = ("loss", "answer_accuracy", "runtime", "samples_per_second", "steps_per_second")


@dataclass
class ModelArguments:
    """Which model to train, and which parts of it."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of the model and its processor."})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the tokenizer, for a repository of 2023 without one."},
    )
    tokenizer_reference: str | None = field(
        default=None,
        metadata={
            "help": "A LLaMA tokenizer of 2023 gives the ids of transformers 4.28, with which Otter was trained, or "
            "4.35. By default as it was saved, else 4.28; Idefics: 4.35."
        },
    )
    freeze: list[str] = field(
        default_factory=list, metadata={"help": f"Groups not to train, of {', '.join(PARAMETER_GROUPS)}."}
    )
    train_embedding_rows: list[str] = field(
        default_factory=list,
        metadata={"help": "Tokens whose rows of the embeddings are trained, the others stay: 2023 trained <answer>."},
    )
    cache_vision_features: str | None = field(
        default=None,
        metadata={"help": "Folder to keep what a frozen vision tower makes of each picture, and to read it from."},
    )
    dtype: str = field(
        default="auto", metadata={"help": "Precision of the weights: auto, float32, bfloat16, float16."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2 or flex_attention; default: transformers'."}
    )
    lora: bool = field(
        default=False, metadata={"help": "Train low-rank updates of lora_target_modules only, and save them alone."}
    )
    lora_r: int = field(default=64, metadata={"help": "Rank of the updates."})
    lora_alpha: int = field(default=32, metadata={"help": "Updates are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the updates."})
    lora_target_modules: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Names of linear layers of the decoder, without its gated blocks: MPT Wqkv out_proj up_proj "
            "down_proj; OtterHD query_key_value dense dense_h_to_4h dense_4h_to_h; LLaMA q_proj v_proj ...; or all of "
            f"a part: {', '.join(f'{part}:all-linear' for part in PARTS)}."
        },
    )
    lora_train_groups: list[str] = field(
        default_factory=list,
        metadata={"help": "Groups trained and saved whole beside the updates: perceiver, cross_attention."},
    )
    lora_dora: bool = field(default=False, metadata={"help": "DoRA: updates of direction and length of the weights."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "With lora: keep the decoder's weights in 4 bits (QLoRA; bitsandbytes)."}
    )

    def __post_init__(self):
        name = self.model_name_or_path
        if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
            raise ValueError(f"model_name_or_path: {name!r} is neither a folder here nor a Hub id (owner/name).")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}.")
        for group in self.freeze:
            if group not in PARAMETER_GROUPS:
                raise ValueError(f"freeze: {group!r} is no group, use some of {', '.join(PARAMETER_GROUPS)}.")
        if self.lora and not self.lora_target_modules:
            raise ValueError("lora needs lora_target_modules: name the linear layers to update, e.g. q_proj v_proj.")
        for name in self.lora_target_modules:
            if name.endswith("all-linear") and name.removesuffix(ALL_LINEAR) not in PARTS:
                known = ", ".join(f"{part}{ALL_LINEAR}" for part in PARTS)
                raise ValueError(f"lora_target_modules: {name!r} names no part, use some of {known}.")
        if self.lora and self.freeze:
            raise ValueError(f"freeze={self.freeze} and lora cannot be combined: lora freezes the whole model.")
        for name in ("load_in_4bit", "lora_dora", "lora_train_groups", "lora_target_modules"):
            if getattr(self, name) and not self.lora:
                raise ValueError(f"{name} needs lora: set lora to true, or leave {name} out.")
        for group in self.lora_train_groups:
            if group not in ("perceiver", "cross_attention"):
                raise ValueError(f"lora_train_groups: {group!r} is none of perceiver, cross_attention.")
        if self.train_embedding_rows and "embeddings" in self.freeze:
            raise ValueError("train_embedding_rows trains rows of the embeddings: take embeddings out of freeze.")


@dataclass
class DataArguments:
    """What to train on: training YAMLs (see `otter_hf.data.read_mixture`) and how their records become tokens."""

    train_mixture: str = field(metadata={"help": "Training YAML: groups and datasets to train on."})
    eval_mixture: str | None = field(default=None, metadata={"help": "YAML of the same form, to evaluate on."})
    eval_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Without eval_mixture: share of the samples to evaluate on, by their ids; never trained on."
        },
    )
    instruction_format: str | None = field(
        default=None,
        metadata={
            "help": f"How prompts are written: {', '.join(FORMATS)}. By default that of the model's family: fuyu for "
            "OtterHD, idefics for Idefics, otherwise simple."
        },
    )
    max_length: int = field(default=2048, metadata={"help": "Tokens of a sample, with BOS and EOS."})
    packing: bool | None = field(
        default=None,
        metadata={
            "help": "Put the samples of a batch one behind the other in one row; False pads them. By default True, "
            "but for Idefics and OPT, which cannot be packed."
        },
    )
    on_overlong: str = field(
        default="truncate", metadata={"help": "A last turn that is too long: error, truncate or skip."}
    )
    on_error: str = field(default="raise", metadata={"help": "A sample that cannot be used: raise or skip."})
    populate_rel_ins: bool = field(
        default=False, metadata={"help": "Without a train config, take context from rel_ins_ids."}
    )
    max_context: int | None = field(default=None, metadata={"help": "Context turns or examples kept, the latest."})
    num_frames: int = field(default=32, metadata={"help": "Frames that a video is resampled to."})
    legacy_pictures: bool = field(
        default=False,
        metadata={"help": "Read pictures as the original did: photographs not turned, transparency dropped."},
    )
    keep_symbols: bool = field(default=True, metadata={"help": "False deletes most punctuation, as the original did."})
    use_task_description: bool = field(
        default=False, metadata={"help": "Put one of the dataset's task descriptions in front of each prompt."}
    )
    remove_answer_token: bool = field(
        default=False, metadata={"help": "Otter: delete <answer> from the tokens, and from the saved chat template."}
    )
    remove_end_of_turn_token: bool = field(
        default=False,
        metadata={"help": "Otter: delete <|endofchunk|> likewise; the model learns to stop at EOS alone."},
    )
    resolution: int | None = field(
        default=None, metadata={"help": "OtterHD: pixels of the shorter side that every image is resized to."}
    )
    dynamic_resolution: list[int] = field(
        default_factory=list,
        metadata={"help": "OtterHD: sides of squares in pixels, one drawn for each sample; 2023: 448 512 768."},
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "OtterHD: images with more pixels than this are shrunk."}
    )

    def __post_init__(self):
        if self.instruction_format is not None:
            get_format(self.instruction_format)
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be at least 0 and less than 1, got {self.eval_fraction}.")
        if self.eval_fraction and self.eval_mixture is not None:
            raise ValueError("eval_mixture and eval_fraction both say what to evaluate on: leave one out.")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Those of transformers, with defaults that fit samples of text and images."""

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the collator, not the model, takes the samples' columns."}
    )
    # the Trainer writes this into the configuration that is saved with the model, which would generate without a cache
    use_cache: bool = field(
        default=True, metadata={"help": "For the saved model: generate with a cache. A loss never needs one."}
    )
    dataloader_num_workers: int = field(default=2, metadata={"help": "Processes that load and transform images."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two values of the loss curve."})
    peak_flops: float | None = field(
        default=None,
        metadata={
            "help": "Operations per second of one device, of which `mfu` in the logs is the share that was used. By "
            "default a matrix multiplication is measured at the start; 0 leaves `mfu` out."
        },
    )
    report_samples: int = field(
        default=3,
        metadata={"help": "Evaluation samples that are answered at each evaluation, in training_report.html."},
    )
    trainable_only: bool = field(
        default=False,
        metadata={"help": "Save the trained weights alone; `otter_hf.training.load_trainable` adds the frozen ones."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "auto: the last checkpoint of output_dir, or a fresh start without one; or a checkpoint."},
    )
    learning_rates: str | None = field(
        default=None,
        metadata={
            "help": "Rates of parts, others have learning_rate: resampler=1e-4,language=1e-5, or a mapping; parts: "
            f"{', '.join(PARAMETER_GROUPS)}; resampler is perceiver."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations in a row without a better metric_for_best_model (or loss)."},
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "What counts as better: by more than this."}
    )
    dry_run: bool = field(
        default=False, metadata={"aliases": ["--plan"], "help": "Print the plan of the training and stop."}
    )

    # the Trainer would wait for the device in every step to keep a loss out of its logs that `OtterTrainer` refuses
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave losses that are not finite out of the logs; they end the training."}
    )

    def __post_init__(self):
        if self.accelerator_config is None and self.dataloader_pin_memory:
            self.accelerator_config = {"non_blocking": True}  # batches come while the device computes
        if self.early_stopping_patience is not None and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        super().__post_init__()
        self.learning_rates = read_rates(self.learning_rates)
        self._check_early_stopping()
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started > 1 and self.world_size == 1:
            raise ValueError(
                f"{started} processes were started, but each would train by itself, on the same samples and into the "
                "same folder: set use_cpu to true to train on a CPU with torchrun, or start one process."
            )
        self._check_metric()
        self._check_trackers()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay False: the collator takes the samples' columns.")
        # the Trainer would compare each label with the token it is the label of, not with the next one
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, which transformers' Trainer applies to "
                "unshifted labels for image-text models: leave it at 0."
            )

    def _check_early_stopping(self):
        patience = self.early_stopping_patience
        if patience is None and self.early_stopping_threshold:
            raise ValueError("early_stopping_threshold needs early_stopping_patience: set it, or leave both out.")
        if patience is not None and patience < 1:
            raise ValueError(f"early_stopping_patience must be at least 1 evaluation, got {patience}.")
        if patience is not None and self.eval_strategy == "no":
            raise ValueError("early_stopping_patience needs evaluations: set eval_strategy to epoch or steps.")

    def _check_metric(self):
        """A name that no evaluation gives would end the run at the first one."""
        metric = self.metric_for_best_model
        if metric is not None and metric.removeprefix("eval_") not in METRICS:
            close = difflib.get_close_matches(metric.removeprefix("eval_"), METRICS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(METRICS)}."
            raise ValueError(f"metric_for_best_model: {metric!r} is not measured; {hint}")

    def _check_trackers(self):
        for name in self.report_to:
            try:
                for callback in get_reporting_integration_callbacks([name]):
                    callback()
            except (ImportError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"report_to: {name} cannot be used ({error}): install it, or set report_to to none."
                ) from None


def read_rates(given: str | dict | None) -> dict[str, float] | None:
    """
    `learning_rates` by group of parameters, from `part=rate,...`, a JSON object or a mapping.

    Raises:
        ValueError: naming the part or rate that is wrong.
    """
    if given is None:
        return None
    if isinstance(given, str):
        try:
            pairs = [*json.loads(given).items()] if given.lstrip().startswith("{") else None
        except ValueError as error:
            raise ValueError(f"learning_rates: {given!r} cannot be read: {error}.") from None
        pairs = [pair.partition("=")[::2] for pair in given.split(",")] if pairs is None else pairs
    else:
        pairs = [*given.items()]
    rates = {}
    for part, value in pairs:
        group = PARTS.get(part.strip(), part.strip())
        if group not in PARAMETER_GROUPS:
            raise ValueError(
                f"learning_rates: {part.strip()!r} is no part, use some of {', '.join(PARAMETER_GROUPS)}."
            )
        if group in rates:
            raise ValueError(f"learning_rates: {group} has two rates.")
        try:
            rates[group] = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"learning_rates: {value!r} of {group} is no number; write {group}=1e-5.") from None
        if not 0 < rates[group] < float("inf"):
            raise ValueError(f"learning_rates: the rate of {group} must be above 0, got {value}; else freeze it.")
    return rates


class _Parser(HfArgumentParser):
    """Raises what argparse would print below the list of all arguments."""

    def error(self, message: str):
        raise ValueError(message)


def parse_arguments(
    argv: Sequence[str], kinds: tuple[type, ...] = (ModelArguments, DataArguments, TrainingArguments)
) -> tuple:
    """
    Reads `[recipe.yaml] [--flag value ...]`; a flag wins over the same key of the YAML, a flat map of argument names.

    Returns one instance of each of `kinds`, dataclasses for `HfArgumentParser`.

    Flags of the original training script are understood too, see `otter_hf.training.upstream`; what has no effect any
    more is logged.

    Raises:
        ValueError: naming the file and key, or the flag, that is unknown or has an unusable value.
    """
    argv = list(argv)
    parser = _Parser(kinds, prog="otter-hf train [recipe.yaml]")
    options: list[Option] = []
    if argv and not argv[0].startswith("-"):
        options = _read_recipe(Path(argv.pop(0)), kinds)
    options = translate(options + _read_flags(argv), logger.warning)
    flags = [part for name, values in options for part in (f"--{name}", *values)]
    return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)


def _read_flags(argv: Iterable[str]) -> list[Option]:
    options: list[Option] = []
    for part in argv:
        if part.startswith("--") or part == "-h":
            name, equals, value = part.lstrip("-").partition("=")
            options.append(("help" if name == "h" else name, [value] if equals else []))
        elif options:
            options[-1][1].append(part)
        else:
            raise ValueError(f"{part!r} belongs to no flag: flags start with --.")
    return options


def _read_recipe(path: Path, kinds: tuple[type, ...]) -> list[Option]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"The recipe {path} does not exist.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {path} cannot be parsed: {error}.") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {path} must map argument names to values, got {recipe!r}.")
    options: list[Option] = []
    for key, value in recipe.items():
        if value is not None and value != []:
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            options.append((str(key), [*map(str, values)]))
    known = [f.name for kind in kinds for f in fields(kind)]
    for option in options:
        for key, _ in translate([option], lambda note: None):
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "`otter-hf train --help` lists them."
                raise ValueError(f"{path}: {key!r} is no argument; {hint}")
    return options
