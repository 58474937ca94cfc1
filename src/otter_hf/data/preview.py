"""Samples and datasets made visible: a sample as the model is given it, lengths and sizes as numbers and pictures."""

import copy
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw

from ..prompts import IMAGE_TOKEN, render
from .collator import IGNORE_INDEX, Collator, OtterCollator
from .collator_flamingo import FlamingoCollator
from .collator_idefics import IdeficsCollator, prepare_idefics_tokenizer
from .collator_otterhd import OtterHDCollator
from .mixture import MimicitMixture
from .samples import Sample
from .tables import aligned


if TYPE_CHECKING:
    from transformers import ProcessorMixin

_CELL = 160
# background colours of the terminal, one for each medium in turn
_COLOURS = (44, 42, 45, 46, 43, 41)


def describe_sample(
    sample: Sample, processor: "ProcessorMixin", format: str | None = None, colour: bool = True
) -> str:
    """A sample as the model is given it, as text for a terminal.

    In colour, the background tells which image a token sees (media index; none before the first) and underlined
    tokens are learned. Without colour, `[n]` stands in front of the tokens that see image `n`, and `{...}` around
    those that are learned. OtterHD's tokens see all images in front of them, of which the number of tokens is told.

    Args:
        processor: of an Otter, Flamingo, OtterHD or Idefics.
        format: instruction format; default: that of the family.

    Raises:
        ValueError: for another processor, or a format that is not of its family.
    """
    collator = _collator_of(processor, format)
    batch = collator([sample])
    tokens, labels = batch["input_ids"][0], batch["labels"][0]
    sees_all = isinstance(collator, OtterHDCollator)
    if sees_all:
        of_image = torch.isin(tokens, torch.tensor(processor.image_token_ids))  # (L,)
        media_index = torch.zeros_like(tokens)
    else:
        of_image = torch.zeros_like(tokens, dtype=torch.bool)
        image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        media_index = (tokens == image_id).cumsum(dim=0)  # (L,)
    learned = labels != IGNORE_INDEX
    pieces, start = [], 0
    for end in range(1, len(tokens) + 1):
        if end < len(tokens) and all(kind[end] == kind[start] for kind in (media_index, learned, of_image)):
            continue
        text = f"[{end - start} image tokens]" if of_image[start] else processor.tokenizer.decode(tokens[start:end])
        index = int(media_index[start])
        if colour:
            codes = [str(_COLOURS[(index - 1) % len(_COLOURS)])] * bool(index) + ["4"] * bool(learned[start])
            pieces.append(f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes else text)
        else:
            changed = not sees_all and (not start or media_index[start - 1] != index)
            pieces.append((f"[{index}]" if changed else "") + (f"{{{text}}}" if learned[start] else text))
        start = end
    shape = "x".join(map(str, batch["pixel_values"].shape[0 if sees_all else 1 :]))
    head = (
        f"sample {sample['id']} of {sample.get('dataset', '?')} ({sample.get('task_group', '?')}): "
        f"{len(tokens)} tokens, {int(learned.sum())} learned, {len(sample['media'])} media, pixel_values {shape}"
    )
    return f"{head}\n{''.join(pieces)}"


def _collator_of(processor: "ProcessorMixin", format: str | None) -> Collator:
    from transformers import IdeficsProcessor

    from ..models.flamingo import FlamingoProcessor
    from ..models.otter import OtterProcessor
    from ..models.otterhd import OtterHDProcessor

    if isinstance(processor, (OtterProcessor, FlamingoProcessor)):
        kind = OtterCollator if isinstance(processor, OtterProcessor) else FlamingoCollator
        return kind(processor, format=format or "simple", max_length=None)
    families = {OtterHDProcessor: "fuyu", IdeficsProcessor: "idefics"}
    own = next((form for family, form in families.items() if isinstance(processor, family)), None)
    if own is None:
        raise ValueError(f"A {type(processor).__name__} is none of Otter, Flamingo, OtterHD and Idefics.")
    if format not in (None, own):
        raise ValueError(f"The format of a {type(processor).__name__} is {own}, got {format!r}: leave it out.")
    if own == "fuyu":
        return OtterHDCollator(processor, packing=False)
    tokenizer = prepare_idefics_tokenizer(copy.deepcopy(processor.tokenizer))
    return IdeficsCollator(tokenizer, processor.image_processor, max_length=None, remove_answer_token=True)


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
