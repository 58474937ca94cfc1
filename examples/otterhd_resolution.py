"""
What resolution buys: one small OtterHD, trained from scratch on the CPU, asked about small things in large pictures.

    python examples/otterhd_resolution.py

Each picture is one of easy-VQA's, a coloured shape on a light background, at a random place of a canvas four times as
large; the shape takes 0.3 to 7 % of it. The model learns as OtterHD did: each training picture is read at a
resolution drawn at random, and the samples of a batch are packed into one row without padding. Then it answers
questions about test pictures at every resolution, and as a control about the picture of another question.

Prints the figures and writes them to `benchmarks/results/otterhd_resolution.json`, the curve to
`out/otterhd_resolution/accuracy.png` and the model to `out/otterhd_resolution/model`.
"""

import argparse
import json
import os
import platform
import random
import re
import time
from collections import Counter
from importlib.metadata import version
from math import log
from pathlib import Path

import easy_vqa
import torch
from matplotlib.figure import Figure
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import Trainer, TrainingArguments
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from otter_hf import OtterHDConfig, OtterHDForConditionalGeneration, OtterHDImageProcessor, OtterHDProcessor
from otter_hf.data import OtterHDCollator, render


RESOLUTIONS = (24, 48, 96)  # pixels of either side
PATCH_SIZE = 12  # pixels
CANVAS = 128  # pixels of either side; easy-VQA's pictures have 64
# of easy-VQA's, those that tell nothing about the picture
QUESTIONS = (
    "what shape is in the image?",
    "what shape does the image contain?",
    "what shape is present?",
    "what color is the shape?",
    "what is the color of the shape?",
)
SHAPES = ("circle", "rectangle", "triangle")
BATCH_SIZE = 32
LEARNING_RATE = 7e-4
RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "otterhd_resolution.json"


def main(output: Path, steps: int) -> None:
    """Trains, evaluates, and writes everything."""
    started = time.time()
    output.mkdir(parents=True, exist_ok=True)
    train = read_split(easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths())
    test = read_split(easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths())
    processor = build_processor([render([turn], "fuyu", "none") for _, turns in train for turn in turns])
    torch.manual_seed(0)
    model = OtterHDForConditionalGeneration(config_for(processor))
    train_seconds = fit(model, processor, train, steps, output)
    model.eval().save_pretrained(output / "model")
    processor.save_pretrained(output / "model")

    generator = random.Random(0)
    questions = [(place(picture, generator), *turn) for picture, turns in test for turn in turns]
    others = [picture for picture, _, _ in questions]
    others = others[len(others) // 2 :] + others[: len(others) // 2]
    shuffled = [(other, *turn) for other, (_, *turn) in zip(others, questions, strict=True)]
    rows = []
    for resolution in RESOLUTIONS:
        patches = resolution // PATCH_SIZE  # of a row, which one more token ends
        row = {"resolution": resolution, "image_tokens": patches * (patches + 1)}
        row |= accuracy(model, processor, questions, resolution)
        row |= {f"{name}_shuffled": v for name, v in accuracy(model, processor, shuffled, resolution).items()}
        print(row, flush=True)
        rows.append(row)

    result = {
        "name": "otterhd_resolution",
        "task": f"easy-VQA pictures of 64 pixels in canvases of {CANVAS}; share of answers right to the letter",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "easy-vqa")},
        "device": f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores, {platform.machine()}",
        "parameters": model.num_parameters(),
        "steps": steps,
        "test_questions": len(questions),
        "train_seconds": round(train_seconds),
        "seconds": round(time.time() - started),
        "rows": rows,
    }
    draw(rows, output / "accuracy.png")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def read_split(questions: tuple, paths: dict[int, str]) -> list[tuple[Image.Image, list[tuple[str, str]]]]:
    """Pictures with the questions that ask for their shape or their colour, and the answers."""
    turns = {image: [] for image in paths}
    for question, answer, image in zip(*questions, strict=True):
        if question in QUESTIONS:
            turns[image].append((question, answer))
    return [(Image.open(paths[image]).convert("RGB"), asked) for image, asked in sorted(turns.items()) if asked]


def place(picture: Image.Image, generator: random.Random) -> Image.Image:
    """The picture at a random place of a canvas of its own background."""
    _, background = max(picture.getcolors(picture.width * picture.height))
    canvas = Image.new("RGB", (CANVAS, CANVAS), background)
    canvas.paste(picture, tuple(generator.randint(0, CANVAS - side) for side in picture.size))
    return canvas


class Scenes(torch.utils.data.Dataset):
    """Endless training samples: a picture at a place drawn anew, its questions in random order."""

    def __init__(self, pictures: list, length: int):
        self.pictures, self.length, self.generator = pictures, length, random.Random(0)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        picture, turns = self.generator.choice(self.pictures)
        return {
            "id": f"scene {index}",
            "turns": self.generator.sample(turns, len(turns)),
            "media_per_turn": [1] + [0] * (len(turns) - 1),
            "media": [[place(picture, self.generator)]],
        }


def fit(model, processor: OtterHDProcessor, pictures: list, steps: int, output: Path) -> float:
    """Trains the model in place; returns the seconds it took."""
    arguments = TrainingArguments(
        output_dir=output / "training",
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.05,
        adam_beta2=0.98,  # the default 0.999 remembers longer than this training lasts
        dataloader_num_workers=1,
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        logging_steps=50,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Scenes(pictures, steps * BATCH_SIZE),
        # the highest twice as often as the others: there is most to learn
        data_collator=OtterHDCollator(processor, dynamic_resolution=[*RESOLUTIONS, max(RESOLUTIONS)]),
    )
    return trainer.train().metrics["train_runtime"]


@torch.inference_mode()
def accuracy(model, processor: OtterHDProcessor, questions: list, resolution: int) -> dict[str, float]:
    """Share of greedy answers that are right to the letter, by what is asked for."""
    right = {"shape": [], "color": []}
    for start in range(0, len(questions), 250):
        pictures, asked, truths = zip(*questions[start : start + 250], strict=True)
        inputs = processor(
            images=[[picture] for picture in pictures],
            text=[render([(question, None)], "fuyu", "none") for question in asked],
            resolution=(resolution, resolution),
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        for given, truth in zip(processor.post_process_image_text_to_text(output), truths, strict=True):
            right["shape" if truth in SHAPES else "color"].append(given == truth)
    return {name: round(sum(values) / len(values), 4) for name, values in right.items()}


def build_processor(texts: list[str]) -> OtterHDProcessor:
    """A processor with a tokenizer like Fuyu's (Unigram with byte fallback), one token for each word of `texts`."""
    counts = Counter(word for text in texts for word in re.findall(r" ?\w+|[:?]", text))
    words = [(word.replace(" ", "▁"), log(count / counts.total())) for word, count in sorted(counts.items())]
    special = ["<unk>", "<s>", "</s>", "|SPEAKER|", "|ENDOFTEXT|", "|NEWLINE|", "▁"]
    fixed = [(piece, 0.0) for piece in [*special, *(f"<0x{byte:02X}>" for byte in range(256))]]
    backend = Tokenizer(models.Unigram([*fixed, *words], unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = TokenizersBackend(
        tokenizer_object=backend, bos_token="|ENDOFTEXT|", eos_token="|ENDOFTEXT|", unk_token="<unk>"
    )
    side = max(RESOLUTIONS)
    image_processor = OtterHDImageProcessor(
        size={"height": side, "width": side}, patch_size={"height": PATCH_SIZE, "width": PATCH_SIZE}
    )
    return OtterHDProcessor(image_processor, tokenizer)


def config_for(processor: OtterHDProcessor) -> OtterHDConfig:
    """Fuyu's architecture, small."""
    return OtterHDConfig(
        patch_size=PATCH_SIZE,
        image_token_id=processor.image_token_id,
        bos_token_id=processor.end_of_text_id,
        eos_token_id=processor.end_of_text_id,
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "rope_theta": 25000.0,
            "initializer_range": 0.05,
        },
    )


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy over resolution, with the control."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    resolutions = [row["resolution"] for row in rows]
    for name, color in (("shape", "tab:blue"), ("color", "tab:orange")):
        axis.plot(resolutions, [row[name] for row in rows], marker="o", color=color, label=f"what {name}?")
        axis.plot(
            resolutions,
            [row[f"{name}_shuffled"] for row in rows],
            marker="x",
            linestyle=":",
            color=color,
            label="the same, another picture",
        )
    axis.set(xlabel="resolution (pixels of either side)", ylabel="share of answers right", ylim=(0, 1.02))
    axis.set_xticks(resolutions)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/otterhd_resolution"))
    parser.add_argument("--steps", type=int, default=1200)
    arguments = parser.parse_args()
    main(arguments.output, arguments.steps)
