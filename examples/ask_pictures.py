"""
Asks a model about every picture of a folder: tags, harmful content, captions, with scores.

    python examples/ask_pictures.py examples/question_sets/tagging.yaml --model MODEL --images FOLDER \\
        --output tags.jsonl

A question set is a YAML of `task: yes_no`, with `labels` that a `question` is asked of, or `questions` by label; or of
`task: caption`, with one `question`. The score of a label is the probability of "yes", of yes and no alone: what the
model would say, whatever else it would. Given `--truth`, a JSON of the labels or captions by file name, figures are
printed.
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from otter_hf.evaluation.model import ConversationModel


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read_question_set(path: str | Path) -> dict[str, Any]:
    """A question set with `questions` by label; `ValueError` naming what is wrong with it."""
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("task") not in ("yes_no", "caption"):
        raise ValueError(f"{path}: task must be yes_no or caption.")
    known = {"task", "question", "questions", "labels", "threshold", "max_new_tokens"}
    if unknown := content.keys() - known:
        raise ValueError(f"{path}: unknown keys {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}.")
    questions = content.get("questions")
    if questions is None and content["task"] == "yes_no" and "{label}" in str(content.get("question")):
        questions = {str(label): content["question"].replace("{label}", str(label)) for label in content["labels"]}
    if questions is None and content["task"] == "caption" and isinstance(content.get("question"), str):
        questions = {"caption": content["question"]}
    if not isinstance(questions, dict) or not questions:
        raise ValueError(f"{path} needs questions by label, or a question with {{label}} and labels.")
    return {"threshold": 0.5, "max_new_tokens": 64, **content, "questions": questions}


def ask(model: ConversationModel, picture: Image.Image, questions: Mapping[str, Any]) -> dict[str, Any]:
    """`labels` that reach the threshold and `scores` of all, or a `caption`."""
    if questions["task"] == "caption":
        conversation = _conversation(picture, questions["questions"]["caption"])
        return {"caption": model.generate([conversation], max_new_tokens=questions["max_new_tokens"])[0]}
    scores = {}
    for label, question in questions["questions"].items():
        yes, no = (total for total, *_ in model.log_likelihood(_conversation(picture, question), ["yes", "no"]))
        scores[label] = 1 / (1 + math.exp(min(700.0, no - yes)))
    found = [label for label, score in scores.items() if score >= questions["threshold"]]
    return {"labels": found, "scores": {label: round(score, 4) for label, score in scores.items()}}


def figures(answers: Mapping[str, Mapping], truth: Mapping[str, list[str]], questions: Mapping) -> dict[str, Any]:
    """CIDEr of captions; precision, recall and F1 of labels, over all and by label. Of pictures that have a truth."""
    names = [name for name in answers if name in truth]
    if not names:
        raise ValueError("The truth has none of the pictures: it is a JSON of lists by file name.")
    if questions["task"] == "caption":
        from otter_hf.evaluation.scoring import captions

        rows = [
            {"id": number, "caption": answers[name]["caption"], "references": truth[name]}
            for number, name in enumerate(names)
        ]
        return captions.score(rows)
    counts = {label: [0, 0, 0] for label in questions["questions"]}  # found rightly, found, there
    for name in names:
        found, there = set(answers[name]["labels"]), set(truth[name])
        for label, count in counts.items():
            count[0] += label in found and label in there
            count[1] += label in found
            count[2] += label in there
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    return {"all": _rates(*total), **{label: _rates(*count) for label, count in counts.items()}}


def _rates(right: int, found: int, there: int) -> dict[str, float | None]:
    """None where nothing was found, or nothing was there."""
    return {
        "precision": right / found if found else None,
        "recall": right / there if there else None,
        "f1": 2 * right / (found + there) if found + there else None,
        "there": there,
    }


def _conversation(picture: Image.Image, question: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def main(arguments: list[str] | None = None) -> None:
    """Asks, writes a line per picture as it comes, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", help="YAML file of a question set")
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--images", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--output", required=True, type=Path, help="JSON lines: file, labels and scores, or caption")
    parser.add_argument("--truth", type=Path, help="JSON: {file name: labels or captions}")
    given = parser.parse_args(arguments)
    questions = read_question_set(given.questions)
    truth = json.loads(given.truth.read_text(encoding="utf-8")) if given.truth else None
    paths = sorted(path for path in given.images.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        parser.error(f"{given.images} holds no picture: {', '.join(SUFFIXES)}.")
    model, answers = ConversationModel(given.model), {}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with open(given.output, "w", encoding="utf-8") as file:
        for path in paths:
            with Image.open(path) as picture:
                answers[path.name] = ask(model, picture, questions)
            file.write(json.dumps({"file": path.name, **answers[path.name]}, ensure_ascii=False) + "\n")
            file.flush()
    print(f"{len(paths)} pictures in {given.output}")
    if truth is not None:
        print(json.dumps(figures(answers, truth, questions), indent=1))


if __name__ == "__main__":
    main()
