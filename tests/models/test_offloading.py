"""Where inputs go whose model has its weights elsewhere."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from accelerate import disk_offload

from otter_hf.models.offloading import let_threads_take_turns
from otter_hf.testing import tiny


@pytest.mark.parametrize("family", ["otter", "flamingo", "otterhd"])
def test_under_fsdp_with_weights_on_the_host(family):
    """transformers asks in each step of `generate`, and would take the inputs off the device they are computed on."""
    model, _ = tiny(family)
    weight = next(model.parameters())
    assert model.device == weight.device == torch.device("cpu")
    weight.device_mesh = SimpleNamespace(device_type="cuda")  # as a DTensor's
    assert model.device == model.base_model.device == torch.device("cuda")


@pytest.mark.parametrize("family", ["otter", "otterhd"])
@torch.no_grad()
def test_threads_may_share_an_offloaded_model(family, tmp_path):
    """The server's do; one would take the weights away that another computes with."""
    model, _ = tiny(family)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(input_ids=ids).logits
    let_threads_take_turns(disk_offload(model, str(tmp_path), execution_device="cpu"))
    with ThreadPoolExecutor(2) as threads:
        for logits in threads.map(lambda _: model(input_ids=ids).logits, range(20)):
            assert torch.equal(logits, expected)
