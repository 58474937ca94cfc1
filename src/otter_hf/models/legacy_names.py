"""How notebooks of 2023 use a model: attributes, arguments and checkpoints by the names of then."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming, apply_renamings
from transformers.utils import logging

from .legacy import mosaic_gpt_renamings, weight_renamings


logger = logging.get_logger(__name__)

_PARTS_OF_2023 = ("lang_encoder.", "vision_encoder.", "perceiver.")
# what is gone, and today's line
_GONE = {
    "text_tokenizer": "a model holds no tokenizer today: AutoProcessor.from_pretrained({name!r}).tokenizer",
    "get_vision_encoder": "the vision tower is `model.model.vision_tower`",
    "get_lang_encoder": "the language model is `model.model.language_model`, its output layer `model.lm_head`",
}


def refuse_arguments_of_2023(kwargs: Mapping[str, Any]) -> None:
    """
    For `from_pretrained`: ValueError with today's line for what transformers once took.
    """
    for name in ("load_in_8bit", "load_in_4bit"):
        if kwargs.get(name):
            raise ValueError(
                f"{name} is no argument of from_pretrained any more: pass "
                f"quantization_config=BitsAndBytesConfig({name}=True) of transformers."
            )


def rename_openflamingo_parts(key: str) -> str:
    """Names that OpenFlamingo gave to layers of the resampler and the gated blocks -> ours; others as they are."""
    key = re.sub(r"^(perceiver\.layers\.\d+)\.0\.", r"\1.", key)
    key = re.sub(r"^(perceiver\.layers\.\d+)\.1\.", r"\1.feed_forward.", key)
    return re.sub(r"(gated_cross_attn_layer)\.ff\.", r"\1.feed_forward.", key)


@contextmanager
def saved_under_names_of_2023(model: PreTrainedModel) -> Iterator[None]:
    """
    Within, `save_original_format=True` of transformers writes the weights of a Flamingo under the names that the code
    of 2023 gave with this language model. By itself transformers reverses what it applied while reading: nothing for
    today's names, and for a new model the last of all patterns with the same target.

    An MPT that was read under the names of MosaicGPT keeps these.
    """
    read = getattr(model, "_weight_conversions", None)
    language_model = model.base_model.language_model
    today = "" if model.base_model is model else f"{model.base_model_prefix}."
    tower = "vision_model." if model.config.vision_config.model_type == "clip_vision_model" else ""
    head = "embed_out" if model.config.text_config.model_type == "gpt_neox" else "lm_head"
    names = {
        f"lang_encoder.{head}.": "lm_head.",
        f"lang_encoder.{language_model.base_model_prefix}.": f"{today}language_model.",
        f"vision_encoder.{tower}": f"{today}vision_tower.",
        "perceiver.": f"{today}perceiver.",
    }
    of_parts = [entry for entry in read or () if entry.scope_prefix or type(entry) is not WeightRenaming]
    model._weight_conversions = [WeightRenaming(f"^{re.escape(old)}", new) for old, new in names.items()] + of_parts
    try:
        yield
    finally:
        model._weight_conversions = read


class NamesOf2023:
    """For a Flamingo with its head: what it was called in 2023."""

    @property
    def vision_encoder(self) -> nn.Module:
        """The vision tower."""
        return _renamed("vision_encoder", "model.model.vision_tower", self.model.vision_tower)

    @property
    def lang_encoder(self) -> nn.Module:
        """The language model, which had its output layer then."""
        today = "model.model.language_model, without its output layer model.lm_head"
        return _renamed("lang_encoder", today, self.model.language_model)

    @property
    def eoc_token_id(self) -> int | None:
        """Of `<|endofchunk|>`."""
        return _renamed("eoc_token_id", "model.config.end_of_chunk_token_id", self.config.end_of_chunk_token_id)

    @property
    def media_token_id(self) -> int | None:
        """Of `<image>`."""
        return _renamed("media_token_id", "model.config.image_token_id", self.config.image_token_id)

    def __getattr__(self, name: str):
        if name in _GONE:
            raise AttributeError(f"{name}: {_GONE[name].format(name=self.name_or_path or 'the model')}.")
        return super().__getattr__(name)

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """
        As in `nn.Module`, also for weights under the names of 2023: of Otter's training scripts and of OpenFlamingo.

        Raises:
            ValueError: if no name fits, which `strict=False` would pass over without a word.
        """
        if any(key.removeprefix("module.").startswith(_PARTS_OF_2023) for key in state_dict):
            renamings = weight_renamings()
            if self.config.text_config.model_type == "otter_mpt":
                renamings += mosaic_gpt_renamings()
            state_dict = {
                apply_renamings(rename_openflamingo_parts(key.removeprefix("module.")), renamings): value
                for key, value in state_dict.items()
                # OpenFlamingo stored its gated blocks twice
                if not key.removeprefix("module.").startswith("lang_encoder.gated_cross_attn_layers.")
            }
        known = {name for name, _ in (*self.named_parameters(remove_duplicate=False), *self.named_buffers())}
        if state_dict and not known & state_dict.keys():
            inner = next((key for key, value in state_dict.items() if isinstance(value, Mapping)), None)
            hint = f"load its {inner!r}" if inner else "`otter-hf convert` reads checkpoints of 2023"
            raise ValueError(
                f"None of {len(state_dict)} entries, such as {next(iter(state_dict))!r}, is a weight of this model, "
                f"which would stay as it is: {hint}."
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _renamed(old: str, new: str, value):
    logger.warning_once(f"`{old}` is the name of 2023: today it is {new}.")
    return value
