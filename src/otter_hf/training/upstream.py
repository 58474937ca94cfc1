"""The flags of Otter's 2023 training script: what they are called today, and what became of those that are gone."""

from collections.abc import Callable


# an option as it was given: its name without dashes, and its values as text; none for a bare flag
Option = tuple[str, list[str]]

_RENAMED = {
    "pretrained_model_name_or_path": "model_name_or_path",
    "training_data_yaml": "train_mixture",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "warmup_steps_ratio": "warmup_steps",
    "workers": "dataloader_num_workers",
    "gradient_checkpointing": "activation_checkpointing",
    "max_seq_len": "max_length",
    "resample_frames": "num_frames",
    "with_task_description": "use_task_description",
    "remove_eos_token": "remove_end_of_turn_token",
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
    "wandb_project": "set the environment variable WANDB_PROJECT; it has no effect.",
    "wandb_entity": "set the environment variable WANDB_ENTITY; it has no effect.",
    "save_checkpoints_to_wandb": "set the environment variable WANDB_LOG_MODEL=checkpoint; it has no effect.",
    "offline": "set the environment variables HF_HUB_OFFLINE=1 and WANDB_MODE=offline; it has no effect.",
}
# flags that asked for something which is not done here
_REFUSED = {
    "customized_config": "edit config.json in the model's folder",
    "trained_ckpt": "turn the file into a folder with `otter-hf convert trainer-pt`, and train that",
    "peft_model_name_or_path": "merge the adapter with PEFT's `merge_and_unload`, and train the result",
    "resize_embedding": "a converted model has a row for each of its tokens; resize with `resize_token_embeddings`",
}
_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
_FUYU_TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head"]


def translate(options: list[Option], note: Callable[[str], None]) -> list[Option]:
    """
    Options of 2023 in today's names; the others as they are.

    Args:
        options: as given, in their order.
        note: takes a sentence on each option that has no effect any more.

    Raises:
        ValueError: naming an option that asks for what cannot be had, and what to do in its place.
    """
    translated: list[Option] = []
    folder = None
    for given, values in options:
        name = given.replace("-", "_")
        if name in _DEAD:
            note(f"{given}: {_DEAD[name]}")
        elif name in _REFUSED:
            raise ValueError(f"{given} is not supported: {_REFUSED[name]}.")
        elif name == "external_save_dir":
            folder = _single(given, values)
        elif name in _CHANGED:
            translated += _CHANGED[name](given, values)
        else:
            translated.append((_RENAMED.get(name, given), values))
    if folder is not None:
        # 2023 wrote to the folder of this name below the other, or to itself
        name = next((values[0] for name, values in translated if name == "run_name"), "otter-9b")
        translated.append(("output_dir", [f"{folder.rstrip('/')}/{name}"]))
    return translated


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
