"""Training step of OtterHD beside the same model in plain transformers, on images of mixed and of equal sizes.

    python benchmarks/otterhd.py            # timings and peak memory, about ten minutes on two cores
    python benchmarks/otterhd.py --repeats 3

Both sides hold the same random weights and see the same samples; one step is forward and backward. The peer is
transformers' `FuyuForCausalLM` with SDPA on a right-padded batch, with the RoPE base set right. Ours is
`OtterHDForConditionalGeneration` on one packed row, with logits for supervised positions only. The runs alternate, and
the losses are compared before anything is timed. Peak memory is that of a process of its own for each side.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers
from transformers import FuyuConfig, FuyuForCausalLM

from otter_hf.models.otterhd import OtterHDConfig, OtterHDForConditionalGeneration


PATCH = 30
IMAGE_TOKEN, NEWLINE, TEXT_START = 3, 6, 1
QUESTION, ANSWER = 46, 40  # tokens of text per sample, the second of them supervised
# sides in pixels of the square image of each sample
WORKLOADS = {"mixed 448+512+768+448": (448, 512, 768, 448), "uniform 4 x 300": (300,) * 4}
MEMORY_WORKLOAD = (768, 768, 448)
RESULTS = Path(__file__).parent / "results"


def make_config(cls, vocabulary: int, hidden: int, layers: int, heads: int):
    return cls(
        patch_size=PATCH,
        image_token_id=IMAGE_TOKEN,
        text_config={
            "model_type": "persimmon",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "rope_theta": 25000.0,
        },
    )


def make_batches(sides, vocabulary: int) -> tuple[dict, dict, int]:
    """The samples as one packed row and as a right-padded batch, and the number of their tokens."""
    generator = torch.Generator().manual_seed(0)
    rows, patches = [], []
    for side in sides:
        count = -(-side // PATCH)
        text = torch.randint(100, vocabulary, (QUESTION + ANSWER,), generator=generator).tolist()
        rows.append(([IMAGE_TOKEN] * count + [NEWLINE]) * count + [TEXT_START] + text)
        patches.append(torch.rand(count * count, 3 * PATCH * PATCH, generator=generator) * 2 - 1)
    labels = [[-100] * (len(row) - ANSWER) + row[-ANSWER:] for row in rows]
    pixel_values = torch.cat(patches)
    packed = {
        "input_ids": torch.tensor([sum(rows, [])]),
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "labels": torch.tensor([sum(labels, [])]),
        "pixel_values": pixel_values,
    }
    length = max(map(len, rows))
    padded = {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "labels": torch.tensor([row + [-100] * (length - len(row)) for row in labels]),
        "pixel_values": pixel_values,
    }
    return packed, padded, sum(map(len, rows))


def make_models(names=("ours", "peer"), **sizes) -> dict:
    models = {}
    torch.manual_seed(0)
    if "ours" in names:
        config = make_config(OtterHDConfig, **sizes)
        model = OtterHDForConditionalGeneration._from_config(config, attn_implementation="varlen_sdpa")
        models["ours"] = model.train()
    if "peer" in names:
        config = make_config(FuyuConfig, **sizes)
        models["peer"] = FuyuForCausalLM._from_config(config, attn_implementation="sdpa").train()
    if len(models) == 2:
        models["peer"].load_state_dict(models["ours"].state_dict())
    return models


def step(model, batch) -> float:
    loss = model(**batch).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.item()


def time_workload(name: str, sides, repeats: int, sizes: dict) -> dict:
    packed, padded, tokens = make_batches(sides, sizes["vocabulary"])
    batches = {"ours": packed, "peer": padded}
    models = make_models(**sizes)
    losses = {side: step(models[side], batches[side]) for side in models}  # also the warm-up
    if abs(losses["ours"] - losses["peer"]) > 1e-4:
        raise SystemExit(f"The two sides do not compute the same loss: {losses}.")
    seconds = {side: [] for side in models}
    for _ in range(repeats):
        for side in models:
            start = time.perf_counter()
            step(models[side], batches[side])
            seconds[side].append(time.perf_counter() - start)
    row = {"workload": name, "real_tokens": tokens, "padded_tokens": padded["input_ids"].numel(), "unit": "tokens/s"}
    for side, times in seconds.items():
        row[side] = {
            "median": round(tokens / statistics.median(times), 1),
            "min": round(tokens / max(times), 1),
            "max": round(tokens / min(times), 1),
        }
    row["ratio"] = round(row["ours"]["median"] / row["peer"]["median"], 2)
    row["loss_difference"] = abs(losses["ours"] - losses["peer"])
    return row


def memory_of_process(field: str) -> float:
    """A field of /proc/self/status in MiB: `VmRSS`, memory in use, or `VmHWM`, the most that ever was."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak_memory(side: str, sizes: dict) -> tuple[float, int]:
    """The memory in MiB that one step takes on top of the model, and the number of tokens."""
    model = make_models((side,), **sizes)[side]
    packed, padded, tokens = make_batches(MEMORY_WORKLOAD, sizes["vocabulary"])
    # building the model may take more than a frugal step: start the high-water mark again (Linux)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_of_process("VmRSS")
    step(model, packed if side == "ours" else padded)
    return memory_of_process("VmHWM") - before, tokens


def memory_row(sizes: dict, repeats: int) -> dict:
    row = {"workload": "peak memory of a step, vocabulary 262144", "unit": "MiB"}
    for side in ("ours", "peer"):
        measured = []
        for _ in range(repeats):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
                mebibytes, row["real_tokens"] = fresh_process.submit(peak_memory, side, sizes).result()
            measured.append(round(mebibytes))
        row[side] = {"median": statistics.median(measured), "min": min(measured), "max": max(measured)}
    row["ratio"] = round(row["ours"]["median"] / row["peer"]["median"], 3)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = {"vocabulary": 16384, "hidden": 512, "layers": 6, "heads": 8}
    rows = [time_workload(name, sides, arguments.repeats, sizes) for name, sides in WORKLOADS.items()]
    rows.append(memory_row({"vocabulary": 262144, "hidden": 64, "layers": 2, "heads": 4}, min(arguments.repeats, 3)))
    result = {
        "benchmark": "otterhd",
        "device": f"CPU, {arguments.threads} threads, {platform.machine()}",
        "dtype": "float32",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": sizes,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "otterhd.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
