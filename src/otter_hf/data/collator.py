"""Samples to training batches: prompt text, token ids, labels and packed images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from transformers.utils import logging

from ..pictures import ImageError, read_image
from ..prompts import RESERVED_TOKENS, get_format, render
from .samples import Sample, SampleError, drop_oldest_turn


if TYPE_CHECKING:
    from ..models.otter.processing_otter import OtterProcessor

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100


def make_labels(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    answer_token_id: int,
    end_of_turn_token_id: int,
    eos_token_id: int | None,
) -> torch.Tensor:
    """Labels of an Otter prompt: every answer of every turn, up to and with its end-of-turn token.

    The `eos_token_id` is a target only right after an end-of-turn token: an answer that was cut to fit the limit keeps
    its loss, yet does not teach the model to stop there. `<answer>` itself, instructions and padding are never
    targets, also when the padding token is the end-of-sequence token.

    Args:
        input_ids: token ids, int64 of shape `(B, L)`, padded on either side.
        attention_mask: 1 for tokens, 0 for padding, shape `(B, L)`.
        answer_token_id: the id of `<answer>`, after which an answer starts.
        end_of_turn_token_id: the id of the token that ends an answer, `<|endofchunk|>` in most formats.
        eos_token_id: the id of the end-of-sequence token behind the last turn, or `None`.

    Returns:
        int64 tensor of shape `(B, L)`; -100 where nothing is to be learned. Not shifted: the model shifts.

    Raises:
        ValueError: if an answer starts before the one in front of it has ended.
    """
    real = attention_mask.bool()  # (B, L)
    is_answer = (input_ids == answer_token_id) & real  # (B, L)
    is_end = (input_ids == end_of_turn_token_id) & real  # (B, L)
    inside = _last_before(is_answer) > _last_before(is_end)  # (B, L)
    broken = inside & is_answer
    if broken.any():
        row, position = broken.nonzero()[0].tolist()
        raise ValueError(
            f"Row {row} has an <answer> token at position {position} inside an answer that has not ended: "
            "put the end-of-turn token behind every answer of the context."
        )
    target = inside & real
    if eos_token_id is not None:
        is_eos = (input_ids == eos_token_id) & real
        after_end = torch.zeros_like(is_end)
        after_end[:, 1:] = is_end[:, :-1]
        target = (target & (~is_eos | is_end)) | (is_eos & after_end)
    return input_ids.masked_fill(~target, IGNORE_INDEX)


def _last_before(flags: torch.Tensor) -> torch.Tensor:
    """For each position of `(B, L)`, the index of the last set flag strictly before it, or -1."""
    positions = torch.arange(flags.shape[1], device=flags.device).expand_as(flags)
    last = torch.where(flags, positions, -1).cummax(dim=1).values  # (B, L), up to and with the position
    return torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)


@dataclass
class OtterCollator:
    """Turns a list of samples (see `Sample`) into one training batch for Otter.

    A sample is `[BOS] prompt [EOS]`. BOS and EOS count towards `max_length`. Samples that are too long lose their
    oldest turns; images go with the last turn that refers to them, so that their number always equals the number of
    `<image>` tokens. With the `Trainer`, set `remove_unused_columns=False`: it would empty the samples.

    Args:
        processor: an `OtterProcessor`.
        format: instruction format, one of `otter_hf.prompts.FORMATS` with an image and an answer token.
        max_length: largest number of tokens of a row, or `None` for no limit.
        on_overlong: what to do with a sample whose last turn alone is longer than `max_length`. `"error"` raises;
            `"truncate"` cuts the end of its answer and trains on the rest, and leaves it out of the batch if not even
            the start of its answer fits; `"skip"` leaves it out of the batch. A batch is never empty: when all of it
            would be left out that is an error, for which our trainer takes other samples (`FillingCollator`).
        pad_to_multiple_of: pads the length of a padded batch to a multiple of this.
        packing: put the samples one behind the other into one row, without padding, or pad them on the right.
        remove_answer_token, remove_end_of_turn_token: delete these tokens, once they have told what is learned, as two
            options of the 2023 training script did (Luodian/Otter). They count towards `max_length`. Without the
            latter a model only learns to stop at EOS, behind the last turn.

    Returns, when called, a dict of
        `input_ids` `(B, L)` int64, `labels` `(B, L)` int64 with -100 where nothing is learned, `pixel_values`
        `(B, T, F, C, H, W)` float, zero-padded over media `T` and frames `F`, and `pixel_attention_mask` `(B, T, F)`
        int64, 1 for frames, 0 for padding. Padded: `attention_mask` `(B, L)` int64. Packed, with B = 1: `position_ids`
        `(1, L)` int64, which restart with each sample, `media_index` `(1, L)` int64, the 1-based medium of the row
        that each token sees, and for variable-length attention kernels `cu_seq_lens_q` and `cu_seq_lens_k`
        `(samples + 1,)` int32, `max_length_q` and `max_length_k` (int).

    Raises:
        SampleError: naming the sample, if its media do not match its placeholders or it is too long.
    """

    processor: "OtterProcessor"
    format: str = "simple"
    max_length: int | None = 2048
    on_overlong: str = "error"
    pad_to_multiple_of: int | None = None
    packing: bool = False
    remove_answer_token: bool = False
    remove_end_of_turn_token: bool = False

    def __post_init__(self):
        pieces = get_format(self.format)
        processor, tokenizer = self.processor, self.processor.tokenizer
        if processor.image_token not in pieces.media or processor.answer_token not in pieces.reply:
            raise ValueError(
                f"format={self.format!r} has no {processor.image_token} or no {processor.answer_token}: "
                "OtterCollator needs both, use 'simple', 'spaced', 'llama2' or 'idefics'."
            )
        if self.on_overlong not in ("error", "truncate", "skip"):
            raise ValueError(f"on_overlong must be 'error', 'truncate' or 'skip', got {self.on_overlong!r}.")
        if pieces.end not in tokenizer.get_vocab():
            raise ValueError(
                f"The tokenizer has no {pieces.end!r} token, which format={self.format!r} ends turns with."
            )
        self._end_of_turn_token_id = tokenizer.convert_tokens_to_ids(pieces.end)
        self._prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._suffix = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if self._pad_token_id is None:
            raise ValueError("The tokenizer has neither a padding nor an end-of-sequence token: set pad_token.")
        if self.remove_end_of_turn_token and not self._suffix:
            raise ValueError(
                "remove_end_of_turn_token: the tokenizer has no end-of-sequence token, so nothing would end an answer."
            )
        # tokens of the format that the batches are without
        self.removed_tokens = [
            *([processor.answer_token] if self.remove_answer_token else []),
            *([pieces.end] if self.remove_end_of_turn_token else []),
        ]
        self._reserved_tokens = sorted({*RESERVED_TOKENS, *tokenizer.all_special_tokens})

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor | int]:
        for sample in samples:
            _check_media(sample)
        rows = list(zip(samples, self._tokenize(samples), strict=True))
        rows = [self._drop_oldest_turns(sample, tokens) for sample, tokens in rows]
        rows = self._apply_limit(rows)
        for sample, tokens in rows:
            placeholders = tokens.count(self.processor.image_token_id)
            if placeholders != len(sample["media"]):
                raise SampleError(
                    f"Sample {sample['id']!r} has {placeholders} {self.processor.image_token} tokens for "
                    f"{len(sample['media'])} images or videos: there must be one token for each.",
                )

        batch = self._pad([self._prefix + tokens + self._suffix for _, tokens in rows])
        batch["labels"] = make_labels(
            **batch,
            answer_token_id=self.processor.answer_token_id,
            end_of_turn_token_id=self._end_of_turn_token_id,
            eos_token_id=self.processor.tokenizer.eos_token_id,
        )
        if self.removed_tokens:
            batch = self._remove(batch)
        media: list = [_read_media(sample) for sample, _ in rows]
        if self.packing:
            batch, media = self._pack(batch), [[medium for of_sample in media for medium in of_sample]]
        return batch | self.processor.pack_media(media)

    def _tokenize(self, samples: Sequence[Sample]) -> list[list[int]]:
        texts = [
            render(
                sample["turns"],
                self.format,
                sample["media_per_turn"],
                sample.get("task_description"),
                self._reserved_tokens,
                sample.get("media_places"),
            )
            for sample in samples
        ]
        # `verbose` would warn of rows longer than the model's limit, which are cut below
        return self.processor.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _fits(self, tokens: list[int]) -> bool:
        return self.max_length is None or len(self._prefix) + len(tokens) + len(self._suffix) <= self.max_length

    def _drop_oldest_turns(self, sample: Sample, tokens: list[int]) -> tuple[Sample, list[int]]:
        while not self._fits(tokens) and len(sample["turns"]) > 1:
            logger.warning_once(f"Samples longer than max_length={self.max_length} lose their oldest turns.")
            sample = drop_oldest_turn(sample)
            (tokens,) = self._tokenize([sample])
        return sample, tokens

    def _apply_limit(self, rows: list[tuple[Sample, list[int]]]) -> list[tuple[Sample, list[int]]]:
        fitting = [row for row in rows if self._fits(row[1])]
        if self.max_length is None or len(fitting) == len(rows):
            return rows
        overlong = [row for row in rows if not self._fits(row[1])]
        if self.on_overlong == "error":
            sample, tokens = overlong[0]
            raise SampleError(
                f"Sample {sample['id']!r} has {len(self._prefix) + len(tokens) + len(self._suffix)} tokens after "
                f"dropping its context, the limit is max_length={self.max_length}: raise the limit or set "
                "on_overlong to 'truncate' or 'skip'.",
                reason="overlong",
            )
        if self.on_overlong == "skip" and fitting:
            logger.warning(f"Left out {len(overlong)} samples longer than max_length, first {overlong[0][0]['id']!r}.")
            return fitting
        if self.on_overlong == "skip":
            raise SampleError(
                f"Sample {overlong[0][0]['id']!r} and the rest of its batch are longer than max_length="
                f"{self.max_length}: raise the limit or set on_overlong to 'truncate'.",
                reason="overlong",
            )
        keep = max(0, self.max_length - len(self._prefix) - len(self._suffix))
        truncated = [(sample, tokens if self._fits(tokens) else tokens[:keep]) for sample, tokens in rows]
        # a row that is cut before its answer starts has nothing to learn and may have lost <image> tokens
        useful = [row for row in truncated if self.processor.answer_token_id in row[1][:-1]]
        if not useful:
            raise SampleError(
                f"Sample {rows[0][0]['id']!r} and the rest of its batch are cut before their answers start: "
                f"max_length={self.max_length} is too small for their instructions.",
                reason="overlong",
            )
        ids = ", ".join(repr(sample["id"]) for sample, _ in overlong)
        logger.warning(f"Cut or left out samples longer than max_length={self.max_length}: {ids}.")
        return useful

    def _pad(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        length = max(len(row) for row in rows)
        if self.pad_to_multiple_of:
            length += -length % self.pad_to_multiple_of
        input_ids = torch.full((len(rows), length), self._pad_token_id, dtype=torch.int64)  # (B, L)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)  # (B, L)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
            attention_mask[index, : len(row)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _remove(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The rows of a padded batch without `removed_tokens`."""
        removed = torch.tensor(self.processor.tokenizer.convert_tokens_to_ids(self.removed_tokens))
        kept = batch["attention_mask"].bool() & ~torch.isin(batch["input_ids"], removed)  # (B, L)
        shorter = self._pad([ids[keep].tolist() for ids, keep in zip(batch["input_ids"], kept, strict=True)])
        labels = torch.full_like(shorter["input_ids"], IGNORE_INDEX)
        labels[shorter["attention_mask"].bool()] = batch["labels"][kept]  # row by row, in the same order
        return {**shorter, "labels": labels}

    def _pack(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | int]:
        """The rows of a padded batch, one behind the other."""
        real = batch["attention_mask"].bool()  # (B, L)
        lengths = real.sum(dim=1)  # (B,)
        seen = (batch["input_ids"] == self.processor.image_token_id).cumsum(dim=1)  # (B, L), counted in its sample
        before = torch.nn.functional.pad(seen[:, -1].cumsum(0)[:-1], (1, 0))  # (B,), media of the samples in front
        media_index = torch.where(seen > 0, seen + before[:, None], 0)  # (B, L)
        boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)  # (B + 1,)
        return {
            "input_ids": batch["input_ids"][real][None],  # (1, L)
            "labels": batch["labels"][real][None],  # (1, L)
            "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()])[None],  # (1, L)
            "media_index": media_index[real][None],  # (1, L)
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": int(lengths.max()),
            "max_length_k": int(lengths.max()),
        }


def _read_media(sample: Sample) -> list[list[Image.Image]]:
    """The frames of each medium by the rules of `otter_hf.pictures`; those that image stores give are that already."""
    try:
        return [[read_image(frame, "an image") for frame in medium] for medium in sample["media"]]
    except ImageError as error:
        raise SampleError(f"Sample {sample['id']!r}: {error}", reason="bad image") from error


def _check_media(sample: Sample) -> None:
    missing = [key for key in ("id", "turns", "media_per_turn", "media") if key not in sample]
    if missing:
        raise SampleError(
            f"A sample lacks {', '.join(missing)}: with the Trainer, set remove_unused_columns=False to keep them."
        )
    placeholders = sum(sample["media_per_turn"])
    if placeholders != len(sample["media"]):
        raise SampleError(
            f"Sample {sample['id']!r} places {placeholders} images or videos in its turns but holds "
            f"{len(sample['media'])}: media_per_turn must add up to the number of media."
        )
    if not all(sample["media"]):
        raise SampleError(f"Sample {sample['id']!r} has a video without frames: each medium needs at least one.")
