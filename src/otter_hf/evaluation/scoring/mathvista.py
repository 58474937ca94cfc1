"""MathVista (arXiv:2310.02255): answers are extracted from free text, normalised, and compared as text."""

import re
import string
from collections.abc import Mapping, Sequence

from . import mean_by, percent
from .choices import OTHER, parse_choice, parse_whole
from .replies import is_answered, read_reply


# what the metadata of a row are scored by
METADATA_KINDS = ("language", "source", "category", "task", "context", "grade", "skills")

_HINTS = {
    "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.",
    "float1": "requiring a floating-point number with one decimal place and provide the final value, e.g., 1.2, 1.3, "
    "1.4, at the end.",
    "float2": "requiring a floating-point number with two decimal places and provide the final value, e.g., 1.23, "
    "1.34, 1.45, at the end.",
    "list": "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at "
    "the end.",
}


def build_query(row: Mapping, shot_type: str | None = None) -> str:
    """
    The question as MathVista asks it, to the byte: the row's `query`, which the data have, else built as they are: a
    hint on the form of the answer, the question, the choices.

    Args:
        row: with `question`, `question_type`, `answer_type`, `choices`, `unit`, `precision`.
        shot_type: `"solution"` for what the authors' `build_query.py` makes without examples, which has another order
            than the data: the hint behind the choices, then `Solution:`.

    Raises:
        ValueError: for an answer type or `shot_type` it does not know.
    """
    if shot_type not in (None, "solution"):
        raise ValueError(f"shot_type must be solution, or left out for the query of the data; got {shot_type!r}.")
    if shot_type is None and row.get("query"):
        return row["query"]
    if row["question_type"] == "multi_choice":
        hint = "and provide the correct option letter, e.g., A, B, C, D, at the end."
    elif row["answer_type"] == "float":
        hint = _HINTS["float1" if int(row.get("precision") or 0) <= 1 else "float2"]
    elif row["answer_type"] in _HINTS:
        hint = _HINTS[row["answer_type"]]
    else:
        raise ValueError(f"Row {row.get('pid')!r} has the answer_type {row['answer_type']!r}; use {sorted(_HINTS)}.")
    hint = f"Hint: Please answer the question {hint}"
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    lines = [f"Question: {row['question']}{unit}"]
    if row.get("choices"):
        lines += ["Choices:", *(f"({letter}) {text}" for letter, text in _options(row).items())]
    return "\n".join([hint, *lines] if shot_type is None else [*lines, hint, "Solution:"])


def _options(row: Mapping) -> dict[str, str]:
    return dict(zip(string.ascii_uppercase, row["choices"], strict=False))


def extract_directly(reply: str, row: Mapping, quick: bool = False) -> str | None:
    """
    The answer, where no judge is needed to find it: a choice or its letter, a number; None otherwise.

    The authors' code takes choices to the letter and numbers that Python reads. This takes what is as plain, too: "B",
    "(B) No", "No." for choices, "3.", "3.0" and "1,000" for numbers.

    Args:
        reply: what the model wrote.
        row: with `question_type`, `answer_type`, `choices`.
        quick: also take what stands in `The answer is "..".`.
    """
    if not is_answered(reply):
        return None
    reply = read_reply(reply)
    if row["question_type"] == "multi_choice":
        if reply in row["choices"]:
            return reply
        if (letter := parse_whole(reply, _options(row))) != OTHER:
            return _options(row)[letter]
    number = reply.rstrip(".").strip("$ ")
    number = number.replace(",", "") if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", number) else number
    try:
        value = float(number)
        if row["answer_type"] == "float":
            return str(value)
        if row["answer_type"] == "integer" and value.is_integer():
            return str(int(value))
    except ValueError:
        pass
    if quick and (stated := re.search(r'The answer is "(.*)"\.', reply)):
        return stated.group(1)
    return None


def choice_in_prose(reply: str, row: Mapping) -> str | None:
    """The choice that a reply names somewhere, for runs without a judge; see `scoring.choices`."""
    if row["question_type"] != "multi_choice" or (letter := parse_choice(reply, _options(row))) == OTHER:
        return None
    return _options(row)[letter]


def extraction_prompt(examples: str, query: str, reply: str) -> str:
    """What the judge is asked: MathVista's examples, then this query and reply."""
    return f"{examples.strip()}\n\n{query}\n\n{read_reply(reply)}\n\nExtracted answer: "


def normalise(extraction: str, row: Mapping) -> str | None:
    """The extracted answer as it is compared: a choice's text (the nearest one), a number of the row's precision."""
    if row["question_type"] == "multi_choice":
        extraction = extraction.strip()
        if extraction in row["choices"] and len(extraction) > 1:
            return extraction
        if letters := re.findall(r"\(([a-zA-Z])\)", extraction):
            extraction = letters[0].upper()
        if len(extraction) == 1 and extraction in string.ascii_uppercase[: len(row["choices"])]:
            return row["choices"][string.ascii_uppercase.index(extraction)]
        return min(row["choices"], key=lambda choice: edit_distance(extraction, choice))
    try:
        if row["answer_type"] == "integer":
            return str(int(float(extraction)))
        if row["answer_type"] == "float":
            return str(round(float(extraction), int(1 if row["precision"] is None else row["precision"])))
    except (ValueError, OverflowError):
        return None
    return extraction


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance: insertions, deletions and substitutions."""
    previous = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        current = [i]
        for j, other in enumerate(second, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (letter != other)))
        previous = current
    return previous[-1]


def score(records: Sequence[Mapping]) -> dict[str, float]:
    """
    Accuracy over all rows and by kind.

    Args:
        records: with `prediction` (None where nothing could be extracted), `answer`, `failed` (the judge gave no
            extraction) and a dict `kinds` of names or lists of names, e.g. question_type, task, skills.

    Returns:
        `accuracy`, `extraction_failures` (they count as wrong; the 2023 code let an empty extraction snap to the
        shortest choice), `questions`, and `KIND/NAME`; of the test split, whose answers are not public, no accuracy.
    """
    if records and not any(str(record["answer"] or "").strip() for record in records):
        return {"extraction_failures": sum(record["failed"] for record in records), "questions": len(records)}
    result = {
        "accuracy": percent(sum(map(_is_right, records)), len(records)),
        "extraction_failures": sum(record["failed"] for record in records),
        "questions": len(records),
    }
    for kind in dict.fromkeys(kind for record in records for kind in record["kinds"]):
        rows = []
        for record in records:
            names = record["kinds"].get(kind) or []
            names = [names] if isinstance(names, str) else names
            rows += [{kind: name, "correct": _is_right(record)} for name in names]
        result |= mean_by(rows, kind)
    return result


def _is_right(record: Mapping) -> bool:
    return record["prediction"] is not None and str(record["prediction"]).strip() == str(record["answer"]).strip()
