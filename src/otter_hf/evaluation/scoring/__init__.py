"""How replies become scores: pure functions, one module per benchmark, that know nothing of models or lmms-eval.

Each module reads replies (`parse_*`) and sums up records (`score`). `score` returns a flat dict of numbers: rates are
in percent, MME's points are points, counts are counts.
"""


def percent(part: float, whole: float) -> float:
    """`part / whole` in percent; 0 where there is nothing to divide by."""
    return 100.0 * part / whole if whole else 0.0


def mean_by(records: list[dict], key: str, value: str = "correct") -> dict[str, float]:
    """Mean of `value` in percent for each value of `key`, as `{"key/value": mean}`, sorted by name."""
    groups: dict[str, list[float]] = {}
    for record in records:
        groups.setdefault(str(record[key]), []).append(float(record[value]))
    return {f"{key}/{name}": percent(sum(values), len(values)) for name, values in sorted(groups.items())}
