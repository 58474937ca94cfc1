#!/usr/bin/env bash
# datatrove 0.10.1: a task that has ended leaves a mark with its rank in the logging folder, and a run that is started again
# skips the marked ranks. The number of tasks is no part of the mark: started again with another one, rank 0 is skipped
# though it stands for other files now, and files of the first run are read again. No warning, and the run counts as done.
# Seen: 2 tasks, the second failing, then 4 tasks in the same folder: file 2 written twice, the others once
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile datatrove==0.10.1 orjson==3.11.4
mkdir files
for i in 0 1 2 3; do echo "{\"text\": \"document $i\", \"id\": \"$i\"}" > files/$i.jsonl; done
cat > run.py <<'PY'
import sys
from collections import Counter
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader


def write(data, rank=0, world_size=1):
    for document in data:
        if world_size == 2 and rank == 1:
            raise ValueError("this task fails")
        with open("written.txt", "a") as file:
            file.write(document.id + "\n")
        yield document


if __name__ == "__main__":
    for tasks in (2, 4):
        steps = [JsonlReader("files", glob_pattern="*.jsonl"), write]
        try:
            LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir="logs").run()
        except ValueError as error:
            print(tasks, "tasks:", error)
    counts = Counter(Path("written.txt").read_text().split())
    print(dict(sorted(counts.items())))
    assert counts == {"0": 1, "1": 1, "2": 2, "3": 1}
PY
venv/bin/python run.py 2>/dev/null
