"""SEED-Bench (arXiv:2307.16125): the option with the smallest loss is the answer."""

from collections.abc import Mapping, Sequence

from . import mean_by, percent


LETTERS = "ABCD"


def rank(losses: Sequence[float]) -> str:
    """The letter of the smallest loss; of equal ones the first."""
    return LETTERS[min(range(len(losses)), key=losses.__getitem__)]


def score(records: list[Mapping]) -> dict[str, float]:
    """
    Accuracy over all questions, by question type, and of pictures and films.

    Args:
        records: with `prediction`, `answer`, and where the data tell them `question_type` and `data_type`.
    """
    records = [{**record, "correct": record["prediction"] == record["answer"]} for record in records]
    return {
        "accuracy": percent(sum(record["correct"] for record in records), len(records)),
        "questions": len(records),
        **{
            name: value
            for kind in ("question_type", "data_type")
            for name, value in mean_by([record for record in records if record.get(kind) is not None], kind).items()
        },
    }
