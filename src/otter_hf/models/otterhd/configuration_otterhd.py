"""OtterHD configuration: transformers' Fuyu configuration, reading the files of 2023 as they were meant.

OtterHD (https://huggingface.co/papers/2311.04219) is Fuyu-8B (adept/fuyu-8b, weights CC-BY-NC-4.0) fine-tuned on
MIMIC-IT; its checkpoints keep Fuyu's architecture, weight names and `model_type`.
"""

from huggingface_hub.dataclasses import strict
from transformers import FuyuConfig
from transformers.utils import logging

from ..attention_choice import AttentionByPart
from ..stored_sizes import refuse_impossible


logger = logging.get_logger(__name__)

# What transformers 4.35 assumed for a field of `text_config` that its config.json leaves out. The sizes are still the
# defaults of `PersimmonConfig`; the RoPE base is not: transformers 5 falls back to 10000 without a word.
_ROPE_THETA_2023 = 25000.0
# 2023 files repeat the fields of the text model at the top level; these are read from there and not kept twice
_FLAT_TEXT_FIELDS = (
    "attention_dropout",
    "hidden_act",
    "hidden_dropout",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "partial_rotary_factor",
    "qk_layernorm",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "use_cache",
    "vocab_size",
)


@strict
class OtterHDConfig(AttentionByPart, FuyuConfig):
    r"""
    Configuration of OtterHD, a decoder-only model that reads image patches through one linear layer.

    It is a `FuyuConfig` (same `model_type`, same fields), so a saved OtterHD folder stays readable by plain
    transformers and by tools that know Fuyu. What it adds is the reading of the files written in 2023, in which
    `text_config` is missing or holds only what differs from the defaults of that time: a field that `text_config`
    lacks is taken from the top level, and the RoPE base defaults to 25000 (Fuyu, Persimmon) instead of the 10000 that
    transformers 5 assumes. Values that `text_config` states are never changed.

    Args:
        image_size (`int`, defaults to 300): unused, kept for the files that carry it.
        patch_size (`int`, defaults to 30): side of a square image patch in pixels.
        num_channels (`int`, defaults to 3): colour channels of a patch.
        image_token_id (`int`, defaults to 71011): id of `|SPEAKER|`, which stands for one image patch.
        text_config (`PersimmonConfig` or `dict`, *optional*): the decoder; defaults to Persimmon-8B.
        tokenizer_vocab_size (`int`, *optional*): size of the tokenizer, where the embedding has more rows; `generate`
            never chooses these.
    """

    tokenizer_vocab_size: int | None = None

    # TRL asks any class that transformers does not export for its map of remote code: there is none
    auto_map = {}

    def __post_init__(self, **kwargs):
        # what reads this configuration: who looks the class up by name would get plain Fuyu, which reads the RoPE base
        # of 2023 files wrong
        if self.architectures == ["FuyuForCausalLM"]:
            self.architectures = ["OtterHDForConditionalGeneration"]
        if self.text_config is None or isinstance(self.text_config, dict):
            self.text_config = self._complete_text_config(dict(self.text_config or {}), kwargs)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in the parent class; ValueError for more layers than the weights can be of."""
        refuse_impossible(config_dict, kwargs.get("name_or_path"))
        return super().from_dict(config_dict, **kwargs)

    def _complete_text_config(self, text_config: dict, top_level: dict) -> dict:
        """`text_config` with what it lacks taken from `top_level`, which loses the fields of the text model."""
        flat = {key: top_level.pop(key) for key in _FLAT_TEXT_FIELDS if key in top_level}
        flat = {key: value for key, value in flat.items() if value is not None}  # 2023: "rope_scaling": null
        # shared by both levels: `generate` reads them at the top, the text model in `text_config`
        flat |= {key: top_level[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in top_level}
        stated = _rope_theta(text_config)
        wanted = _rope_theta(flat) or _ROPE_THETA_2023
        completed = {"model_type": "persimmon"} | flat | {k: v for k, v in text_config.items() if v is not None}
        if stated is None:
            if text_config or flat:  # read from a file, not the defaults of `OtterHDConfig()`
                logger.warning_once(
                    f"The configuration states no RoPE base in `text_config`: using {wanted:g}, the base of Fuyu "
                    "(plain transformers 5 would use 10000). Save the model once to write it down."
                )
            completed["rope_theta"] = wanted
        elif _rope_theta(flat) is not None and stated != wanted:
            logger.warning_once(
                f"`text_config` has the RoPE base {stated:g} and the top level of the configuration {wanted:g}: "
                f"using {stated:g}. If transformers 5 wrote this file from a 2023 checkpoint that was not trained "
                f"since, the right one is {wanted:g}: set `config.text_config.rope_parameters['rope_theta']` to it "
                "before building the model."
            )
        return completed


def _rope_theta(fields: dict) -> float | None:
    """The RoPE base stated in the fields of a text configuration, in any of its spellings, or `None`."""
    for holder in (fields, fields.get("rope_parameters") or {}, fields.get("rope_scaling") or {}):
        if holder.get("rope_theta") is not None:
            return float(holder["rope_theta"])
    return None


__all__ = ["OtterHDConfig"]
