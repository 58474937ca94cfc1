"""Weight names of 2023, of language models and of vision towers, and ours."""

import re
from collections.abc import Callable

from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings

from ..models.flamingo.decoders_flamingo import SUPPORTED_DECODERS
from ..models.legacy import mosaic_gpt_renamings, weight_renamings
from ..models.legacy_names import rename_openflamingo_parts
from .tensors import ConversionError, LazyTensor


Rename = Callable[[str], str | None]

HEAD = "lm_head.weight"
_GATED_LAYER = re.compile(r"\.(\d+)\.gated_cross_attn_layer\.")


def rename_2023(text_config: PreTrainedConfig) -> Rename:
    """Names that the Otter repository of 2023 wrote around a language model -> ours; ours stay as they are."""
    renamings = weight_renamings()
    if text_config.model_type == "otter_mpt":
        renamings += mosaic_gpt_renamings()
    return lambda key: apply_renamings(key, renamings)


def rename_openflamingo(text_config: PreTrainedConfig) -> Rename:
    """Names of an OpenFlamingo checkpoint (v1 or v2) -> ours."""
    rename = rename_2023(text_config)
    return lambda key: rename(rename_openflamingo_parts(key))


def base_class(config: PreTrainedConfig) -> type:
    """The headless model class of a configuration."""
    return AutoModel._model_mapping[type(config)]


def language_model_rename(text_config: PreTrainedConfig) -> Rename:
    """Names of a causal language model's own checkpoint -> those of its layers inside a Flamingo."""
    prefix = base_class(text_config).base_model_prefix
    layers = re.escape(SUPPORTED_DECODERS[text_config.model_type])
    renamings = mosaic_gpt_renamings() if text_config.model_type == "otter_mpt" else []

    def rename(key: str) -> str:
        if key in (HEAD, "embed_out.weight"):
            return HEAD
        key = apply_renamings(key.removeprefix(f"{prefix}."), renamings)
        return "model.language_model." + re.sub(rf"^({layers}\.\d+)\.", r"\1.decoder_layer.", key)

    return rename


def vision_tower_rename(vision_config: PreTrainedConfig) -> Rename:
    """Names of a vision model's own checkpoint, or of a two-tower model's -> those of the tower in a Flamingo."""
    tower = base_class(vision_config)
    prefix = tower.base_model_prefix
    # transformers renamed the layers of ViT, DINOv2 and others, and saves them under their old names to this day
    mapping = get_checkpoint_conversion_mapping(tower.__name__)
    mapping = mapping or get_checkpoint_conversion_mapping(vision_config.model_type) or []
    renamings = [transform for transform in mapping if type(transform) is WeightRenaming]

    def rename(key: str) -> str:
        key = key.removeprefix(f"{prefix}.").removeprefix("vision_model.")
        return "model.vision_tower." + apply_renamings(key, renamings)

    return rename


def gated_layer_indices(keys) -> list[int]:
    """Which decoder layers have a gated cross-attention block in front, according to weight names."""
    return sorted({int(match.group(1)) for key in keys if (match := _GATED_LAYER.search(key))})


_OPEN_CLIP_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
}
_OPEN_CLIP_PARTS = {
    "ln_pre.": "pre_layrnorm.",
    "ln_post.": "post_layernorm.",
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
}


def from_open_clip(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """
    The visual part of an open_clip checkpoint under the names of transformers' `CLIPVisionModel`.

    The fused query, key and value projection is cut in three. Names that belong to no part of the tower stay.

    Args:
        tensors: a `visual` state dict, or that of a whole CLIP, whose text part is dropped.
    """
    if any(name.startswith("visual.") for name in tensors):
        visual = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
        tensors = {name.removeprefix("visual."): tensor for name, tensor in visual.items()}
    renamed = {}
    for name, tensor in tensors.items():
        name = _OPEN_CLIP_NAMES.get(name, name)
        for old, new in _OPEN_CLIP_PARTS.items():
            name = name.replace(old, new) if old.startswith(".") or name.startswith(old) else name
        if match := re.search(r"\.attn\.in_proj_(weight|bias)$", name):
            size = tensor.shape[0] // 3
            for i, part in enumerate("qkv"):
                rows = slice(i * size, (i + 1) * size)
                target = f"{name[: match.start()]}.self_attn.{part}_proj.{match.group(1)}"
                renamed[target] = tensor.map(lambda value, rows=rows: value[rows], (size, *tensor.shape[1:]))
        else:
            renamed[name] = tensor
    return renamed


def open_clip_config(tensors: dict[str, LazyTensor], head_dim: int = 64, hidden_act: str = "quick_gelu"):
    """
    The configuration of an open_clip vision transformer, from the shapes of its tensors as [`from_open_clip`] names
    them. What shapes do not tell is an argument: the width of a head, and the activation (`quick_gelu` for OpenAI's
    weights, `gelu` for most others).
    """
    if "embeddings.patch_embedding.weight" not in tensors:
        raise ConversionError("The open_clip file holds no conv1.weight, so no vision transformer.")
    hidden_size, channels, patch_size, _ = tensors["embeddings.patch_embedding.weight"].shape
    side = round((tensors["embeddings.position_embedding.weight"].shape[0] - 1) ** 0.5)
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")}
    return AutoConfig.for_model(
        "clip_vision_model",
        hidden_size=hidden_size,
        num_channels=channels,
        patch_size=patch_size,
        image_size=side * patch_size,
        num_hidden_layers=len(layers),
        num_attention_heads=hidden_size // head_dim,
        intermediate_size=tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        hidden_act=hidden_act,
    )
