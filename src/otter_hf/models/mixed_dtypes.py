"""Parts of a model in different precisions, such as a float32 vision tower in front of a bfloat16 decoder."""

import torch
from transformers import PreTrainedModel


def dtype_of(model: PreTrainedModel) -> torch.dtype:
    """As `model.dtype`; also of a replica that `nn.DataParallel` made, whose weights are no parameters."""
    if not getattr(model, "_is_replica", False):
        return model.dtype
    weights = (weight for module in model.modules() for weight in module._former_parameters.values())
    return next(weight.dtype for weight in weights if weight.is_floating_point())


def in_dtype_of(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """`states` in the precision of a part's `weight`; as they are under autocast, and where weights are quantized."""
    if not weight.is_floating_point() or (not states.is_meta and torch.is_autocast_enabled(states.device.type)):
        return states
    return states.to(weight.dtype)
