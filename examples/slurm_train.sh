#!/bin/bash
# Fine-tuning on a SLURM cluster, one task per node, which starts a process for each of its GPUs:
#
#     sbatch examples/slurm_train.sh RECIPE.yaml [--flag value ...]
#     sbatch --nodes 4 examples/slurm_train.sh RECIPE.yaml --fsdp full_shard
#
# The environment (`conda activate`, `module load`) is that of the shell that calls sbatch. Two minutes before the time
# is over SLURM sends SIGTERM: training writes a checkpoint and ends with 143, the job puts itself into the queue again,
# and goes on from there. A node that fails is tried again, twice.
#SBATCH --job-name=otter-hf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail

master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:-8}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK / gpus))}
# the time a checkpoint may take after SIGTERM before torchrun kills
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
# a store of its own for each attempt, without the addresses of processes that died
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

srun --kill-on-bad-exit=0 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$gpus" \
    --rdzv-backend c10d --rdzv-endpoint "$master:$((20000 + SLURM_JOB_ID % 10000))" --rdzv-id "$SLURM_JOB_ID" \
    --max-restarts 2 \
    -m otter_hf.cli train "$@" --resume_from_checkpoint auto &
step=$!

stopped=0
trap 'stopped=1; scancel --signal TERM "$SLURM_JOB_ID.0"' TERM
# a trapped signal ends `wait`, the step is still at work
status=0
wait "$step" || status=$?
if [ "$stopped" = 1 ]; then
    wait "$step" || status=$?
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
