"""Storage in 4 bits: one configuration for training, chat, serving and evaluation, and weights that stay."""

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from ..extras import missing


# what is not the decoder keeps its precision: it is small, and gates and resampler may be trained
WHOLE_MODULES = [
    "lm_head",
    "vision_tower",
    "vision_model",  # of Idefics
    "vision_embed_tokens",
    "perceiver",
    "gated_cross_attn_layer",
]


def quantization_config() -> BitsAndBytesConfig:
    """
    QLoRA's storage of the decoder's weights (https://huggingface.co/papers/2305.14314): 4-bit NormalFloat with
    quantised scales, computed in bfloat16.

    Raises:
        ValueError: where bitsandbytes is not installed.
    """
    if not is_bitsandbytes_available():
        raise ValueError(missing("load_in_4bit", "qlora"))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        # compared with full names from their start
        llm_int8_skip_modules=[rf"(?:.*\.)?{name}" for name in WHOLE_MODULES],
    )


def keep_stored_weights(model: nn.Module) -> None:
    """
    Switches off, in place, what bitsandbytes does to 4-bit layers on CPUs with AVX512-BF16.

    At the first forward pass in evaluation mode it repacks a layer's weights for a bfloat16 kernel and rounds their
    scales, for good: what is merged, saved or trained on afterwards is another model (bitsandbytes 0.50.2).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
