"""SEED-Bench (arXiv:2307.16125): the option with the smallest loss is the answer."""

from collections.abc import Mapping, Sequence

from . import mean_by, percent


LETTERS = "ABCD"


def rank(losses: Sequence[float]) -> str:
    """The letter of the smallest loss; of equal ones the first."""
    return LETTERS[min(range(len(losses)), key=losses.__getitem__)]


def score(records: list[Mapping]) -> dict[str, float]:
    """Accuracy over all questions and by question type; `records` have `prediction`, `answer`, `question_type`."""
    records = [{**record, "correct": record["prediction"] == record["answer"]} for record in records]
    return {
        "accuracy": percent(sum(record["correct"] for record in records), len(records)),
        "questions": len(records),
        **mean_by([record for record in records if record.get("question_type") is not None], "question_type"),
    }
