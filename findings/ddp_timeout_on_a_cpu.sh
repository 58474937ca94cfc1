#!/usr/bin/env bash
# transformers 5.23.0 with accelerate 1.15.0: TrainingArguments(ddp_timeout=SECONDS) bounds how long processes wait for
# each other. With use_cpu=True it does not reach the process group: gloo keeps its own half an hour, so that a job whose
# other process has hung is not ended.
# Seen: ddp_timeout=3, one process comes 12 seconds late: the other waits for it, exit code 0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile transformers==5.23.0 accelerate==1.15.0
cat > wait.py <<'PY'
import time

import torch.distributed as dist
from transformers import TrainingArguments


arguments = TrainingArguments("out", use_cpu=True, ddp_timeout=3, report_to="none")
assert arguments.world_size == 2 and arguments.device.type == "cpu"
dist.barrier()
start = time.monotonic()
if arguments.process_index == 1:
    time.sleep(12)
dist.barrier()
waited = time.monotonic() - start
print(f"process {arguments.process_index} waited {waited:.0f} s")
assert waited > 10
PY
OMP_NUM_THREADS=1 venv/bin/python -m torch.distributed.run --nproc-per-node 2 --standalone wait.py
