"""Training step of our MPT decoder beside transformers' `MptForCausalLM`: time and peak memory over the length.

    OMP_NUM_THREADS=2 python benchmarks/mpt.py      # about five minutes on two cores

Random weights, float32: width 512, 8 heads, 6 layers, vocabulary 1024; both sides hold the same weights and see the
same row of tokens, forward and backward, and their losses are compared. The peer runs `eager`, all it has; ours runs
`sdpa`. Peak memory is that of a process of its own, above weights, gradients and libraries, with an allocator that
returns freed blocks at once. 8,192 tokens are run on our side only, with 6 and with 12 layers: the peer's memory there
is extrapolated from a parabola through its three measured lengths.
"""

import argparse
import multiprocessing
import os
import resource
import time

import psutil
import torch
from _common import compare, report, summary
from torch.profiler import profile
from transformers import MptConfig, MptForCausalLM

from otter_hf.models.mpt import OtterMptConfig, OtterMptForCausalLM


SIZES = {"d_model": 512, "n_heads": 8, "n_layers": 6, "vocab_size": 1024}
LENGTHS = (512, 1024, 2048)
LONG, DEEP = 8192, 12


def make_model(side: str, layers: int = SIZES["n_layers"]):
    torch.manual_seed(0)
    sizes = {**SIZES, "n_layers": layers}
    if side == "peer":
        return MptForCausalLM._from_config(MptConfig(**sizes, max_seq_len=max(LENGTHS))).train()
    return OtterMptForCausalLM._from_config(OtterMptConfig(**sizes), attn_implementation="sdpa").train()


def make_ids(length: int) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(length))


def step(model, ids: torch.Tensor) -> float:
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item()


def time_row(ours, peer, length: int, repeats: int) -> dict:
    ids = make_ids(length)
    losses = step(ours, ids), step(peer, ids)
    if abs(losses[0] - losses[1]) > 1e-4:
        raise SystemExit(f"The two sides do not compute the same loss: {losses}.")
    workload = f"forward and backward of {length} tokens"
    difference = abs(losses[0] - losses[1])
    return compare(workload, lambda: step(ours, ids), lambda: step(peer, ids), repeats, loss_difference=difference)


def measure_step(side: str, length: int, layers: int, threads: int, queue):
    """Puts `(MiB above weights and gradients, seconds)` of one step into `queue`."""
    torch.set_num_threads(threads)
    model = make_model(side, layers)
    step(model, make_ids(16))  # libraries are loaded and gradients allocated
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    step(model, make_ids(length))
    seconds = time.perf_counter() - start
    queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before / 2**20, seconds))


def in_a_process(side: str, length: int, threads: int, layers: int = SIZES["n_layers"]) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure_step, args=(side, length, layers, threads, queue))
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # glibc, in the child: blocks of 1 MiB go back when freed
    process.start()
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    measured = queue.get(timeout=1200)
    process.join()
    return measured


def memory_row(length: int, repeats: int, threads: int) -> dict:
    mebibytes = {"ours": [], "peer": []}
    for _ in range(repeats):
        for side, values in mebibytes.items():
            values.append(in_a_process(side, length, threads)[0])
    return {
        "workload": f"peak memory of {length} tokens above weights and gradients, ratio = ours over peer",
        "unit": "MiB",
        **{side: summary(values, 0) for side, values in mebibytes.items()},
        "ratio": summary([ours / peer for ours, peer in zip(*mebibytes.values(), strict=True)], 3),
    }


def long_row(layers: int, peers: dict[int, float], threads: int) -> dict:
    """`peers`: MiB of the peer by length."""
    mebibytes, seconds = in_a_process("ours", LONG, threads, layers)
    powers = torch.tensor([[length**i for i in range(3)] for length in peers], dtype=torch.float64)
    parabola = torch.linalg.solve(powers, torch.tensor(list(peers.values()), dtype=torch.float64))
    extrapolated = sum(float(parabola[i]) * LONG**i for i in range(3))
    return {
        "workload": f"forward and backward of {LONG} tokens, {layers} layers",
        "ours": {"MiB": round(mebibytes), "s": round(seconds, 2)},
        "peer": {"MiB_extrapolated": round(extrapolated), "MiB_measured": {n: round(m) for n, m in peers.items()}},
    }


def profile_row(model, length: int) -> dict:
    """Share of the step's CPU time by kind of operation."""
    ids = make_ids(length)
    with profile() as trace:
        step(model, ids)
    shares = {"matrix products": 0.0, "attention": 0.0, "everything else": 0.0}
    for event in trace.key_averages():
        if event.key in ("aten::mm", "aten::addmm", "aten::bmm"):
            kind = "matrix products"
        elif "scaled_dot_product" in event.key:
            kind = "attention"
        else:
            kind = "everything else"
        shares[kind] += event.self_cpu_time_total
    total = sum(shares.values())
    return {
        "workload": f"profile of {length} tokens",
        "unit": "share of CPU time",
        "ours": {kind: round(share / total, 3) for kind, share in shares.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    threads = torch.get_num_threads()

    memory_rows = [memory_row(length, min(arguments.repeats, 2), threads) for length in LENGTHS]
    shallow = {length: row["peer"]["median"] for length, row in zip(LENGTHS, memory_rows, strict=True)}
    deep = {length: in_a_process("peer", length, threads, DEEP)[0] for length in LENGTHS}
    long_rows = [long_row(SIZES["n_layers"], shallow, threads), long_row(DEEP, deep, threads)]
    ours, peer = make_model("ours"), make_model("peer")
    ours.load_state_dict(peer.state_dict())
    time_rows = [time_row(ours, peer, length, arguments.repeats) for length in LENGTHS]
    rows = [*time_rows, *memory_rows, *long_rows, profile_row(ours, max(LENGTHS))]
    report("mpt", "transformers MptForCausalLM, eager attention", rows)


if __name__ == "__main__":
    main()
