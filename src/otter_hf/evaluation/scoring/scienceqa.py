"""ScienceQA (arXiv:2209.09513)."""

import string
from collections.abc import Mapping, Sequence

from . import mean_by, percent
from .choices import OTHER, parse_choice


def parse_answer(reply: str, choices: Sequence[str]) -> str:
    """The letter a reply names, or `"other"`; see [`~otter_hf.evaluation.scoring.choices.parse_choice`]."""
    return parse_choice(reply, dict(zip(string.ascii_uppercase, choices, strict=False)))


def score(records: list[Mapping]) -> dict[str, float]:
    """
    Accuracy over all questions, over those with an image, and where the data tell them by subject, grades, and
    context: those with a text (`hint`) and those with neither text nor image.

    Args:
        records: with `prediction`, `answer` (letters), `has_image`, and optionally `has_text`, `subject` and `grade`.
    """
    records = [{**record, "correct": record["prediction"] == record["answer"]} for record in records]
    with_image = [record for record in records if record["has_image"]]
    told = [record for record in records if record.get("has_text") is not None]
    of_context = [{**record, "context": "text"} for record in told if record["has_text"]]
    of_context += [{**record, "context": "none"} for record in told if not (record["has_text"] or record["has_image"])]
    graded = [
        {**record, "grade": "1-6" if int(record["grade"].removeprefix("grade")) <= 6 else "7-12"}
        for record in records
        if record.get("grade")
    ]
    return {
        "accuracy": percent(sum(record["correct"] for record in records), len(records)),
        "image_accuracy": percent(sum(record["correct"] for record in with_image), len(with_image)),
        "unparsed": sum(record["prediction"] == OTHER for record in records),
        "questions": len(records),
        **mean_by([record for record in records if record.get("subject")], "subject"),
        **mean_by(graded, "grade"),
        **mean_by(of_context, "context"),
    }
