"""Samples to training batches for OtterHD: token ids, labels of every answer, and patches of mixed resolutions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from transformers import BatchFeature

from ..prompts import render
from .collator import IGNORE_INDEX, Collator, Row
from .samples import Sample, SampleError, frames_as_media


if TYPE_CHECKING:
    from ..models.otterhd.processing_otterhd import OtterHDProcessor

_ANSWER_CHARACTER = "\x04"


@dataclass
class OtterHDCollator(Collator):
    r"""Turns a list of samples (see `Sample`) into one training batch for OtterHD, see `Collator`.

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
        max_length: largest number of tokens of a sample, or `None` for no limit. Image tokens are never cut.
        on_overlong: what to do with a sample whose last turn alone is longer than `max_length`, see `Collator`;
            `"truncate"` trains on the rest without `|ENDOFTEXT|`.
        pad_to_multiple_of: pads the length of a padded batch to a multiple of this.

    Returns, when called, a dict of
        `input_ids` and `labels` `(B, L)` int64, -100 where nothing is learned, and `pixel_values` `(N, 3 P P)`
        float32, the patches of the batch in the order of their tokens (N may be 0). Padded: `attention_mask` `(B, L)`
        int64. Packed, with B = 1: `position_ids` `(1, L)` int64, `cu_seq_lens_q` and `cu_seq_lens_k` `(samples + 1,)`
        int32, `max_length_q` and `max_length_k` (int), which `flash_attention_2` would else work out in every layer.

    Raises:
        SampleError: naming the sample, if an image is refused or it is too long.
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
        self._check_choices(labels=("answers", "2023"), draw_per=("sample", "batch"))
        if self.resolution is not None and self.dynamic_resolution is not None:
            raise ValueError("Give resolution or dynamic_resolution, not both.")
        self._pad_token_id = self.processor.end_of_text_id  # as in 2023, masked and without labels

    def _prepare(self, samples: Sequence[Sample]) -> list[Sample]:
        """Each with the `resolution` of its images, a frame of a video being one."""
        sides = zip(samples, self._resolutions(samples), strict=True)
        return [{**frames_as_media(sample), "resolution": side} for sample, side in sides]

    def _resolutions(self, samples: Sequence[Sample]) -> list[int | tuple[int, int] | None]:
        sides: list = [self.resolution] * len(samples)
        if self.dynamic_resolution is not None and not all("resolution" in sample for sample in samples):
            drawn = torch.randint(len(self.dynamic_resolution), (len(samples),)).tolist()
            if self.draw_per == "batch":
                drawn = drawn[:1] * len(samples)
            sides = [(self.dynamic_resolution[index],) * 2 for index in drawn]
        own = [(sample["resolution"],) * 2 if "resolution" in sample else None for sample in samples]
        return [side if side is not None else drawn for side, drawn in zip(own, sides, strict=True)]

    def _encode(self, samples: Sequence[Sample]) -> list[Row]:
        return [self._row(sample, self._process_images(sample)) for sample in samples]

    def _cut(self, row: Row) -> Row | None:
        try:
            cut = self._row(row.sample, row.media, truncation=True, max_length=self.max_length)
        except SampleError:  # not even the images fit
            return None
        return None if (cut.labels == IGNORE_INDEX).all() else cut

    def _model_media(self, rows: Sequence[Row], batch: dict) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.cat([row.media["pixel_values"] for row in rows])}

    def _process_images(self, sample: Sample) -> BatchFeature:
        """The patches `(n, 3 P P)` of a sample, with `patch_grids` and `image_scale_factors` of its images."""
        images = [frame for medium in sample["media"] for frame in medium]
        if self.labels == "2023":
            images = images[:1] or [Image.new("RGB", (224, 224))]
        options = {"resolution": sample["resolution"], "max_pixels": self.max_pixels}
        try:
            return self.processor.image_processor(images, **options)
        except ValueError as error:
            raise SampleError(f"Sample {sample['id']!r}: {error}", reason="bad image") from error

    def _row(self, sample: Sample, media: BatchFeature, **limit) -> Row:
        """A sample's row, within a `limit` without what ends it."""
        ids, starts, spans = self._tokenize(sample, media, **limit)
        complete = not limit
        if self.labels == "2023":
            ids, labels = self._labels_of_2023(ids, complete)
        else:
            labels = [
                token if any(start <= place < end for start, end in spans) else IGNORE_INDEX
                for token, place in zip(ids, starts, strict=True)
            ]
            if complete:
                ids, labels = [*ids, self.processor.end_of_text_id], [*labels, self.processor.end_of_text_id]
        return Row(sample, torch.tensor(ids), torch.tensor(labels), media)

    def _tokenize(self, sample: Sample, media: BatchFeature, **limit) -> tuple[list[int], list[int], list]:
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
        grids, factors = media["patch_grids"].tolist(), media["image_scale_factors"].tolist()
        try:
            ids, starts = self.processor.encode(written[-1], grids, factors, add_answer_token=False, **limit)
        except ValueError as error:
            raise SampleError(f"Sample {sample['id']!r}: {error}", reason="bad text") from error
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
