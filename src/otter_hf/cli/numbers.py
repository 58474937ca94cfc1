"""Numbers of options, for argparse: what is no number, or none that makes sense, is refused before anything starts."""

import argparse
import math
from collections.abc import Callable


def number(
    kind: type = int, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> Callable[[str], int | float]:
    """A `type=` for a finite number of the kind, from `least` or above `above`, up to `most`."""
    wanted = "whole number" if kind is int else "number"
    if above is not None:
        wanted += f" above {above}"
    elif least is not None:
        wanted += f" from {least} on" if most is None else f" from {least} to {most}"

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        fits = (
            (least is None or value >= least) and (above is None or value > above) and (most is None or value <= most)
        )
        if not math.isfinite(value) or not fits:
            raise argparse.ArgumentTypeError(f"{text!r} is no {wanted}")
        return value

    return read


positive = number(least=1)
not_negative = number(least=0)
