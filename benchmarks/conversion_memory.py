"""
Peak memory of a conversion, on a synthetic 2023 checkpoint of several GB.

    python benchmarks/conversion_memory.py [--gigabytes 2.5]

Writes an Otter folder as the 2023 code did (`pytorch_model.bin` shards of about 1 GB, float32, random values), and the
same as a single safetensors file; converts each to bfloat16 shards of 1 GB in a process of its own, and compares the
peak resident memory of that process (`VmHWM` of Linux) with that of loading the same checkpoint into a model and
saving it (`from_pretrained`, `save_pretrained`). The result goes to `benchmarks/results/conversion_memory.json`.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from otter_hf import OtterProcessor, __version__
from otter_hf.conversion.export import legacy_name, to_legacy_config
from otter_hf.conversion.memory import load_model_config
from otter_hf.conversion.plan import build_meta_model
from otter_hf.testing.otter import byte_tokenizer


GB = 10**9
SHARD = GB

# One process each. Not `ru_maxrss`: a process inherits that from the one that started it.
MEASURE = """
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
"""
CONVERT = """
import json, sys
from otter_hf.conversion import finish, plan_folder
before = peak()
finish(plan_folder(sys.argv[1]), sys.argv[2], dtype="bfloat16", max_shard_size=int(sys.argv[3]))
print(json.dumps([before, peak()]))
"""
LOAD_AND_SAVE = """
import json, sys, torch
import otter_hf
from transformers import AutoModelForImageTextToText
before = peak()
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2], max_shard_size=int(sys.argv[3]))
print(json.dumps([before, peak()]))
"""


def write_checkpoint(folder: Path, gigabytes: float) -> dict:
    """An Otter folder of 2023 of about that size, in shards, and beside it the same weights in one file."""
    tokenizer = OtterProcessor.prepare_tokenizer(byte_tokenizer(bos_token="<s>", eos_token="</s>"))
    vision = {"model_type": "clip_vision_model", "hidden_size": 256, "intermediate_size": 1024, "image_size": 56}
    vision |= {"num_attention_heads": 4, "num_hidden_layers": 2, "patch_size": 14}
    # a layer of this width has 0.2 GB in float32
    text = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16}
    text |= {"num_hidden_layers": max(1, round((gigabytes - 0.5) / 0.21)), "vocab_size": 32004}
    (folder / "sharded").mkdir(parents=True)
    (folder / "single").mkdir()
    config_file = folder / "config.json"
    vocabulary = tokenizer.get_vocab()
    ids = {"image_token_id": vocabulary["<image>"], "end_of_chunk_token_id": vocabulary["<|endofchunk|>"]}
    fields = {"model_type": "otter", "text_config": text, "vision_config": vision, "perceiver_depth": 6, **ids}
    config_file.write_text(json.dumps({**fields, "answer_token_id": vocabulary["<answer>"]}))
    config = load_model_config(config_file)
    parameters = build_meta_model(config).state_dict()
    shards, size, weight_map = [{}], 0, {}
    generator = torch.Generator().manual_seed(0)
    everything = {}
    for name, meta in parameters.items():
        tensor = torch.empty(meta.shape).normal_(0, 0.02, generator=generator)
        num_bytes = tensor.numel() * 4
        if shards[-1] and size + num_bytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][legacy_name(name, config)] = tensor
        everything[legacy_name(name, config)] = tensor
        size += num_bytes
    for number, shard in enumerate(shards, 1):
        file = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        torch.save(shard, folder / "sharded" / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "sharded" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    save_file(everything, folder / "single" / "model.safetensors", {"format": "pt"})
    for layout in ("sharded", "single"):
        legacy = to_legacy_config(config) | {"torch_dtype": "float32"}
        (folder / layout / "config.json").write_text(json.dumps(legacy))
        tokenizer.save_pretrained(folder / layout)
    return {
        "bytes": sum(4 * tensor.numel() for tensor in parameters.values()),
        "largest_source_shard": max(sum(4 * tensor.numel() for tensor in shard.values()) for shard in shards),
        "largest_tensor": max(4 * tensor.numel() for tensor in parameters.values()),
    }


def measure(program: str, source: Path, output: Path) -> dict:
    """Run a program in a process of its own: its peak memory, what it had before it started, its time."""
    started = time.perf_counter()
    command = [sys.executable, "-c", MEASURE + program, str(source), str(output), str(SHARD)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    before, peak = json.loads(result.stdout.splitlines()[-1])
    return {"imports": before, "peak": peak, "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.5, help="size of the float32 checkpoint (default: 2.5)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", help="where to put some three times that size (default: the temporary folder)")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        checkpoint = write_checkpoint(folder, args.gigabytes)
        for layout in ("sharded", "single"):
            runs = {"ours": [], "peer": []}
            for repeat in range(args.repeats):
                for name, program in (("ours", CONVERT), ("peer", LOAD_AND_SAVE)):
                    output = folder / f"{layout}-{name}-{repeat}"
                    runs[name].append(measure(program, folder / layout, output))
                    subprocess.run(["rm", "-r", str(output)], check=True)
            rows.append(summarise(layout, runs, checkpoint))
            print(json.dumps(rows[-1]))
    result = {
        "benchmark": "conversion_memory",
        "checkpoint": checkpoint,
        "target_shard": SHARD,
        "rows": rows,
        "device": f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "otter_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "command": " ".join(["python", "benchmarks/conversion_memory.py", *sys.argv[1:]]),
    }
    path = Path(__file__).parent / "results" / "conversion_memory.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def summarise(layout: str, runs: dict[str, list[dict]], checkpoint: dict) -> dict:
    """One row: peak bytes (min, median, max) of both ways, and the bound 1.3 x largest shard + 1 GB."""
    row = {"source": layout}
    for name, measured in runs.items():
        peaks = sorted(run["peak"] for run in measured)
        row[name] = {
            "peak": [peaks[0], statistics.median(peaks), peaks[-1]],
            "imports": statistics.median(run["imports"] for run in measured),
            "seconds": statistics.median(run["seconds"] for run in measured),
        }
    row["ratio"] = row["ours"]["peak"][1] / row["peer"]["peak"][1]
    largest = checkpoint["bytes"] if layout == "single" else checkpoint["largest_source_shard"]
    row["bound"] = int(1.3 * min(largest, SHARD) + GB)
    row["within_bound"] = row["ours"]["peak"][2] <= row["bound"]
    return row


if __name__ == "__main__":
    main()
