#!/usr/bin/env bash
# Syphus without an endpoint: the requests of a run as files, answered by vLLM's batch runner on this machine's GPU.
#   examples/syphus/vllm_batch.sh video.DenseCaptions train.json Qwen/Qwen2.5-7B-Instruct runs/dc
# Given again after an interruption it asks what has no result yet.
set -euo pipefail
[ $# -eq 4 ] || { echo "usage: $0 KIND ANNOTATIONS MODEL FOLDER" >&2; exit 2; }
kind=$1 annotations=$2 model=$3 run=$4

[ -e "$run/run.json" ] || otter-hf syphus run "$kind" --annotations "$annotations" --model "$model" --output "$run" \
    --batch-files
for requests in "$run"/batch/requests-*.jsonl; do
    results=${requests/requests-/results-}
    [ -e "$results" ] && continue
    vllm run-batch --input-file "$requests" --output-file "$results.incomplete" --model "$model"
    mv "$results.incomplete" "$results"
done
otter-hf syphus resume "$run" --batch-results "$run"/batch/results-*.jsonl
