"""A film of 16 frames beside 7 pictures in a batch: only real frames encoded, beside all that the batch is padded to.

    OMP_NUM_THREADS=2 python benchmarks/frames.py      # about five minutes on two cores

Random weights, float32: CLIP ViT-B/32 at 224 pixels, a resampler of 6 layers with 64 latents, and a decoder so small
that the vision side is what is timed. 8 rows of 16 tokens hold one medium each, the first a film of 16 frames, the
others pictures. The peer is this project at a commit before `pixel_attention_mask`, taken out of git's history into a
temporary folder: it encodes 8 x 16 frames. Each side is a process of its own, and they run in turn. Compared first:
the film's logits, which padding never changed, are the same. Memory is what the resident set of a fresh process grows
by in one forward pass, at its peak.
"""

import inspect
import json
import resource
import sys
import tempfile
from pathlib import Path

import torch
from _common import Side, check_out, commit_parser, compare, report, summary


PEER_COMMIT = "9bb62d4"
ROWS, FRAMES, LENGTH, IMAGE = 8, 16, 16, 63


def make_model():
    from otter_hf import FlamingoConfig, FlamingoForConditionalGeneration

    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 32, "hidden_size": 768}
    vision |= {"intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "vocab_size": IMAGE + 1}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = FlamingoConfig(
        text_config=text,
        vision_config=vision,
        cross_attn_every_n_layers=1,
        cross_attn_gate_init=1.0,
        perceiver_num_latents=64,
        image_token_id=IMAGE,
    )
    return FlamingoForConditionalGeneration(config).eval()


def make_batch(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(ROWS, 1, FRAMES, dtype=torch.long)
    mask[:, :, 0] = mask[0] = 1
    pixels = torch.zeros(ROWS, 1, FRAMES, 3, 224, 224)
    pixels[mask.bool()] = torch.randn(int(mask.sum()), 3, 224, 224, generator=generator)
    ids = torch.randint(0, IMAGE, (ROWS, LENGTH), generator=generator)
    ids[:, 1] = IMAGE
    batch = {"input_ids": ids, "pixel_values": pixels}
    if "pixel_attention_mask" in inspect.signature(model.forward).parameters:
        batch["pixel_attention_mask"] = mask
    return batch


def work() -> None:
    """One side: a forward pass and a line of JSON for every line that comes in."""
    model = make_model()
    batch = make_batch(model)
    frames = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: frames.append(len(args[0])))
    for _ in sys.stdin:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        answer = {"film": logits[0].flatten().tolist(), "frames": frames[-1], "megabytes": grown / 1024}
        print(json.dumps(answer), flush=True)


def main():
    args = commit_parser(__doc__, PEER_COMMIT).parse_args()
    if args.work:
        work()
        return
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(__file__).resolve().parent.parent / "src", check_out(args.peer, folder)
        first, memory = [], ([], [])
        for _ in range(3):
            for grown, source in zip(memory, sources, strict=True):
                side = Side(__file__, source)
                first.append(side.run())
                grown.append(first[-1]["megabytes"])
                side.close()
        film = [torch.tensor(answer["film"]) for answer in first[:2]]
        ours, peer = (Side(__file__, source) for source in sources)
        frames = {"frames_ours": first[0]["frames"], "frames_peer": first[1]["frames"]}
        name = "1 film of 16 frames beside 7 pictures"
        rows = [
            compare(
                f"forward pass, {name}",
                ours.run,
                peer.run,
                args.repeats,
                **frames,
                max_difference_of_the_film=float((film[0] - film[1]).abs().max()),
            ),
            {
                "workload": f"peak memory of a forward pass, {name}",
                "unit": "MB",
                "ours": summary(memory[0], 1),
                "peer": summary(memory[1], 1),
                "ratio": summary([b / a for a, b in zip(*memory, strict=True)], 2),
                **frames,
            },
        ]
        ours.close()
        peer.close()
    report("frames", f"this project at commit {args.peer}, which encodes padding", rows)


if __name__ == "__main__":
    main()
