"""
Did it look? The same questions with the picture of another row, and with a blank one.

A score says what a model answers, not whether it looked: much of VQA is answered as well without the picture (Goyal et
al. 2017, https://huggingface.co/papers/1612.00837). What the right picture is worth is the visual gain, the score less
that with other pictures.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from transformers.utils import logging


logger = logging.get_logger(__name__)

CONTROLS = ("swapped", "blank")
_GREY = (127, 127, 127)
# rows that are looked at for another picture: benchmarks ask several questions about one
_LOOKED_AT = 64
Unit = TypeVar("Unit")


def control_messages(
    control: str, messages: list[dict], number: int, count: int, messages_of: Callable[[int], list[dict]]
) -> list[dict]:
    """
    A conversation with other media in its last message of a user that has any; all else stays.

    Args:
        control: `swapped`, by the media of another row, or `blank`, by grey of the same size.
        messages: with parts `{"type": "image" or "video", key: medium}`.
        number: of the row.
        count: of rows.
        messages_of: the conversation of the row of a number.
    """
    place = _question(messages)
    if place is None:
        return messages
    waiting = iter(control_media(control, media_of(messages), number, count, lambda row: media_of(messages_of(row))))
    content = [part if part["type"] == "text" else next(waiting) for part in messages[place]["content"]]
    return [*messages[:place], {**messages[place], "content": content}, *messages[place + 1 :]]


def control_media(control: str, own: Sequence, number: int, count: int, of_row: Callable[[int], Sequence]) -> list:
    """Media in place of a row's own; see `control_messages` and, for the arguments, `swap`."""
    return [blank(medium) for medium in own] if control == "blank" else swap(own, number, count, of_row)


def media_of(messages: list[dict]) -> list[dict]:
    """The pictures and films of the last message of a user that has any."""
    place = _question(messages)
    return [] if place is None else [part for part in messages[place]["content"] if part["type"] != "text"]


def swap(own: Sequence, number: int, count: int, of_row: Callable[[int], Sequence], seed: int = 0) -> list:
    """
    As many media as a row has, of the next row whose media are all others, in a cycle of all rows drawn by a seed; its
    own, with a warning, where there are no others.

    Args:
        own: media of the row: pictures, lists of frames, paths, or parts of a message with these.
        number: of the row.
        count: of rows.
        of_row: the media of the row of a number.
        seed: of the cycle.
    """
    following = _cycle(count, seed)
    row = following[number]
    for _ in range(min(count - 1, _LOOKED_AT)):
        there = of_row(row)
        other = [there[i % len(there)] for i in range(len(own))] if there else []
        if other and not any(_is_same(mine, theirs) for mine, theirs in zip(own, other, strict=True)):
            return other
        row = following[row]
    if own:
        logger.warning_once(
            "Questions whose picture no other row replaces keep it in the control `swapped`, which makes the visual "
            "gain too small: it takes rows with different pictures."
        )
    return list(own)


@functools.lru_cache(maxsize=4)
def _cycle(count: int, seed: int) -> list[int]:
    """The row that follows each in a random cycle of all (Sattolo 1986): none follows itself."""
    rows = list(range(count))
    generator = np.random.default_rng(seed)
    for last in range(count - 1, 0, -1):
        other = int(generator.integers(last))
        rows[last], rows[other] = rows[other], rows[last]
    return rows


def blank(medium: Any) -> Any:
    """
    A picture, or the frames of a film, of the same size in grey, also in a part of a message; of a film that is not
    read yet one such frame.
    """
    if isinstance(medium, dict):
        return {key: value if key == "type" else blank(value) for key, value in medium.items()}
    if isinstance(medium, Image.Image):
        return Image.new("RGB", medium.size, _GREY)
    if isinstance(medium, (list, tuple)) and medium:
        return [blank(frame) for frame in medium]
    return [Image.new("RGB", (224, 224), _GREY)]


def visual_gains(
    metrics: Callable[[list[Unit]], Mapping[str, float]],
    shown: Sequence[Unit],
    swapped: Sequence[Unit],
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """
    Each score less that with the pictures of other rows, with its 95 % interval: the bootstrap over questions, each
    with both of its answers (Efron 1979).

    Args:
        metrics: the scores of any number of questions, some of them several times.
        shown: of each question what is scored.
        swapped: the same with the picture of another row.
        samples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        score -> `visual_gain`, and `interval`, its lower and upper bound.
    """

    def gains(places: Sequence[int]) -> dict[str, float]:
        with_others = metrics([swapped[i] for i in places])
        return {name: score - with_others[name] for name, score in metrics([shown[i] for i in places]).items()}

    generator = np.random.default_rng(seed)
    drawn = [gains(generator.integers(len(shown), size=len(shown)).tolist()) for _ in range(samples)]
    intervals = {name: np.percentile([gain[name] for gain in drawn], (2.5, 97.5)).tolist() for name in drawn[0]}
    found = gains(range(len(shown)))
    return {name: {"visual_gain": found[name], "interval": interval} for name, interval in intervals.items()}


def visual_gain(
    metric: Callable[[list[Unit]], float], shown: Sequence[Unit], swapped: Sequence[Unit], **options: int
) -> dict[str, Any]:
    """As [`visual_gains`], of one score."""
    return visual_gains(lambda units: {"": metric(units)}, shown, swapped, **options)[""]


def _question(messages: list[dict]) -> int | None:
    for place in range(len(messages) - 1, -1, -1):
        content = messages[place]["content"]
        if messages[place]["role"] == "user" and isinstance(content, list):
            if any(part["type"] != "text" for part in content):
                return place
    return None


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Image.Image) and isinstance(other, Image.Image):
        return one is other or (one.size == other.size and one.tobytes() == other.tobytes())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return type(one) is type(other) and one == other
