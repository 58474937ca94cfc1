"""A training step beside the code of 2023: the same weights, rows and labels, every position supervised.

    PARITY_CACHE=FOLDER OMP_NUM_THREADS=2 python benchmarks/upstream.py      # about a quarter of an hour on two cores

The peer is otter-ai 0.0.0a8 with transformers 4.35.2 and our version of torch, in the environment that
`tests/parity_2023/run.sh` makes (`FOLDER/venv`). It writes its random weights to a folder, and our model loads them:
the losses of the first step are compared before anything is timed. Float32, eager mode on a CPU, AdamW as each trains
by default (2023: torch's own; ours: torch's fused one), gradients clipped to 1.

Otter on Llama: width 512, 8 layers, 8 heads, vocabulary 32,004, a gated cross-attention in front of every second layer
(79M), and on MPT of the same width with 50,432 tokens, tied (72M); a resampler of 6 layers, width 1,024; a CLIP of two
narrow layers with 256 tokens a picture, as a ViT-L/14 gives, without gradients, on both sides transformers' own.
4 rows of 256 tokens, 2 pictures a row; all but the tower is trained. `memory` is the peak of a process in its steps.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from _common import Side, report, summary


# to try it out, ROWS=1 LENGTH=16 in the environment
ROWS, LENGTH = (int(os.environ.get(name, size)) for name, size in (("ROWS", 4), ("LENGTH", 256)))
PICTURES, IMAGE, END, ANSWER = 2, 32001, 32000, 32002
TOWER = {"hidden_size": 1024, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 16}
TOWER |= {"image_size": 224, "patch_size": 14}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "_name_or_path": "llama", "vocab_size": 32004}
LLAMA |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
LLAMA |= {"num_key_value_heads": 8, "tie_word_embeddings": False}
MPT = {"model_type": "mpt", "architectures": ["MPTForCausalLM"], "d_model": 512, "hidden_size": 512, "n_heads": 8}
MPT |= {"n_layers": 8, "expansion_ratio": 4, "vocab_size": 50432, "no_bias": True, "max_seq_len": 2048}
MPT |= {"attn_config": {"attn_impl": "torch", "alibi": True}}
OURS = {
    "llama": {key: value for key, value in LLAMA.items() if key not in ("architectures", "_name_or_path")},
    "mpt": {"model_type": "otter_mpt", "d_model": 512, "n_heads": 8, "n_layers": 8, "expansion_ratio": 4}
    | {"vocab_size": 50432, "no_bias": True, "max_seq_len": 2048, "tie_word_embeddings": True},
}


class Tokenizer:
    """What the old class asks of a tokenizer, which it would load by its name on the Hub."""

    pad_token = "<PAD>"

    @classmethod
    def from_pretrained(cls, name, **kwargs):
        return cls()

    def add_special_tokens(self, tokens):
        pass

    def encode(self, text: str) -> list[int]:
        return [{"<|endofchunk|>": END, "<image>": IMAGE, "<answer>": ANSWER}[text]]


def make_peer(decoder: str, folder: Path) -> torch.nn.Module:
    from otter_ai.models.otter import modeling_otter
    from otter_ai.models.otter.configuration_otter import OtterConfig

    modeling_otter.AutoTokenizer = Tokenizer
    text = dict(LLAMA if decoder == "llama" else MPT)
    tied = decoder == "mpt"
    config = OtterConfig(dict(TOWER), text, cross_attn_every_n_layers=2, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = modeling_otter.OtterForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.constant_(parameter, 0.5)
    model.save_pretrained(folder, safe_serialization=False)
    model.requires_grad_(True)
    model.vision_encoder.requires_grad_(False)
    return model


def make_ours(decoder: str, folder: Path) -> torch.nn.Module:
    from otter_hf import OtterConfig, OtterForConditionalGeneration

    config = OtterConfig(
        text_config=OURS[decoder],
        vision_config={"model_type": "clip_vision_model", **TOWER},
        cross_attn_every_n_layers=2,
        image_token_id=IMAGE,
        end_of_chunk_token_id=END,
        answer_token_id=ANSWER,
        tie_word_embeddings=decoder == "mpt",
    )
    model = OtterForConditionalGeneration.from_pretrained(folder, config=config)
    model.model.vision_tower.requires_grad_(False)
    return model


def peak_memory() -> int:
    """Of this process since it was asked to forget, in bytes (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def work(side: str, decoder: str, folder: str) -> None:
    """Answers each line, `backward` or `step`, with its seconds and the loss."""
    with contextlib.redirect_stdout(io.StringIO()):  # the old code prints every parameter
        model = (make_peer if side == "peer" else make_ours)(decoder, Path(folder)).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, END, (ROWS, LENGTH), generator=generator)
    ids[:, :: LENGTH // PICTURES] = IMAGE
    pixels = torch.randn(ROWS, PICTURES, 1, 3, 224, 224, generator=generator)
    names = ("vision_x", "lang_x") if side == "peer" else ("pixel_values", "input_ids")
    inputs = {names[0]: pixels, names[1]: ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, **({} if side == "peer" else {"fused": True}))
    Path("/proc/self/clear_refs").write_text("5")
    for line in sys.stdin:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        if line.strip() == "step":
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        seconds = time.perf_counter() - start
        told = {"seconds": seconds, "loss": loss.item(), "memory": peak_memory()}
        told["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        print(json.dumps(told), flush=True)


def compare_sides(decoder: str, old_python: str, repeats: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        peer = Side(
            __file__, python=old_python, arguments=("--side", "peer", "--decoder", decoder, "--folder", folder)
        )
        first = [peer.run("backward")]  # it has written its weights now
        ours = Side(__file__, arguments=("--side", "ours", "--decoder", decoder, "--folder", folder))
        first.insert(0, ours.run("backward"))
        difference = abs(first[0]["loss"] / first[1]["loss"] - 1)
        if difference > 1e-4:
            raise SystemExit(f"{decoder}: the losses differ, {first[0]['loss']} and {first[1]['loss']}.")
        rows = []
        for kind, name in (("backward", "forward and backward pass"), ("step", "whole step")):
            runs = [[side.run(kind) for side in (ours, peer)] for _ in range(repeats + 1)][1:]
            seconds = [[run["seconds"] for run in side] for side in zip(*runs, strict=True)]
            rows.append(
                {
                    "workload": f"{name}, {decoder}",
                    "unit": "s",
                    "ours": summary(seconds[0], 4),
                    "peer": summary(seconds[1], 4),
                    "ratio": summary([b / a for a, b in zip(*seconds, strict=True)], 3),
                    "difference_of_losses": difference,
                    "memory": {"ours": runs[-1][0]["memory"], "peer": runs[-1][1]["memory"]},
                    "parameters": {"ours": first[0]["parameters"], "peer": first[1]["parameters"]},
                }
            )
        ours.close(), peer.close()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--decoder", choices=("llama", "mpt"), help="by default both")
    for name in ("--work", "--side", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS, **({"action": "store_true"} if name == "--work" else {}))
    args = parser.parse_args()
    if args.work:
        work(args.side, args.decoder, args.folder)
        return
    cache = os.environ.get("PARITY_CACHE", Path.home() / ".cache" / "otter-hf-parity-2023")
    old_python = Path(cache) / "venv" / "bin" / "python"
    if not old_python.is_file():
        raise SystemExit(f"There is no {old_python}: tests/parity_2023/run.sh makes it.")
    decoders = [args.decoder] if args.decoder else ["llama", "mpt"]
    rows = [row for decoder in decoders for row in compare_sides(decoder, str(old_python), args.repeats)]
    report("upstream", "otter-ai 0.0.0a8 with transformers 4.35.2", rows)


if __name__ == "__main__":
    main()
