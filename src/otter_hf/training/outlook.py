"""What a planned training needs of the machines it would run on: memory, network, time, data; in a table."""

from transformers import PreTrainedModel

from ..conversion.memory import gibibytes
from .arguments import DataArguments, ModelArguments, TrainingArguments
from .devices import find_device
from .plan import SHARDINGS, TrainingPlan, state_bytes


def network_bytes(model, model_args, training_args, world_size: int, sharding: str) -> int:
    """
    Bytes that each device sends in an optimizer step, with collectives in rings, in which each device passes on
    `(N - 1) / N` of what is gathered or reduced (https://huggingface.co/papers/1910.02054, section 7).

    DDP reduces and gathers the gradients (an all-reduce) once a step. ZeRO-1 and 2 reduce them, ZeRO-2 for every batch
    that is accumulated, and gather the new weights. ZeRO-3 and FSDP gather all weights for every forward and every
    backward pass, as they are computed with, and reduce the gradients of every batch.

    Args:
        model: see `meta_model`.
    """
    batches = training_args.gradient_accumulation_steps
    sizes = state_bytes(model, model_args, training_args, sharding)
    share = (world_size - 1) / world_size
    # FSDP keeps float32, and sends what is computed with
    half = 0.5 if sharding == "fsdp" and (training_args.bf16 or training_args.fp16) else 1
    trained = sizes["gradients"]  # a gradient is as wide as its weight
    sent = {
        "none": 2 * trained,
        "zero1": trained + trained,
        "zero2": batches * trained + trained,
        "zero3": batches * (2 * sizes["weights"] + trained),
        "fsdp": batches * half * (2 * sizes["weights"] + trained),
    }[sharding]
    return int(share * sent)


def outlook(
    plan: TrainingPlan,
    model: PreTrainedModel,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    *,
    frames: int = 1,
) -> str:
    """
    Lines on the memory and network of every sharding, and for a known card on time and data.

    Args:
        plan: of the training.
        model: see `meta_model`.
        frames: of the one picture or video that each sample is taken to have.
    """
    world_size = plan.world_size
    device = find_device(training_args.plan_device) if training_args.plan_device else None
    per_batch = plan.memory["activations"] + plan.memory["logits"]
    lines = [f"{'sharding':<10}{'states':>14}{'together':>14}{'sent a step':>14}" + ("  fits" if device else "")]
    for sharding in SHARDINGS if world_size > 1 else ("none",):
        states = sum(state_bytes(model, model_args, training_args, sharding, world_size).values())
        sent = network_bytes(model, model_args, training_args, world_size, sharding)
        cells = "".join(f"{gibibytes(size):>14}" for size in (states, states + per_batch, sent))
        fits = "" if device is None else "  yes" if states + per_batch < (device.gibibytes - 1) * 2**30 else "  no"
        lines.append(f"{sharding:<10}{cells}{fits}")
    lines.append(
        "(of each device: weights, gradients and optimizer; with activations and logits; bytes on the network)"
    )
    if device is None:
        return "\n".join(lines)
    lines.append(
        f"{training_args.plan_device}: {device.gibibytes} GiB, {device.teraflops:g} TFLOP/s in 16 bits "
        f"({device.source}); {world_size} of them"
    )
    if plan.flops is None:
        return "\n".join([*lines, "time: not counted for this model"])
    seconds = step_seconds(plan, model, data_args, training_args, frames)
    rate = plan.samples_per_step / seconds
    lines.append(
        f"{seconds:.3g} s a step at {training_args.mfu:.0%} of that (mfu), with samples as long as they may be"
        + ("" if plan.steps is None else f": {plan.steps * seconds / 3600:,.3g} hours")
    )
    workers = max(1, training_args.dataloader_num_workers)
    lines.append(
        f"data: {rate:,.3g} samples a second, {rate / world_size:.3g} for each device; at least "
        f"{world_size * workers:,} shards where data are read from shards, one for each of its {workers} worker(s)"
    )
    return "\n".join(lines)


def step_seconds(plan, model, data_args, training_args, frames: int = 1) -> float:
    """Seconds of an optimizer step on `plan_device` at `mfu` of its peak, by the operations of full samples."""
    vision = getattr(model.config, "vision_config", None)
    side = getattr(vision, "image_size", 224)
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    samples, length = plan.samples_per_step, data_args.max_length
    work = plan.flops.count(
        tokens=samples * length,
        labels=samples * length,
        pixels=samples * frames * height * width,
        media=samples,
        squares=samples * length**2,
    )
    peak = find_device(training_args.plan_device).teraflops * 1e12
    return work / (plan.world_size * peak * training_args.mfu)
