"""Parts of a model in different precisions, such as a float32 vision tower in front of a bfloat16 decoder."""

import torch


def in_dtype_of(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """`states` in the precision of a part's `weight`; as they are under autocast, and where weights are quantized."""
    if not weight.is_floating_point() or (not states.is_meta and torch.is_autocast_enabled(states.device.type)):
        return states
    return states.to(weight.dtype)
