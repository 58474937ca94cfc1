"""Samples to training batches for OtterHD: token ids, labels of every answer, and patches of mixed resolutions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from transformers.utils import logging

from ..prompts import render
from .collator import IGNORE_INDEX
from .samples import Sample, SampleError, drop_oldest_turn, frames_as_media


if TYPE_CHECKING:
    from ..models.otterhd.processing_otterhd import OtterHDProcessor

logger = logging.get_logger(__name__)

_ANSWER_CHARACTER = "\x04"


@dataclass
class OtterHDCollator:
    r"""Turns a list of samples (see `Sample`) into one training batch for OtterHD.

    A row is `images <s> text |ENDOFTEXT|`, with the text `User:{q} Assistant:<0x04> {a}` of every turn; a row without
    images starts with `|ENDOFTEXT|` in place of `<s>`. The images of the first turn, the frames of videos included,
    stand in front, those of later turns in front of these, and those with a place in an instruction there.

    Args:
        processor: an `OtterHDProcessor`.
        packing: put the samples one after the other into one row, without padding (`position_ids` restart), or pad
            them on the right.
        labels: `"answers"` trains on every answer and the final `|ENDOFTEXT|`. `"2023"` reproduces the rule of the
            original code: what lies between the first and the second `<0x04>` (of two turns the first answer and the
            second *question*) and the final `|ENDOFTEXT|`; it also keeps only the first image of a sample and gives
            a sample without images a black one.
        resolution: size of all images, see `OtterHDImageProcessor`.
        dynamic_resolution: sides in pixels from which to draw the square that images are resized to (448, 512, 768 in
            the original), drawn with torch's global generator; `None` for no drawing. A sample with a side of its own
            under the key `resolution` keeps that one.
        draw_per: `"sample"`, or `"batch"` for one drawing for all samples as in the original, in each process apart.
        max_pixels: largest number of pixels of an image, see `OtterHDImageProcessor`.
        max_length: largest number of tokens of a sample, or `None` for no limit. Samples that are too long lose their
            oldest turns first. Image tokens are never cut.
        on_overlong: what to do with a sample whose last turn alone is longer than `max_length`: `"error"` raises,
            `"truncate"` cuts the end of its answer and trains on the rest without `|ENDOFTEXT|`, `"skip"` leaves it
            out of the batch.
        pad_to_multiple_of: pads the length of a padded batch to a multiple of this.

    Returns, when called, a dict of
        `input_ids` and `labels` `(B, L)` int64, -100 where nothing is learned, and `pixel_values` `(N, 3 P P)`
        float32, the patches of the batch in the order of their tokens (N may be 0). Padded: `attention_mask` `(B, L)`
        int64. Packed, with B = 1: `position_ids` `(1, L)` int64, `cu_seq_lens_q` and `cu_seq_lens_k` `(samples + 1,)`
        int32, `max_length_q` and `max_length_k` (int), which `flash_attention_2` would else work out in every layer.

    Raises:
        SampleError: naming the sample, if an image is refused, if it is too long, or has nothing to learn.
    """

    processor: "OtterHDProcessor"
    packing: bool = True
    labels: str = "answers"
    resolution: int | tuple[int, int] | None = None
    dynamic_resolution: Sequence[int] | None = None
    draw_per: str = "sample"
    max_pixels: int | None = None
    max_length: int | None = None
    on_overlong: str = "error"
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        for name, choices in (
            ("labels", ("answers", "2023")),
            ("draw_per", ("sample", "batch")),
            ("on_overlong", ("error", "truncate", "skip")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        if self.resolution is not None and self.dynamic_resolution is not None:
            raise ValueError("Give resolution or dynamic_resolution, not both.")

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor | int]:
        rows = []
        for sample, resolution in zip(samples, self._resolutions(samples), strict=True):
            row = self._encode(frames_as_media(sample), resolution)
            if row is not None:
                rows.append(row)
        if not rows:
            raise SampleError(
                f"Sample {samples[0]['id']!r} and the rest of its batch are longer than max_length={self.max_length}: "
                "raise the limit or set on_overlong='truncate'.",
                reason="overlong",
            )
        ids, labels, patches = zip(*rows, strict=True)
        batch = self._pack(ids, labels) if self.packing else self._pad(ids, labels)
        return batch | {"pixel_values": torch.cat(patches)}

    def _resolutions(self, samples: Sequence[Sample]) -> list[int | tuple[int, int] | None]:
        if all("resolution" in sample for sample in samples):
            return [(sample["resolution"],) * 2 for sample in samples]
        if self.dynamic_resolution is None:
            return [self.resolution] * len(samples)
        drawn = torch.randint(len(self.dynamic_resolution), (len(samples),)).tolist()
        if self.draw_per == "batch":
            drawn = drawn[:1] * len(samples)
        return [(self.dynamic_resolution[index],) * 2 for index in drawn]

    def _encode(self, sample: Sample, resolution) -> tuple[list[int], list[int], torch.Tensor] | None:
        """Ids, labels and patches `(n, 3 P P)` of a sample; `None` if it is to be left out."""
        grids, factors, patches = self._process_images(sample, resolution)
        ids, starts, spans = self._tokenize(sample, grids, factors)
        while self._is_too_long(ids) and len(sample["turns"]) > 1:
            logger.warning_once(f"Samples longer than max_length={self.max_length} lose their oldest turns.")
            sample = drop_oldest_turn(sample)
            grids, factors, patches = self._process_images(sample, resolution)
            ids, starts, spans = self._tokenize(sample, grids, factors)
        complete = not self._is_too_long(ids)
        if not complete:
            if self.on_overlong == "skip":
                logger.warning(f"Left out sample {sample['id']!r}: longer than max_length={self.max_length}.")
                return None
            if self.on_overlong == "error":
                raise SampleError(
                    f"Sample {sample['id']!r} has {len(ids) + 1} tokens after dropping its context, the limit is "
                    f"max_length={self.max_length}: raise the limit or set on_overlong to 'truncate' or 'skip'.",
                    reason="overlong",
                )
            ids, starts, spans = self._tokenize(sample, grids, factors, truncation=True, max_length=self.max_length)
        if self.labels == "2023":
            ids, labels = self._labels_of_2023(ids, complete)
        else:
            labels = [
                token if any(start <= place < end for start, end in spans) else IGNORE_INDEX
                for token, place in zip(ids, starts, strict=True)
            ]
            if complete:
                ids, labels = [*ids, self.processor.end_of_text_id], [*labels, self.processor.end_of_text_id]
        if all(label == IGNORE_INDEX for label in labels):
            raise SampleError(
                f"Sample {sample['id']!r} is cut before its answer starts: max_length={self.max_length} is too small.",
                reason="nothing to learn",
            )
        return ids, labels, patches

    def _is_too_long(self, ids: list[int]) -> bool:
        return self.max_length is not None and len(ids) + 1 > self.max_length  # + 1: |ENDOFTEXT|

    def _process_images(self, sample: Sample, resolution) -> tuple[list, list, torch.Tensor]:
        images = [frame for medium in sample["media"] for frame in medium]
        if self.labels == "2023":
            images = images[:1] or [Image.new("RGB", (224, 224))]
        try:
            processed = self.processor.image_processor(images, resolution=resolution, max_pixels=self.max_pixels)
        except ValueError as error:
            raise SampleError(f"Sample {sample['id']!r}: {error}", reason="bad image") from error
        return (
            processed["patch_grids"].tolist(),
            processed["image_scale_factors"].tolist(),
            processed["pixel_values"],
        )

    def _tokenize(self, sample: Sample, grids, factors, **limit):
        """Ids, the place of each in the text, and the places of the answers."""
        turns, counts, places = sample["turns"], sample["media_per_turn"], sample.get("media_places")
        if self.labels == "2023":
            counts, places = [1] + [0] * (len(turns) - 1), None
        written = [
            render(
                turns[:end],
                "fuyu",
                counts[:end],
                sample.get("task_description"),
                self.processor.reserved_tokens,
                places and places[:end],
            )
            for end in range(1, len(turns) + 1)
        ]
        # the words of the sample are escaped, so what is left of the character opens an answer
        openings = [place for place, letter in enumerate(written[-1]) if letter == _ANSWER_CHARACTER]
        spans = [(opening + 1, len(text)) for opening, text in zip(openings, written, strict=True)]
        try:
            ids, starts = self.processor.encode(written[-1], grids, factors, add_answer_token=False, **limit)
        except ValueError as error:
            raise SampleError(
                f"Sample {sample['id']!r}: {error}", reason="overlong" if limit else "bad text"
            ) from error
        return ids, starts, spans

    def _labels_of_2023(self, ids: list[int], complete: bool) -> tuple[list[int], list[int]]:
        """Ids and labels by the rule of the original code, which put `<0x04>` behind the text and then renamed it."""
        ids = [*ids, self.processor.answer_token_id] if complete else list(ids)
        marks = [place for place, token in enumerate(ids) if token == self.processor.answer_token_id] + [len(ids)] * 2
        labels = [IGNORE_INDEX] * len(ids)
        labels[marks[0] + 1 : marks[1] + 1] = ids[marks[0] + 1 : marks[1] + 1]
        if complete:
            ids[-1] = labels[-1] = self.processor.end_of_text_id
        return ids, labels

    def _pack(self, ids: Sequence[list[int]], labels: Sequence[list[int]]) -> dict[str, torch.Tensor | int]:
        lengths = torch.tensor([0, *map(len, ids)])
        boundaries = lengths.cumsum(0).to(torch.int32)  # (samples + 1,)
        longest = int(lengths.max())
        return {
            "input_ids": torch.tensor([[token for row in ids for token in row]]),  # (1, L)
            "labels": torch.tensor([[label for row in labels for label in row]]),  # (1, L)
            "position_ids": torch.cat([torch.arange(len(row)) for row in ids]).unsqueeze(0),  # (1, L)
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def _pad(self, ids: Sequence[list[int]], labels: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        length = max(map(len, ids))
        if self.pad_to_multiple_of:
            length += -length % self.pad_to_multiple_of
        # |ENDOFTEXT| as in 2023, masked and without labels
        batch = {
            "input_ids": torch.full((len(ids), length), self.processor.end_of_text_id),  # (B, L)
            "attention_mask": torch.zeros((len(ids), length), dtype=torch.int64),  # (B, L)
            "labels": torch.full((len(ids), length), IGNORE_INDEX),  # (B, L)
        }
        for index, (row, row_labels) in enumerate(zip(ids, labels, strict=True)):
            batch["input_ids"][index, : len(row)] = torch.tensor(row)
            batch["attention_mask"][index, : len(row)] = 1
            batch["labels"][index, : len(row)] = torch.tensor(row_labels)
        return batch
