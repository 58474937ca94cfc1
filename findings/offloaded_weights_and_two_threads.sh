#!/usr/bin/env bash
# accelerate 1.15.0: a model in evaluation mode may be called from several threads, as servers do; with weights
# offloaded it may not. The thread that leaves a layer first puts its weights back on the meta device, under the hands
# of the one that is still in it.
# Seen: two threads in one layer: offloaded: RuntimeError, not offloaded: both right
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile accelerate==1.15.0
venv/bin/python -W ignore - <<'PY'
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from accelerate import disk_offload


class Layer(torch.nn.Linear):
    """The thread that brings a `slow` input waits inside until another one has been through."""

    inside, through = threading.Event(), threading.Event()

    def forward(self, inputs, slow=False):
        if slow:
            self.inside.set()
            self.through.wait()
        return super().forward(inputs)


def two_threads(model):
    Layer.inside.clear()
    Layer.through.clear()

    def slow():
        with torch.no_grad():
            return model(torch.ones(1, 4), slow=True)

    with ThreadPoolExecutor() as pool, torch.no_grad():
        waiting = pool.submit(slow)
        Layer.inside.wait()
        quick = model(torch.ones(1, 4))
        Layer.through.set()
        error = waiting.exception()
        return type(error).__name__ if error else torch.equal(waiting.result(), quick)


model = Layer(4, 4).eval()
plain = two_threads(model)
disk_offload(model, "weights", execution_device=torch.device("cpu"))
offloaded = two_threads(model)
print(f"two threads in one layer: offloaded: {offloaded}, not offloaded: {plain}")
assert plain is True and offloaded == "RuntimeError"
PY
