#!/usr/bin/env bash
# accelerate 1.15.0: a prepared loader tells the epoch to a dataset that has set_epoch, which then draws or augments
# anew. With several processes and a sampler that has set_epoch too, as the Trainer's has (use_seedable_sampler), it
# tells the sampler alone; a batch sampler of one's own is told with one process alone, too. What works on one GPU gives
# the rows of epoch 0 for ever on two.
# Seen: epochs told to the dataset, and to a batch sampler: 1 process: [0, 1, 2] both, 2 processes: [] both
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0
venv/bin/pip install --quiet --no-compile accelerate==1.15.0
venv/bin/python -W ignore - <<'PY'
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler


class Rows(list):
    def __init__(self):
        super().__init__(range(8))
        self.told = []

    def set_epoch(self, epoch):
        self.told.append(epoch)


class Batches(BatchSampler):
    def __init__(self):
        super().__init__(SequentialSampler(range(8)), 2, False)
        self.told = []

    def set_epoch(self, epoch):
        self.told.append(epoch)


def told(listener, loader, processes):
    loader = prepare_data_loader(loader, num_processes=processes, process_index=0, use_seedable_sampler=True)
    for _ in range(3):
        list(loader)
    return listener.told


seen = {}
for processes in (1, 2):
    rows, batches = Rows(), Batches()
    seen[processes] = (
        told(rows, DataLoader(rows, batch_size=2, shuffle=True), processes),
        told(batches, DataLoader(range(8), batch_sampler=batches), processes),
    )
print(f"processes -> epochs told to the dataset, and to a batch sampler: {seen}")
assert seen == {1: ([0, 1, 2], [0, 1, 2]), 2: ([], [])}
PY
