"""Writes what DDP and FSDP2 hand to collectives in a step, beside what the plan says they send."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode


sys.path.insert(0, str(Path(__file__).parents[1]))

from otter_hf.testing.otter import tiny_model, tiny_processor
from otter_hf.training.arguments import parse_arguments
from otter_hf.training.outlook import network_bytes


WORLD_SIZE = 4


class Counter(TorchDispatchMode):
    """Bytes of what is gathered and reduced, whole."""

    def __init__(self):
        super().__init__()
        self.whole = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            self.whole += max(argument.nbytes for argument in args[:2])
        return func(*args, **(kwargs or {}))


def step(model, ids):
    model(input_ids=ids, labels=ids, pixel_values=torch.randn(2, 1, 3, 28, 28)).loss.backward()


def main():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_SIZE)
    flags = "--model_name_or_path m --train_mixture t.yaml --output_dir out --use_cpu True"
    model_args, _, training_args = parse_arguments(flags.split())
    model = tiny_model(tiny_processor()).train()
    planned = {name: network_bytes(model, model_args, training_args, WORLD_SIZE, name) for name in ("none", "fsdp")}
    ids = torch.randint(3, 200, (2, 32))
    ids[:, 1] = model.config.image_token_id
    share = (WORLD_SIZE - 1) / WORLD_SIZE

    reduced = []

    def hook(state, bucket):
        reduced.append(bucket.buffer().nbytes)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    parallel.register_comm_hook(None, hook)
    step(parallel, ids)
    measured = {"none": 2 * share * sum(reduced)}

    model = tiny_model(tiny_processor()).train()
    for module in [*model.modules()]:
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    fully_shard(model)
    with Counter() as counter:
        step(model, ids)
    measured["fsdp"] = share * counter.whole
    dist.destroy_process_group()
    sys.stdout.write(json.dumps({"planned": planned, "measured": measured}) + "\n")


if __name__ == "__main__":
    main()
