"""
Continuous batching: rows join and leave a running batch between decoding steps, each with its own pictures, length
and settings, and answer what they would alone.

transformers' own continuous batching feeds token ids to paged attention: it has no place for pictures,
cross-attention or ALiBi, and of a request's settings it knows temperature, top-k and top-p. This module has its order
of things (first come, first served; prompts read in pieces beside decoding) and the logits processors of `generate`.

A prompt is read but for its last token in a cache of its own, padded on the right together with others, for which
causal attention needs no mask. Its keys and values are then copied into the [`BatchCache`], and its last token is the
first that a decoding step is given.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from transformers import Cache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import (
    GenerationMode,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .batch_cache import BatchCache, Member
from .batch_media import FRAMES_PER_STEP, FlamingoMedia, PatchMedia
from .flamingo import FlamingoForConditionalGeneration
from .generation import ExcludeTokens
from .media_cache import MediaDynamicCache
from .media_store import MediaStore
from .prefix_cache import can_share_prefixes, crop, expand


# with fewer in a step time goes into reading the weights, and padding costs nothing
_FEW_TOKENS = 64
# what these do to scores depends on nothing else
_SCORES_ONLY = (ExcludeTokens, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
_INPUTS = {"input_ids", "attention_mask", "pixel_values", "pixel_attention_mask", "image_hidden_states"}


def can_batch(model: PreTrainedModel, config: GenerationConfig) -> bool:
    """Whether a [`ContinuousBatch`] of the model takes these settings: greedy decoding or sampling, one answer."""
    return (
        can_share_prefixes(model)
        and config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and (config.num_return_sequences or 1) == 1
        and (config.guidance_scale or 1) == 1
        and not config.stop_strings
        and config.max_time is None
        and not config.token_healing
    )


class BatchRow:
    """
    A prompt and its answer.

    Attributes:
        tokens: ids of the answer so far, with the one that ended it, as `generate` returns it.
        finish: None while it is under way, then `stop` (its end was chosen, or `on_token` said so), `length`,
            `cancelled` or `error`.
        future: done with the row when it has finished, or with the exception.
    """

    def __init__(self, ids: list[int], media: FlamingoMedia | PatchMedia, prefix: Cache | None, max_new_tokens: int):
        self.ids = ids  # of the prompt, then of the answer too
        self.prompt_length = len(ids)
        self.media = media
        self.prefix = prefix
        self.prefix_length = 0 if prefix is None else prefix.get_seq_length()
        self.max_new_tokens = max_new_tokens
        self.finish: str | None = None
        self.future: Future[BatchRow] = Future()
        self.future.set_running_or_notify_cancel()  # who waits for it may give up, which is not to stop the batch
        self.ends: frozenset[int] = frozenset()
        self.processors = LogitsProcessorList()
        self.settings: tuple | None = None  # equal where processors do the same to any scores
        self.generator: torch.Generator | None = None  # for rows that sample
        self.on_token: Callable[[int], bool | None] | None = None
        self.is_cancelled: Callable[[], bool] = lambda: False
        self.alone = False  # whether its prompt is read without others, as reading it among them failed

    @property
    def tokens(self) -> list[int]:
        """Ids of the answer so far."""
        return self.ids[self.prompt_length :]

    @property
    def error(self) -> BaseException | None:
        """What ended the row, if it ended by an error."""
        return self.future.exception() if self.finish == "error" else None

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are to be read behind the prefix; the last one is left to the first step."""
        return self.prompt_length - 1 - self.prefix_length

    @property
    def final_length(self) -> int:
        """Tokens that the row has in the cache at most."""
        return self.prompt_length + self.max_new_tokens

    def end(self, finish: str, error: BaseException | None = None) -> None:
        """Say that the row has finished."""
        self.finish = finish
        self.media = self.prefix = None
        if error is None:
            self.future.set_result(self)
        else:
            if isinstance(error, torch.OutOfMemoryError):
                # whoever holds the error would hold the states of all layers that it came through
                error.__traceback__ = None
            self.future.set_exception(error)


class ContinuousBatch:
    """
    The rows of a model that are answered together. Nothing happens but in `step`, which one thread may call; `submit`
    may be called by others meanwhile.

    Args:
        model: an Otter, Flamingo or OtterHD in evaluation mode.
        token_budget: rows times the length of the longest, answer included, that the cache has room for. Rows wait
            until there is room for all that they may say, in the order they came. The prompts being read take up to
            as much as the longest of them, or `prefill_tokens`, beside it.
        max_rows: rows at a time.
        prefill_tokens: of prompts that are read between two decoding steps.
        media: encoded pictures to share with others; by default a store of its own.

    Raises:
        ValueError: for a model of another family.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        token_budget: int = 16_384,
        max_rows: int = 64,
        prefill_tokens: int = 512,
        media: MediaStore | None = None,
    ):
        self.is_flamingo = isinstance(model, FlamingoForConditionalGeneration)
        if not can_share_prefixes(model):
            raise ValueError(f"{type(model).__name__} has no continuous batching; Otter, Flamingo and OtterHD have.")
        self.model = model
        self.token_budget = token_budget
        self.max_rows = max_rows
        self.prefill_tokens = prefill_tokens
        self.media_store = media or (MediaStore(model) if self.is_flamingo else None)
        self._waiting: deque[BatchRow] = deque()
        self._reading: _Reading | None = None
        self._running: list[BatchRow] = []  # in the order of the cache's rows
        self._cache = BatchCache(token_budget, model.device)

    @property
    def num_running(self) -> int:
        """Rows that get a token in each step."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Rows that have no place yet, or whose prompts are being read."""
        reading = self._reading
        return len(self._waiting) + (0 if reading is None else len(reading.rows))

    @property
    def tokens_taken(self) -> int:
        """Tokens that the cache of the running rows has room for at this moment."""
        return self._cache.taken

    @property
    def has_work(self) -> bool:
        """Whether any row has not finished."""
        return bool(self._waiting or self._running or self._reading)

    def submit(
        self,
        inputs: Mapping[str, Any],
        generation_config: GenerationConfig | None = None,
        *,
        prefix: Cache | None = None,
        seed: int | None = None,
        logits_processor: Sequence[LogitsProcessor] = (),
        on_token: Callable[[int], bool | None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
        **generation,
    ) -> BatchRow:
        """
        Queue a row.

        Args:
            inputs: of a processor, for one conversation without padding: `input_ids (1, L)`, and of an Otter or
                Flamingo `pixel_values` with `pixel_attention_mask`, or `image_hidden_states`; of an OtterHD
                `pixel_values (N, patch width)`. Pixels are best still on the CPU.
            generation_config, generation: as for `generate`.
            prefix: a cache of one row with the first P < L tokens of the prompt, whose layers hold all of them. It is
                not changed; rows with the same object are read together. Media may be those of the whole prompt, or
                only those behind the prefix.
            seed: of a row that samples, which then draws as `generate` does after `torch.manual_seed`, whatever the
                neighbours; by default a number of torch's generator.
            logits_processor: further ones, as for `generate`.
            on_token: called with each new token id, in the thread of `step`; the answer ends if it returns True.
            is_cancelled: looked at before each step; the row ends if it returns True.

        Raises:
            ValueError: for inputs that do not fit together, settings that a batch does not have (see `can_batch`), or
                a row that `token_budget` would never have room for.
        """
        config, unknown = self.model._prepare_generation_config(generation_config, **generation)
        if unknown or not can_batch(self.model, config):
            raise ValueError(
                f"{', '.join(unknown) or 'generation_config'} is nothing that a batch of rows with settings of their "
                "own has; use generate for beams, several answers, stop_strings, max_time and token_healing."
            )
        ids = self._read_ids(inputs)
        length = len(ids)
        limit = config.max_new_tokens or (config.max_length or 0) - length
        if limit < 1:
            raise ValueError(
                f"The prompt has {length} tokens, and max_length leaves none to answer; use max_new_tokens."
            )
        if length + limit > self.token_budget:
            raise ValueError(
                f"The prompt has {length} tokens and asks for {limit} more, together above the {self.token_budget} "
                "that this batch has room for; shorten it or ask for less."
            )
        positions = self.model.config.get_text_config()
        if positions.model_type == "opt" and length + limit > positions.max_position_embeddings:
            raise ValueError(f"OPT has no position {length + limit}, only {positions.max_position_embeddings}.")
        ends_in_picture = ids[-1] == self.model.config.image_token_id
        if ends_in_picture and prefix is not None and prefix.get_seq_length() == length - 1 > 1:
            prefix = crop(prefix, length - 2)  # it is read with the token before it
        take = FlamingoMedia if self.is_flamingo else PatchMedia
        row = BatchRow(ids, take(self.model, inputs, prefix), prefix, limit)
        if row.unread < 0 or (row.unread == 0 and ends_in_picture):
            raise ValueError(
                f"The prompt has {length} tokens, of which the prefix holds {row.prefix_length}: it must leave one "
                "that is no picture."
            )
        self.model._prepare_special_tokens(config, device=self.model.device)
        ends = config._eos_token_tensor
        row.ends = frozenset() if ends is None else frozenset(ends.tolist())
        row.processors = self.model._get_logits_processor(
            config,
            input_ids_seq_length=length,
            logits_processor=LogitsProcessorList(logits_processor),
            device=self.model.device,
        )
        if config.do_sample:
            row.generator = torch.Generator(self.model.device)
            row.generator.manual_seed(int(torch.randint(2**63 - 1, ())) if seed is None else seed)
        row.settings = _settings(row)
        row.on_token = on_token
        row.is_cancelled = is_cancelled or row.is_cancelled
        self._waiting.append(row)
        return row

    def run(self) -> None:
        """Answer all rows that are there."""
        while self.step():
            pass

    def fail(self, error: Exception) -> None:
        """End all rows with an error that is none of theirs, and begin anew."""
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        reading = [] if self._reading is None else self._reading.rows
        for row in (*waiting, *reading, *self._running):
            if row.finish is None:
                row.end("error", error)
        self._reading, self._running = None, []
        self._cache = BatchCache(self.token_budget, self.model.device)

    @torch.inference_mode()
    def step(self) -> bool:
        """Read a piece of the prompts of newcomers, and choose a token for every running row; False without any."""
        try:
            self._drop_cancelled()
            if self._reading is None:
                self._admit()
            if self._reading is not None:
                self._read()
            if self._running:
                self._decode()
        except Exception as error:
            # of those that are answered nobody is to blame more than others; who is being read has a cache apart
            rows, self._running = self._running, []
            if not rows:
                if self._reading is None:
                    raise
                rows, self._reading = self._reading.rows, None
            self._cache = BatchCache(self.token_budget, self.model.device)
            for row in rows:
                row.end("error", error)
        return self.has_work

    def _read_ids(self, inputs: Mapping[str, Any]) -> list[int]:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        known = _INPUTS if self.is_flamingo else {"input_ids", "attention_mask", "pixel_values", "image_grid_thw"}
        if unknown := {name for name, value in inputs.items() if value is not None} - known:
            raise ValueError(f"inputs hold {', '.join(sorted(unknown))}; a row takes {', '.join(sorted(known))}.")
        if ids.ndim != 2 or len(ids) != 1 or (mask is not None and not mask.all()):
            raise ValueError(f"input_ids has shape {tuple(ids.shape)}; submit rows one by one, without padding.")
        return ids[0].tolist()

    def _drop_cancelled(self) -> None:
        for row in tuple(self._waiting):  # which other threads add to
            if row.is_cancelled():
                self._waiting.remove(row)
                row.end("cancelled")
        # several are read at once, and only wait to join
        if self._reading is not None and len(self._reading.rows) == 1:
            (row,) = self._reading.rows
            if row.is_cancelled():
                row.end("cancelled")
                self._reading = None
        for index in reversed(range(len(self._running))):
            if self._running[index].is_cancelled():
                self._leave(index, "cancelled")

    # ----- reading prompts -----

    def _admit(self) -> None:
        """Take the first who waits, and of those behind it, as far as there is room for all, who are read at once."""
        together, rows = list(self._running), []
        for row in tuple(self._waiting):  # which other threads add to
            together.append(row)
            longest = max(one.final_length for one in together)
            if len(together) > self.max_rows or len(together) * longest > self.token_budget:
                break
            if not rows or self._are_read_at_once([*rows, row]):
                rows.append(row)
        for row in rows:
            self._waiting.remove(row)
        if rows:
            self._reading = _Reading(rows)

    def _are_read_at_once(self, rows: list[BatchRow]) -> bool:
        tokens = [row.unread for row in rows]
        padded = len(rows) * max(tokens)
        return (
            all(row.prefix is rows[0].prefix and not row.alone for row in rows)
            and sum(row.media.frames for row in rows) <= FRAMES_PER_STEP
            and padded <= self.prefill_tokens
            and (padded <= _FEW_TOKENS or 8 * (padded - sum(tokens)) <= padded)
        )

    def _read(self) -> None:
        reading = self._reading
        try:
            if reading.place < reading.width:
                self._read_piece(reading)
        except Exception as error:
            self._reading = None
            if len(reading.rows) == 1:
                reading.rows[0].end("error", error)
                return
            # one of them is to blame: each by itself
            for row in reversed(reading.rows):
                row.alone = True
                row.media.rewind()
                self._waiting.appendleft(row)
            return
        if reading.place < reading.width:
            return
        members = [Member(i, row.prompt_length - 1, row.media.in_view) for i, row in enumerate(reading.rows)]
        self._cache.add(reading.cache, members)
        for row in reading.rows:
            row.media = row.prefix = None
        self._running += reading.rows
        self._reading = None

    def _read_piece(self, reading: "_Reading") -> None:
        start, stop = reading.place, reading.width
        if len(reading.rows) == 1:
            (row,) = reading.rows
            stop = min(stop, start + self.prefill_tokens)
            stop = row.media.end_of_piece(row.prefix_length + start, row.prefix_length + stop) - row.prefix_length
        padding = int(self.model.config.image_token_id == 0)  # any token but that of pictures
        ids = []
        for row in reading.rows:
            end = row.prefix_length + min(stop, row.unread)
            piece = row.ids[row.prefix_length + start : end]
            ids.append(piece + [padding] * (stop - start - len(piece)))
            # the last token of the prompt is not read, but what it sees is
            row.media.take(end + 1 if end == row.prompt_length - 1 else end)
        media = [row.media for row in reading.rows]
        self.model.model(
            input_ids=torch.tensor(ids, device=self.model.device),
            past_key_values=reading.cache,
            use_cache=True,
            **media[0].batch(media, self.model, self.media_store),
        )
        reading.place = stop

    # ----- decoding -----

    def _decode(self) -> None:
        position_ids, attention_mask = self._cache.prepare_step()
        inputs = {"media_index": self._cache.media_index} if self.is_flamingo else {}
        outputs = self.model(
            input_ids=torch.tensor([row.ids[-1:] for row in self._running], device=self.model.device),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
            **inputs,
        )
        self._cache.advance()
        chosen = self._choose(outputs.logits[:, -1].float())
        for index in reversed(range(len(self._running))):
            row, token = self._running[index], chosen[index]
            if isinstance(token, Exception):
                self._leave(index, "error", token)
                continue
            row.ids.append(token)
            try:
                stopped = row.on_token is not None and row.on_token(token)
            except Exception as error:
                self._leave(index, "error", error)
                continue
            if stopped or token in row.ends:
                self._leave(index, "stop")
            elif len(row.ids) == row.final_length:
                self._leave(index, "length")

    def _choose(self, logits: torch.Tensor) -> list[int | Exception]:
        """A token for each of `logits (B, V)`, float32; the exception for a row that has none."""
        alike: dict[Any, list[int]] = {}
        for index, row in enumerate(self._running):
            alike.setdefault(row if row.settings is None else row.settings, []).append(index)
        chosen: list[int | Exception] = [0] * len(logits)
        for members in alike.values():
            scores = logits if len(members) == len(logits) else logits[members]
            rows = [self._running[index] for index in members]
            try:
                tokens = _next_tokens(rows, scores)
            except Exception as error:
                tokens = [_next_or_error(row, scores[[i]]) for i, row in enumerate(rows)] if rows[1:] else [error]
            for index, token in zip(members, tokens, strict=True):
                chosen[index] = token
        return chosen

    def _leave(self, index: int, finish: str, error: Exception | None = None) -> None:
        row = self._running[index]
        self._cache.remove(index)
        last = self._running.pop()
        if last is not row:
            self._running[index] = last
        row.end(finish, error)


def _settings(row: BatchRow) -> tuple | None:
    if not all(type(processor) in _SCORES_ONLY for processor in row.processors):
        return None
    numbers = [
        (type(processor), *(value for value in vars(processor).values() if not isinstance(value, torch.Tensor)))
        for processor in row.processors
    ]
    return (row.generator is None, *numbers)


def _next_tokens(rows: list[BatchRow], scores: torch.Tensor) -> list[int]:
    """Tokens of rows with the same settings from their scores `(B, V)`, as `generate` chooses them."""
    ids = None if rows[0].settings else torch.tensor([rows[0].ids], device=scores.device)
    scores = rows[0].processors(ids, scores)
    if rows[0].generator is None:
        return scores.argmax(dim=-1).tolist()
    drawn = [
        torch.multinomial(row, 1, generator=one.generator)
        for one, row in zip(rows, scores.softmax(dim=-1), strict=True)
    ]
    return torch.cat(drawn).tolist()


def _next_or_error(row: BatchRow, scores: torch.Tensor) -> int | Exception:
    try:
        return _next_tokens([row], scores)[0]
    except Exception as error:
        return error


class _Reading:
    """Rows whose prompts are being read into a cache, one below the other from the first column on."""

    def __init__(self, rows: list[BatchRow]):
        self.rows = rows
        prefix = rows[0].prefix
        self.cache = MediaDynamicCache() if prefix is None else expand(prefix, [0] * len(rows))
        self.place = 0  # tokens behind the prefix that have been read
        self.width = max(row.unread for row in rows)
