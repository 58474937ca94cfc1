"""
Asks a model about every picture of a folder: tags, harmful content, captions, with scores.

    python examples/ask_pictures.py examples/question_sets/tagging.yaml --model MODEL --images FOLDER \\
        --output tags.jsonl

A question set is a YAML of `task: yes_no`, with `labels` that a `question` is asked of, or `questions` by label; or of
`task: caption`, with one `question`. The score of a label is the probability of "yes", of yes and no alone: what the
model would say, whatever else it would. Given `--truth`, a JSON of the labels or captions by file name, figures are
printed; with `--controls` those of the same questions with the picture of another file and with a blank one, too, and
the visual gain, the F1 or CIDEr less that with other pictures. Interrupted and started again, it asks only what was
not answered.
"""

import argparse
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from otter_hf.data.controls import CONTROLS, control_media, visual_gain
from otter_hf.evaluation.model import ConversationModel
from otter_hf.evaluation.replies import ReplyLog, answer_all
from otter_hf.evaluation.scoring import captions
from otter_hf.files import remove, replacing
from otter_hf.made_from import state_of_model
from otter_hf.pictures import read_image


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


def ask_all(
    model: ConversationModel,
    pictures: Sequence[Path | Image.Image],
    questions: Mapping[str, Any],
    batch_size: int = 8,
    replies: ReplyLog | None = None,
) -> Iterator[dict[str, Any]]:
    """For each picture `labels` that reach the threshold and `scores` of all, or a `caption`."""
    asked = list(questions["questions"].values())
    # of a picture many questions are asked, each of them twice: for what is known, and in its batch
    read = functools.lru_cache(4 * batch_size)(read_image)

    def conversation(item: tuple) -> list[dict[str, Any]]:
        picture, question = item
        picture = read(picture) if isinstance(picture, Path) else picture
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        return [{"role": "user", "content": content}]

    def ask(window: list[tuple], wanted: set[int]) -> Iterator[dict[int, Any]]:
        conversations = (conversation(item) for item in window)
        options = {"batch_size": batch_size, "wanted": wanted}
        if questions["task"] == "caption":
            return model.answers(conversations, max_new_tokens=questions["max_new_tokens"], **options)
        return model.log_likelihoods(conversations, [["yes", "no"]] * len(window), **options)

    items = [(picture, question) for picture in pictures for question in asked]
    answers = answer_all(items, conversation, ask, 4 * batch_size, replies)
    for _ in pictures:
        of_picture = list(islice(answers, len(asked)))
        if questions["task"] == "caption":
            yield {"caption": of_picture[0]}
            continue
        scores = {}
        for label, ((yes, *_), (no, *_)) in zip(questions["questions"], of_picture, strict=True):
            scores[label] = 1 / (1 + math.exp(min(700.0, no - yes)))
        found = [label for label, score in scores.items() if score >= questions["threshold"]]
        yield {"labels": found, "scores": {label: round(score, 4) for label, score in scores.items()}}


def figures(answers: Mapping[str, Mapping], truth: Mapping[str, list[str]], questions: Mapping) -> dict[str, Any]:
    """CIDEr of captions; precision, recall and F1 of labels, over all and by label. Of pictures that have a truth."""
    names = [name for name in answers if name in truth]
    if not names:
        raise ValueError("The truth has none of the pictures: it is a JSON of lists by file name.")
    if questions["task"] == "caption":
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


def controlled(
    model: ConversationModel, pictures: Mapping[str, Image.Image], questions: Mapping, batch_size: int = 8
) -> dict[str, dict[str, Any]]:
    """The answers of `ask_all` by control and file, with other pictures in place of each file's own."""
    names, answers = list(pictures), {}
    for control in CONTROLS:
        others = [
            control_media(control, [pictures[name]], number, len(names), lambda row: [pictures[names[row]]])[0]
            for number, name in enumerate(names)
        ]
        answers[control] = dict(zip(names, ask_all(model, others, questions, batch_size), strict=True))
    return answers


def gain(answers: Mapping, others: Mapping[str, Mapping], truth: Mapping, questions: Mapping) -> dict[str, Any]:
    """The score of each control, and the visual gain with its 95 % interval, of pictures that have a truth."""
    names = [name for name in answers if name in truth]
    units = {}
    for control, of_control in {"shown": answers, **others}.items():
        rows = [{"id": name, **of_control[name], "references": truth[name]} for name in names]
        if questions["task"] == "caption":
            units[control] = captions.scores_of(rows)
        else:
            units[control] = [(of_control[name], truth[name]) for name in names]

    def score(drawn: list) -> float:
        if questions["task"] == "caption":
            return sum(drawn) / len(drawn)
        # a picture may be drawn several times
        told = figures(*(dict(enumerate(column)) for column in zip(*drawn, strict=True)), questions)
        return told["all"]["f1"] or 0.0

    scores = {control: score(units[control]) for control in others}
    return {**scores, **visual_gain(score, units["shown"], units["swapped"])}


def _rates(right: int, found: int, there: int) -> dict[str, float | None]:
    """None where nothing was found, or nothing was there."""
    return {
        "precision": right / found if found else None,
        "recall": right / there if there else None,
        "f1": 2 * right / (found + there) if found + there else None,
        "there": there,
    }


def main(arguments: list[str] | None = None) -> None:
    """Asks, writes a line per picture, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", help="YAML file of a question set")
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--images", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--output", required=True, type=Path, help="JSON lines: file, labels and scores, or caption")
    parser.add_argument("--truth", type=Path, help="JSON: {file name: labels or captions}")
    parser.add_argument("--batch-size", type=int, default=8, help="questions that are asked at a time (default: 8)")
    parser.add_argument("--controls", action="store_true", help="with --truth: did it look?")
    given = parser.parse_args(arguments)
    questions = read_question_set(given.questions)
    truth = json.loads(given.truth.read_text(encoding="utf-8")) if given.truth else None
    paths = sorted(path for path in given.images.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        parser.error(f"{given.images} holds no picture: {', '.join(SUFFIXES)}.")
    if given.controls and truth is None:
        parser.error("--controls compares scores: give the --truth.")
    model, answers = ConversationModel(given.model), {}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    # what an interrupted run was told, by the pixels, the question and the model
    kept = given.output.with_name(f"{given.output.name}.replies")
    replies = ReplyLog(kept, context=[given.model, state_of_model(given.model)])
    with replacing(given.output) as written, written.open("w", encoding="utf-8") as file:
        for path, answer in zip(paths, ask_all(model, paths, questions, given.batch_size, replies), strict=True):
            answers[path.name] = answer
            file.write(json.dumps({"file": path.name, **answer}, ensure_ascii=False) + "\n")
    replies.close()
    remove(kept)
    print(f"{len(paths)} pictures in {given.output}")
    if truth is not None:
        told = figures(answers, truth, questions)
        if given.controls:
            pictures = {path.name: read_image(path, path.name) for path in paths}
            told["controls"] = gain(
                answers, controlled(model, pictures, questions, given.batch_size), truth, questions
            )
        print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
