"""What training needs to know of a vision tower: which of its weights are not used, and what is frozen."""

import torch
from torch import nn


# parameters of a tower that do not reach `last_hidden_state`: frozen, or DDP would wait for their gradients for ever
_UNUSED_MODULES = {
    "clip_vision_model": ["post_layernorm"],
    "convnext": ["layernorm"],
    "convnextv2": ["layernorm"],
    "siglip_vision_model": ["head"],
    "vit": ["pooler"],
}


def freeze_unused_modules(vision_tower: nn.Module) -> None:
    """Freezes what does not reach `last_hidden_state`."""
    for name in _UNUSED_MODULES.get(vision_tower.config.model_type, []):
        if (unused := getattr(vision_tower, name, None)) is not None:  # SigLIP's may be built without its head
            unused.requires_grad_(False)


def keep_frozen_statistics(vision_tower: nn.Module) -> None:
    """A tower in training mode back into evaluation mode if it is frozen, or else its batch norms that are."""
    if _is_frozen(vision_tower):
        vision_tower.eval()
        return
    for module in vision_tower.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.affine and _is_frozen(module):
            module.eval()


def require_input_grad(module: nn.Module, args: tuple) -> tuple | None:
    """Forward pre-hook: a first argument that needs a gradient, for a module of which something is trained."""
    if torch.is_grad_enabled() and not args[0].requires_grad and not _is_frozen(module):
        return (args[0].detach().requires_grad_(), *args[1:])
    return None


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())
