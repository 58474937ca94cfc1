"""
What the host has to know about tensors on a device. To read a value back, it waits until the device has finished all
that was asked of it, and the device then waits for more: a model reads nothing while it decodes, and in training only
what its batch does not bring along as numbers.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import nn


def reads_are_free(tensor: torch.Tensor) -> bool:
    """Whether values of the tensor can be looked at without waiting for a device."""
    return tensor.device.type == "cpu"


def known_on_host(batch: dict, image_token_id: int | None, ignore_index: int = -100) -> dict[str, int | list]:
    """
    The arguments of `forward` that spare a model reading its batch, counted while the batch is still on the CPU.

    Args:
        batch: `input_ids (B, L)` int64, and where there are, `labels (B, L)`, `media_index (B, L)` and
            `pixel_attention_mask (B, T, F)`.
        image_token_id: of the model's configuration.

    Returns:
        `target_count`, the labels of the batch that count in a causal loss, `media_counts`, for each row the media its
        tokens refer to (OtterHD: its image tokens), and `frame_counts`, for each row the frames of its media; each
        where the batch has what it is counted from.
    """
    known = {}
    if "pixel_attention_mask" in batch:
        known["frame_counts"] = batch["pixel_attention_mask"].sum(dim=2).tolist()
    if "labels" in batch:
        known["target_count"] = int((batch["labels"][:, 1:] != ignore_index).sum())
    if "media_index" in batch:
        known["media_counts"] = batch["media_index"].amax(dim=1).tolist()
    elif "input_ids" in batch and image_token_id is not None:
        known["media_counts"] = (batch["input_ids"] == image_token_id).sum(dim=1).tolist()
    return known


def numbers_on(device: torch.device, values: Sequence) -> torch.Tensor:
    """`torch.tensor(values, device=device)`, for which the host does not wait."""
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def positions_with_labels(targets: torch.Tensor, count: int | None, ignore_index: int) -> torch.Tensor:
    """
    Where `targets (N,)` have a label, in order; read back from the device unless `count`, the number of labels, is
    known.
    """
    ignored = targets == ignore_index
    if count is None:
        return (~ignored).nonzero().squeeze(1)
    # places with a label come first; beyond them, if there are fewer than said, the loss ignores what it is given
    return ignored.to(torch.uint8).argsort(stable=True)[:count]


def accepts_known_numbers(model: nn.Module) -> bool:
    """Whether `forward` of the model takes what `known_on_host` returns."""
    return "target_count" in inspect.signature(model.forward).parameters
