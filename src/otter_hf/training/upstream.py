"""
The flags of Otter's 2023 training scripts, and of transformers' before version 5: what they are called today, and what
became of those that are gone.
"""

import json
from collections.abc import Callable
from pathlib import Path


# an option as it was given: its name without dashes, and its values as text; none for a bare flag
Option = tuple[str, list[str]]

RENAMED = {
    "pretrained_model_name_or_path": "model_name_or_path",
    "training_data_yaml": "train_mixture",
    # not of 2023, but what they are called elsewhere: they need not be YAML
    "train_data": "train_mixture",
    "eval_data": "eval_mixture",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "warmup_steps_ratio": "warmup_steps",
    "workers": "dataloader_num_workers",
    "gradient_checkpointing": "activation_checkpointing",
    "max_seq_len": "max_length",
    "resample_frames": "num_frames",
    "with_task_description": "use_task_description",
    "remove_eos_token": "remove_end_of_turn_token",
    # transformers' own; below 1, warmup_steps is a ratio
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
}
_LAUNCHER = "torchrun and accelerate launch set up the processes: it has no effect."
# flags without effect, with the note that is given once
_DEAD = {
    "model_name": "the folder's config.json says which model it is; it has no effect.",
    "patch_image_size": "the processor in the model's folder says the size of pictures; it has no effect.",
    "save_hf_model": "the output is always a Hugging Face folder; it has no effect.",
    "dist_url": _LAUNCHER,
    "dist_backend": _LAUNCHER,
    "no_set_device_rank": _LAUNCHER,
    "save_checkpoints_to_wandb": "set the environment variable WANDB_LOG_MODEL=checkpoint; it has no effect.",
    "overwrite_output_dir": "resume_from_checkpoint says whether a run goes on; it has no effect.",
    "save_safetensors": "weights are always safetensors; it has no effect.",
    "offline": "set the environment variables HF_HUB_OFFLINE=1 and WANDB_MODE=offline; it has no effect.",
}
# flags that asked for something which is not done here
_REFUSED = {
    "customized_config": "edit config.json in the model's folder",
    "trained_ckpt": "turn the file into a folder with `otter-hf convert trainer-pt`, and train that",
    "peft_model_name_or_path": "merge the adapter with PEFT's `merge_and_unload`, and train the result",
    "resize_embedding": "a converted model has a row for each of its tokens; resize with `resize_token_embeddings`",
}
# of pretraining: sets by the names that end their flags, and what those flags are in `train_sets`
_SETS = {
    "mmc4": {"kind": "interleaved", "loss_weight": 1.0},
    "laion": {"kind": "pairs", "loss_weight": 0.2},
    "cc3m": {"kind": "pairs", "loss_weight": 1.0},
}
_OF_SETS = {
    "{}_shards": ("shards", str),
    "train_num_samples_{}": ("num_samples", int),
    "batch_size_{}": ("batch_size", int),
    "loss_multiplier_{}": ("loss_weight", float),
    "{}_textsim_threshold": ("min_similarity", float),
}
_PRETRAINING = {
    flag.format(name): (name, *setting)
    for name in _SETS
    for flag, setting in _OF_SETS.items()
    if name == "mmc4" or "textsim" not in flag
}
_NEVER_READ = "2023 read it and did nothing with it; it has no effect."
_DEAD_IN_PRETRAINING = {"precision": _NEVER_READ, "max_src_length": _NEVER_READ, "max_tgt_length": _NEVER_READ}
# what the code of 2023 did whatever its flags said
_FAMILIES = ("otter", "flamingo")
_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
_FUYU_TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head"]


def translate(options: list[Option], note: Callable[[str], None], *, pretraining: bool = False) -> list[Option]:
    """
    Options of 2023 in today's names; the others as they are.

    Args:
        options: as given, in their order.
        note: takes a sentence on each option that has no effect any more.
        pretraining: whether the script was that of pretraining.

    Raises:
        ValueError: naming an option that asks for what cannot be had, and what to do in its place.
    """
    translated: list[Option] = []
    folder = None
    sets: dict[str, dict] = {}
    for given, values in options:
        name = given.replace("-", "_")
        if name in _PRETRAINING or name == "dataset_resampled":
            if not pretraining:
                raise ValueError(f"{given} is of pretraining: `otter-hf pretrain` takes it.")
            _note_set(sets, given, values)
        elif pretraining and name in _DEAD_IN_PRETRAINING:
            note(f"{given}: {_DEAD_IN_PRETRAINING[name]}")
        elif pretraining and name == "mask_lm_head":
            translated += [("train_embedding_rows", ["<image>", "<|endofchunk|>"])] if _is_on(values) else []
        elif name in _DEAD:
            note(f"{given}: {_DEAD[name]}")
        elif name in _REFUSED:
            raise ValueError(f"{given} is not supported: {_REFUSED[name]}.")
        elif name == "external_save_dir":
            folder = _single(given, values)
        elif name in _CHANGED:
            translated += _CHANGED[name](given, values)
        else:
            translated.append((RENAMED.get(name, given), values))
    if folder is not None:
        # 2023 wrote to the folder of this name below the other, or to itself
        name = next((values[0] for name, values in translated if name == "run_name"), "otter-9b")
        translated.append(("output_dir", [f"{folder.rstrip('/')}/{name}"]))
    if sets:
        translated.append(("train_sets", [_sets_of(sets)]))
    return translated


def add_unsaid(options: list[Option], note: Callable[[str], None]) -> list[Option]:
    """
    What the scripts of 2023 did without being told, in today's names: options to be put in front of the given ones.

    A command is one of 2023 if it names the model as they did. They trained Otter and Flamingo with vision tower and
    language model frozen, unless config.json said otherwise, with a weight decay of 0.1, and every model in bfloat16.

    Args:
        options: as given, before `translate`.
        note: takes a sentence on what is done, and how it is undone.
    """
    given = {name.replace("-", "_"): values for name, values in options}
    if not {"model_name", "pretrained_model_name_or_path"} & {*given}:
        return []
    family = (given.get("model_name") or ["otter"])[0]
    folder = Path((given.get("pretrained_model_name_or_path") or given.get("model_name_or_path") or [""])[0])
    unsaid: list[Option] = []
    if family in _FAMILIES and not {"freeze", "lora", "enable_lora"} & {*given}:
        frozen = _frozen_in_2023(folder)
        unsaid += [("freeze", frozen)] if frozen else []
    if family in _FAMILIES and "weight_decay" not in given:
        unsaid.append(("weight_decay", ["0.1"]))
    if not {"bf16", "fp16", "dtype"} & {*given}:
        unsaid += _bfloat16(note)
    if unsaid:
        said = ", ".join(f"{name} {' '.join(values)}" for name, values in unsaid)
        note(f"as the code of 2023 did without being told: {said}; say {unsaid[0][0]} and the like to change that.")
    return unsaid


def _frozen_in_2023(folder: Path) -> list[str]:
    """The groups that were not trained; a folder's config.json may have switches of 2023."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if config.get("model_type", "otter") not in _FAMILIES or config.get("train_full_model"):
        return []
    switches = {"vision": "train_vision_encoder", "language": "train_lang_encoder"}
    return [group for group, switch in switches.items() if not config.get(switch)]


def _bfloat16(note: Callable[[str], None]) -> list[Option]:
    import torch

    if not torch.accelerator.is_available():
        return [("bf16", ["True"]), ("use_cpu", ["True"])]
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        note("2023 computed in bfloat16, which this device cannot: it computes in float32 unless fp16 is on.")
        return []
    return [("bf16", ["True"])]


def _note_set(sets: dict[str, dict], given: str, values: list[str]) -> None:
    """Enter a flag of a set into the settings of that set; `dataset_resampled` is of all."""
    name = given.replace("-", "_")
    if name == "dataset_resampled":
        sets.setdefault("", {})["resampled"] = _is_on(values)
        return
    of, setting, kind = _PRETRAINING[name]
    value = _single(given, values)
    try:
        sets.setdefault(of, {})[setting] = kind(value)
    except ValueError:
        raise ValueError(f"{given} must be a number, got {value!r}.") from None


def _sets_of(sets: dict[str, dict]) -> str:
    """The mapping that `read_pretraining_sets` reads, as JSON."""
    common = sets.pop("", {})
    return json.dumps({name: {**_SETS[name], **common, **settings} for name, settings in sets.items()})


def _single(name: str, values: list[str]) -> str:
    if len(values) != 1:
        raise ValueError(f"{name} takes one value, got {len(values)}.")
    return values[0]


def _is_on(values: list[str]) -> bool:
    return values in ([], ["True"], ["true"], ["1"])


def _if_on(*options: Option) -> Callable[[str, list[str]], list[Option]]:
    return lambda given, values: list(options) if _is_on(values) else []


def _schedule(given: str, values: list[str]) -> list[Option]:
    schedule = _single(given, values)
    if schedule not in _SCHEDULES:
        raise ValueError(f"{given} must be constant, linear or cosine, got {schedule!r}; others: lr_scheduler_type.")
    return [("lr_scheduler_type", [_SCHEDULES[schedule]])]


def _image_resolution(given: str, values: list[str]) -> list[Option]:
    sides = [side.strip(" ()") for value in values for side in value.split(",")]
    if len(sides) != 2 or sides[0] != sides[1] or not sides[0].isdigit():
        raise ValueError(f"{given} must be a square such as 448,448, got {','.join(sides)}; see resolution.")
    return [("dynamic_resolution", sides[:1])]


def _dynamic_resolution(given: str, values: list[str]) -> list[Option]:
    # a switch in 2023, today the sides to draw from
    return [("dynamic_resolution", ["448", "512", "768"] if _is_on(values) else values)]


def _resume(given: str, values: list[str]) -> list[Option]:
    # a switch in 2023, today a folder, or True for the last checkpoint
    return [("resume_from_checkpoint", values or ["True"])]


def _save_steps(given: str, values: list[str]) -> list[Option]:
    steps = _single(given, values)
    return [] if steps == "-1" else [("save_strategy", ["steps"]), ("save_steps", [steps])]


_CHANGED = {
    "lr_scheduler": _schedule,
    "image_resolution": _image_resolution,
    "dynamic_resolution": _dynamic_resolution,
    "resume_from_checkpoint": _resume,
    "save_steps_interval": _save_steps,
    "save_ckpt_each_epoch": _if_on(("save_strategy", ["epoch"])),
    "delete_previous_checkpoint": _if_on(("save_total_limit", ["1"])),
    "report_to_wandb": _if_on(("report_to", ["wandb"])),
    "mask_lm_head": _if_on(("train_embedding_rows", ["<answer>"])),
    "enable_lora": _if_on(("lora", ["True"]), ("lora_target_modules", _FUYU_TARGETS)),
}
