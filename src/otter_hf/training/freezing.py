"""Which parameters are trained: five named groups that can be frozen."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from .fields import PARAMETER_GROUPS


def parameter_groups(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """
    The parameters of a Flamingo, Otter, OtterHD or Idefics by group, each parameter in one group.

    `vision`: the vision tower, or OtterHD's patch embedding. `perceiver`: the resampler. `cross_attention`: the gated
    blocks. `embeddings`: input embedding and output layer. `language`: all else of the decoder.
    """
    groups = {name: [] for name in PARAMETER_GROUPS}
    embeddings = set()
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        # Idefics keeps the rows of added tokens apart
        apart = (getattr(layer, name, None) for name in ("additional_embedding", "additional_fc"))
        embeddings |= {id(part.weight) for part in (layer, *apart) if part is not None}
    for name, parameter in model.named_parameters():
        groups["embeddings" if id(parameter) in embeddings else group_of(name)].append(parameter)
    return groups


def group_of(name: str) -> str:
    """The group of a parameter or layer by its name, embeddings apart."""
    name = name.removeprefix("base_model.model.")  # of PEFT
    if ".gated_cross_attn_layer" in name:
        return "cross_attention"
    if name.startswith(("model.vision_tower.", "model.vision_embed_tokens.", "model.vision_model.")):
        return "vision"
    return "perceiver" if name.startswith(("model.perceiver.", "model.perceiver_resampler.")) else "language"


def is_trained(module: nn.Module) -> bool:
    """Whether any parameter of it is."""
    return any(parameter.requires_grad for parameter in module.parameters())


def freeze(model: PreTrainedModel, groups: Iterable[str]) -> None:
    """
    Stops training of the named groups, in place; what is frozen already stays so.

    The original trained its first Otters with `freeze(model, ["vision", "language"])`.

    Raises:
        ValueError: for an unknown group, or if nothing is left to train.
    """
    parameters = parameter_groups(model)
    groups = list(groups)
    for group in groups:
        if group not in parameters:
            raise ValueError(f"freeze: {group!r} is no group, use some of {', '.join(PARAMETER_GROUPS)}.")
    for group in groups:
        for parameter in parameters[group]:
            parameter.requires_grad_(False)
    if not is_trained(model):
        raise ValueError(f"freeze={groups} leaves nothing to train: leave a group out.")


def train_only_rows(model: PreTrainedModel, token_ids: Iterable[int]) -> None:
    """
    Trains the rows of some tokens in the input embedding and the output layer; the other rows keep their bits.

    The original did so for `<answer>` (`mask_lm_head`). Rows are held by removing their gradients, so their moments in
    the optimizer stay 0, and the embeddings must be without weight decay, as [`OtterTrainer`] has it. Takes whole
    parameters: not for FSDP and ZeRO-3, where a process holds a part of the rows.
    """
    rows = torch.tensor(sorted({*token_ids}))

    def keep_rows(gradient: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros_like(gradient)
        index = rows.to(gradient.device)
        return kept.index_copy_(0, index, gradient.index_select(0, index))

    for parameter in parameter_groups(model)["embeddings"]:
        parameter.requires_grad_(True)
        parameter.register_hook(keep_rows)


def parameter_counts(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """For each group its parameters, and how many of them are trained."""
    return {
        group: (sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad))
        for group, parameters in parameter_groups(model).items()
    }
