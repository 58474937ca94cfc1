"""The plan of a training: what will be trained, on how much, with what memory, told before any weight is loaded."""

import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import set_zero3_state
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available

from ..conversion.memory import gibibytes
from ..errors import config_told
from ..models.attention_choice import tell_choice
from ..models.lm_loss import MAX_LOGITS
from ..models.quantization import WHOLE_MODULES
from .arguments import DataArguments, ModelArguments, TrainingArguments
from .devices import check_dtype
from .flops import TrainingFlops, count_training_flops
from .freezing import freeze, group_of, parameter_counts, parameter_groups
from .lora import with_updates


# bytes of a weight in NF4 with quantised scales, and of the two moments of an optimizer of which they are not kept
# in the precision of the weight
_BYTES_4BIT = 0.516
_MOMENTS = {"8bit": 2.0, "adafactor": 0.0, "sgd": 0.0}
# what is shared between devices
SHARDINGS = {
    "none": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights"),
    "fsdp": ("optimizer", "gradients", "weights"),
}


@dataclass(frozen=True)
class TrainingPlan:
    """
    Args:
        groups: parameters, and trained ones, of each group.
        dtype: of the weights; `compute_dtype`: of the multiplications.
        samples_per_step, tokens_per_step: of all devices and accumulated batches; tokens at most.
        steps: optimizer steps, None where the data is not known.
        world_size: number of devices. sharding: `none`, `zero1`, `zero2`, `zero3` or `fsdp`.
        memory: bytes on each device for weights, gradients, optimizer, activations (an estimate, see `_activations`)
            and logits.
        attention: implementation by part; `attention_notes`: what else there was, on a GPU.
        liger, compiled: whether these kernels are used.
        learning_rates: by group; `others` have none of their own. `weight_decay`: of linear and convolutional layers.
        flops: operations of a step, for the share of the device's peak in the logs; None for Idefics, not counted.
    """

    groups: dict[str, tuple[int, int]]
    dtype: str
    compute_dtype: str
    samples_per_step: int
    tokens_per_step: int
    steps: int | None
    world_size: int
    sharding: str
    memory: dict[str, int]
    attention: dict[str, str]
    attention_notes: str
    liger: bool
    compiled: bool
    learning_rates: dict[str, float]
    weight_decay: float
    flops: TrainingFlops | None

    def __str__(self) -> str:
        lines = [f"{'group':<16}{'parameters':>16}{'trained':>16}"]
        total = tuple(map(sum, zip(*self.groups.values(), strict=True)))
        for name, counts in {**self.groups, "total": total}.items():
            lines.append(f"{name:<16}{counts[0]:>16,}{counts[1]:>16,}")
        steps = "unknown" if self.steps is None else f"{self.steps:,}"
        lines += [
            f"weights in {self.dtype}, computed in {self.compute_dtype}; {self.world_size} device(s), "
            f"sharding: {self.sharding}",
            f"{steps} steps of {self.samples_per_step:,} samples, at most {self.tokens_per_step:,} tokens",
            "memory per device, from shapes: "
            + ", ".join(f"{name} {gibibytes(size)}" for name, size in self.memory.items())
            + f"; together {gibibytes(sum(self.memory.values()))}",
            "attention: "
            + ", ".join(f"{part} {name}" for part, name in self.attention.items())
            + f"; Liger kernels: {'yes' if self.liger else 'no'}; torch.compile: {'yes' if self.compiled else 'no'}",
            "learning rate: "
            + ", ".join(f"{group} {rate:g}" for group, rate in self.learning_rates.items())
            + f"; weight decay: {self.weight_decay:g}",
            *([f"attention kernels: {self.attention_notes}"] if self.attention_notes else []),
        ]
        return "\n".join(lines)


def meta_model(
    model_args: ModelArguments,
    config: PreTrainedConfig | None = None,
    attention: str | dict[str, str] | None = None,
    *,
    autocast: bool = False,
) -> PreTrainedModel:
    """
    The model without memory behind its parameters, those to train marked, adapters included.

    Args:
        config: by default that of `model_name_or_path`.
        attention: implementation, see `choose_attention`.
        autocast: whether it is trained with `bf16` or `fp16`.
    """
    with config_told(model_args.model_name_or_path):
        config = config or AutoConfig.from_pretrained(model_args.model_name_or_path)
    dtype = config.dtype or torch.float32 if model_args.dtype == "auto" else getattr(torch, model_args.dtype)
    # transformers shall think that ZeRO-3 is at work already: it would share out parameters that have no memory
    with torch.device("meta"), set_zero3_state():
        with config_told(model_args.model_name_or_path):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
        model.tie_weights()
        if model_args.lora:
            return with_updates(model, model_args, range(len(model_args.train_embedding_rows)), autocast=autocast)
    freeze(model, model_args.freeze)
    for parameter in parameter_groups(model)["embeddings"]:
        parameter.requires_grad_(parameter.requires_grad or bool(model_args.train_embedding_rows))
    return model


def sharding_of(training_args: TrainingArguments) -> str:
    """What is shared between devices: `none`, `zero1`, `zero2`, `zero3` or `fsdp`, as arguments or launcher say."""
    if training_args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "fsdp"
    plugin = training_args.deepspeed_plugin
    return "none" if plugin is None else f"zero{plugin.zero_stage}"


def make_plan(
    model: PreTrainedModel,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    *,
    num_samples: int | None = None,
    frames: int = 1,
    world_size: int | None = None,
    sharding: str | None = None,
) -> TrainingPlan:
    """
    Args:
        model: see `meta_model`.
        num_samples: samples of an epoch.
        frames: of the one picture or video that each sample is taken to have.
        world_size, sharding: by default those of the arguments and this process.
    """
    world_size = training_args.planned_world_size if world_size is None else world_size
    sharding = sharding_of(training_args) if sharding is None else sharding
    batch_size = training_args.per_device_train_batch_size
    samples = batch_size * training_args.gradient_accumulation_steps * world_size
    compute = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else model.dtype
    if training_args.plan_device:
        check_dtype(training_args.plan_device, str(compute).removeprefix("torch."))
    memory = state_bytes(model, model_args, training_args, sharding, world_size)
    memory["activations"] = _activations(
        model, batch_size, data_args.max_length, frames, compute.itemsize, training_args.activation_checkpointing
    )
    logits = min(MAX_LOGITS, batch_size * data_args.max_length * model.config.get_text_config().vocab_size)
    memory["logits"] = 2 * torch.float32.itemsize * logits  # and their gradient
    attention = {part: str(config._attn_implementation) for part, config in _configs(model.config).items()}
    flops = None
    if model.config.model_type != "idefics":
        flops = count_training_flops(
            model, cache_text_states=model_args.cache_text_states, media_store=model_args.media_store is not None
        )
    return TrainingPlan(
        groups=parameter_counts(model),
        dtype="4 bits" if model_args.load_in_4bit else str(model.dtype).removeprefix("torch."),
        compute_dtype=str(compute).removeprefix("torch."),
        samples_per_step=samples,
        tokens_per_step=samples * data_args.max_length,
        steps=_steps(training_args, num_samples, world_size),
        world_size=world_size,
        sharding=sharding,
        memory=memory,
        attention=attention,
        attention_notes=tell_choice({*attention.values()}, training_args.device, compute),
        liger=training_args.use_liger_kernel and is_liger_kernel_available(),
        compiled=bool(training_args.torch_compile),
        learning_rates={**(training_args.learning_rates or {}), "others": training_args.learning_rate},
        weight_decay=training_args.weight_decay,
        flops=flops,
    )


def _configs(config) -> dict:
    parts = {"vision": getattr(config, "vision_config", None), "language": config.get_text_config()}
    if hasattr(config, "cross_attn_every_n_layers"):
        parts["gated and resampler"] = config
    return {part: inner for part, inner in parts.items() if inner is not None}


def _steps(training_args: TrainingArguments, num_samples: int | None, world_size: int) -> int | None:
    if training_args.max_steps > 0:
        return training_args.max_steps
    if num_samples is None:
        return None
    # as the Trainer counts: batches of each device, a last one that is not full included
    batches = -(-num_samples // training_args.per_device_train_batch_size)
    if training_args.dataloader_drop_last:
        batches = num_samples // training_args.per_device_train_batch_size
    batches = batches // world_size if training_args.dataloader_drop_last else -(-batches // world_size)
    per_epoch = max(1, -(-batches // training_args.gradient_accumulation_steps))
    return -(-int(per_epoch * training_args.num_train_epochs * 1000) // 1000)


def state_bytes(
    model: PreTrainedModel,
    model_args: ModelArguments,
    training_args: TrainingArguments,
    sharding: str,
    world_size: int = 1,
) -> dict[str, int]:
    """Bytes of `weights`, `gradients` and `optimizer` on each of so many devices; see `SHARDINGS`."""
    linear = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in WHOLE_MODULES) and "lora_" not in name
    }
    total = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0}
    moments = next(
        (size for name, size in _MOMENTS.items() if name in OptimizerNames(training_args.optim).value), None
    )
    for parameter in model.parameters():
        size = weight = parameter.element_size()
        if sharding == "fsdp" and (training_args.bf16 or training_args.fp16):
            size = weight = 4  # kept whole, cast for computing
        master = 0
        if sharding.startswith("zero") and (training_args.bf16 or training_args.fp16):
            size, weight, master = 4, 2, 4  # a copy in float32 belongs to the optimizer
        if model_args.load_in_4bit:
            # what is not in 4 bits is made float32
            size, weight = 4, _BYTES_4BIT if id(parameter) in linear else 4
        count = parameter.numel()
        total["weights"] += count * weight
        if parameter.requires_grad:
            total["gradients"] += count * weight
            total["optimizer"] += count * (master + (2 * size if moments is None else moments))
    shared = SHARDINGS[sharding]
    return {name: int(size / (world_size if name in shared else 1)) for name, size in total.items()}


def _activations(model, batch_size: int, max_length: int, frames: int, itemsize: int, checkpointing: bool) -> int:
    """
    Bytes that the backward pass needs of the forward pass, on the estimate that a linear layer keeps its output, and
    its input too if its weight is trained, a norm twice its input; checkpointed layers keep what enters them, and one
    at a time the rest. For one image or video of so many frames in each sample, all samples as long as they may be. A
    frozen vision tower keeps nothing.
    """
    config = model.config
    tokens, media, vision = batch_size * max_length, 0, 0
    if hasattr(config, "perceiver_num_latents"):
        media = batch_size * config.perceiver_num_latents
    if hasattr(config, "vision_config"):
        size = getattr(config.vision_config, "image_size", 224)
        size = size[0] if isinstance(size, (list, tuple)) else size
        patches = (size // getattr(config.vision_config, "patch_size", 32)) ** 2
        vision = batch_size * frames * patches
        if config.model_type == "idefics":
            latents = config.perceiver_config.resampler_n_latents if config.use_resampler else patches
            media = batch_size * frames * latents

    def positions(name: str) -> int:
        group = group_of(name)
        is_source = name.endswith((".to_kv", ".k_proj", ".v_proj"))
        if group == "vision":
            return vision
        if group == "perceiver":
            return media + (vision if is_source else 0)
        return media if group == "cross_attention" and is_source else tokens

    kept: dict[str, int] = {}  # of each checkpointed layer, or of the rest
    units = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    trained_tower = any(p.requires_grad for n, p in model.named_parameters() if group_of(n) == "vision")
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear)
        if not is_linear and "Norm" not in type(module).__name__:
            continue
        if module is head or (group_of(name) == "vision" and not trained_tower):
            continue
        unit = next((unit for unit in units if name.startswith(f"{unit}.")), "") if checkpointing else ""
        if is_linear:
            width = module.out_features + (module.in_features if module.weight.requires_grad else 0)
        else:
            width = 2 * module.weight.numel()
        kept[unit] = kept.get(unit, 0) + positions(name) * width * itemsize
    entering = sum(positions(f"{unit}.") * _entering_width(config, unit) * itemsize for unit in kept if unit)
    return kept.pop("", 0) + entering + max(kept.values(), default=0)


def _entering_width(config, unit: str) -> int:
    if group_of(unit) not in ("vision", "perceiver"):
        return config.get_text_config().hidden_size
    return config.vision_config.embed_dim if config.model_type == "idefics" else config.vision_hidden_size
