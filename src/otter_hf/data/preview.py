"""Samples and datasets made visible: a sample as the model is given it, lengths and sizes as numbers and pictures."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from ..prompts import render
from .collator import IGNORE_INDEX, OtterCollator
from .mixture import MimicitMixture
from .samples import Sample
from .tables import aligned


if TYPE_CHECKING:
    from ..models.otter.processing_otter import OtterProcessor

_CELL = 160
# background colours of the terminal, one for each medium in turn
_COLOURS = (44, 42, 45, 46, 43, 41)


def describe_sample(sample: Sample, processor: "OtterProcessor", format: str = "simple", colour: bool = True) -> str:
    """A sample as the model is given it, as text for a terminal.

    In colour, the background tells which image a token sees (media index; none before the first) and underlined
    tokens are learned. Without colour, `[n]` stands in front of the tokens that see image `n`, and `{...}` around
    those that are learned.
    """
    batch = OtterCollator(processor, format=format, max_length=None)([sample])
    tokens, labels = batch["input_ids"][0], batch["labels"][0]
    media_index = (tokens == processor.image_token_id).cumsum(dim=0)  # (L,)
    learned = labels != IGNORE_INDEX
    pieces, start = [], 0
    for end in range(1, len(tokens) + 1):
        if end < len(tokens) and media_index[end] == media_index[start] and learned[end] == learned[start]:
            continue
        text = processor.tokenizer.decode(tokens[start:end])
        index = int(media_index[start])
        if colour:
            codes = [str(_COLOURS[(index - 1) % len(_COLOURS)])] * bool(index) + ["4"] * bool(learned[start])
            pieces.append(f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes else text)
        else:
            changed = not start or media_index[start - 1] != index
            pieces.append((f"[{index}]" if changed else "") + (f"{{{text}}}" if learned[start] else text))
        start = end
    shape = "x".join(map(str, batch["pixel_values"].shape[1:]))
    head = (
        f"sample {sample['id']} of {sample.get('dataset', '?')} ({sample.get('task_group', '?')}): "
        f"{len(tokens)} tokens, {int(learned.sum())} learned, {len(sample['media'])} media, pixel_values {shape}"
    )
    return f"{head}\n{''.join(pieces)}"


def text_of_sample(sample: Sample, format: str = "simple") -> str:
    """The prompt text of a sample."""
    return render(
        sample["turns"],
        format,
        sample["media_per_turn"],
        sample.get("task_description"),
        media_places=sample.get("media_places"),
    )


def contact_sheet(sample: Sample) -> Image.Image:
    """All pictures of a sample: a row for each medium, its frames in order."""
    rows = sample["media"] or [[]]
    sheet = Image.new("RGB", (_CELL * max(1, *map(len, rows)), _CELL * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, frames in enumerate(rows):
        for x, frame in enumerate(frames):
            cell = frame.copy()
            cell.thumbnail((_CELL - 4, _CELL - 4))
            sheet.paste(cell, (x * _CELL + 2, y * _CELL + 2))
            draw.text(
                (x * _CELL + 5, y * _CELL + 4), f"{y + 1}.{x + 1}", fill="black", stroke_width=1, stroke_fill="white"
            )
    return sheet


_UNITS = {
    "turns": "of a sample",
    "media": "of a sample",
    "frames": "of a sample",
    "width": "of a picture, pixels",
    "height": "of a picture, pixels",
}


def mixture_statistics(mixture: MimicitMixture, tokenizer: Any = None, limit: int | None = 1000) -> dict[str, list]:
    """Lengths and sizes of the first `limit` samples of a mixture.

    Returns a dict of lists: `length` of the prompts, in tokens or without a tokenizer in characters, `turns`, `media`
    and `frames` per sample, and the `width` and `height` of the pictures in pixels.
    """
    values: dict[str, list] = {key: [] for key in ("length", "turns", "media", "frames", "width", "height")}
    for index in range(min(len(mixture), limit or len(mixture))):
        sample = mixture[index]
        text = text_of_sample(sample)
        length = len(text) if tokenizer is None else len(tokenizer(text, verbose=False)["input_ids"])
        frames = [frame for medium in sample["media"] for frame in medium]
        for key, value in (("length", length), ("turns", len(sample["turns"])), ("media", len(sample["media"]))):
            values[key].append(value)
        values["frames"].append(len(frames))
        values["width"] += [frame.width for frame in frames]
        values["height"] += [frame.height for frame in frames]
    return values


def statistics_table(values: Mapping[str, Sequence[int]], in_tokens: bool = False) -> str:
    """
    Number, least, median, 95th percentile and largest of each list of `mixture_statistics`, as a table with units;
    `in_tokens` says that it had a tokenizer.
    """
    units = _UNITS | {"length": "tokens of a sample's text" if in_tokens else "characters of a sample's text"}
    lines = [("", "count", "min", "median", "p95", "max")]
    for key, numbers in values.items():
        ordered = sorted(numbers)
        if ordered:
            p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
            key = f"{key} ({units[key]})" if key in units else key
            lines.append((key, *map(str, (len(ordered), ordered[0], median(ordered), p95, ordered[-1]))))
    return aligned(lines, left=0)


def write_histograms(values: Mapping[str, Sequence[int]], path: str | Path):
    """Histograms of the lists as one PNG; needs matplotlib."""
    from matplotlib.figure import Figure

    shown = {key: numbers for key, numbers in values.items() if numbers}
    figure = Figure(figsize=(10, 2.5 * -(-len(shown) // 3)), layout="constrained")
    for number, (key, numbers) in enumerate(shown.items()):
        axes = figure.add_subplot(-(-len(shown) // 3), 3, number + 1)
        if len(set(numbers)) > 1:
            axes.hist(numbers, bins=min(40, len(set(numbers))))
        else:
            axes.bar([str(numbers[0])], [Counter(numbers)[numbers[0]]])
        axes.set_title(key)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(buffer.getvalue())
