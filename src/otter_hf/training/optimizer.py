"""Which parameters decay, with what rate they learn, and in what precision."""

import logging
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from .freezing import parameter_groups


logger = logging.getLogger(__name__)


def check_precision(model: nn.Module, fp16: bool, sharding: str) -> None:
    """
    Warns where what is trained is kept in 16 bits, unless it is shared: FSDP and DeepSpeed keep float32 weights for
    the optimizer.

    Raises:
        ValueError: if it is so with `fp16`, which scales gradients.
    """
    half = next((p.dtype for p in model.parameters() if p.requires_grad and p.itemsize < 4), None)
    if half is None or sharding != "none":
        return
    kept = str(half).removeprefix("torch.")
    if fp16:
        raise ValueError(
            f"fp16 scales gradients of float32 weights, and what is trained is kept in {kept}: set dtype to float32, "
            "or fp16 to false."
        )
    logger.warning(
        f"What is trained is kept in {kept}, where steps far smaller than a weight are lost: set dtype to float32, "
        "and bf16 to true to compute in bfloat16."
    )


def decayed_parameter_names(model: nn.Module) -> list[str]:
    """
    Names of the parameters that weight decay applies to: the weights of linear and convolutional layers.

    Norms, gates, biases, latents, position embeddings, the input embedding and the output layer have none. The
    original decayed the gated cross-attention blocks alone, among them by accident the norm in front of their
    feed-forward part; the resampler, and all of OtterHD, had no decay whatever `weight_decay` said.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    embeddings |= {id(parameter) for parameter in parameter_groups(model)["embeddings"]}
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    return [
        f"{prefix}.weight" if prefix else "weight"
        for prefix, module in model.named_modules()
        if isinstance(module, layers) and id(module.weight) not in embeddings
    ]


def set_learning_rates(optimizer: torch.optim.Optimizer, model: PreTrainedModel, rates: Mapping[str, float]) -> None:
    """
    Splits the groups of an optimizer that has made no step yet, so that parts of the model have rates of their own.

    Args:
        rates: learning rate by group of parameters, see `parameter_groups`; others keep theirs.

    Raises:
        ValueError: for a part of which nothing is trained.
    """
    part_of = {id(parameter): part for part, group in parameter_groups(model).items() for parameter in group}
    groups, met = [], set()
    for group in optimizer.param_groups:
        parts: dict[str | None, list] = {}
        for parameter in group["params"]:
            part = part_of.get(id(parameter))
            parts.setdefault(part if part in rates else None, []).append(parameter)
        met |= {*parts}
        groups += [{**group, "params": some, "lr": rates.get(part, group["lr"])} for part, some in parts.items()]
    for part in rates:
        if part not in met:
            raise ValueError(f"learning_rates: nothing of {part} is trained, take it out.")
    optimizer.param_groups[:] = groups
