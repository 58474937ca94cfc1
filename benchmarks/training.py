"""Fine-tuning as users run it: real tokens per second, waiting for data, model FLOP utilisation.

    OMP_NUM_THREADS=2 python benchmarks/training.py      # minutes on two cores

From MIMIC-IT files on disk through two data loader workers and `OtterTrainer`, optimizer and logs included. The data:
512 questions about pictures of 224 x 224 in JPEG, with a heavy-tailed length, as instruction data has: log-normal with
median 64 tokens and sigma 0.8, between 16 and 512, half of it the answer. The model, random weights in float32: Llama
of width 256 with 4 layers and a vocabulary of 8,192, a gated cross-attention in front of every second, 64 latents per
picture; the vision tower is small and frozen. 16 samples make a step.

ours: packed rows, logits where a label asks for them (the defaults)
peer: the same model on padded rows, logits of every position
between: padded rows, logits where a label asks for them

The figures are those of the training's own logs, without each run's first two steps.
"""

import argparse
import logging
import random
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from _common import report, summary
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPImageProcessorPil

from otter_hf import OtterConfig, OtterProcessor
from otter_hf.data import write_mimicit
from otter_hf.data.collator import OtterCollator
from otter_hf.data.mixture import MimicitMixture
from otter_hf.testing.otter import byte_tokenizer
from otter_hf.training.arguments import DataArguments, ModelArguments, TrainingArguments
from otter_hf.training.flops import measure_peak_flops
from otter_hf.training.kernels import choose_attention
from otter_hf.training.plan import make_plan, meta_model
from otter_hf.training.trainer import OtterTrainer


SAMPLES, PICTURES, BATCH, SIDE = 512, 64, 16, 224


def make_processor() -> OtterProcessor:
    """A token is a byte, so that a text has the length asked for."""
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    size = {"height": SIDE, "width": SIDE}
    return OtterProcessor(
        CLIPImageProcessorPil(size=size, do_center_crop=False), OtterProcessor.prepare_tokenizer(tokenizer)
    )


def make_config(processor: OtterProcessor) -> OtterConfig:
    text = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "vocab_size": 8192}
    text |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    vision = {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": 32, "hidden_size": 64}
    vision |= {"intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return OtterConfig(
        text_config=text,
        vision_config=vision,
        cross_attn_every_n_layers=2,
        cross_attn_gate_init=1.0,
        perceiver_depth=2,
        perceiver_num_heads=2,
        perceiver_head_dim=32,
        image_token_id=processor.image_token_id,
        end_of_chunk_token_id=processor.end_of_chunk_token_id,
        answer_token_id=processor.answer_token_id,
    )


def write_data(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    lengths = (64 * np.exp(0.8 * generator.standard_normal(SAMPLES))).astype(int).clip(16, 512)
    frame = len("User: GPT:") + 5  # and the special tokens
    letters = random.Random(0)

    def text(length: int) -> str:
        return "".join(letters.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(max(1, length)))

    records = {
        f"INS_{i}": {
            "instruction": text(length - length // 2 - frame),
            "answer": text(length // 2 - 1),
            "image_ids": [f"IMG_{i % PICTURES}"],
        }
        for i, length in enumerate(lengths.tolist())
    }
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(PICTURES):
        noise = Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        noise.resize((SIDE, SIDE)).save(pictures / f"IMG_{i}.jpg")
    images = {f"IMG_{i}": pictures / f"IMG_{i}.jpg" for i in range(PICTURES)}
    paths = write_mimicit(folder, "LA", records, images)
    entry = {"mimicit_path": str(paths.instructions_path), "images_path": str(paths.images_path)}
    (folder / "data.yaml").write_text(yaml.safe_dump({"IMAGE_TEXT": {"LA": entry}}))
    return folder / "data.yaml"


class FullLogits:
    """A collator whose batches ask the model for the logits of every position."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, samples):
        return self.collator(samples) | {"skip_logits": False}


def train(folder: Path, processor, mixture, packing: bool, full_logits: bool, steps: int, peak: float) -> list[dict]:
    """The logs of a run of `steps` steps from the untrained model."""
    model_args = ModelArguments(str(folder / "base"), freeze=["vision"])
    data_args = DataArguments(str(folder / "data.yaml"), packing=packing, max_length=640)
    training_args = TrainingArguments(
        str(folder / "out"),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_num_workers=2,
        peak_flops=peak,
        use_cpu=True,
        disable_tqdm=True,
    )
    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    attention = choose_attention(config, model_args, data_args, training_args)
    plan = make_plan(meta_model(model_args, config, attention), model_args, data_args, training_args)
    model = AutoModelForImageTextToText.from_pretrained(folder / "base", attn_implementation=attention)
    model.model.vision_tower.requires_grad_(False)
    collator = OtterCollator(processor, max_length=data_args.max_length, packing=packing)
    trainer = OtterTrainer(
        model=model,
        args=training_args,
        data_collator=FullLogits(collator) if full_logits else collator,
        train_dataset=mixture,
        processing_class=processor,
        flops=plan.flops,
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    variants = {"ours": (True, False), "between": (False, False), "peer": (False, True)}
    runs = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processor = make_processor()
        processor.save_pretrained(folder / "base")
        AutoModelForImageTextToText.from_config(make_config(processor)).save_pretrained(folder / "base")
        mixture = MimicitMixture(write_data(folder), cache_dir=folder / "cache")
        for _ in range(options.repeats):
            peak = measure_peak_flops(torch.device("cpu"), torch.float32)
            for variant, (packing, full_logits) in variants.items():
                runs[variant].append(train(folder, processor, mixture, packing, full_logits, options.steps, peak))
    difference = max(
        abs(ours["loss"] / peer["loss"] - 1) for ours, peer in zip(runs["ours"][0], runs["peer"][0], strict=True)
    )
    if difference > 1e-3:
        raise SystemExit(f"Packed and padded do not learn the same: the losses differ by {difference:.1e}.")

    def measured(variant: str, key: str) -> list[float]:
        return [statistics.median(entry[key] for entry in run[2:]) for run in runs[variant]]

    speeds = {variant: measured(variant, "tokens_per_second") for variant in variants}
    rows = [
        {
            "workload": f"{BATCH} samples a step",
            "unit": "real tokens per second",
            **{variant: summary(values, 1) for variant, values in speeds.items()},
            "ratio": summary([a / b for a, b in zip(speeds["ours"], speeds["peer"], strict=True)], 2),
            "largest_difference_of_losses": difference,
        }
    ]
    for key, unit in (("data_wait", "share of the time waiting for data"), ("mfu", "model FLOP utilisation")):
        values = {variant: summary(measured(variant, key), 4) for variant in variants}
        rows.append({"workload": f"{BATCH} samples a step", "unit": unit, **values})
    report("training", "the same model on padded rows, logits of every position", rows)


if __name__ == "__main__":
    main()
