"""The few-shot harness: shots x seeds of a data set, with the demonstrations in the conversation."""

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from filelock import FileLock
from transformers.utils import logging

from ...data.controls import CONTROLS, control_media, visual_gain
from ...made_from import state_of_model
from ..config import DatasetSpec
from ..report import write_samples
from ..scoring import captions, ranking, vqa
from ..scoring.replies import count_fates
from .demonstrations import (
    RicesIndex,
    fixed_demonstrations,
    picture_features,
    query_set,
    random_demonstrations,
    test_subset,
)
from .prompts import Prompts, prompts_for
from .rows import Rows


logger = logging.get_logger(__name__)

KINDS = {
    "coco": "caption",
    "flickr30k": "caption",
    "vqav2": "vqa",
    "ok_vqa": "vqa",
    "vizwiz": "vqa",
    "textvqa": "vqa",
    "imagenet": "imagenet",
    "hateful_memes": "hateful_memes",
}
# beams, length penalty and lengths of the 2023 suite
_GENERATION = {
    "coco": {"max_new_tokens": 64, "num_beams": 3, "length_penalty": -2.0},
    "flickr30k": {"max_new_tokens": 128, "num_beams": 3, "length_penalty": -2.0},
    "textvqa": {"max_new_tokens": 10, "num_beams": 3, "length_penalty": 0.0},
}
_SHORT_ANSWER = {"max_new_tokens": 5, "num_beams": 3, "length_penalty": 0.0}
_HATEFUL = ["no", "yes"]
_METRICS = {"caption": "cider", "vqa": "vqa_accuracy", "imagenet": "top1_accuracy", "hateful_memes": "roc_auc"}


def run_fewshot(lm, dataset: DatasetSpec, folder: Path, with_controls: bool = False) -> dict[str, Any]:
    """
    The figures of a model on one data set.

    With several processes each asks its share of the rows, once; the main one scores them.

    Args:
        lm: a model of `otter_hf.evaluation.lmms`; ranking needs one of transformers.
        dataset: with `fewshot`, see `docs/evaluation.md`.
        folder: for samples and picture features.
        with_controls: whether every question is asked with other pictures, too; its demonstrations stay.

    Returns:
        `N-shot METRIC` (mean over seeds) and its parts, such as `N-shot answer_type/number`, `N-shot/seed S` for each
        trial, and `controls` of the first, means over seeds, too; {} on other processes than the main one.

    Raises:
        ValueError: for settings or data that do not fit.
    """
    settings = dataset.fewshot
    kind = KINDS[dataset.name]
    common = {"kind": kind, "image_dir": settings.get("image_dir"), "columns": settings.get("columns")}
    train = Rows(settings["train"], settings.get("train_split", "train"), **common)
    test = Rows(settings["test"], settings.get("test_split", "test"), **common)
    names = _class_names(settings, kind, train)
    for rows in (train, test) if names else ():
        rows.check_labels(len(names))
    style, template = prompts_for(lm, kind)
    same: set[tuple[int, int]] = set()
    figures: dict[str, Any] = {}
    for shots in settings.get("shots", [0, 4, 8]):
        trials, unanswered = [], Counter()
        # of each seed the units of its rows
        units: dict[str | None, list[dict[int, Any]]] = {
            control: [] for control in ((None, *CONTROLS) if with_controls else (None,))
        }
        for seed in settings.get("seeds", [42]):
            rows = test_subset(settings.get("num_samples"), len(test), seed)
            mine = rows[lm.rank :: lm.world_size]
            # Flamingo's "0 shots" are two demonstrations without their pictures
            drawn = min(2, len(train) - 1) if shots == 0 and style.text_only_zero_shot else shots
            choose = _chooser(settings, train, test, rows, drawn, seed, folder, same)
            shown = {row: choose(row) for row in mine}
            for control, of_seeds in units.items():
                build = _conversation_builder(kind, style, train, test, shots, names, control)
                likelihood = settings.get("likelihood", "mean")
                replies = _ask(lm, dataset.name, kind, template, build, shown, names, likelihood)
                records = [_record(kind, test[row], shown[row], reply, settings) for row, reply in replies.items()]
                records = _gather(lm, records)
                if lm.rank > 0:
                    continue
                records.sort(key=lambda record: record["row"])
                scored = _units(kind, records)
                of_seeds.append({record["row"]: unit for record, unit in zip(records, scored, strict=True)})
                if control is None:
                    score = _score(kind, records, scored)
                    trials.append(score)
                    figures[f"{shots}-shot/seed {seed}"] = score[_METRICS[kind]]
                    unanswered.update(count_fates(record["reply"] for record in records if "reply" in record))
                stem = f"{dataset.name}.{shots}-shot.seed-{seed}{'' if control is None else f'.{control}'}"
                write_samples(folder / f"{stem}.samples.jsonl", records)
        if lm.rank == 0:
            values = [trial[_METRICS[kind]] for trial in trials]
            known = None not in values
            figures[f"{shots}-shot {_METRICS[kind]}"] = sum(values) / len(values) if known else None
            if with_controls and known:
                gains = figures.setdefault("controls", {})
                gains[f"{shots}-shot {_METRICS[kind]}"] = _gains(kind, units)
            for part in dict.fromkeys(name for trial in trials for name in trial if "/" in name):
                of_part = [trial[part] for trial in trials if part in trial]
                figures[f"{shots}-shot {part}"] = sum(of_part) / len(of_part)
            if "tokenizer" in trials[0]:
                figures["tokenizer"] = trials[0]["tokenizer"]
            for name, count in unanswered.items():
                figures[name] = figures.get(name, 0) + count
    if same:
        logger.warning(
            f"{dataset.name}: {len(same)} test rows are training rows, too; none is shown its own answer, another "
            "demonstration takes its place."
        )
    return figures


def _class_names(settings: dict, kind: str, train: Rows) -> list[str] | None:
    if kind == "hateful_memes":
        return _HATEFUL
    if kind != "imagenet":
        return None
    names = settings.get("class_names") or train.class_names()
    if isinstance(names, str):
        names = [line.strip() for line in Path(names).read_text(encoding="utf-8").splitlines() if line.strip()]
    wanted = "a list, or a file with one name per line, in label order"
    if not names:
        raise ValueError(f"imagenet needs `class_names`: {wanted}.")
    if all(re.fullmatch(r"n\d{8}", str(name)) for name in names):
        called = f"The classes are called {names[0]} and so on, no words to rank"
        raise ValueError(f"{called}; give `class_names`: {wanted}.")
    return list(names)


def _chooser(settings, train: Rows, test: Rows, rows, shots: int, seed: int, folder: Path, same: set) -> Callable:
    """What chooses the demonstrations of a test row; pairs of a test row and itself go into `same`."""

    def itself(row: int) -> Callable[[int], bool]:
        def is_test_row(number: int) -> bool:
            if not train.is_row_of(number, test, row):
                return False
            same.add((row, number))
            return True

        return is_test_row

    way = settings.get("demonstrations", "random")
    # OpenFlamingo draws from a sample of the training set, but looks for similar pictures in all of it
    size = settings.get("query_set_size", len(train) if way == "rices" else 2048)
    candidates = query_set(size, len(train), seed)
    if way == "random":
        return lambda row: random_demonstrations(candidates, shots, seed, row, itself(row))
    if way == "fixed":
        return lambda row: fixed_demonstrations(candidates, shots, seed, itself(row))
    features = {}
    for name, table, numbers in (("train", train, candidates), ("test", test, rows)):
        encoder = settings["encoder"]
        made_of = [encoder, state_of_model(encoder), table.state(), seed, list(numbers)]
        digest = sha256(json.dumps(made_of).encode()).hexdigest()[:20]
        stem = f"{name}-{Path(encoder).name}-{digest}"
        path = folder / "rices" / f"{stem}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        # one process computes, the others read, however long that takes
        with FileLock(path.with_name(f".{path.name}.lock")):
            features[name] = picture_features(table, numbers, encoder, path)
    index = RicesIndex(features["train"], candidates)
    place = {row: i for i, row in enumerate(rows)}
    return lambda row: index.nearest(features["test"][place[row]], shots, itself(row))


def _conversation_builder(
    kind, style: Prompts, train: Rows, test: Rows, shots: int, names, control: str | None = None
) -> Callable:
    of_row = partial(_pictures, test)

    def question(number: int) -> dict:
        row = test[number]
        if control is None:
            return row
        return {**row, "image": control_media(control, [row["image"]], number, len(test), of_row)[0]}

    def turns(row: dict, answered: bool, with_picture: bool = True) -> list[dict]:
        picture = [{"type": "image", "image": row["image"]}] if with_picture else []
        messages = [{"role": "user", "content": [*picture, {"type": "text", "text": style.ask(row)}]}]
        if answered:
            text = _truth(kind, row, names)
            messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
        return messages

    def build(item: tuple[int, list[int]]) -> list[dict]:
        row, shown = item
        messages = []
        for number in shown:
            messages += turns(train[number], answered=True, with_picture=shots > 0)
        return messages + turns(question(row), answered=False)

    return build


def _pictures(rows: Rows, number: int) -> list:
    return [rows[number]["image"]]


def _units(kind: str, records: list[dict]) -> list:
    """What the score of records is the mean of, in percent; for an area under a curve P(yes) and the label."""
    if kind == "caption":
        return captions.scores_of([{**record, "id": record["row"]} for record in records])
    if kind == "vqa":
        return [100.0 * record["accuracy"] for record in records]
    if kind == "imagenet":
        return [ranking.score([record])["top1_accuracy"] for record in records]
    return [(ranking.probabilities(record["log_likelihoods"])[1], record["label"]) for record in records]


def _gains(kind: str, units: dict[str | None, list[dict[int, Any]]]) -> dict[str, Any]:
    """
    As [`~otter_hf.evaluation.benchmarks.Benchmark.gains`] of one figure, the mean over seeds. Seeds ask the same rows,
    or some of the same: a row is drawn with its units of all of them.

    Args:
        units: for each control, and None, of each seed the unit of each row.
    """
    rows = sorted({row for of_seed in units[None] for row in of_seed})
    asked = {control: [[of_seed.get(row) for of_seed in seeds] for row in rows] for control, seeds in units.items()}

    def of_one_seed(drawn: list) -> float:
        if kind != "hateful_memes":
            return sum(drawn) / len(drawn)
        area = ranking.roc_auc(*zip(*drawn, strict=True))
        return 50.0 if area is None else 100.0 * area  # of one class alone

    def metric(drawn: list[list]) -> float:
        of_seeds = ([unit for unit in of_seed if unit is not None] for of_seed in zip(*drawn, strict=True))
        scores = [of_one_seed(there) for there in of_seeds if there]
        return sum(scores) / len(scores)

    scores = {control: metric(drawn) for control, drawn in asked.items() if control is not None}
    return {**scores, **visual_gain(metric, asked[None], asked["swapped"])}


def _truth(kind: str, row: dict, names: list[str] | None) -> str:
    """The answer of a demonstration: the first annotator's."""
    if kind == "caption":
        return row["captions"][0]
    return row["answers"][0] if kind == "vqa" else names[int(row["label"])]


def _ask(lm, name: str, kind: str, template, build: Callable, shown: dict, names, ranked_by: str) -> dict[int, Any]:
    # the conversations are built when they are asked: pictures need not all be in memory
    questions = [partial(build, item) for item in shown.items()]
    if kind in ("caption", "vqa"):
        options = {**_GENERATION.get(name, _SHORT_ANSWER), "do_sample": False}
        replies = lm.answer_questions(questions, options, template)
    else:
        scored = lm.rank_candidates([(question, names) for question in questions], template)
        replies = [[ranking.likelihood(total, count, ranked_by) for total, count, _ in scores] for scores in scored]
    return dict(zip(shown, replies, strict=True))


def _record(kind: str, row: dict, shown: list[int], reply, settings: dict) -> dict[str, Any]:
    record = {"row": row["number"], "id": row["id"], "demonstrations": shown}
    if kind == "caption":
        return {**record, "reply": reply, "caption": captions.clean_reply(reply), "references": row["captions"]}
    if kind == "vqa":
        answer, normalise = vqa.clean_reply(reply), vqa.answer_normaliser(settings.get("normaliser", "official"))
        accuracy = vqa.accuracy(answer, row["answers"], normalise)
        told = {"answer_type": row["answer_type"]} if row.get("answer_type") else {}
        return {**record, "reply": reply, "answer": answer, "answers": row["answers"], "accuracy": accuracy, **told}
    return {**record, "log_likelihoods": reply, "label": int(row["label"])}


def _score(kind: str, records: list[dict], units: list) -> dict[str, Any]:
    if kind == "caption":
        return captions.score(records, units)
    if kind == "vqa":
        return vqa.score(records)
    return ranking.score(records) if kind == "imagenet" else ranking.score_binary(records)


def _gather(lm, records: list[dict]) -> list[dict]:
    """The records of all processes."""
    return records if lm.world_size == 1 else gather_object(records)
