"""Fine-tuning step on packed rows, beside padded rows; and how much of the machine's matrix multiplication it reaches.

    OMP_NUM_THREADS=2 python benchmarks/packing.py      # about two minutes on two cores

Random weights, float32: Llama of width 256, 4 layers, vocabulary 4096, a gated cross-attention in front of every
second layer, 64 latents per image; the vision tower is frozen and, with the resampler, small beside the decoder, as it
is in a model of 7B. The samples have one image each and a heavy-tailed length, as instruction data has: log-normal
with median 64 and sigma 0.8, between 16 and 512 tokens; half of the tokens are answers. 16 samples make a step,
forward and backward. Padded: 16 rows as long as the longest sample, attention `sdpa`. Packed: the samples one after
the other in one row, with `position_ids` that restart, a `media_index` and `cu_seq_lens`, as `OtterCollator` gives
them, attention `varlen_sdpa`, the counterpart of flash attention on a CPU. Losses and gradients are compared first.
The ratio is that of real tokens per second.

Model FLOP utilisation: the operations of the packed step, as torch counts those of its matrix multiplications and
attention, over its time, as a share of what a float32 multiplication of 2048 x 2048 matrices reaches in the same run.
"""

import argparse

import torch
from _common import compare, report, summary, time_call
from torch.utils.flop_counter import FlopCounterMode

from otter_hf import FlamingoConfig, FlamingoForConditionalGeneration


WIDTH, LAYERS, HEADS, VOCAB, IMAGE, PAD = 256, 4, 4, 4096, 4095, 0
SAMPLES = 16


def make_model(attention: str) -> FlamingoForConditionalGeneration:
    torch.manual_seed(0)
    text = {"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "vocab_size": VOCAB}
    text |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    vision = {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14, "hidden_size": 64}
    vision |= {"intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = FlamingoConfig(
        text_config=text,
        vision_config=vision,
        cross_attn_every_n_layers=2,
        cross_attn_gate_init=1.0,
        perceiver_depth=2,
        perceiver_num_heads=2,
        perceiver_head_dim=32,
        image_token_id=IMAGE,
    )
    model = FlamingoForConditionalGeneration._from_config(config, attn_implementation=attention).train()
    model.model.vision_tower.requires_grad_(False)
    return model


def make_samples(generator: torch.Generator) -> list[torch.Tensor]:
    lengths = (64 * torch.exp(0.8 * torch.randn(SAMPLES, generator=generator))).long().clamp(16, 512)
    samples = [torch.randint(3, IMAGE, (int(length),), generator=generator) for length in lengths]
    for sample in samples:
        sample[1] = IMAGE
    return samples


def answers(sample: torch.Tensor) -> torch.Tensor:
    labels = sample.clone()
    labels[: len(sample) // 2] = -100
    return labels


def padded(samples: list[torch.Tensor], pixels: torch.Tensor) -> dict:
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(samples, batch_first=True, padding_value=PAD)
    return {
        "input_ids": ids,
        "labels": pad([answers(s) for s in samples], batch_first=True, padding_value=-100),
        "attention_mask": (torch.arange(ids.shape[1]) < torch.tensor([len(s) for s in samples])[:, None]).long(),
        "pixel_values": pixels[:, None],
    }


def packed(samples: list[torch.Tensor], pixels: torch.Tensor) -> dict:
    ids = torch.cat(samples)
    lengths = torch.tensor([len(s) for s in samples])
    boundaries = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    index = [(torch.arange(len(s)) > 0).long() * (i + 1) for i, s in enumerate(samples)]
    return {
        "input_ids": ids[None],
        "labels": torch.cat([answers(s) for s in samples])[None],
        "position_ids": torch.cat([torch.arange(len(s)) for s in samples])[None],
        "media_index": torch.cat(index)[None],
        "pixel_values": pixels[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }


def step(model, batch: dict) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def difference(*sides: tuple) -> float:
    """Largest relative difference of the losses and of any gradient's norm of two pairs of model and batch."""
    values = []
    for model, batch in sides:
        loss = step(model, batch)
        values.append(torch.stack([loss, *(p.grad.norm() for p in model.parameters() if p.grad is not None)]))
    return ((values[0] - values[1]).abs() / values[1].abs().clamp(min=1e-3)).max().item()


def utilisation(model, batch: dict, repeats: int) -> dict:
    """Share of the matrix multiplication peak that the step reaches."""
    with FlopCounterMode(display=False) as counter:
        step(model, batch)
    left, right = torch.randn(2, 2048, 2048)
    shares, peaks = [], []
    for _ in range(repeats):
        peaks.append(2 * 2048**3 / min(time_call(lambda: left @ right) for _ in range(3)))
        shares.append(counter.get_total_flops() / time_call(lambda: step(model, batch)) / peaks[-1])
    return {
        "workload": "model FLOP utilisation of the packed step",
        "unit": "share of the matrix multiplication peak",
        "ours": summary(shares, 3),
        "peak_gflops": summary([peak / 1e9 for peak in peaks], 1),
        "step_gflop": round(counter.get_total_flops() / 1e9, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    ours, peer, rows = make_model("varlen_sdpa"), make_model("sdpa"), []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        samples, pixels = make_samples(generator), torch.randn(SAMPLES, 3, 56, 56, generator=generator)
        batches = packed(samples, pixels), padded(samples, pixels)
        error = difference((ours, batches[0]), (peer, batches[1]))
        if error > 1e-3:
            raise SystemExit(f"Packed and padded do not agree: relative difference {error}.")
        real, slots = sum(map(len, samples)), batches[1]["input_ids"].numel()
        rows.append(
            compare(
                f"{SAMPLES} samples, {real} tokens; padded to {slots}",
                lambda batch=batches[0]: step(ours, batch),
                lambda batch=batches[1]: step(peer, batch),
                repeats,
                real_tokens=real,
                padded_tokens=slots,
                relative_difference=error,
            )
        )
    rows.append(utilisation(ours, batches[0], repeats))
    report("packing", "the same step on padded rows", rows)


if __name__ == "__main__":
    main()
