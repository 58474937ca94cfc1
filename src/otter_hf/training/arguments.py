"""Arguments of fine-tuning: three dataclasses for `HfArgumentParser`, from a YAML file, from flags, or both."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import transformers
import yaml
from transformers import HfArgumentParser

from ..data.prompts import FORMATS, get_format
from .freezing import PARAMETER_GROUPS


@dataclass
class ModelArguments:
    """Which model to train, and which parts of it."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of the model and its processor."})
    freeze: list[str] = field(
        default_factory=list, metadata={"help": f"Groups not to train, of {', '.join(PARAMETER_GROUPS)}."}
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
        metadata={"help": "Names of linear layers; OtterHD: query_key_value dense dense_h_to_4h dense_4h_to_h."},
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "With lora: keep the frozen weights in 4 bits (QLoRA; bitsandbytes, CUDA)."}
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
        if self.lora and self.freeze:
            raise ValueError(f"freeze={self.freeze} and lora cannot be combined: lora freezes the whole model.")
        if self.load_in_4bit and not self.lora:
            raise ValueError("load_in_4bit needs lora: weights in 4 bits cannot be trained themselves.")


@dataclass
class DataArguments:
    """What to train on: training YAMLs (see `otter_hf.data.read_mixture`) and how their records become tokens."""

    train_mixture: str = field(metadata={"help": "Training YAML: groups and datasets to train on."})
    eval_mixture: str | None = field(default=None, metadata={"help": "YAML of the same form, to evaluate on."})
    instruction_format: str = field(
        default="simple",
        metadata={"help": f"How prompts are written: {', '.join(FORMATS)}. Otter: simple, OtterHD: fuyu."},
    )
    max_length: int = field(default=2048, metadata={"help": "Tokens of a row, with BOS and EOS."})
    on_overlong: str = field(
        default="truncate", metadata={"help": "A last turn that is too long: error, truncate or skip."}
    )
    on_error: str = field(default="raise", metadata={"help": "A sample that cannot be used: raise or skip."})
    populate_rel_ins: bool = field(
        default=False, metadata={"help": "Without a train config, take context from rel_ins_ids."}
    )
    max_context: int | None = field(default=None, metadata={"help": "Context turns or examples kept, the latest."})
    num_frames: int = field(default=32, metadata={"help": "Frames that a video is resampled to."})
    keep_symbols: bool = field(default=True, metadata={"help": "False deletes most punctuation, as the original did."})
    use_task_description: bool = field(
        default=False, metadata={"help": "Put one of the dataset's task descriptions in front of each prompt."}
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
        get_format(self.instruction_format)


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

    def __post_init__(self):
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay False: the collator takes the samples' columns.")
        # the Trainer would compare each label with the token it is the label of, not with the next one
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, which transformers' Trainer applies to "
                "unshifted labels for image-text models: leave it at 0."
            )


class _Parser(HfArgumentParser):
    """Raises what argparse would print below the list of all arguments."""

    def error(self, message: str):
        raise ValueError(message)


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """
    Reads `[recipe.yaml] [--flag value ...]`; a flag wins over the same key of the YAML, a flat map of argument names.

    Raises:
        ValueError: naming the file and key, or the flag, that is unknown or has an unusable value.
    """
    argv = list(argv)
    parser = _Parser((ModelArguments, DataArguments, TrainingArguments), prog="otter-hf train [recipe.yaml]")
    from_file = []
    if argv and not argv[0].startswith("-"):
        from_file = _read_recipe(Path(argv.pop(0)))
    return parser.parse_args_into_dataclasses(from_file + argv, look_for_args_file=False)


def _read_recipe(path: Path) -> list[str]:
    """The YAML as the flags it stands for."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"The recipe {path} does not exist.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {path} cannot be parsed: {error}.") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {path} must map argument names to values, got {recipe!r}.")
    known = [f.name for kind in (ModelArguments, DataArguments, TrainingArguments) for f in fields(kind)]
    flags = []
    for key, value in recipe.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "`otter-hf train --help` lists them."
            raise ValueError(f"{path}: {key!r} is no argument; {hint}")
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{key}", *map(str, values)]
    return flags
