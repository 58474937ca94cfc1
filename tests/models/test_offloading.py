"""Where inputs go whose model has its weights elsewhere."""

from types import SimpleNamespace

import pytest
import torch

from otter_hf.testing import tiny


@pytest.mark.parametrize("family", ["otter", "flamingo", "otterhd"])
def test_under_fsdp_with_weights_on_the_host(family):
    """transformers asks in each step of `generate`, and would take the inputs off the device they are computed on."""
    model, _ = tiny(family)
    weight = next(model.parameters())
    assert model.device == weight.device == torch.device("cpu")
    weight.device_mesh = SimpleNamespace(device_type="cuda")  # as a DTensor's
    assert model.device == model.base_model.device == torch.device("cuda")
