"""
The test split of easy-VQA, answered by a trained model.

    python examples/easy_vqa/evaluate.py --model out/demo/model --output out/demo

Each of the 9,673 test questions is asked alone about its picture and decoded greedily; an answer counts if it is the
true one to the letter. The first two figures below tell how much of the accuracy needs no picture:

    question_only      the most frequent answer of each question in the training split
    shuffled_images    the same model, asked about another picture of the test split
    follow_up          one question per test picture, after two others about it with their true answers
    two_shot           one question per test picture, after two worked examples from the training split

Writes `metrics.json`, and `answers.png` with pictures, answers and mistakes.
"""

import argparse
import json
import random
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import easy_vqa
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import otter_hf  # noqa: F401  registers the models with the Auto classes
from otter_hf.data import render


BATCH_SIZE = 256
SHAPES = ("circle", "rectangle", "triangle")


def main(model_folder: Path, output: Path) -> None:
    """Evaluates the model in `model_folder`."""
    processor = AutoProcessor.from_pretrained(model_folder)
    model = AutoModelForImageTextToText.from_pretrained(model_folder).eval()
    train = list(zip(*easy_vqa.get_train_questions(), strict=True))  # (question, answer, picture)
    test = list(zip(*easy_vqa.get_test_questions(), strict=True))
    train_pictures = read_pictures(easy_vqa.get_train_image_paths())
    pictures = read_pictures(easy_vqa.get_test_image_paths())
    generator = random.Random(0)

    def ask(prompts: list[tuple[list, list]], name: str) -> list[str]:
        return answer(model, processor, prompts, name)

    answers = ask([single(question, pictures[image]) for question, _, image in test], "test split")
    ids = list(pictures)
    generator.shuffle(ids)
    other = dict(zip(ids, [*ids[1:], ids[0]], strict=True))  # never the picture itself
    shuffled = ask([single(question, pictures[other[image]]) for question, _, image in test], "shuffled images")

    of_image = defaultdict(list)
    for question, truth, image in test:
        of_image[image].append((question, truth))
    follow_ups, two_shots, truths = [], [], []
    for image, pairs in of_image.items():
        if len(pairs) >= 3:
            *earlier, (question, truth) = generator.sample(pairs, 3)
            follow_ups.append(([*earlier, (question, None)], [[pictures[image]], [], []]))
            examples = generator.sample(train, 2)
            support = [[train_pictures[example[2]]] for example in examples]
            turns = [(example[0], example[1]) for example in examples]
            two_shots.append(([*turns, (question, None)], [*support, [pictures[image]]]))
            truths.append(truth)

    by_question = defaultdict(Counter)
    for question, truth, _ in train:
        by_question[question][truth] += 1
    right_by_kind = defaultdict(list)
    for (question, truth, _), given in zip(test, answers, strict=True):
        right_by_kind[question_type(question, truth)].append(given == truth)
    test_truths = [truth for _, truth, _ in test]
    majority = [by_question[question].most_common(1)[0][0] for question, _, _ in test]
    metrics = {
        "accuracy": accuracy(answers, test_truths),
        "question_only": accuracy(majority, test_truths),
        "shuffled_images": accuracy(shuffled, test_truths),
        "per_question_type": {
            kind: round(sum(right) / len(right), 4) for kind, right in sorted(right_by_kind.items())
        },
        "follow_up": accuracy(ask(follow_ups, "follow-up questions"), truths),
        "two_shot": accuracy(ask(two_shots, "two worked examples"), truths),
        "test_questions": len(test),
        "parameters": model.num_parameters(),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    draw_answers([(pictures[i], q, given, t) for (q, t, i), given in zip(test, answers, strict=True)], output)
    print(json.dumps(metrics, indent=2))


def read_pictures(paths: dict[int, str]) -> dict[int, Image.Image]:
    return {image: Image.open(path).convert("RGB") for image, path in sorted(paths.items())}


def single(question: str, picture: Image.Image) -> tuple[list, list]:
    """A conversation of one question about one picture: turns, and the pictures in front of each."""
    return [(question, None)], [[picture]]


@torch.inference_mode()
def answer(model, processor, conversations: list[tuple[list, list]], name: str) -> list[str]:
    """The greedy answers to the last turns of conversations: `(turns, pictures of each turn)`."""
    answers = []
    for start in tqdm(range(0, len(conversations), BATCH_SIZE), desc=name):
        batch = conversations[start : start + BATCH_SIZE]
        texts = [render(turns, "simple", [len(of_turn) for of_turn in pictures]) for turns, pictures in batch]
        images = [[picture for of_turn in pictures for picture in of_turn] for _, pictures in batch]
        inputs = processor(text=texts, images=images, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers += processor.post_process_image_text_to_text(output)
    return answers


def accuracy(answers: list[str], truths: list[str]) -> float:
    return round(sum(a == t for a, t in zip(answers, truths, strict=True)) / len(truths), 4)


def question_type(question: str, truth: str) -> str:
    """What the question asks for: a shape, a colour, or whether one of them is there."""
    if truth in ("yes", "no"):
        return "yes/no, shape" if any(shape in question for shape in SHAPES) else "yes/no, color"
    return "what shape" if truth in SHAPES else "what color"


def draw_answers(results: list[tuple], output: Path) -> None:
    """`answers.png`: three rows of questions drawn at random, and a row of mistakes if there are any."""
    generator = random.Random(1)
    mistakes = [result for result in results if result[2] != result[3]]
    shown = generator.sample(results, 18) + generator.sample(mistakes, min(6, len(mistakes)))
    rows = 4 if mistakes else 3
    figure = Figure(figsize=(13, 2.7 * rows), layout="constrained")
    axes = list(figure.subplots(rows, 6).flat)
    for axis in axes:
        axis.axis("off")
    for axis, (picture, question, given, truth) in zip(axes, shown, strict=False):
        axis.imshow(picture, interpolation="nearest")
        title = f"{textwrap.fill(question, 24)}\n{given} (truth: {truth})"
        axis.set_title(title, fontsize=9, color="darkgreen" if given == truth else "firebrick")
    below = f"; last row: {len(shown) - 18} of the {len(mistakes)} mistakes" if mistakes else ""
    figure.suptitle(f"Test split, questions drawn at random{below}")
    figure.savefig(output / "answers.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("out/demo/model"))
    parser.add_argument("--output", type=Path, default=Path("out/demo"))
    arguments = parser.parse_args()
    main(arguments.model, arguments.output)
