"""What is logged beside the loss."""

import functools
import json
import sys
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

from otter_hf import OtterForConditionalGeneration
from otter_hf.training.flops import TrainingFlops
from otter_hf.training.run import main
from otter_hf.training.throughput import Throughput, _peak_memory, count_batch
from otter_hf.training.trainer import NamingCollator, OtterTrainer


TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / "models"), str(TESTS.parent / "benchmarks")]

import flash_stand_in  # noqa: E402
from _gpu_host import HostWaits  # noqa: E402


FLOPS = TrainingFlops(per_token=10, per_label=1000, per_pixel=7, per_medium=5, per_square=1)


def batch(packed=False, labels=3):
    ids = torch.zeros(1, 6, dtype=torch.long) if packed else torch.zeros(2, 4, dtype=torch.long)
    target = torch.full_like(ids, -100)
    target.view(-1)[1 : 1 + labels] = 5
    lengths = {"cu_seq_lens_q": torch.tensor([0, 2, 6])} if packed else {"attention_mask": torch.ones_like(ids)}
    if not packed:
        lengths["attention_mask"][0, 2:] = 0
    media = torch.zeros(1, 2, 3, 1, 1, 1) if packed else torch.zeros(2, 1, 3, 1, 1, 1)
    return {"input_ids": ids, "labels": target, "pixel_values": media, **lengths}


@pytest.mark.parametrize("packed", [False, True])
def test_counts(packed):
    """Two samples of 2 and 4 tokens, two videos of 3 frames, 3 labels."""
    throughput = Throughput(["b", "a"], FLOPS, peak_flops=1e6)
    for _ in throughput.timed(iter([0])):
        time.sleep(0.02)
    throughput.add(count_batch(batch(packed)), ["a", "a"], torch.tensor(2.0), None)
    throughput.on_step_end(None, None, None)
    seconds = throughput._counts["seconds"]
    logs = throughput.collect(lambda row: row[None], torch.device("cpu"))
    assert logs["tokens_per_second"] == pytest.approx(6 / seconds)
    assert logs["samples_per_second"] == pytest.approx(2 / seconds)
    assert logs["mfu"] == pytest.approx((6 * 10 + 3 * 1000 + 6 * 7 + 2 * 5 + 20) / seconds / 1e6)
    assert logs["loss/a"] == pytest.approx(2)
    assert "loss/b" not in logs and "loss/mixed" not in logs
    assert 0 <= logs["data_wait"] < 1
    assert logs["peak_memory_gb"] > 0.05
    assert throughput.collect(lambda row: row[None], torch.device("cpu")) == {}


def test_all_processes_and_losses_by_group():
    """The mean of a group is over its labels in all batches of all processes."""
    throughput = Throughput(["a"], None, None)
    next(throughput.timed(iter([0])))
    throughput.add(count_batch(batch(labels=3)), ["a", "a"], torch.tensor(2.0), None)
    throughput.add(count_batch(batch(labels=1)), ["a", "a"], torch.tensor(0.5), torch.tensor(8))  # 4 over 1 label
    throughput.add(count_batch(batch(labels=2)), ["a", "?"], torch.tensor(7.0), None)
    throughput.on_step_end(None, None, None)
    seconds = throughput._counts["seconds"]
    logs = throughput.collect(lambda row: torch.stack([row, row]), torch.device("cpu"))
    assert logs["loss/a"] == pytest.approx((3 * 2 + 4) / 4)
    assert logs["loss/mixed"] == pytest.approx(7)
    assert logs["samples_per_second"] == pytest.approx(2 * 6 / seconds)
    assert "mfu" not in logs


def test_waiting_for_data_is_told_from_working():
    def slow():
        for item in range(2):
            time.sleep(0.05)
            yield item

    throughput = Throughput([], None, None)
    for _ in throughput.timed(slow()):
        pass
    time.sleep(0.05)
    throughput.add(count_batch(batch()), ["", ""], torch.tensor(1.0), None)
    throughput.on_step_end(None, None, None)
    time.sleep(0.2)  # an evaluation: not part of the step
    logs = throughput.collect(lambda row: row[None], torch.device("cpu"))
    assert 0.4 < logs["data_wait"] < 0.9


def test_logs_of_a_training(fit):
    out = fit(max_steps=6, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    entries = [entry for entry in history if "loss" in entry]
    assert len(entries) == 6
    for entry in entries:
        assert entry["tokens_per_second"] > entry["samples_per_second"] > 0
        assert 0 <= entry["data_wait"] < 1
        assert 0 < entry["mfu"] < 1
        assert entry["peak_memory_gb"] > 0
        # a step is of one group, so its loss is the loss
        (group,) = [key for key in entry if key.startswith("loss/")]
        assert entry[group] == pytest.approx(entry["loss"], rel=1e-5)
    groups = {key for entry in entries for key in entry if key.startswith("loss/")}
    assert groups == {"loss/IMAGE_TEXT", "loss/TEXT_ONLY", "loss/IMAGE_TEXT_IN_CONTEXT"}


def test_names_stay_out_of_the_model(ragged, fit, monkeypatch):
    """Nor does `group_by_length` reach held-out samples, which it would ask for ids that they have not yet."""
    seen = []
    original = OtterForConditionalGeneration.forward

    @functools.wraps(original)
    def spy(self, *args, **kwargs):
        seen.append({*kwargs} & {"sample_ids", "task_groups"})
        return original(self, *args, **kwargs)

    monkeypatch.setattr(OtterForConditionalGeneration, "forward", spy)
    evaluated = {"eval_mixture": str(ragged / "data.yaml"), "eval_strategy": "steps", "eval_steps": 1}
    fit(max_steps=1, train_sampling_strategy="group_by_length", **evaluated)
    assert len(seen) > 2
    assert not any(seen)


def test_peak_memory_is_in_bytes(monkeypatch):
    """Linux counts in KiB, macOS does not."""
    linux = _peak_memory(torch.device("cpu"))
    monkeypatch.setattr("otter_hf.training.throughput.sys", SimpleNamespace(platform="darwin"))
    assert _peak_memory(torch.device("cpu")) == pytest.approx(linux / 1024, rel=0.5)


def test_collator_names_samples():
    collator = NamingCollator(lambda samples: {"input_ids": len(samples)})
    batch = collator([{"id": "a", "task_group": "X"}, {"id": "b"}])
    assert batch == {"input_ids": 2, "sample_ids": ["a", "b"], "task_groups": ["X", ""]}


def test_measured_peak(ragged):
    flags = f"--model_name_or_path {ragged / 'base'} --train_mixture {ragged / 'data.yaml'} --use_cpu True"
    fixed = "--max_steps 1 --logging_steps 1 --save_strategy no --dataloader_num_workers 2 --disable_tqdm True"
    main([*flags.split(), *fixed.split(), "--output_dir", str(ragged / "out")], transform=keep)
    history = json.loads((ragged / "out" / "trainer_state.json").read_text())["log_history"]
    assert 0 < history[0]["mfu"] < 1


def keep(sample, generator: Random):
    return sample


def test_a_step_on_a_card_reads_once(fit, monkeypatch):
    """Two batches are accumulated: nothing is read in them, and before the optimizer's step both losses together."""
    flash_stand_in.pretend_cuda(monkeypatch)
    monkeypatch.setattr("otter_hf.models.flamingo.media_flamingo.reads_are_free", lambda tensor: False, raising=False)
    waits = {"training_step": [], "_get_grad_norm": []}

    def watch(name):
        original = getattr(OtterTrainer, name)

        def watched(self, *args, **kwargs):
            with HostWaits(ignore=("flash_stand_in.py",)) as counted:
                result = original(self, *args, **kwargs)
            waits[name].append(dict(counted.places))
            return result

        monkeypatch.setattr(OtterTrainer, name, watched)

    for name in waits:
        watch(name)
    fit(max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2, max_grad_norm=1.0)
    assert waits["training_step"] == [{}] * 4
    assert [sum(places.values()) for places in waits["_get_grad_norm"]] == [1, 1]
