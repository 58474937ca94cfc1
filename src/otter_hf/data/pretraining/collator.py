"""Samples of pretraining to batches: padded ids, labels, packed pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..collator import IGNORE_INDEX, Row, pad, padding_token_id
from .samples import PretrainingSample


if TYPE_CHECKING:
    from ...models.flamingo.processing_flamingo import FlamingoProcessor


def caption_labels(input_ids: torch.Tensor, attention_mask: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """
    Labels of captions: all tokens but `<image>`, padding, and the first one, which nothing predicts.

    Args:
        input_ids: `(B, L)` int64, padded on the right.
        attention_mask: `(B, L)`, 0 for padding.

    Returns:
        `(B, L)` int64, -100 where nothing is learned. Not shifted: the model shifts.
    """
    target = attention_mask.bool() & (input_ids != image_token_id)  # (B, L)
    target[:, :1] = False
    return input_ids.masked_fill(~target, IGNORE_INDEX)


def interleaved_labels(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, image_token_id: int, end_of_chunk_token_id: int
) -> torch.Tensor:
    """
    Labels of interleaved documents: from each `<image>`, without it, to the `<|endofchunk|>` that follows, with it.

    What stands in front of the first image and between the chunks, among it the end-of-sequence token, is not learned.
    Arguments and result are those of `caption_labels`.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)  # (B, L)
    is_image, is_end = input_ids == image_token_id, input_ids == end_of_chunk_token_id
    last_image = torch.where(is_image, positions, -1).cummax(dim=1).values  # (B, L), up to and with the position
    last_end = torch.where(is_end, positions, -1).cummax(dim=1).values
    last_end = torch.nn.functional.pad(last_end[:, :-1], (1, 0), value=-1)  # strictly before the position
    target = (last_image > last_end) & ~is_image & attention_mask.bool()
    return input_ids.masked_fill(~target, IGNORE_INDEX)


@dataclass
class PretrainingCollator:
    """
    Turns samples of one set into a batch for Flamingo or Otter.

    Args:
        processor: of the model.

    Returns, when called, a dict of `input_ids`, `attention_mask` and `labels` `(B, L)` int64, padded on the right, and
    `pixel_values` `(B, T, 1, C, H, W)` float, zero where a row has fewer images, as is `pixel_attention_mask`
    `(B, T, 1)` int64.
    """

    processor: "FlamingoProcessor"

    def __post_init__(self):
        self._pad_token_id = padding_token_id(self.processor.tokenizer)

    def __call__(self, samples: Sequence[PretrainingSample], label_all: bool) -> dict[str, torch.Tensor]:
        """`label_all`: labels as `caption_labels` has them, not as `interleaved_labels`."""
        rows = [self._row(sample, label_all) for sample in samples]
        pictures = [[[image] for image in sample.images] for sample in samples]
        return pad(rows, self._pad_token_id) | self.processor.pack_media(pictures)

    def _row(self, sample: PretrainingSample, label_all: bool) -> Row:
        ids = torch.tensor(sample.input_ids)
        tokens = (ids[None], torch.ones_like(ids)[None], self.processor.image_token_id)
        if label_all:
            (labels,) = caption_labels(*tokens)
        else:
            (labels,) = interleaved_labels(*tokens, self.processor.end_of_chunk_token_id)
        return Row(sample, ids, labels)
