"""Weights that are not where they are computed with: what transformers and accelerate forget there."""

import functools
import threading
from collections.abc import Callable

import torch
from transformers import PreTrainedModel


def default_device() -> torch.device:
    """The accelerator of this process, or the CPU where there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def index_tied_weights(model: PreTrainedModel, offloaded: dict | None) -> None:
    """
    Adds to the index of weights on disk the tied ones, in place, under their second name.

    transformers 5.23 does so for safetensors; read from `.bin` files, a tied output layer on disk would be looked for
    in vain.

    Args:
        offloaded: weight name -> where it is on disk, as `_load_pretrained_model` returns it; None without any.
    """
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if offloaded and source in offloaded:
            offloaded.setdefault(name, offloaded[source])


def let_threads_take_turns(model: PreTrainedModel) -> PreTrainedModel:
    """
    Lets several threads call a model with offloaded weights, in place; others may be called as they are.

    accelerate's hooks bring the weights of a layer to its device and take them away behind it, also from another
    thread that is computing with them: here a layer is used by one thread at a time.
    """
    lock = threading.RLock()
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(one, "offload", False) for one in getattr(hook, "hooks", [hook])):
            module.forward = functools.update_wrapper(
                functools.partial(_call_within, lock, module.forward), module.forward
            )
    return model


def _call_within(lock: threading.RLock, function: Callable, *args, **kwargs):
    with lock:
        return function(*args, **kwargs)


def device_of_inputs(model: PreTrainedModel, device: torch.device) -> torch.device:
    """
    Where a model takes its inputs. transformers says where its first weight is: offloaded, the meta device, and under
    FSDP2 with weights in the memory of the host, the CPU.

    Args:
        device: what transformers says.
    """
    if device.type == "cpu" and (mesh := getattr(next(model.parameters(), None), "device_mesh", None)) is not None:
        return torch.device(mesh.device_type)
    computes_on = getattr(getattr(model, "_hf_hook", None), "execution_device", None)  # of accelerate
    return device if device.type != "meta" or computes_on is None else torch.device(computes_on)
