#!/usr/bin/env bash
# accelerate 1.15.0: on a CPU `accelerate launch --cpu --num_processes 2` starts one process, without a word; a
# configuration file for FSDP with use_cpu starts two, and Accelerator.prepare() then gives DistributedDataParallel:
# every process holds all parameters. torch's own fully_shard does work on a CPU with gloo.
# Seen: --cpu --num_processes 2: 1 process / FSDP in the file: 2 processes, DistributedDataParallel
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile accelerate==1.15.0
cat > show.py <<'PY'
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
model = accelerator.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)))
held = sum(parameter.numel() for parameter in model.parameters())
line = f"{accelerator.num_processes} process(es), {type(model).__name__}, {held} parameters each"
open(f"seen{accelerator.process_index}", "w").write(line)
PY
cat > fsdp.yaml <<'YAML'
distributed_type: FSDP
use_cpu: true
num_machines: 1
machine_rank: 0
num_processes: 2
main_process_port: 0
mixed_precision: "no"
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: NO_WRAP
YAML
export OMP_NUM_THREADS=1
venv/bin/accelerate launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no show.py
echo "--cpu --num_processes 2: $(cat seen*)"
grep -q '^1 process(es), Sequential, 40 ' seen0
test ! -e seen1
venv/bin/accelerate launch --config_file fsdp.yaml show.py
echo "FSDP in the file: $(cat seen0)"
grep -q '^2 process(es), DistributedDataParallel, 40 ' seen0
grep -q '^2 process(es), DistributedDataParallel, 40 ' seen1
