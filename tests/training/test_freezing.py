"""Named groups of parameters."""

import pytest

from otter_hf.training.freezing import PARAMETER_GROUPS, freeze, parameter_counts, parameter_groups


def test_every_parameter_is_in_one_group(model):
    groups = parameter_groups(model)
    assert list(groups) == list(PARAMETER_GROUPS)
    assert all(groups.values())
    ids = [id(parameter) for parameters in groups.values() for parameter in parameters]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize(
    ("group", "part"),
    [
        ("vision", "vision_tower."),
        ("perceiver", "perceiver."),
        ("cross_attention", "gated_cross_attn_layer."),
        ("language", "decoder_layer."),
        ("embeddings", "embed_tokens."),
    ],
)
def test_freeze_one_group(model, group, part):
    freeze(model, [group])
    for name, parameter in model.named_parameters():
        if part in name:
            assert not parameter.requires_grad, name
    others = [p for other, parameters in parameter_groups(model).items() if other != group for p in parameters]
    # the tower's last norm is frozen from the start: it does not reach the resampler
    assert sum(not p.requires_grad for p in others) == (0 if group == "vision" else 2)


def test_tied_embeddings_are_one_group(model):
    model.lm_head.weight = model.get_input_embeddings().weight
    assert len(parameter_groups(model)["embeddings"]) == 1


def test_mistakes_change_nothing(model):
    with pytest.raises(ValueError, match="'ears' is no group"):
        freeze(model, ["language", "ears"])
    assert all(parameter.requires_grad for parameter in parameter_groups(model)["language"])
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze(model, PARAMETER_GROUPS)


def test_counts(model):
    freeze(model, ["language"])
    counts = parameter_counts(model)
    assert list(counts) == list(PARAMETER_GROUPS)
    assert counts["language"][1] == 0
    assert sum(count for count, _ in counts.values()) == model.num_parameters()
    assert sum(count for _, count in counts.values()) == model.num_parameters(only_trainable=True)
