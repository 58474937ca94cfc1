"""What can be said about a training, without what reads it: neither torch nor transformers is loaded for its help."""

from dataclasses import dataclass, field
from typing import Any

from ..model_names import check_model_name
from ..prompts import FORMATS, get_format
from .devices import DEVICES


PARAMETER_GROUPS = ("vision", "perceiver", "cross_attention", "language", "embeddings")
# parts that have linear layers, by the names that users say -> group
PARTS = {"vision": "vision", "resampler": "perceiver", "cross_attention": "cross_attention", "language": "language"}
# behind the name of a part in lora_target_modules
ALL_LINEAR = ":all-linear"


def _option(default: Any, help: str, *aliases: str) -> Any:
    """A field for `HfArgumentParser`; `...` is the default of one that must be given."""
    metadata: dict[str, Any] = {"help": help} | ({"aliases": list(aliases)} if aliases else {})
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """Which model to train, and which parts of it."""

    model_name_or_path: str = _option(..., "Folder or Hub id of the model and its processor.")
    tokenizer: str | None = _option(None, "Folder or Hub id of the tokenizer, for a repository of 2023 without one.")
    tokenizer_reference: str | None = _option(
        None,
        "A LLaMA tokenizer of 2023 gives the ids of transformers 4.28, with which Otter was trained, or "
        "4.35. By default as it was saved, else 4.28; Idefics: 4.35.",
    )
    freeze: list[str] = _option([], f"Groups not to train, of {', '.join(PARAMETER_GROUPS)}.")
    train_embedding_rows: list[str] = _option(
        [], "Tokens whose rows of the embeddings are trained, the others stay: 2023 trained <answer>."
    )
    media_store: str | None = _option(
        None,
        "Folder to keep what a frozen vision tower, and a frozen resampler, make of each medium, and to read it from.",
    )
    media_store_gb: float = _option(64.0, "Most that is in the media_store, in 10**9 bytes; what is above is encoded.")
    cache_text_states: bool = _option(
        False,
        "Keep in memory what frozen layers below the first gated block make of each text: one that comes "
        "again is not read again. Needs packing false.",
    )
    dtype: str = _option("auto", "Precision of the weights: auto, float32, bfloat16, float16.")
    attn_implementation: str | None = _option(
        None,
        "eager, sdpa, flash_attention_2 or flex_attention, or by part: "
        "text_config=sdpa,vision_config=eager; default: transformers'.",
    )
    lora: bool = _option(False, "Train low-rank updates of lora_target_modules only, and save them alone.")
    lora_r: int = _option(64, "Rank of the updates.")
    lora_alpha: int = _option(32, "Updates are scaled by lora_alpha / lora_r.")
    lora_dropout: float = _option(0.05, "Dropout in front of the updates.")
    lora_target_modules: list[str] = _option(
        [],
        "Names of linear layers of the decoder, without its gated blocks: MPT Wqkv out_proj up_proj "
        "down_proj; OtterHD query_key_value dense dense_h_to_4h dense_4h_to_h; LLaMA q_proj v_proj ...; or all of "
        f"a part: {', '.join(f'{part}:all-linear' for part in PARTS)}.",
    )
    lora_train_groups: list[str] = _option(
        [], "Groups trained and saved whole beside the updates: perceiver, cross_attention."
    )
    lora_dora: bool = _option(False, "DoRA: updates of direction and length of the weights.")
    load_in_4bit: bool = _option(False, "With lora: keep the decoder's weights in 4 bits (QLoRA; bitsandbytes).")

    def __post_init__(self):
        check_model_name(self.model_name_or_path, "model_name_or_path", ask_hub=False)
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

    train_mixture: str = _option(
        ...,
        "Training YAML: groups and datasets to train on; or rows of messages (.jsonl, .json, .parquet or a "
        "folder of that). Also --train_data.",
    )
    eval_mixture: str | None = _option(None, "YAML of the same form, to evaluate on.")
    eval_fraction: float = _option(
        0.0, "Without eval_mixture: share of the samples to evaluate on, by their ids; never trained on."
    )
    instruction_format: str | None = _option(
        None,
        f"How prompts are written: {', '.join(FORMATS)}. By default that of the model's family: fuyu for "
        "OtterHD, idefics for Idefics, otherwise simple.",
    )
    max_length: int = _option(2048, "Tokens of a sample, with BOS and EOS.")
    packing: bool | None = _option(
        None,
        "Put the samples of a batch one behind the other in one row; False pads them. By default True, "
        "but for Idefics and OPT, which cannot be packed.",
    )
    on_overlong: str = _option("truncate", "A last turn that is too long: error, truncate or skip.")
    on_error: str = _option("raise", "A sample that cannot be used: raise or skip.")
    populate_rel_ins: bool = _option(False, "Without a train config, take context from rel_ins_ids.")
    max_context: int | None = _option(None, "Context turns or examples kept, the latest.")
    num_frames: int | None = _option(
        None, "Frames that a video is resampled to; by default those the model was trained with, else 32."
    )
    legacy_pictures: bool = _option(
        False, "Read pictures as the original did: photographs not turned, transparency dropped."
    )
    max_image_pixels: int | None = _option(
        None,
        "Pictures and film frames with more cannot be used, as a damaged header may state any size; by "
        "default 89 million.",
    )
    keep_symbols: bool = _option(True, "False deletes most punctuation, as the original did.")
    use_task_description: bool = _option(False, "Put one of the dataset's task descriptions in front of each prompt.")
    remove_answer_token: bool = _option(
        False, "Otter: delete <answer> from the tokens, and from the saved chat template."
    )
    remove_end_of_turn_token: bool = _option(
        False, "Otter: delete <|endofchunk|> likewise; the model learns to stop at EOS alone."
    )
    resolution: int | None = _option(None, "OtterHD: pixels of the shorter side that every image is resized to.")
    dynamic_resolution: list[int] = _option(
        [], "OtterHD: sides of squares in pixels, one drawn for each sample; 2023: 448 512 768."
    )
    max_pixels: int | None = _option(None, "OtterHD: images with more pixels than this are shrunk.")

    def __post_init__(self):
        if self.instruction_format is not None:
            get_format(self.instruction_format)
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be at least 0 and less than 1, got {self.eval_fraction}.")
        if self.eval_fraction and self.eval_mixture is not None:
            raise ValueError("eval_mixture and eval_fraction both say what to evaluate on: leave one out.")


@dataclass
class PretrainingDataArguments:
    """What to pretrain on."""

    train_sets: str = _option(
        ..., "YAML of sets of shards, or the mapping itself: in a recipe as it is, on a command as JSON."
    )
    block_size: int = _option(5000, "Samples of a set that each worker shuffles at a time.")


@dataclass
class TrainingFields:
    """What training has beyond the arguments of transformers, or with another default."""

    remove_unused_columns: bool = _option(
        False, "Must stay False: the collator, not the model, takes the samples' columns."
    )
    # the Trainer writes this into the configuration that is saved with the model, which would generate without a cache
    use_cache: bool = _option(True, "For the saved model: generate with a cache. A loss never needs one.")
    dataloader_num_workers: int = _option(2, "Processes that load and transform images.")
    logging_steps: float = _option(
        0.05, "Steps between two values of the loss curve; below 1 a share of all: 0.05 gives 20 values."
    )
    peak_flops: float | None = _option(
        None,
        "Operations per second of one device, of which `mfu` in the logs is the share that was used. By "
        "default a matrix multiplication is measured at the start; 0 leaves `mfu` out.",
    )
    report_samples: int = _option(
        3, "Evaluation samples that are answered at each evaluation, in training_report.html."
    )
    report_controls: bool = _option(
        False, "Ask them with the picture of another one and with a blank one, too: eval_visual_gain in the logs."
    )
    wandb_project: str | None = _option(None, "Project of W&B, with report_to wandb.")
    wandb_entity: str | None = _option(None, "User or team of W&B, with report_to wandb.")
    trainable_only: bool = _option(
        False, "Save the trained weights alone; `otter_hf.training.load_trainable` adds the frozen ones."
    )
    resume_from_checkpoint: str | None = _option(
        None, "auto: the last checkpoint of output_dir, or a fresh start without one; or a checkpoint."
    )
    learning_rates: str | None = _option(
        None,
        "Rates of parts, others have learning_rate: resampler=1e-4,language=1e-5, or a mapping; parts: "
        f"{', '.join(PARAMETER_GROUPS)}; resampler is perceiver.",
    )
    early_stopping_patience: int | None = _option(
        None, "Stop after so many evaluations in a row without a better metric_for_best_model (or loss)."
    )
    early_stopping_threshold: float = _option(0.0, "What counts as better: by more than this.")
    dry_run: bool = _option(False, "Print the plan of the training and stop.", "--plan")
    plan_device: str | None = _option(
        None, f"With plan: the card to plan for, whatever is here: {', '.join(DEVICES)}."
    )
    nodes: int | None = _option(None, "With plan: the number of machines (default: 1).")
    gpus: int | None = _option(None, "With plan: the cards of each machine (default: 1).")
    mfu: float = _option(0.4, "With plan_device: the share of its peak that a step is taken to reach.")

    # the Trainer would wait for the device in every step to keep a loss out of its logs that `OtterTrainer` refuses
    logging_nan_inf_filter: bool = _option(
        False, "Leave losses that are not finite out of the logs; they end the training."
    )
