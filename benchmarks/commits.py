"""This build beside the same project at a commit before: what a change cost, or saved.

    OMP_NUM_THREADS=2 python benchmarks/commits.py --peer 9bb62d4      # about eight minutes on two cores

The models and batches are those of `decoding.py`, `packing.py`, `otterhd.py` and `mpt.py`; only the package differs.
Each side is a process of its own, and they run in turn. What both compute (tokens or losses) is compared first.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from _common import Side, check_out, commit_parser, compare, report


PEER_COMMIT = "9bb62d4"


def make_workloads() -> dict:
    """Function of each workload, by its name; each returns a list of numbers."""
    import decoding
    import mpt
    import otterhd
    import packing

    flamingo = decoding.make_ours()
    inputs, _ = decoding.make_inputs(4, 4)

    def forward():
        with torch.no_grad():
            return flamingo(**inputs).logits[:, -1].sum(-1).tolist()

    samples = packing.make_samples(torch.Generator().manual_seed(0))
    pixels = torch.randn(len(samples), 3, 56, 56, generator=torch.Generator().manual_seed(1))
    padded = packing.make_model("sdpa"), packing.padded(samples, pixels)
    packed = packing.make_model("varlen_sdpa"), packing.packed(samples, pixels)
    sizes = {"vocabulary": 4096, "hidden": 256, "layers": 4, "heads": 4}
    otter_hd = drawn_alike(otterhd.make_models(("ours",), **sizes)["ours"])
    patches, _, _ = otterhd.make_batches((300, 448, 300, 300), sizes["vocabulary"])
    decoder, ids = mpt.make_model("ours"), mpt.make_ids(1024)
    return {
        "forward pass of 4 rows of 96 tokens, 4 images": forward,
        "32 tokens x 4 rows after 96 tokens, 4 images": lambda: decoding.generate(flamingo, inputs)[:, 96:].tolist(),
        "training step of 16 samples, padded": lambda: [packing.step(*padded).item()],
        "training step of 16 samples, packed": lambda: [packing.step(*packed).item()],
        "training step of OtterHD, 4 images, packed": lambda: [otterhd.step(otter_hd, patches)],
        "training step of an MPT, 1,024 tokens": lambda: [mpt.step(decoder, ids)],
    }


def drawn_alike(model: torch.nn.Module) -> torch.nn.Module:
    """With weights that do not depend on the order in which the package draws them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                parameter.normal_(std=0.02, generator=generator)
    return model


def work() -> None:
    """One side: a workload's name comes in, what it computed goes out."""
    workloads = make_workloads()
    for line in sys.stdin:
        name = line.strip()
        print(json.dumps(workloads[name]() if name else list(workloads)), flush=True)


def main():
    args = commit_parser(__doc__, PEER_COMMIT).parse_args()
    if args.work:
        work()
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(__file__).resolve().parent.parent / "src", check_out(args.peer, folder)
        ours, peer = (Side(__file__, source) for source in sources)
        for name in ours.run():
            values = [torch.tensor(side.run(name), dtype=torch.float64) for side in (ours, peer)]
            difference = float((values[0] - values[1]).abs().max())
            run = [lambda side=side, name=name: side.run(name) for side in (ours, peer)]
            rows.append(compare(name, *run, args.repeats, turns=3, max_difference=difference))
        ours.close()
        peer.close()
    report("commits", f"this project at commit {args.peer}", rows)


if __name__ == "__main__":
    main()
