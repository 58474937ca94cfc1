"""Any image-text-to-text model of transformers, asked in conversations: greedy answers and log-probabilities."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature

from ..films import read_video
from ..loading import load_model, read_processor
from ..models.chat_processing import MEDIA_SOURCES, read_conversations
from ..models.flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from ..models.media_store import MediaStore
from ..pictures import read_image
from ..thinking import thinking_length


# what generation_kwargs of lmms-eval's tasks may hold and `generate` understands
_SAMPLING = ("temperature", "top_p", "top_k")
_GENERATION = ("max_new_tokens", "num_beams", "no_repeat_ngram_size", "length_penalty", "repetition_penalty")


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
        chat_template: a Jinja template in place of the processor's.
        processor_kwargs: for every call of the processor, e.g. `{"resolution": 512}` for OtterHD.
        generation: for every `generate`, over what a task asks for, e.g. `{"num_beams": 3}`.

    Raises:
        ValueError: when asked, if the processor has no chat template and none is given. Idefics needs none.
        OSError: if there is no such model.
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
    ):
        self.path = path
        options = {"dtype": dtype, "device_map": device, "load_in_4bit": load_in_4bit, "tokenizer": tokenizer}
        self.model = load_model(str(path), **options)
        # demonstrations and pictures that several questions are about are encoded once
        self.media = MediaStore(self.model) if isinstance(self.model, FlamingoForConditionalGeneration) else None
        self.is_idefics = self.model.config.model_type == "idefics"
        self.processor = read_processor(str(processor or path), tokenizer, tokenizer_reference)
        self.processor.tokenizer.padding_side = "left"
        self.chat_template = chat_template
        self.processor_kwargs = dict(processor_kwargs or {})
        self.generation = dict(generation or {})

    def prepare(self, conversations: Sequence[list[dict]], chat_template: str | None = None) -> BatchFeature:
        """Model inputs of B conversations, padded on the left, ending where the answer begins."""
        options = dict(self.processor_kwargs)
        if not takes_films(self.processor):
            reading = {name: options.pop(name) for name in ("num_frames", "fps") if name in options}
            conversations = [_films_as_pictures(messages, **reading) for messages in conversations]
        if self.is_idefics:
            legacy = options.pop("legacy_pictures", False)
            prompts = [_idefics_prompt(messages, self.processor, legacy) for messages in conversations]
            inputs = self.processor(text=prompts, padding=True, return_tensors="pt", **options)
        elif not (chat_template or self.chat_template or self.processor.chat_template):
            raise ValueError(f"{self.path} has no chat template; give the model a `chat_template` (Jinja).")
        else:
            inputs = self.processor.apply_chat_template(
                list(conversations),
                chat_template=chat_template or self.chat_template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, **options},
            )
        if self.media is not None:
            inputs = BatchFeature(self.media.encode(inputs))
        inputs = inputs.to(self.model.device)
        for name, value in inputs.items():
            if value.is_floating_point():
                inputs[name] = value.to(self.model.dtype)
        return inputs

    @torch.inference_mode()
    def generate(
        self,
        conversations: Sequence[list[dict]],
        until: Sequence[str] = (),
        chat_template: str | None = None,
        **generation,
    ) -> list[str]:
        """
        The answer to each conversation, as one batch.

        Args:
            conversations: B of them.
            until: an answer ends before the first of these that stands behind its thoughts.
            chat_template: in place of the model's.
            generation: `max_new_tokens`, `num_beams`, `do_sample`, `temperature` and the like; greedy by default. What
                `self.generation` says goes before it; what is unknown to `generate` (lmms-eval's tasks hold such) is
                left out.
        """
        inputs = self.prepare(conversations, chat_template)
        output = self.model.generate(**inputs, **_generation_kwargs({**generation, **self.generation}))
        new = output[:, inputs["input_ids"].shape[1] :]  # (B, L_new)
        answers = []
        for answer in self.processor.post_process_image_text_to_text(new):
            head = thinking_length(answer)
            rest = answer[head:]
            for stop in until:
                rest = rest.split(stop)[0]
            answers.append((answer[:head] + rest).strip())
        return answers

    @torch.inference_mode()
    def log_likelihood(
        self,
        conversation: list[dict],
        candidates: Sequence[str],
        batch_size: int = 8,
        chat_template: str | None = None,
    ) -> list[tuple[float, int, bool]]:
        """
        How likely each candidate is as the answer.

        The conversation, with its pictures, is read once; all candidates continue its cache.

        Args:
            conversation: up to the question.
            candidates: answers, tokenized by themselves.
            batch_size: candidates per forward pass; each holds a copy of the conversation's cache.
            chat_template: in place of the model's.

        Returns:
            for each candidate the sum of its tokens' natural log-probabilities, its number of tokens, and whether
            greedy decoding would begin with it.

        Raises:
            ValueError: for a candidate without tokens.
        """
        tokens = [self.processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in candidates]
        if not all(tokens):
            raise ValueError(f"Candidate {tokens.index([])} of {len(tokens)} is empty: there is nothing to score.")
        inputs = self.prepare([conversation], chat_template)
        outputs = self.model(**inputs, use_cache=True)
        cache, rows = outputs.past_key_values, min(batch_size, len(tokens))
        cache.batch_repeat_interleave(rows)
        first = outputs.logits[0, -1].float().log_softmax(-1)  # (V,)
        mask = inputs["attention_mask"].expand(rows, -1)  # (rows, L)
        results = []
        for start in range(0, len(tokens), rows):
            batch = tokens[start : start + rows]
            # the last batch is filled up, as the cache has its number of rows
            padded = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(ids) for ids in batch + batch[-1:] * (rows - len(batch))], batch_first=True
            ).to(self.model.device)  # (rows, L_candidate)
            width = padded.shape[1]
            # padding stands behind the tokens that count, which do not see it
            continuation = self.model(
                input_ids=padded,
                attention_mask=torch.cat([mask, mask.new_ones(rows, width)], dim=1),
                past_key_values=cache,
                use_cache=True,
                **self._idefics_pictures(inputs, outputs, rows, width),
            )
            later = continuation.logits.float().log_softmax(-1)  # (rows, L_candidate, V)
            cache.crop(-width)
            for row, ids in enumerate(batch):
                distributions = torch.cat([first[None], later[row, : len(ids) - 1]])  # (L_candidate, V)
                chosen = distributions.gather(1, padded[row, : len(ids), None])[:, 0]
                greedy = bool((distributions.argmax(-1) == padded[row, : len(ids)]).all())
                results.append((float(chosen.double().sum()), len(ids), greedy))
        return results

    def _idefics_pictures(self, inputs, outputs, rows: int, width: int) -> dict[str, torch.Tensor]:
        """Idefics keeps no pictures in its cache and wants them with every call."""
        if not self.is_idefics:
            return {}
        states = outputs.image_hidden_states
        states = states[0] if isinstance(states, tuple) else states
        name = "perceiver_embeddings" if self.model.config.use_resampler else "image_encoder_embeddings"
        mask = inputs["image_attention_mask"][:, -1:].expand(rows, width, -1)
        return {name: states.repeat_interleave(rows, dim=0), "image_attention_mask": mask}


def _generation_kwargs(asked: Mapping[str, Any]) -> dict[str, Any]:
    sample = bool(asked.get("do_sample")) or float(asked.get("temperature") or 0) > 0
    names = _GENERATION + (_SAMPLING if sample else ())
    chosen = {name: asked[name] for name in names if asked.get(name) is not None}
    if not sample:
        # a folder's generation_config may sample
        chosen |= dict.fromkeys(_SAMPLING)
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
            pieces.append(value if part["type"] == "text" else read_image(value, legacy=legacy))
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
