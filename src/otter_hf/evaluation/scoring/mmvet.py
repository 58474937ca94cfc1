"""MM-Vet (arXiv:2308.02490): open answers, graded from 0 to 1 by a language model."""

from collections.abc import Mapping, Sequence

from . import percent
from .replies import read_reply


def grading_prompt(table: str, question: str, truth: str, reply: str) -> str:
    """
    What MM-Vet's own code asks its judge: the few-shot `table`, an empty line, and one more row, whose grade is left
    to the judge.
    """
    truth = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"{table}\n" + " | ".join([question, truth, read_reply(reply), ""])


def parse_grade(reply: str) -> float | None:
    """The grade a judge's reply opens with, from 0 to 1, or None."""
    try:
        grade = float(read_reply(reply).split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0.0 <= grade <= 1.0 else None


def score(records: Sequence[Mapping]) -> dict[str, float]:
    """
    Mean grade in percent: over all rows, for each capability, and for each exact set of capabilities.

    Args:
        records: with `capabilities` (list of names), `grades`, one per run of the judge, None where it gave none. A
            row without a grade counts as 0, as in 2023, and is counted.

    Returns:
        `total`, `total_std` (over runs, population), `judge_failures`, `capability/NAME`, `capabilities/NAME_NAME`.
    """
    num_runs = max((len(record["grades"]) for record in records), default=0)
    totals = [_mean([record["grades"][run] or 0.0 for record in records]) for run in range(num_runs)]
    result = {
        "total": percent(sum(totals), num_runs),
        "total_std": 100.0 * (_mean([(total - _mean(totals)) ** 2 for total in totals])) ** 0.5,
        "judge_failures": sum(grade is None for record in records for grade in record["grades"]),
        "questions": len(records),
    }
    single, exact = {}, {}
    for record in records:
        grade = _mean([value or 0.0 for value in record["grades"]])
        exact.setdefault("_".join(sorted(record["capabilities"])), []).append(grade)
        for name in record["capabilities"]:
            single.setdefault(name, []).append(grade)
    for prefix, groups in (("capability", single), ("capabilities", exact)):
        result |= {f"{prefix}/{name}": 100.0 * _mean(grades) for name, grades in sorted(groups.items())}
    return result


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
