"""MMBench (arXiv:2307.06281): CircularEval, and the table its server scores."""

import re
from collections.abc import Mapping

from . import mean_by, percent


LETTERS = "ABCDE"
# rows of one question are copies with shifted options, this far apart in `index`
_COPY_OFFSET = 1_000_000


def options_of(row: Mapping) -> dict[str, str]:
    """The options of a row that exist, `{letter: text}`; missing ones are None, NaN, empty or the word "nan"."""
    return {letter: str(row[letter]) for letter in LETTERS if present(row.get(letter))}


def present(value) -> bool:
    """Whether a cell holds something."""
    return value is not None and str(value).strip() not in ("", "nan", "None")


def question_of(record: Mapping) -> int:
    """The number of the question of which a record is one of the copies."""
    return int(record["index"]) % _COPY_OFFSET


def with_number(record: Mapping, number: int) -> dict:
    """The record as one of the question of another number."""
    return {**record, "index": int(record["index"]) // _COPY_OFFSET * _COPY_OFFSET + number}


def score(records: list[Mapping]) -> dict[str, float]:
    """
    CircularEval: a question is right only if all its shifted copies are.

    Args:
        records: with `index`, `num_options`, `prediction` and `answer` (None on the test split, which only the server
            can score), and where the data tell them `category` and `l2-category`.

    Returns:
        `circular_accuracy`, `vanilla_accuracy` (of the unshifted rows), `questions`, `category/NAME` and
        `l2-category/NAME` (both by CircularEval, as the authors' toolkit has them), and where there are any
        `incomplete_questions`, those without a copy for each option (a limit cut them off, or the data have
        none), which makes them easier; of unanswered data only `questions`.
    """
    questions: dict[int, list[Mapping]] = {}
    for record in records:
        questions.setdefault(question_of(record), []).append(record)
    if not all(present(record["answer"]) for record in records):
        return {"questions": len(questions)}
    right = {index: all(r["prediction"] == r["answer"] for r in rows) for index, rows in questions.items()}
    incomplete = sum(len(rows) < rows[0].get("num_options", 0) for rows in questions.values())
    unshifted = [record for record in records if int(record["index"]) < _COPY_OFFSET]
    circular = [{**rows[0], "correct": right[index]} for index, rows in questions.items()]
    return {
        "circular_accuracy": percent(sum(right.values()), len(right)),
        "vanilla_accuracy": percent(sum(r["prediction"] == r["answer"] for r in unshifted), len(unshifted)),
        "questions": len(questions),
        **({"incomplete_questions": incomplete} if incomplete else {}),
        **{
            name: value
            for level in ("category", "l2-category")
            for name, value in mean_by([record for record in circular if present(record.get(level))], level).items()
        },
    }


SUBMISSION_COLUMNS = (
    "question",
    "answer",
    *LETTERS,
    "prediction",
    "hint",
    "source",
    "split",
    "category",
    "l2-category",
    "index",
)


def submission_rows(records: list[Mapping]) -> list[dict]:
    """
    Rows of the table that the OpenCompass server takes: the model's own words as `prediction`. Control characters,
    which a spreadsheet cannot hold, are left out.
    """
    return [{column: _cell(record["row"].get(column)) for column in SUBMISSION_COLUMNS} for record in records]


def _cell(value):
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "", value) if isinstance(value, str) else value
