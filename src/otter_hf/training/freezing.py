"""Which parameters are trained: five named groups that can be frozen."""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel


PARAMETER_GROUPS = ("vision", "perceiver", "cross_attention", "language", "embeddings")


def parameter_groups(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """
    The parameters of a Flamingo, Otter or OtterHD by group, each parameter in one group.

    `vision`: the vision tower, or OtterHD's patch embedding. `perceiver`: the resampler. `cross_attention`: the gated
    blocks. `embeddings`: input embedding and output layer. `language`: all else of the decoder.
    """
    groups = {name: [] for name in PARAMETER_GROUPS}
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings:
            group = "embeddings"
        elif ".gated_cross_attn_layer." in name:
            group = "cross_attention"
        elif name.startswith(("model.vision_tower.", "model.vision_embed_tokens.")):
            group = "vision"
        elif name.startswith("model.perceiver."):
            group = "perceiver"
        else:
            group = "language"
        groups[group].append(parameter)
    return groups


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
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze={groups} leaves nothing to train: leave a group out.")


def parameter_table(model: PreTrainedModel) -> str:
    """A table of the groups: parameters, and how many of them are trained."""
    rows = []
    for group, parameters in parameter_groups(model).items():
        rows.append((group, sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)))
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines = [f"{'group':<16}{'parameters':>16}{'trained':>16}"]
    return "\n".join(lines + [f"{group:<16}{total:>16,}{trained:>16,}" for group, total, trained in rows])
