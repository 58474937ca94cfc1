"""Named groups of parameters."""

import pytest

from otter_hf.training.freezing import PARAMETER_GROUPS, freeze, parameter_groups, parameter_table


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


def test_table(model):
    freeze(model, ["language"])
    lines = parameter_table(model).splitlines()
    assert [line.split()[0] for line in lines] == ["group", *PARAMETER_GROUPS, "total"]
    row = {line.split()[0]: line.split()[1:] for line in lines}
    assert row["language"][1] == "0"
    assert row["total"][0] == f"{model.num_parameters():,}"
