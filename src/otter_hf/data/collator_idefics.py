"""Samples to training batches of transformers' `IdeficsForVisionText2Text`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.loss.loss_utils import ForCausalLMLoss

from ..prompts import ANSWER_TOKEN, IMAGE_TOKEN, get_format
from .collator import OtterCollator
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
class IdeficsCollator:
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

    def __post_init__(self):
        self._collator = OtterCollator(
            _IdeficsMedia(self.tokenizer, self.image_processor),
            format="idefics",
            max_length=self.max_length,
            on_overlong=self.on_overlong,
            pad_to_multiple_of=self.pad_to_multiple_of,
            remove_answer_token=self.remove_answer_token,
            remove_end_of_turn_token=self.remove_end_of_turn_token,
        )

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        batch = self._collator([frames_as_media(sample) for sample in samples])
        image_token_id = self._collator.processor.image_token_id
        seen = (batch["input_ids"] == image_token_id).cumsum(dim=1) * batch["attention_mask"]  # (B, L), 0: none yet
        numbers = torch.arange(1, batch["pixel_values"].shape[1] + 1)  # (T,)
        batch["image_attention_mask"] = (seen[..., None] == numbers).long()  # (B, L, T)
        return batch


class _IdeficsMedia:
    """What `OtterCollator` needs of a processor."""

    image_token = IMAGE_TOKEN
    answer_token = ANSWER_TOKEN

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_processor: Any):
        missing = [token for token in (IMAGE_TOKEN, ANSWER_TOKEN) if token not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(f"The tokenizer lacks {', '.join(missing)}: pass it to prepare_idefics_tokenizer first.")
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.answer_token_id = tokenizer.convert_tokens_to_ids(ANSWER_TOKEN)

    def pack_media(self, media: list[list[list[Image.Image]]]) -> dict[str, torch.Tensor]:
        """`pixel_values` of one picture per medium, `(B, T, C, H, W)`, with at least one slot, as the model needs."""
        pictures = [frame for of_row in media for (frame,) in of_row]
        # without any picture, the shape is that of a blank one
        pixels = self.image_processor(pictures or [Image.new("RGB", (1, 1))], return_tensors="pt")
        pixels = iter(pixels if torch.is_tensor(pixels) else pixels["pixel_values"])  # (C, H, W) each
        rows = [[next(pixels) for _ in of_row] for of_row in media]
        blank = torch.zeros_like(next(row[0] for row in rows if row) if pictures else next(pixels))
        slots = max(1, *map(len, rows))
        return {"pixel_values": torch.stack([torch.stack(row + [blank] * (slots - len(row))) for row in rows])}
