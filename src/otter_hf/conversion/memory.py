"""How much memory a model takes, from its configuration alone."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.utils import cached_file

from ..errors import config_told
from ..model_names import check_model_name, split_revision
from .plan import build_meta_model
from .tensors import ConversionError


# bytes of a linear weight; what is not linear, and the output layer, stays in bfloat16 under the last two
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "4-bit": 0.5}
_QUANTISED = ("int8", "4-bit")


def load_model_config(name_or_path: str | Path):
    """
    The configuration of a folder, a `config.json` or a Hub repository, without looking at its tokenizer.

    Raises:
        ConversionError: if there is none, or its model is unknown.
    """
    path = Path(name_or_path)
    try:
        if path.is_dir():
            path = path / "config.json"
        elif not path.is_file():
            check_model_name(name_or_path)
            name, revision = split_revision(str(name_or_path))
            path = Path(cached_file(name, "config.json", revision=revision))
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"{name_or_path} is no config.json, nor a folder or repository with one.") from error
    if config.get("model_type") not in CONFIG_MAPPING:
        raise ConversionError(f"{name_or_path} has the model type {config.get('model_type')!r}, which is unknown.")
    with config_told(name_or_path):
        return CONFIG_MAPPING[config["model_type"]].from_dict(config)


def estimate_memory(config) -> dict:
    """
    Parameters and bytes of a model.

    Args:
        config: of a Flamingo, Otter or OtterHD model.

    Returns:
        `parameters` by part (and `total`), `weights` in bytes by dtype, `cache_per_1024_tokens` and, for Flamingo and
        Otter, `cache_per_image`: bytes of keys and values of one row in bfloat16. Computed from shapes: what a
        framework needs besides (activations, buffers, fragmentation) is not in it.
    """
    model = build_meta_model(config)
    shared = {id(parameter): (name, parameter) for name, parameter in model.named_parameters()}
    linear = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    parts: dict[str, int] = {}
    weights = dict.fromkeys(_BYTES, 0.0)
    for identity, (name, parameter) in shared.items():
        parts[_part(name)] = parts.get(_part(name), 0) + parameter.numel()
        for dtype, size in _BYTES.items():
            quantised = dtype in _QUANTISED and identity in linear
            weights[dtype] += parameter.numel() * (size if quantised or dtype not in _QUANTISED else 2.0)
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if text.model_type == "falcon":
        kv_heads = text.num_kv_heads if text.new_decoder_architecture or not text.multi_query else 1
    result = {
        "parameters": {**parts, "total": sum(parts.values())},
        "weights": {dtype: int(size) for dtype, size in weights.items()},
        "cache_per_1024_tokens": 1024 * text.num_hidden_layers * 2 * kv_heads * head_dim * torch.bfloat16.itemsize,
    }
    if hasattr(config, "cross_attn_every_n_layers"):
        gated = text.num_hidden_layers // config.cross_attn_every_n_layers
        width = 2 * config.cross_attn_num_heads * config.cross_attn_head_dim
        result["cache_per_image"] = gated * config.perceiver_num_latents * width * torch.bfloat16.itemsize
    return result


def _part(name: str) -> str:
    if ".gated_cross_attn_layer." in name:
        return "gated cross-attention"
    for part, marks in {
        "vision tower": ("vision_tower.", "vision_embed_tokens."),
        "resampler": ("perceiver.",),
        "embeddings and output layer": ("lm_head.", "embed_tokens.", "wte.", "embed_in.", "word_embeddings."),
    }.items():
        if any(mark in name for mark in marks):
            return part
    return "language model"


def gibibytes(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"


def memory_table(config) -> str:
    """[`estimate_memory`] as two Markdown tables."""
    estimate = estimate_memory(config)
    lines = ["| part | parameters |", "|---|---:|"]
    lines += [f"| {part} | {count:,} |" for part, count in estimate["parameters"].items()]
    lines += ["", "| weights in | memory |", "|---|---:|"]
    lines += [f"| {dtype} | {gibibytes(size)} |" for dtype, size in estimate["weights"].items()]
    lines += [f"| cache of 1024 tokens (bfloat16, one row) | {gibibytes(estimate['cache_per_1024_tokens'])} |"]
    if "cache_per_image" in estimate:
        lines += [f"| cache of one image (bfloat16, one row) | {gibibytes(estimate['cache_per_image'])} |"]
    return "\n".join(lines)
