"""Back to 2023: folders in the names and the configuration dialect of Luodian/Otter, for its own code."""

import dataclasses
import json
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from ..models.legacy import upgrade_text_config
from .export_tokenizer import save_tokenizer_2023
from .job import open_flamingo_folder, written_folder
from .names import HEAD, base_class
from .plan import plan_model
from .report import ConversionReport
from .tensors import ConversionError


_MOSAIC_GPT_PARTS = {
    ".decoder_layer.norm_1.": ".decoder_layer.ln_1.",
    ".decoder_layer.norm_2.": ".decoder_layer.ln_2.",
    ".decoder_layer.ffn.up_proj.": ".decoder_layer.mlp.mlp_up.",
    ".decoder_layer.ffn.down_proj.": ".decoder_layer.mlp.mlp_down.",
    ".norm_f.": ".ln_f.",
}
_LLAMA_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps pad_token_id bos_token_id eos_token_id use_cache "
    "tie_word_embeddings"
).split()
_FALCON_FIELDS = (
    "vocab_size hidden_size layer_norm_epsilon initializer_range bos_token_id eos_token_id alibi multi_query "
    "parallel_attn bias hidden_dropout attention_dropout use_cache tie_word_embeddings"
).split()
_VISION_FIELDS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size "
    "hidden_act layer_norm_eps attention_dropout initializer_range initializer_factor projection_dim"
).split()
# of language models what their layers compute without, or alike
_OF_NO_MATTER = ("attention_dropout", "initializer_range", "max_position_embeddings", "pretraining_tp", "use_cache")
# what the 2023 code had fixed in its source
_FIXED_SHAPE = {
    "perceiver_depth": 6,
    "perceiver_num_latents": 64,
    "perceiver_num_heads": 8,
    "perceiver_head_dim": 64,
    "perceiver_ff_mult": 4,
    "cross_attn_num_heads": 8,
    "cross_attn_head_dim": 64,
    "cross_attn_ff_mult": 4,
    "cross_attn_on_text": True,
    "vision_feature_select_strategy": "default",
}


def export_legacy(
    source: str | Path,
    output: str | Path,
    *,
    tokenizer: str | None = None,
    tokenizer_reference: str | None = None,
    language_model_name: str | None = None,
    dtype: str | None = None,
    allow: bool = False,
    max_shard_size: int = 5 * 10**9,
    push_to_hub: str | None = None,
) -> ConversionReport:
    """
    Write a folder that Otter's code of 2023 reads: its weight names, its configuration dialect, safetensors.

    Args:
        source: a Flamingo or Otter folder with a Llama, MPT, MosaicGPT or Falcon language model and a CLIP tower.
        language_model_name: where that code finds the base tokenizer; it is written as `_name_or_path`. For Llama it
            must contain `llama`, and defaults to the name in Otter's own configurations.

    Raises:
        ConversionError: for a model that the 2023 code cannot express.
    """
    report = ConversionReport("export-legacy")
    config, weights, processor = open_flamingo_folder(source, tokenizer, tokenizer_reference)
    legacy_config = to_legacy_config(config, language_model_name)
    ours = plan_model(config, [weights], report)
    report.check(allow)
    renamed = {legacy_name(name, config): tensor for name, tensor in ours.items()}
    if config.tie_word_embeddings and config.text_config.model_type == "falcon":
        # the only tied decoder whose head the old code stored
        renamed["lang_encoder.lm_head.weight"] = renamed["lang_encoder.transformer.word_embeddings.weight"]
    report.tensors = {what: legacy_name(name, config) for what, name in report.tensors.items()}
    writing = {"dtype": dtype, "allow": allow, "max_shard_size": max_shard_size, "push_to_hub": push_to_hub}
    with written_folder(report, output, renamed, **writing) as folder:
        legacy_config["torch_dtype"] = report.dtype
        (folder / "config.json").write_text(json.dumps(legacy_config, indent=2) + "\n")
        save_tokenizer_2023(processor.tokenizer, folder)
    return report


def legacy_name(name: str, config) -> str:
    """One of our weight names -> that of the 2023 code."""
    text_config = config.text_config
    prefix = base_class(text_config).base_model_prefix
    for ours, theirs in {
        HEAD: "lang_encoder.lm_head.weight",
        "model.language_model.": f"lang_encoder.{prefix}.",
        "model.vision_tower.": "vision_encoder.vision_model.",
        "model.perceiver.": "perceiver.",
    }.items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            break
    if _is_mosaic_gpt(text_config):
        for ours, theirs in _MOSAIC_GPT_PARTS.items():
            name = name.replace(ours, theirs)
    return name


def to_legacy_config(config, language_model_name: str | None = None) -> dict:
    """A configuration of ours in the dialect of 2023. Raises ConversionError where that has no word for it."""
    for field, value in _FIXED_SHAPE.items():
        if getattr(config, field) != value:
            raise ConversionError(f"{field} is {getattr(config, field)}; the 2023 code knows {value} only.")
    if config.vision_config.model_type != "clip_vision_model":
        raise ConversionError(
            f"The vision tower is a {config.vision_config.model_type!r}; the 2023 code knows CLIP only."
        )
    text_config = _legacy_text_config(config.text_config, language_model_name)
    _check_expressed(config.text_config, text_config)
    legacy = {
        "model_type": config.model_type,
        "architectures": [f"{config.model_type.capitalize()}ForConditionalGeneration"],
        "cross_attn_every_n_layers": config.cross_attn_every_n_layers,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        # True would draw lots for every forward pass whether a text sees the image before or after it
        "use_media_placement_augmentation": False,
        "text_config": text_config,
        "vision_config": {"model_type": "clip_vision_model", **_take(config.vision_config, _VISION_FIELDS)},
    }
    if config.max_num_frames is not None:
        legacy["max_num_frames"] = config.max_num_frames
    return legacy


def _check_expressed(text, legacy: dict) -> None:
    """Raises ConversionError if a language model's configuration of 2023, read again, is that of another model."""
    upgraded = upgrade_text_config(legacy)
    again = AutoConfig.for_model(upgraded.pop("model_type"), **upgraded)
    free = {*_OF_NO_MATTER, *(("num_kv_heads",) if getattr(text, "multi_query", False) else ())}
    for field in {field.name for field in dataclasses.fields(text)} - {
        field.name for field in dataclasses.fields(PreTrainedConfig)
    }:
        value = getattr(text, field)
        if field not in free and value != getattr(again, field):
            raise ConversionError(
                f"The language model has {field}={value!r}, for which the configuration of 2023 has no word."
            )


def _take(config, fields) -> dict:
    return {field: getattr(config, field) for field in fields}


def _is_mosaic_gpt(text_config) -> bool:
    return text_config.model_type == "otter_mpt" and text_config.qk_ln


def _legacy_text_config(text, name: str | None) -> dict:
    if text.model_type == "llama":
        theta = text.rope_parameters["rope_theta"]
        fields = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": theta}
        return {**fields, "_name_or_path": name or "luodian/llama-7b-hf", **_take(text, _LLAMA_FIELDS)}
    if text.model_type == "falcon":
        fields = {"model_type": "RefinedWebModel", "architectures": ["RWForCausalLM"], "_name_or_path": name or ""}
        sizes = {"n_layer": text.num_hidden_layers, "n_head": text.num_attention_heads}
        return {**fields, **sizes, **_take(text, _FALCON_FIELDS)}
    if text.model_type != "otter_mpt":
        raise ConversionError(
            f"The language model is a {text.model_type!r}; the 2023 code knows Llama, MPT, MosaicGPT and Falcon only."
        )
    common = "d_model n_heads n_layers max_seq_len vocab_size resid_pdrop emb_pdrop no_bias logit_scale".split()
    fields = {
        "_name_or_path": name or "",
        "hidden_size": text.d_model,
        "tie_word_embeddings": text.tie_word_embeddings,
        "use_cache": False,
        "init_device": "cpu",
        "embedding_fraction": 1.0,
        "tokenizer_name": "EleutherAI/gpt-neox-20b",
        **_take(text, common),
    }
    attention = {"attn_impl": "torch", "attn_pdrop": text.attn_pdrop, "attn_uses_sequence_id": False}
    attention |= {"prefix_lm": False, "softmax_scale": text.softmax_scale}
    attention |= {"alibi": True, "alibi_bias_max": text.alibi_bias_max}
    if _is_mosaic_gpt(text):
        flat = {"mlp_ratio": text.expansion_ratio, "attn_qk_ln": True, "attn_clip_qkv": text.clip_qkv}
        return {"model_type": "mosaic_gpt", "architectures": ["MosaicGPT"], **fields, **attention, **flat}
    attention |= {"attn_type": "multihead_attention", "clip_qkv": text.clip_qkv, "qk_ln": False}
    nested = {"attn_config": attention, "expansion_ratio": text.expansion_ratio}
    nested |= {"norm_type": "low_precision_layernorm", "learned_pos_emb": True}
    return {"model_type": "mpt", "architectures": ["MPTForCausalLM"], **fields, **nested}
