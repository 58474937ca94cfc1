"""Samples to training batches of transformers' `IdeficsForVisionText2Text`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.loss.loss_utils import ForCausalLMLoss

from ..prompts import ANSWER_TOKEN, IMAGE_TOKEN, get_format
from .collator import AnswerTokenCollator, Row, read_media
from .samples import Sample, frames_as_media


def prepare_idefics_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Adds the tokens of the `idefics` format that the tokenizer lacks: for Idefics as published, `<answer>` only.

    Idefics keeps the rows of added tokens apart, and `from_pretrained` cannot add one to those it loads: with the
    published models use `IdeficsCollator(..., remove_answer_token=True)`, which needs none. transformers 5.23 computes
    the loss as if there were no such rows, and fails: give the `Trainer` `idefics_loss`.
    """
    tokens = (ANSWER_TOKEN, IMAGE_TOKEN, "<fake_token_around_image>", get_format("idefics").end)
    missing = [token for token in tokens if token not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    return tokenizer


def idefics_loss(outputs, labels: torch.Tensor, **kwargs) -> torch.Tensor:
    """`compute_loss_func` for the `Trainer`: the causal loss over all rows, those of added tokens included."""
    return ForCausalLMLoss(outputs.logits, labels, outputs.logits.shape[-1], **kwargs)


@dataclass
class IdeficsCollator(AnswerTokenCollator):
    """Turns a list of samples into one training batch for Idefics, in the prompt format `idefics`.

    Each frame of a video is a picture of its own, as Idefics has no videos. See `OtterCollator` for the limits and
    for what is learned.

    Args:
        tokenizer: with the tokens of the format, see `prepare_idefics_tokenizer`.
        image_processor: an `IdeficsImageProcessorPil` or its like.
        max_length: see `OtterCollator`.
        on_overlong: see `OtterCollator`.
        pad_to_multiple_of: see `OtterCollator`.
        remove_answer_token, remove_end_of_turn_token: see `OtterCollator`.

    Returns, when called, a dict of
        `input_ids`, `attention_mask` and `labels`, int64 `(B, L)`; `pixel_values`, zero-padded float
        `(B, T, C, H, W)`; and `image_attention_mask`, int64 `(B, L, T)`: each token sees the last image in front of
        it, and a token with no image in front of it, or padding, sees none.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    max_length: int | None = 2048
    on_overlong: str = "error"
    pad_to_multiple_of: int | None = None
    remove_answer_token: bool = False
    remove_end_of_turn_token: bool = False

    format = "idefics"
    packing = False
    has_films = False

    def __post_init__(self) -> None:
        missing = [token for token in (IMAGE_TOKEN, ANSWER_TOKEN) if token not in self.tokenizer.get_vocab()]
        if missing:
            raise ValueError(f"The tokenizer lacks {', '.join(missing)}: pass it to prepare_idefics_tokenizer first.")
        self._set_up(self.tokenizer, IMAGE_TOKEN, ANSWER_TOKEN)

    def _prepare(self, samples: Sequence[Sample]) -> list[Sample]:
        return [frames_as_media(sample) for sample in samples]

    def _model_media(self, rows: Sequence[Row], batch: dict) -> dict[str, torch.Tensor]:
        pictures = [[frame for (frame,) in read_media(row.sample)] for row in rows]
        flat = [picture for of_row in pictures for picture in of_row]
        # without any picture, the shape is that of a blank one
        pixels = self.image_processor(flat or [Image.new("RGB", (1, 1))], return_tensors="pt")
        pixels = pixels if torch.is_tensor(pixels) else pixels["pixel_values"]  # (N, C, H, W)
        slots = max(1, *map(len, pictures))  # the model needs one
        packed = pixels.new_zeros(len(rows), slots, *pixels.shape[1:])  # (B, T, C, H, W)
        of_picture = iter(pixels)
        for row, of_row in enumerate(pictures):
            for slot in range(len(of_row)):
                packed[row, slot] = next(of_picture)
        seen = (batch["input_ids"] == self._image_id).cumsum(dim=1)  # (B, L), 0: none yet
        seen = seen * batch["attention_mask"]
        mask = seen[..., None] == torch.arange(1, slots + 1)  # (B, L, T)
        return {"pixel_values": packed, "image_attention_mask": mask.long()}
