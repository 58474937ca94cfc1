"""Which decoders a Flamingo can stand on, and how one becomes its language model."""

from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from ..attention_choice import attention_for
from ..falcon import OtterFalconModel
from .configuration_flamingo import FlamingoConfig
from .layers_flamingo import FlamingoDecoderLayer, GatedCrossAttentionBlock


# model_type of every decoder that hands unknown keyword arguments on to its layers, which is how images reach the
# gated blocks, and whose output layer is a matrix (Phi's has a bias). Others would run blind without an error: BLOOM,
# GPT-J and transformers' own MPT do. Value: where the layers are.
SUPPORTED_DECODERS = {
    "falcon": "h",
    "gemma": "layers",
    "gemma3_text": "layers",
    "gpt_neox": "layers",
    "llama": "layers",
    "mistral": "layers",
    "olmo2": "layers",
    "opt": "decoder.layers",
    "otter_mpt": "blocks",
    "phi3": "layers",
    "qwen2": "layers",
    "qwen3": "layers",
    "smollm3": "layers",
    "stablelm": "layers",
}

# transformers' own class runs blind; this one does not
_DECODER_CLASSES = {"falcon": OtterFalconModel}


def get_decoder_layers(language_model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a decoder listed in `SUPPORTED_DECODERS`."""
    return language_model.get_submodule(SUPPORTED_DECODERS[language_model.config.model_type])


def make_language_model(config: FlamingoConfig) -> PreTrainedModel:
    """
    The decoder of `config.text_config` with a gated block in front of every `cross_attn_every_n_layers`-th layer.

    Raises:
        ValueError: for a text model that does not hand images on to its layers.
    """
    text_type = config.text_config.model_type
    if text_type not in SUPPORTED_DECODERS:
        raise ValueError(
            f"text_config.model_type is {text_type!r}, a decoder that images cannot reach; use one of "
            f"{', '.join(sorted(SUPPORTED_DECODERS))}."
        )
    decoder_class = _DECODER_CLASSES.get(text_type)
    build = AutoModel.from_config if decoder_class is None else decoder_class._from_config
    requested = config.text_config._attn_implementation
    text_class = decoder_class or MODEL_MAPPING[type(config.text_config)]
    config.text_config._attn_implementation = attention_for(text_class, requested, "text_config")
    language_model = build(config.text_config)
    if config.lora_config is not None:
        # here: PEFT takes longer to import than all else, and a model without adapters runs without it
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(**config.lora_config), language_model)
        # what is trained is the trainer's choice, here as in any other model
        language_model.requires_grad_(True)
    layers = get_decoder_layers(language_model)
    for layer_idx, decoder_layer in enumerate(layers):
        gated = (layer_idx + 1) % config.cross_attn_every_n_layers == 0
        layers[layer_idx] = FlamingoDecoderLayer(
            decoder_layer, GatedCrossAttentionBlock(config, layer_idx) if gated else None
        )
    # the decoder's own plans name its layers as they were before they were wrapped
    prefix = f"{SUPPORTED_DECODERS[text_type]}.*."
    for plan in ("_tp_plan", "_pp_plan", "_ep_plan", "_fsdp_plan"):
        renamed = {
            key.replace(prefix, f"{prefix}decoder_layer.", 1) if key.startswith(prefix) else key: value
            for key, value in getattr(language_model, plan).items()
        }
        setattr(language_model, plan, renamed)
    return language_model


def reset_adapters(language_model: nn.Module) -> None:
    """Initial values of the LoRA layers that `config.lora_config` put into the language model."""
    from peft.tuners.lora import LoraLayer

    for module in language_model.modules():
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters("default", True)
