"""Results on disk: JSON, a table to read, a log of samples. No file holds a time: the same run, the same bytes."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import write_text


def write_samples(path: Path, samples: Iterable[Mapping]) -> None:
    """Writes one JSON object per line."""
    write_text(path, "".join(json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples))


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """
    The results as text, one figure per line; parts of a figure (`category/..`) are in the JSON only. Where there are
    controls, a score has beside it that with other pictures, with blank ones, and the visual gain with its interval.

    Args:
        results: model -> dataset -> figure -> value, `controls` -> figure -> what [`Benchmark.gains`] says.
    """
    has_controls = any(figures.get("controls") for datasets in results.values() for figures in datasets.values())
    rows = [("model", "dataset", "figure", "value", *(("swapped", "blank", "visual gain (95 %)") * has_controls))]
    for model, datasets in results.items():
        for dataset, figures in datasets.items():
            for name, value in figures.items():
                if "/" not in name and name != "controls":
                    beside = _beside(figures.get("controls", {}).get(name)) if has_controls else ()
                    rows.append((model, dataset, name, _number(value), *beside))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"


def _beside(control: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if control is None:
        return "", "", ""
    low, high = control["interval"]
    gain = f"{control['visual_gain']:+.2f} ({low:+.2f} to {high:+.2f})"
    return _number(control["swapped"]), _number(control["blank"]), gain


def _number(value) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
