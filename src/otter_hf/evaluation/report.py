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
    The results as text, one figure per line; parts of a figure (`category/..`) are in the JSON only.

    Args:
        results: model -> dataset -> figure -> value.
    """
    rows = [("model", "dataset", "figure", "value")]
    for model, datasets in results.items():
        for dataset, figures in datasets.items():
            for name, value in figures.items():
                if "/" not in name:
                    rows.append((model, dataset, name, f"{value:.2f}" if isinstance(value, float) else str(value)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"
