"""Samples to training batches: what all families share, and the text of those with a token in front of each answer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers.utils import logging

from ..pictures import ImageError, read_image
from ..prompts import get_format, render, reserved_tokens_of
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


def padding_token_id(tokenizer: Any) -> int:
    """The id that batches are padded with: of the padding token, else of the end-of-sequence token."""
    token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if token_id is None:
        raise ValueError("The tokenizer has neither a padding nor an end-of-sequence token: set pad_token.")
    return token_id


@dataclass
class Row:
    """
    A sample on its way into a batch.

    Args:
        ids, labels: `(l,)` int64 each; -100 where nothing is learned.
        media: what became of the sample's media, where that decides about the ids.
    """

    sample: Any
    ids: torch.Tensor
    labels: torch.Tensor
    media: Any = None


def pad(rows: Sequence[Row], pad_token_id: int, multiple: int | None = None) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels`, `(B, L)` int64, padded on the right to a multiple of `multiple`."""
    length = max(len(row.ids) for row in rows)
    length += -length % (multiple or 1)

    def column(values: list[torch.Tensor], padding: int) -> torch.Tensor:
        padded = torch.full((len(values), length), padding, dtype=torch.int64)  # (B, L)
        for index, value in enumerate(values):
            padded[index, : len(value)] = value
        return padded

    return {
        "input_ids": column([row.ids for row in rows], pad_token_id),
        "attention_mask": column([torch.ones_like(row.ids) for row in rows], 0),
        "labels": column([row.labels for row in rows], IGNORE_INDEX),
    }


def pack(rows: Sequence[Row]) -> dict[str, torch.Tensor | int]:
    """The rows one behind the other, `(1, L)`, and what tells a model where each begins."""
    lengths = torch.tensor([len(row.ids) for row in rows])  # (samples,)
    boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)  # (samples + 1,)
    return {
        "input_ids": torch.cat([row.ids for row in rows])[None],
        "labels": torch.cat([row.labels for row in rows])[None],
        "position_ids": torch.cat([torch.arange(len(row.ids)) for row in rows])[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }


class Collator:
    """
    Turns a list of samples (see `Sample`) into one training batch: each becomes ids, labels and media, is made to fit
    `max_length`, and all are padded, or packed into one row.

    Samples that are too long lose their oldest turns first. What happens to one whose last turn alone is too long is
    `on_overlong`: `"error"` raises, `"skip"` leaves it out of the batch, `"truncate"` cuts the end of its answer, or
    leaves it out if not even the start of that fits. A batch is never empty: when all of it would be left out that is
    an error, for which our trainer takes other samples (`NamingCollator`). With the `Trainer`, set
    `remove_unused_columns=False`: it would empty the samples.

    A family says how a sample is written, `_encode`, how one is cut, `_cut`, and what its media are to the model,
    `_model_media`.
    """

    max_length: int | None
    on_overlong: str
    pad_to_multiple_of: int | None
    packing: bool
    _pad_token_id: int

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor | int]:
        for sample in samples:
            _check_media(sample)
        rows = self._fit(self._encode(self._prepare(samples)))
        batch = pack(rows) if self.packing else pad(rows, self._pad_token_id, self.pad_to_multiple_of)
        return batch | self._model_media(rows, batch)

    def _prepare(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """What is done to the samples once, before they are written."""
        return samples

    def _encode(self, samples: Sequence[Sample]) -> list[Row]:
        """A row of each sample, as long as it is."""
        raise NotImplementedError

    def _cut(self, row: Row) -> Row | None:
        """The row with `max_length` tokens; None to leave it out, as nothing of its answer is left."""
        raise NotImplementedError

    def _model_media(self, rows: Sequence[Row], batch: dict) -> dict[str, torch.Tensor]:
        """What the model is told of the media of a batch."""
        raise NotImplementedError

    def _check_choices(self, **choices: tuple[str, ...]) -> None:
        for name, values in ({"on_overlong": ("error", "truncate", "skip")} | choices).items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}.")

    def _fits(self, row: Row) -> bool:
        return self.max_length is None or len(row.ids) <= self.max_length

    def _drop_oldest_turns(self, row: Row) -> Row:
        while not self._fits(row) and len(row.sample["turns"]) > 1:
            logger.warning_once(f"Samples longer than max_length={self.max_length} lose their oldest turns.")
            (row,) = self._encode([drop_oldest_turn(row.sample)])
        return row

    def _fit(self, rows: list[Row]) -> list[Row]:
        """The rows by the rules of `max_length` and `on_overlong`."""
        rows = [self._drop_oldest_turns(row) for row in rows]
        overlong = [row for row in rows if not self._fits(row)]
        if not overlong:
            return rows
        limit, first = f"max_length={self.max_length}", f"Sample {overlong[0].sample['id']!r}"
        if self.on_overlong == "error":
            raise SampleError(
                f"{first} has {len(overlong[0].ids)} tokens after dropping its context, the limit is {limit}: raise "
                "the limit or set on_overlong to 'truncate' or 'skip'.",
                reason="overlong",
            )
        if self.on_overlong == "skip":
            kept = [row for row in rows if self._fits(row)]
            problem = f"are longer than {limit}: raise the limit or set on_overlong to 'truncate'."
        else:
            cut = [row if self._fits(row) else self._cut(row) for row in rows]
            kept = [row for row in cut if row is not None]
            problem = f"are cut before their answers start: {limit} is too small for what stands in front."
        if not kept:
            raise SampleError(f"{first} and the rest of its batch {problem}", reason="overlong")
        ids = ", ".join(repr(row.sample["id"]) for row in overlong)
        logger.warning(f"Cut or left out samples longer than {limit}: {ids}.")
        return kept


class AnswerTokenCollator(Collator):
    """
    A collator of a prompt format with a token in front of each answer, which tells what is learned (`make_labels`).

    A sample is `[BOS] prompt [EOS]`. BOS and EOS count towards `max_length`, and so do tokens that are removed.
    """

    format: str
    remove_answer_token: bool
    remove_end_of_turn_token: bool
    has_films = True  # whether a medium may have several frames

    def _set_up(self, tokenizer: Any, image_token: str, answer_token: str) -> None:
        """Checks the options; `tokenizer` is the one to write samples with, which has these tokens."""
        pieces = get_format(self.format)
        if image_token not in pieces.media or answer_token not in pieces.reply:
            raise ValueError(
                f"format={self.format!r} has no {image_token} or no {answer_token}: {type(self).__name__} needs both, "
                "use 'simple', 'spaced', 'llama2' or 'idefics'."
            )
        self._check_choices()
        if pieces.end not in tokenizer.get_vocab():
            raise ValueError(
                f"The tokenizer has no {pieces.end!r} token, which format={self.format!r} ends turns with."
            )
        self._tokenizer, self._image_token = tokenizer, image_token
        tokens = [image_token, answer_token, pieces.end]
        self._image_id, self._answer_id, self._end_of_turn_id = tokenizer.convert_tokens_to_ids(tokens)
        self._prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._suffix = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._pad_token_id = padding_token_id(tokenizer)
        if self.remove_end_of_turn_token and not self._suffix:
            raise ValueError(
                "remove_end_of_turn_token: the tokenizer has no end-of-sequence token, so nothing would end an answer."
            )
        # tokens of the format that the batches are without
        self.removed_tokens = [
            *([answer_token] if self.remove_answer_token else []),
            *([pieces.end] if self.remove_end_of_turn_token else []),
        ]
        self._removed_ids = torch.tensor(tokenizer.convert_tokens_to_ids(self.removed_tokens), dtype=torch.int64)
        self._reserved_tokens = reserved_tokens_of(tokenizer)

    @property
    def adds_bos(self) -> bool:
        """Whether samples begin with a BOS that the tokenizer does not write by itself, as GPT-NeoX's for MPT."""
        return bool(self._prefix) and self._tokenizer("a")["input_ids"][:1] != self._prefix

    def _tokenize(self, samples: Sequence[Sample]) -> list[list[int]]:
        for sample in samples:
            self._tell_of_hidden_media(sample)
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
        # `verbose` would warn of rows longer than the model's limit, which are cut later
        return self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _tell_of_hidden_media(self, sample: Sample) -> None:
        """A token sees the last medium in front of it alone (Alayrac et al. 2022, section 3.1.3)."""
        places = sample.get("media_places") or [[0] * count for count in sample["media_per_turn"]]
        if any(len({*of_turn}) < len(of_turn) for of_turn in places):
            frames = "make them frames of one medium (images_as: frames; in messages a list as a video), or "
            logger.warning_once(
                "Some samples show several pictures without words between them: the words behind see the last one "
                f"alone; {frames if self.has_films else ''}put words between them."
            )

    def _row(self, sample: Sample, tokens: list[int]) -> Row:
        ids = torch.tensor(self._prefix + tokens + self._suffix, dtype=torch.int64)
        return Row(sample, ids, labels=torch.full_like(ids, IGNORE_INDEX))

    def _encode(self, samples: Sequence[Sample]) -> list[Row]:
        return [self._row(*row) for row in zip(samples, self._tokenize(samples), strict=True)]

    def _cut(self, row: Row) -> Row | None:
        around = len(self._prefix) + len(self._suffix)
        keep = max(0, (self.max_length or 0) - around)
        tokens = row.ids[len(self._prefix) :][:keep].tolist()
        # what is cut before its answer starts has nothing to learn, and may have lost <image> tokens
        return self._row(row.sample, tokens) if self._answer_id in tokens[:-1] else None

    def _fit(self, rows: list[Row]) -> list[Row]:
        return [self._label(row) for row in super()._fit(rows)]

    def _label(self, row: Row) -> Row:
        """The row with labels, and without the tokens that are removed."""
        placeholders = int((row.ids == self._image_id).sum())
        if placeholders != len(row.sample["media"]):
            raise SampleError(
                f"Sample {row.sample['id']!r} has {placeholders} {self._image_token} tokens for "
                f"{len(row.sample['media'])} images or videos: there must be one token for each.",
            )
        (labels,) = make_labels(
            row.ids[None],
            torch.ones_like(row.ids)[None],
            answer_token_id=self._answer_id,
            end_of_turn_token_id=self._end_of_turn_id,
            eos_token_id=self._tokenizer.eos_token_id,
        )
        kept = ~torch.isin(row.ids, self._removed_ids)  # (l,)
        return replace(row, ids=row.ids[kept], labels=labels[kept])


@dataclass
class OtterCollator(AnswerTokenCollator):
    """Turns a list of samples (see `Sample`) into one training batch for Otter, see `Collator`.

    Images go with the last turn that refers to them, so that there is always one for each `<image>` token.

    Args:
        processor: an `OtterProcessor`.
        format: instruction format, one of `otter_hf.prompts.FORMATS` with an image and an answer token.
        max_length: largest number of tokens of a row, BOS and EOS included, or `None` for no limit.
        on_overlong: what to do with a sample whose last turn alone is longer than `max_length`, see `Collator`.
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

    def __post_init__(self) -> None:
        processor = self.processor
        self._set_up(processor.tokenizer, processor.image_token, processor.answer_token)

    def _model_media(self, rows: Sequence[Row], batch: dict) -> dict[str, torch.Tensor]:
        media: list = [read_media(row.sample) for row in rows]
        if not self.packing:
            return self.processor.pack_media(media)
        index, before = [], 0
        for row in rows:
            seen = (row.ids == self._image_id).cumsum(0)  # (l,), counted in its sample
            index.append(torch.where(seen > 0, seen + before, 0))
            before += len(row.sample["media"])
        flat = [medium for of_sample in media for medium in of_sample]
        return {"media_index": torch.cat(index)[None]} | self.processor.pack_media([flat])


def read_media(sample: Sample) -> list[list[Image.Image]]:
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
