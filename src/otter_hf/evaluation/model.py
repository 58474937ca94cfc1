"""Any image-text-to-text model of transformers, asked in conversations: greedy answers and log-probabilities."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from ..films import read_video
from ..loading import load_model, read_processor
from ..models.chat_processing import MEDIA_SOURCES, read_conversations
from ..models.flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from ..models.media_folder import hash_of_tensor
from ..models.media_store import MediaStore
from ..models.prefix_cache import (
    branch,
    can_share_prefixes,
    compute_prefix,
    forget_media_behind,
    read_columns,
    row_of,
)
from ..pictures import read_image
from ..prompts import read_chat_template
from ..reading import whole_characters
from ..thinking import thinking_length
from .batching import Batch, PromptBatches, TokenizedPrompt
from .candidates import score_candidates
from .config import GENERATION, SAMPLING, check_generation, samples


class ConversationModel:
    """
    A model and its processor. A conversation is a list of messages in the form of `apply_chat_template`, pictures as
    `{"type": "image", "image": PIL image}`.

    Args:
        path: folder or Hub id. Otter, Flamingo, OtterHD, Fuyu and Idefics are read by the classes of this package.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        device: e.g. `cuda`, `cpu`, or `auto` to spread over devices; by default the accelerator if there is one.
        load_in_4bit: quantise with bitsandbytes, as chat and training do (NF4).
        processor: folder or Hub id of the processor, where it is not the model's.
        tokenizer: folder or Hub id of the tokenizer, for an Otter or Flamingo repository of 2023 that has none.
        tokenizer_reference: for a LLaMA tokenizer of 2023, see [`FlamingoProcessor.from_pretrained`].
        chat_template: in place of the processor's, see [`read_chat_template`].
        processor_kwargs: for every call of the processor, e.g. `{"resolution": 512}` for OtterHD.
        generation: for every `generate`, over what a task asks for, e.g. `{"num_beams": 3}`; see
            [`check_generation`].
        media_store: folder in which an Otter or Flamingo keeps what it made of pictures and films, for later runs.
        media_store_gb: most that is in it, in 10**9 bytes; what is above is encoded.

    Raises:
        ValueError: for a `media_store` of another model, and as [`check_generation`]; when asked, if the processor
            has no chat template and none is given. Idefics needs none.
        OSError: if there is no such model, or template.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        load_in_4bit: bool = False,
        processor: str | Path | None = None,
        tokenizer: str | None = None,
        tokenizer_reference: str | None = None,
        chat_template: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        media_store: str | Path | None = None,
        media_store_gb: float = 64.0,
    ):
        self.generation = check_generation(generation or {})
        self.chat_template = None if chat_template is None else read_chat_template(chat_template)
        options = {"dtype": dtype, "device_map": device, "load_in_4bit": load_in_4bit, "tokenizer": tokenizer}
        model = load_model(str(path), **options)
        processor = read_processor(str(processor or path), tokenizer, tokenizer_reference)
        self._use(path, model, processor, media_store, int(media_store_gb * 10**9))
        self.processor_kwargs = dict(processor_kwargs or {})

    @classmethod
    def of(cls, path: str | Path, model: PreTrainedModel, processor: ProcessorMixin) -> "ConversationModel":
        """A model that is loaded already, and its processor."""
        asked = cls.__new__(cls)
        asked._use(path, model, processor)
        asked.chat_template, asked.processor_kwargs, asked.generation = None, {}, {}
        return asked

    def _use(self, path, model, processor, media_store=None, media_store_bytes=0) -> None:
        self.path, self.model, self.processor = path, model, processor
        # demonstrations and pictures that several questions are about are encoded once
        self.media = None
        if isinstance(self.model, FlamingoForConditionalGeneration):
            self.media = MediaStore(self.model, folder=media_store, folder_bytes=media_store_bytes)
        elif media_store is not None:
            raise ValueError(
                f"media_store is for Otter and Flamingo, not {self.model.config.model_type}: leave it out."
            )
        self.is_idefics = self.model.config.model_type == "idefics"
        self.processor.tokenizer.padding_side = "left"
        self._batches = None
        if can_share_prefixes(self.model):
            self._batches = PromptBatches(self.model, self.processor.tokenizer.pad_token_id or 0, self.media)

    def prepare(self, conversations: Sequence[list[dict]], chat_template: str | None = None) -> BatchFeature:
        """Model inputs of B conversations, padded on the left, ending where the answer begins."""
        inputs = self._process(conversations, chat_template)
        if self.media is not None:
            inputs = BatchFeature(self.media.encode(inputs))
        return inputs.to(self.model.device, self.model.dtype)

    def _process(self, conversations: Sequence[list[dict]], chat_template: str | None) -> BatchFeature:
        options = dict(self.processor_kwargs)
        if not takes_films(self.processor):
            reading = {name: options.pop(name) for name in ("num_frames", "fps") if name in options}
            reading["default_num_frames"] = getattr(self.processor, "num_frames", None)
            conversations = [_films_as_pictures(messages, **reading) for messages in conversations]
        if self.is_idefics:
            legacy = options.pop("legacy_pictures", False)
            prompts = [_idefics_prompt(messages, self.processor, legacy) for messages in conversations]
            return self.processor(text=prompts, padding=True, return_tensors="pt", **options)
        if not (chat_template or self.chat_template or self.processor.chat_template):
            raise ValueError(f"{self.path} has no chat template; give the model a `chat_template` (Jinja).")
        return self.processor.apply_chat_template(
            list(conversations),
            chat_template=chat_template or self.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, **options},
        )

    def generate(
        self,
        conversations: Sequence[list[dict]],
        until: Sequence[str] = (),
        chat_template: str | None = None,
        batch_size: int | None = None,
        **generation,
    ) -> list[str]:
        """
        The answer to each conversation.

        Args:
            conversations: any number of them.
            until: an answer ends before the first of these that stands behind its thoughts.
            chat_template: in place of the model's.
            batch_size: conversations per forward pass; by default all.
            generation: `max_new_tokens`, `num_beams`, `do_sample`, `temperature` and the like; greedy by default. What
                `self.generation` says goes before it; what is unknown to `generate` (lmms-eval's tasks hold such) is
                left out.
        """
        answers: dict[int, str] = {}
        for found in self.answers(conversations, until, chat_template, batch_size or len(conversations), **generation):
            answers |= found
        return [answers[number] for number in range(len(answers))]

    @torch.inference_mode()
    def answers(
        self,
        conversations: Iterable[list[dict]],
        until: Sequence[str] = (),
        chat_template: str | None = None,
        batch_size: int = 8,
        wanted: Collection[int] | None = None,
        seed: int | None = None,
        **generation,
    ) -> Iterator[dict[int, str]]:
        """
        As `generate`, a batch at a time: the number of each conversation, and its answer.

        Conversations of an Otter, Flamingo or OtterHD are in batches of like length, and what all begin with, such as
        the same worked examples, is read once. With beams a prompt is read once, too, not once for each.

        Args:
            wanted: numbers of conversations; batches without any of these are not asked.
            seed: what is drawn for a batch depends on it and on the batch alone, not on those asked before it; by
                default torch's generator goes on.
        """
        options = _generation_kwargs({**generation, **self.generation})
        for numbers, inputs, ask in self._asked(conversations, chat_template, batch_size, wanted):
            with nullcontext() if seed is None or not options["do_sample"] else _draws(seed, numbers, inputs):
                new = ask(options)  # (B, L_new)
            texts = self.processor.post_process_image_text_to_text(new)
            yield {number: _cut(text, until) for number, text in zip(numbers, texts, strict=True)}

    def _asked(
        self, conversations, chat_template, batch_size, wanted
    ) -> Iterator[tuple[list[int], Mapping[str, torch.Tensor], Callable]]:
        """Batches with their inputs, and what generates for each the new tokens `(B, L_new)`."""
        if self._batches is not None:
            prompts = self._prompts(conversations, chat_template, batch_size)
            for batch in self._batches.batches(prompts, batch_size, wanted):
                yield batch.numbers, batch.inputs, partial(self._generate, batch)
            return
        for numbers, chunk in _chunks(conversations, batch_size):
            if wanted is None or not set(wanted).isdisjoint(numbers):
                inputs = self.prepare(chunk, chat_template)
                length = inputs["input_ids"].shape[1]
                yield (
                    numbers,
                    inputs,
                    lambda options, inputs=inputs, at=length: self.model.generate(**inputs, **options)[:, at:],
                )

    def _generate(self, batch: Batch, options: Mapping[str, Any]) -> torch.Tensor:
        inputs = batch.inputs
        ids, beams = inputs["input_ids"], options.get("num_beams", 1)
        ends_with_media = bool((ids[:, -1] == self.model.config.image_token_id).any())
        if beams > 1 and ids.shape[1] > 1 and not ends_with_media:
            cache = batch.cache()
            forget_media_behind(cache)
            cache = compute_prefix(self.model, inputs, ids.shape[1] - 1, cache)
            forget_media_behind(cache)
            cache = branch(cache, beams, options.get("max_new_tokens", 32))
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        elif (cache := batch.cache()) is not None:
            cache.batch_repeat_interleave(beams)
        given = {} if cache is None else {"past_key_values": cache}
        return self.model.generate(**inputs, **given, **options)[:, ids.shape[1] :]

    def _prompts(
        self, conversations: Iterable[list[dict]], chat_template: str | None, size: int
    ) -> list[TokenizedPrompt]:
        return [
            prompt
            for _, chunk in _chunks(conversations, size)
            for prompt in self._batches.split(self._process(chunk, chat_template))
        ]

    def log_likelihood(
        self,
        conversation: list[dict],
        candidates: Sequence[str],
        batch_size: int = 8,
        chat_template: str | None = None,
    ) -> list[tuple[float, int, bool]]:
        """
        How likely each candidate is as the answer.

        Args:
            conversation: up to the question.
            candidates: answers, tokenized by themselves.
            batch_size: candidates per forward pass, or more where memory allows.
            chat_template: in place of the model's.

        Returns:
            for each candidate the sum of its tokens' natural log-probabilities, its number of tokens, and whether
            greedy decoding would begin with it.

        Raises:
            ValueError: for a candidate without tokens.
        """
        return next(self.log_likelihoods([conversation], [candidates], chat_template, batch_size))[0]

    @torch.inference_mode()
    def log_likelihoods(
        self,
        conversations: Iterable[list[dict]],
        candidates: Sequence[Sequence[str]],
        chat_template: str | None = None,
        batch_size: int = 8,
        wanted: Collection[int] | None = None,
    ) -> Iterator[dict[int, list[tuple[float, int, bool]]]]:
        """
        As `log_likelihood`, of many conversations: the number of each, and the scores of its candidates.

        Each conversation, with its pictures, is read once, and all its candidates continue its cache. Batches are as
        in `answers`.

        Args:
            candidates: of each conversation.
        """
        tokenize = self.processor.tokenizer
        tokens = {texts: [] for texts in map(tuple, candidates)}  # data sets have the same for all
        for texts in tokens:
            tokens[texts] = [tokenize(text, add_special_tokens=False)["input_ids"] for text in texts]
            if not all(tokens[texts]):
                empty = tokens[texts].index([])
                raise ValueError(f"Candidate {empty} of {len(texts)} is empty: there is nothing to score.")
        if self._batches is not None:
            prompts = self._prompts(conversations, chat_template, batch_size)
            for batch in self._batches.batches(prompts, batch_size, wanted):
                forget_media_behind(cache := batch.cache())
                outputs = read_columns(self.model, batch.inputs, cache=cache)
                cache, scores = outputs.past_key_values, {}
                forget_media_behind(cache)
                for row, (number, padding) in enumerate(zip(batch.numbers, batch.padding, strict=True)):
                    of_row = (row_of(cache, row, padding), outputs.logits[row, -1])
                    ids = tokens[tuple(candidates[number])]
                    scores[number] = score_candidates(self.model, *of_row, ids, batch_size)
                yield scores
            return
        for (number,), chunk in _chunks(conversations, 1):
            if wanted is None or number in wanted:
                inputs = self.prepare(chunk, chat_template)
                outputs = self.model(**inputs, use_cache=True)
                ids, extra = tokens[tuple(candidates[number])], partial(self._idefics_pictures, inputs, outputs)
                of_row = (outputs.past_key_values, outputs.logits[0, -1])
                yield {number: score_candidates(self.model, *of_row, ids, batch_size, extra)}

    def _idefics_pictures(self, inputs, outputs, rows: int, width: int) -> dict[str, torch.Tensor]:
        """Idefics keeps no pictures in its cache and wants them with every call."""
        if not self.is_idefics:
            return {}
        states = outputs.image_hidden_states
        states = states[0] if isinstance(states, tuple) else states
        name = "perceiver_embeddings" if self.model.config.use_resampler else "image_encoder_embeddings"
        mask = inputs["image_attention_mask"][:, -1:].expand(rows, width, -1)
        return {name: states.repeat_interleave(rows, dim=0), "image_attention_mask": mask}


@contextmanager
def _draws(seed: int, numbers: list[int], inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within, torch draws what the seed and this batch say; behind it goes on as if nothing had been drawn."""
    told = [str(seed), str(numbers), *map(hash_of_tensor, inputs.values())]
    # of other accelerators, which it does not know, the generator is left with these seeds
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(int(hashlib.sha256(" ".join(told).encode()).hexdigest()[:16], 16))
        yield


def _chunks(items: Iterable, size: int) -> Iterator[tuple[list[int], list]]:
    """Lists of `size` items, with their numbers."""
    left, start = iter(items), 0
    while chunk := list(islice(left, size)):
        yield list(range(start, start + len(chunk))), chunk
        start += len(chunk)


def _cut(answer: str, until: Sequence[str]) -> str:
    """An answer up to the first of `until` that stands behind its thoughts."""
    head = thinking_length(answer)
    rest = answer[head:]
    for stop in until:
        rest = rest.split(stop)[0]
    return (answer[:head] + rest).strip()


def _generation_kwargs(asked: Mapping[str, Any]) -> dict[str, Any]:
    sample = samples(asked)
    names = GENERATION + (SAMPLING if sample else ())
    chosen = {name: asked[name] for name in names if asked.get(name) is not None}
    if not sample:
        # a folder's generation_config may sample
        chosen |= dict.fromkeys(SAMPLING)
    return {"do_sample": sample, **chosen}


def takes_films(processor) -> bool:
    """Whether a processor is given films; others are given their frames as pictures, one after the other."""
    return isinstance(processor, FlamingoProcessor) or getattr(processor, "video_processor", None) is not None


def _films_as_pictures(messages: list[dict], **reading) -> list[dict]:
    fitted = []
    for index, message in enumerate(messages):
        content = message["content"]
        if not isinstance(content, str):
            parts = []
            for place, part in enumerate(content):
                source = next((part[key] for key in MEDIA_SOURCES["video"] if part.get(key) is not None), None)
                if part.get("type") == "video" and source is not None:
                    frames = read_video(source, f"messages[{index}].content[{place}]", **reading)
                    parts += [{"type": "image", "image": frame} for frame in frames]
                else:
                    parts.append(part)
            message = {**message, "content": parts}
        fitted.append(message)
    return fitted


def _idefics_prompt(messages: list[dict], processor, legacy: bool = False) -> list:
    """Texts and pictures as Idefics' processor wants them, in the form Idefics-instruct was trained on."""
    # the processor's own flag for this looks where transformers 5 keeps no added tokens
    end = "<end_of_utterance>" if "<end_of_utterance>" in processor.tokenizer.get_vocab() else ""
    names = {"user": "User:", "assistant": "Assistant:"}
    pieces = []
    for index, message in enumerate(read_conversations(messages, template="", with_media=True)):
        if message["role"] not in names:
            raise ValueError(f"messages[{index}] has the role {message['role']!r}; Idefics knows user and assistant.")
        pieces.append(("" if not pieces else "\n") + names[message["role"]])
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            (value,) = (part[key] for key in part if key != "type")
            pieces.append(whole_characters(value) if part["type"] == "text" else read_image(value, legacy=legacy))
        pieces.append(end)
    pieces.append("\nAssistant:")
    joined = []
    for piece in pieces:
        # the processor would put an end between two texts by itself
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined
