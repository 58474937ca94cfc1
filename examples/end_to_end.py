"""
From a random Flamingo to an Otter that answers: pretraining, `<answer>`, fine-tuning, few-shot evaluation.

    python examples/end_to_end.py --output out/end_to_end

All of it on the CPU in minutes, with the pictures of easy-VQA (`pip install easy-vqa`), one shape of one colour each:

1. captions of the training pictures are rendered ("a red circle", ...) and written as WebDataset shards;
2. a Flamingo of 1.3 million random parameters is pretrained on them: examples/pretrain_flamingo.py;
3. it captions test pictures, without and with examples in front;
4. it becomes an Otter: `otter-hf convert flamingo-to-otter` adds `<answer>`;
5. it is fine-tuned on questions and answers in the form of MIMIC-IT: examples/easy_vqa/train.py;
6. it answers test questions, after 0, 2 and 4 examples.

What the figures have to be compared with is measured as well: captions and answers about shuffled pictures, the most
frequent answer of each question, and an Otter that was fine-tuned in the same way without pretraining. Writes
`figures.json`.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

import easy_vqa
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessorPil

from otter_hf import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoProcessor
from otter_hf.data.pretraining import ShardWriter, write_sizes


EXAMPLES = Path(__file__).resolve().parent
COLOURS = ("red", "green", "blue", "yellow", "black", "gray", "brown", "teal")
SHAPES = ("circle", "rectangle", "triangle")
CAPTIONS = ("a {} {}", "a {} {} in the image", "the image contains a {} {}", "there is a {} {}", "this is a {} {}")
SHOTS = (0, 2, 4)


def easy_vqa_script(name: str):
    """A script of examples/easy_vqa as a module."""
    spec = importlib.util.spec_from_file_location(f"easy_vqa_{name}", EXAMPLES / "easy_vqa" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


evaluate = easy_vqa_script("evaluate")


def main(output: Path, pretrain_steps: int, finetune_steps: int, num_test: int) -> dict:
    """Runs all steps; returns the figures."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(output / "cache")}
    started = time.time()
    seconds = {}
    captions = write_captions(output / "pairs")
    easy_vqa_script("prepare").main(output / "mimicit")
    build_flamingo(output, captions)

    seconds["pretraining"] = run(
        EXAMPLES / "pretrain_flamingo.py",
        *("--model_name_or_path", output / "untrained", "--train_sets", output / "sets.yaml"),
        *("--output_dir", output / "flamingo", "--max_steps", pretrain_steps, "--learning_rate", 5e-4),
        *("--lr_scheduler_type", "cosine", "--warmup_steps", 0.05, "--weight_decay", 0.05, "--adam_beta2", 0.98),
        *("--save_strategy", "no", "--logging_steps", 20, "--use_cpu", True, "--dataloader_num_workers", 0),
    )
    figures = {"captions": evaluate_captions(output / "flamingo", num_test)}
    for name, source in (("pretrained", "flamingo"), ("from_scratch", "untrained")):
        run(
            "-m",
            "otter_hf.cli",
            "convert",
            "flamingo-to-otter",
            "--source",
            output / source,
            "--output",
            output / name,
        )
        seconds[f"fine-tuning, {name}"] = run(
            EXAMPLES / "easy_vqa" / "train.py",
            EXAMPLES / "easy_vqa" / "recipe.yaml",
            *("--model_name_or_path", output / name, "--output_dir", output / f"otter_{name}"),
            *("--train_mixture", output / "mimicit" / "train.yaml", "--max_steps", finetune_steps),
            *("--eval_mixture", output / "mimicit" / "validation.yaml", "--eval_strategy", "no"),
            *("--save_strategy", "no"),
        )
        figures[f"answers, {name}"] = evaluate_answers(output / f"otter_{name}", num_test)
    figures["answers, question alone"] = question_alone(num_test)
    state = json.loads((output / "flamingo" / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [entry["loss/captions"] for entry in state["log_history"] if "loss/captions" in entry]
    return {
        "name": "end_to_end",
        **figures,
        "pretraining_loss": {"first": losses[0], "last": losses[-1]} if losses else None,
        "steps": {"pretraining": pretrain_steps, "fine-tuning": finetune_steps},
        "test": num_test,
        "seconds": {**{name: round(value) for name, value in seconds.items()}, "all": round(time.time() - started)},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("otter-hf", "torch", "transformers", "easy-vqa")},
        },
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
    }


def run(*command: object) -> float:
    """Runs Python with these arguments; returns its seconds."""
    arguments = [str(part) for part in command]
    print("\n$ python " + " ".join(arguments), flush=True)
    start = time.time()
    status = subprocess.run([sys.executable, *arguments]).returncode
    if status:
        sys.exit(status)
    return time.time() - start


def kinds_of(questions) -> dict[int, tuple[str, str]]:
    """Colour and shape of each picture, from the answers to its questions."""
    found = defaultdict(dict)
    for question, answer, image in zip(*questions, strict=True):
        words = question.rstrip("?").split()
        if answer in SHAPES:
            found[image]["shape"] = answer
        elif answer in COLOURS:
            found[image]["colour"] = answer
        elif answer == ("no" if {"no", "not"} & set(words) else "yes"):
            # yes to "is there a red shape?", no to "is no red shape present?"
            for word in words:
                if word in (*COLOURS, *SHAPES):
                    found[image]["shape" if word in SHAPES else "colour"] = word
    return {image: (kind["colour"], kind["shape"]) for image, kind in found.items() if len(kind) == 2}


def write_captions(folder: Path) -> list[str]:
    """Shards of the training pictures that `prepare` does not hold out, with their captions."""
    generator = random.Random(0)
    paths = easy_vqa.get_train_image_paths()
    kinds = kinds_of(easy_vqa.get_train_questions())
    held_out = set(sorted(paths)[-easy_vqa_script("prepare").NUM_HELD_OUT :])
    captions = []
    with ShardWriter(folder, "%05d.tar", max_samples=1000) as writer:
        for image in sorted(set(kinds) - held_out):
            captions.append(generator.choice(CAPTIONS).format(*kinds[image]))
            parts = {"png": Path(paths[image]).read_bytes(), "txt": captions[-1].encode()}
            writer.write(f"{image:05d}", parts)
    write_sizes(folder, writer.sizes)
    return captions


def build_flamingo(output: Path, captions: list[str]) -> None:
    """The untrained Flamingo, whose tokenizer knows captions and questions, and the YAML of the shards."""
    build = easy_vqa_script("build_tiny_otter")
    questions = [
        f"User:{question} GPT:{answer}" for question, answer, _ in zip(*easy_vqa.get_train_questions(), strict=True)
    ]
    tokenizer = build.train_tokenizer(captions + questions, FlamingoProcessor)
    size = {"height": build.IMAGE_SIZE, "width": build.IMAGE_SIZE}
    processor = FlamingoProcessor(
        CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3),
        FlamingoProcessor.prepare_tokenizer(tokenizer),
    )
    processor.save_pretrained(output / "untrained")
    torch.manual_seed(0)
    config = build.config_for(processor, FlamingoConfig)
    FlamingoForConditionalGeneration(config).save_pretrained(output / "untrained")
    (output / "sets.yaml").write_text("captions: {kind: pairs, shards: pairs, batch_size: 32}\n", encoding="utf-8")


def load(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@torch.inference_mode()
def evaluate_captions(folder: Path, num_test: int) -> dict[str, float]:
    """Share of captions of test pictures that name colour and shape, by number of examples in front."""
    model, processor = load(folder)
    generator = random.Random(0)
    kinds = kinds_of(easy_vqa.get_test_questions())
    pictures = evaluate.read_pictures(easy_vqa.get_test_image_paths())
    train_kinds = kinds_of(easy_vqa.get_train_questions())
    train_pictures = evaluate.read_pictures(easy_vqa.get_train_image_paths())
    images = generator.sample(sorted(kinds), min(num_test, len(kinds)))

    def share(shown: list[int], num_shots: int) -> float:
        right = 0
        for start in range(0, len(images), 100):
            batch = list(zip(images[start : start + 100], shown[start : start + 100], strict=True))
            texts, rows = [], []
            for _, other in batch:
                examples = generator.sample(sorted(train_kinds), num_shots)
                shots = [f"<image>{CAPTIONS[0].format(*train_kinds[example])}<|endofchunk|>" for example in examples]
                texts.append("".join(shots) + "<image>")
                rows.append([*(train_pictures[example] for example in examples), pictures[other]])
            inputs = processor(text=texts, images=rows, return_tensors="pt")
            generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)
            for (image, _), caption in zip(batch, processor.post_process_image_text_to_text(generated), strict=True):
                right += set(kinds[image]) <= set(caption.split())
        return round(right / len(images), 4)

    figures = {f"{num_shots} shots": share(images, num_shots) for num_shots in SHOTS[:2]}
    return {**figures, "0 shots, shuffled pictures": share([*images[1:], images[0]], 0)}


def test_questions(num_test: int) -> list[tuple[str, str, int]]:
    return random.Random(1).sample(list(zip(*easy_vqa.get_test_questions(), strict=True)), num_test)


def evaluate_answers(folder: Path, num_test: int) -> dict[str, float]:
    """Share of test questions answered to the letter, by number of worked examples in front."""
    model, processor = load(folder)
    generator = random.Random(0)
    test = test_questions(num_test)
    truths = [truth for _, truth, _ in test]
    train = list(zip(*easy_vqa.get_train_questions(), strict=True))
    pictures = evaluate.read_pictures(easy_vqa.get_test_image_paths())
    train_pictures = evaluate.read_pictures(easy_vqa.get_train_image_paths())

    def share(shown: list[int], num_shots: int, name: str) -> float:
        conversations = []
        for (question, _, _), image in zip(test, shown, strict=True):
            examples = generator.sample(train, num_shots)
            turns = [*((example[0], example[1]) for example in examples), (question, None)]
            conversations.append((turns, [*([train_pictures[e[2]]] for e in examples), [pictures[image]]]))
        return evaluate.accuracy(evaluate.answer(model, processor, conversations, name), truths)

    images = [image for _, _, image in test]
    figures = {f"{num_shots} shots": share(images, num_shots, f"{num_shots} shots") for num_shots in SHOTS}
    others = [*images[1:], images[0]]
    return {**figures, "0 shots, shuffled pictures": share(others, 0, "shuffled pictures")}


def question_alone(num_test: int) -> float:
    """Share of test questions that the most frequent answer of the training split gets right."""
    answers = defaultdict(Counter)
    for question, answer, _ in zip(*easy_vqa.get_train_questions(), strict=True):
        answers[question][answer] += 1
    test = test_questions(num_test)
    return evaluate.accuracy([answers[question].most_common(1)[0][0] for question, _, _ in test], [t[1] for t in test])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/end_to_end"))
    parser.add_argument("--pretrain-steps", type=int, default=480)
    parser.add_argument("--finetune-steps", type=int, default=320)
    parser.add_argument("--test", type=int, default=1000, help="test questions, and pictures to caption")
    parser.add_argument("--results", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    result = main(arguments.output.resolve(), arguments.pretrain_steps, arguments.finetune_steps, arguments.test)
    for path in (arguments.output / "figures.json", arguments.results):
        if path is not None:
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
