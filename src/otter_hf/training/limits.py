"""Arguments that make no sense: numbers (a comparison with NaN is never true), and what needs whole weights."""

import math
from dataclasses import fields

from ..errors import did_you_mean


# what an evaluation of `otter-hf train` gives
METRICS = ("loss", "answer_accuracy", "runtime", "samples_per_second", "steps_per_second")

# name -> the smallest value that means something; None is always one
_LEAST = {
    "block_size": 1,
    "dynamic_resolution": 1,
    "early_stopping_threshold": 0,
    "eval_delay": 0,
    "eval_steps": 0,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "logging_steps": 0,
    "lora_alpha": 0,
    "lora_dropout": 0,
    "lora_r": 1,
    "max_context": 0,
    "max_grad_norm": 0,
    "max_length": 1,
    "max_pixels": 1,
    "media_store_gb": 0,
    "num_frames": 1,
    "num_train_epochs": 0,
    "peak_flops": 0,
    "per_device_eval_batch_size": 1,
    "per_device_train_batch_size": 1,
    "report_samples": 0,
    "resolution": 1,
    "save_steps": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
}


def check_sharding(model_args, training_args, sharding: str) -> None:
    """Raises ValueError for arguments that need the whole weights on each device, where these are shared."""
    given = {"learning_rates": training_args.learning_rates}
    given |= {name: getattr(model_args, name) for name in ("train_embedding_rows", "media_store", "cache_text_states")}
    for name, value in given.items():
        if value and sharding in ("fsdp", "zero3"):
            raise ValueError(f"{name} needs whole weights on each device, not {sharding}: use DDP or ZeRO-2.")


def check_metrics(training_args) -> None:
    """Raises ValueError for a name that no evaluation gives, which would end the run at the first one."""
    metrics = [name for name in METRICS if not (training_args.prediction_loss_only and name == "answer_accuracy")]
    metric = training_args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in metrics:
        hint = did_you_mean(metric.removeprefix("eval_"), metrics)
        raise ValueError(f"metric_for_best_model: {metric!r} is not measured; {hint}")
    if not training_args.eval_do_concat_batches:
        raise ValueError("eval_do_concat_batches must stay True: answers are counted over all batches.")


def refuse_label_smoothing(training_args) -> None:
    """Raises ValueError for it: the Trainer would compare a label with the token it is of, not with the next one."""
    if training_args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor is {training_args.label_smoothing_factor}, which transformers' Trainer applies "
            "to unshifted labels for image-text models: leave it at 0."
        )


def check_numbers(*arguments) -> None:
    """
    Raises ValueError for a number of these dataclasses that is NaN or infinite, or below what it can be, by its name.
    """
    for given in arguments:
        for field in fields(given):
            values = getattr(given, field.name)
            for value in values if isinstance(values, list) else [values]:
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{field.name} must be a number, got {value}.")
                least = _LEAST.get(field.name)
                if value is None and least is not None and isinstance(field.default, (int, float)):
                    raise ValueError(f"{field.name} must be a number, got None; the default is {field.default}.")
                if least is not None and isinstance(value, (int, float)) and value < least:
                    raise ValueError(f"{field.name} must be at least {least}, got {value}.")
            if field.name == "learning_rate" and values == 0 and not given.learning_rates:
                raise ValueError("learning_rate is 0, with which nothing is trained: raise it.")
            if field.name == "max_steps" and values != -1 and values < 1:
                raise ValueError(f"max_steps must be at least 1, got {values}: leave it out to train whole epochs.")
