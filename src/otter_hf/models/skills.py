"""
Worked examples that a model has read once: a conversation prefix as text cache and media.

In-context learning pays for all its examples with every question. What a model makes of them depends on nothing behind
them: the keys and values of their tokens, and in an Otter or Flamingo those of their pictures in each gated block. A
skill holds these, in memory or in a file, for all conversations that begin with the examples; in an OtterHD, where
pictures are tokens, it is the text cache alone.

Shape legend: B rows, L tokens, S tokens of the skill, T media, n latents, H heads, d head width.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.processing_utils import ProcessorMixin

from ..files import claim, replacing
from ..made_from import MadeFrom
from .chat_processing import map_parts, media_parts_of
from .fingerprint import fingerprint_of
from .media_attention import split_media
from .media_cache import MediaCacheMixin, MediaDynamicCache
from .prefix_cache import can_share_prefixes, common_length, compute_prefix, crop, expand, layer_of
from .prepared_media import PreparedMedium


FORMAT = "otter-hf skill 1"
# two questions, by which it shows what every conversation has behind the examples
_PROBES = ("a", "b")


@dataclass(eq=False)
class Skill:
    """
    A conversation prefix that a model has read.

    ```python
    skill = Skill.compile(model, processor, examples)  # messages, with pictures
    inputs = processor.apply_chat_template(
        [*skill.messages, question], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    model.generate(**inputs, past_key_values=skill.cache_for(inputs))
    ```

    Attributes:
        messages: the examples, to be put in front of a question; their pictures are ready ([`PreparedMedium`]).
        input_ids: `(1, S)`, the tokens of the examples with what every further turn begins with.
        cache: of these tokens, of one row. It must stay as it is: `cache_for` makes others of it.
        media: what stands at each image token: for Otter and Flamingo T media, for OtterHD the patches.
        image_token_id: of the model.
        fingerprint: what tells the model and processor it is for.
    """

    messages: list[dict]
    input_ids: torch.LongTensor
    cache: Cache
    media: list[PreparedMedium]
    image_token_id: int | None
    fingerprint: dict[str, str]
    _cropped: dict[int, Cache] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def compile(cls, model: PreTrainedModel, processor: ProcessorMixin, messages: Sequence[dict]) -> "Skill":
        """
        Read a conversation prefix.

        Args:
            model: an Otter, Flamingo or OtterHD in evaluation mode; its weights stay as they are while the skill is
                in use.
            processor: its processor, with a chat template.
            messages: as for `apply_chat_template`: a system message, questions with pictures, and their answers. It
                should end with an answer, where the template wants turns to alternate.

        Raises:
            ValueError: for a model of another family, and for messages that the processor refuses.
        """
        if not can_share_prefixes(model):
            raise ValueError(
                f"A skill is for Otter, Flamingo and OtterHD, whose caches hold all they know; {type(model).__name__} "
                "is none of them."
            )
        dtype = model.dtype
        messages = _in_dtype(processor.prepare_media(list(messages)), dtype)  # as exact as the model reads them
        probes = [_prompt(processor, [*messages, {"role": "user", "content": _text(probe)}]) for probe in _PROBES]
        ids = [probe["input_ids"][0] for probe in probes]
        length = common_length(*ids)
        inputs = probes[0].to(model.device, dtype)
        media = [part[part["type"]] for part in media_parts_of(messages)]
        return cls(
            messages=messages,
            input_ids=inputs["input_ids"][:, :length].cpu(),
            cache=compute_prefix(model, inputs, length),
            media=media,
            image_token_id=model.config.image_token_id,
            fingerprint=fingerprint_of(model, processor),
        )

    def cache_for(self, inputs: Mapping, num_beams: int = 1) -> Cache | None:
        """
        The cache of the first columns of a batch, as far as its rows begin with the skill.

        A row that begins with a part of it, or with other pictures, shares what is the same. In a batch padded on the
        left each row's part stands behind its padding; the columns which not all rows have from the skill are read
        again.

        Args:
            inputs: as the processor returns them for whole conversations: `input_ids (B, L)`, `attention_mask
                (B, L)`, and `pixel_values` with all of their pictures.
            num_beams: with which `generate` will be called, or its `num_return_sequences`.

        Returns:
            a cache for `generate(**inputs, past_key_values=...)`, of its own; None where nothing is shared.

        Raises:
            ValueError: for latents in place of pixels, by which pictures cannot be told from others.
        """
        padding, columns = self._shared_columns(inputs)
        length = min(*columns, self.input_ids.shape[1])
        if length <= 0 or all(column <= start for column, start in zip(columns, padding, strict=True)):
            return None
        return expand(crop(self.cache, length), [start for start in padding for _ in range(num_beams)])

    def prefix_of(self, inputs: Mapping) -> Cache | None:
        """
        As `cache_for` of one row without padding, but to be read only and always the same object for the same length,
        as [`~otter_hf.models.continuous_batching.ContinuousBatch`] takes it.
        """
        (length,) = self._shared_columns(inputs)[1]
        if length <= 0:
            return None
        if length == self.input_ids.shape[1]:
            return self.cache
        # where it differs is mostly the same place: behind the words that come in front of a question without picture
        if length not in self._cropped:
            self._cropped[length] = crop(self.cache, length)
        return self._cropped[length]

    @torch.no_grad()
    def _shared_columns(self, inputs: Mapping) -> tuple[list[int], list[int]]:
        """Of each row the columns of padding in front, and where what it shares with the skill ends."""
        if inputs.get("image_hidden_states") is not None:
            raise ValueError(
                "The inputs have image_hidden_states in place of pixel_values: ask for the skill's cache before media "
                "are encoded."
            )
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        own = self.input_ids[0].to(ids.device)
        media = self._media_of(inputs)
        padding, columns = [], []
        for row in range(len(ids)):
            tokens = mask[row].nonzero()[:, 0]
            start, end = int(tokens[0]), int(tokens[-1]) + 1
            width = min(end - start - 1, len(own))  # a model answers to the last token
            shared = common_length(ids[row, start : start + width], own)
            if inputs.get("media_index") is not None:
                index = inputs["media_index"][row, start : start + shared]
                shared = common_length(index, self.cache.media_index[0, :shared])
            padding.append(start)
            columns.append(start + self._shared_with_media(shared, media[row]))
        return padding, columns

    def _media_of(self, inputs: Mapping) -> list[list[torch.Tensor]]:
        """Of each row the pixels of its media `(F, C, H, W)`, or for OtterHD of its patches."""
        ids, pixels = inputs["input_ids"], inputs.get("pixel_values")
        if pixels is None:
            return [[] for _ in ids]
        if not isinstance(self.cache, MediaCacheMixin):
            counts = (ids == self.image_token_id).sum(dim=1).tolist()
            patches = pixels.reshape(-1, pixels.shape[-1])
            # what does not fit together the model refuses
            return list(patches.split(counts)) if sum(counts) == len(patches) else [[] for _ in ids]
        return split_media(inputs)

    def _shared_with_media(self, length: int, media) -> int:
        """How many of the first `length` tokens are the same with what stands at the image tokens."""
        places = (self.input_ids[0, :length] == self.image_token_id).nonzero()[:, 0].tolist()
        first = 0
        for medium in self.media:
            if first >= len(places):
                break
            if isinstance(self.cache, MediaCacheMixin):
                same, width = first < len(media) and medium.equals(media[first]), 1
            else:
                width = len(medium)
                same = medium.equals(media[first : first + width])
            if not same:
                return places[first]
            first += width
        return length

    def save(self, path: str | Path) -> None:
        """
        Write it as safetensors, whole or not at all.

        Raises:
            ValueError: if there is a folder of that name.
            OSError: if the disk is full, or another process is writing it.
            TypeError: for messages with keys that JSON has no form for.
        """
        check_skill_path(path)
        tensors = {"input_ids": self.input_ids}
        for index, layer in enumerate(self.cache.layers):
            tensors |= {f"keys.{index}": layer.keys, f"values.{index}": layer.values}
        if isinstance(self.cache, MediaCacheMixin):
            tensors["media_index"] = self.cache.media_index
            for index, states in self.cache.media_key_values.items():
                tensors[f"media_key_values.{index}"] = states
        tensors |= {f"media.{number}": medium.pixels for number, medium in enumerate(self.media)}
        metadata = {
            "format": FORMAT,
            "messages": json.dumps(_without_media(self.messages)),
            "media": json.dumps([{"grid": medium.grid, "scale": medium.scale} for medium in self.media]),
            "made_from": json.dumps(MadeFrom(options=self.fingerprint).to_json()),
        }
        path = Path(path)
        with claim(path.with_name(f".{path.name}.lock"), path), replacing(path) as written:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, written, metadata)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        fingerprint: Mapping[str, str] | None = None,
    ) -> "Skill":
        """
        Read a file that `save` wrote.

        Args:
            path: the file.
            model, processor: those it was made with.
            fingerprint: theirs, where [`fingerprint_of`] has read all weights for it before.

        Raises:
            ValueError: for a file that is no skill or damaged, and for the skill of another model, processor or
                dtype, saying what differs.
            OSError: if there is no such file.
        """
        tensors, metadata = _read(path)
        fingerprint = dict(fingerprint or fingerprint_of(model, processor))
        if changes := MadeFrom(options=fingerprint).changes(json.loads(metadata["made_from"])):
            raise ValueError(
                f"{path} is a skill of another model ({changes}): load that one, or make the skill again with this "
                "(otter-hf skill make)."
            )
        try:
            media = [
                PreparedMedium(
                    tensors[f"media.{number}"], *(known[key] and (*known[key],) for key in ("grid", "scale"))
                )
                for number, known in enumerate(json.loads(metadata["media"]))
            ]
            return cls(
                messages=_with_media(json.loads(metadata["messages"]), media),
                input_ids=tensors["input_ids"],
                cache=_cache(model, tensors),
                media=media,
                image_token_id=model.config.image_token_id,
                fingerprint=fingerprint,
            )
        except (KeyError, TypeError, StopIteration) as error:
            raise ValueError(f"{path} is damaged: it lacks {error}; make the skill again.") from error


def check_skill_path(path: str | Path) -> None:
    """ValueError for a folder, where a skill is a file."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; name the file of the skill, e.g. {Path(path) / 'skill.safetensors'}.")


def describe_skill(path: str | Path) -> dict:
    """
    What a file holds, without a model: `messages`, `tokens`, `media` and `made_from`.

    Raises:
        ValueError, OSError: as [`Skill.load`], but for any model's skill.
    """
    tensors, metadata = _read(path)
    return {
        "messages": json.loads(metadata["messages"]),
        "tokens": tensors["input_ids"].shape[1],
        "media": len(json.loads(metadata["media"])),
        "made_from": json.loads(metadata["made_from"])["options"],
    }


def _read(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no skill {path}: otter-hf skill make writes one.")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is no skill of this version ({metadata.get('format')!r:.80} in place of {FORMAT!r}): "
                    "make it with otter-hf skill make."
                )
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no skill, or damaged ({error}): make it with otter-hf skill make.") from error
    for name in {"messages", "media", "made_from"} - metadata.keys() | {"input_ids"} - tensors.keys():
        raise ValueError(f"{path} is damaged: it lacks {name!r}; make the skill again.")
    return tensors, metadata


def _cache(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> Cache:
    """The cache in a file, each layer where the model's layer is."""
    has_media = "media_index" in tensors
    cache = MediaDynamicCache() if has_media else DynamicCache()
    decoder = model.model.decoder_layers if has_media else model.model.language_model.layers
    for index, module in enumerate(decoder):
        device = next(module.parameters()).device
        cache.layers.append(layer_of(*(tensors[f"{name}.{index}"].to(device) for name in ("keys", "values"))))
        if has_media and f"media_key_values.{index}" in tensors:
            cache.media_key_values[index] = tensors[f"media_key_values.{index}"].to(device)
    if has_media:
        cache.media_index = tensors["media_index"].to(model.device)
    return cache


def _prompt(processor: ProcessorMixin, messages: list[dict]) -> Mapping:
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def _text(words: str) -> list[dict]:
    return [{"type": "text", "text": words}]


def _in_dtype(messages: list[dict], dtype: torch.dtype) -> list[dict]:
    def convert(part: dict) -> list[dict]:
        if part["type"] == "text":
            return [part]
        medium = part[part["type"]]
        return [{**part, part["type"]: PreparedMedium(medium.pixels.to(dtype), medium.grid, medium.scale)}]

    return map_parts(messages, convert)


def _without_media(messages: list[dict]) -> list[dict]:
    return map_parts(messages, lambda part: [part if part["type"] == "text" else {"type": part["type"]}])


def _with_media(messages: list[dict], media: Sequence[PreparedMedium]) -> list[dict]:
    waiting = iter(media)
    return map_parts(
        messages, lambda part: [part if part["type"] == "text" else {**part, part["type"]: next(waiting)}]
    )


__all__ = ["FORMAT", "Skill", "check_skill_path", "describe_skill"]
