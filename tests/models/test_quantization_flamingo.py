"""bitsandbytes: accepted as for any model of transformers, and every linear layer but the head takes it."""

import importlib.util

import pytest
import torch
from tiny_flamingo import images, row, tiny_model
from transformers import BitsAndBytesConfig

from otter_hf import FlamingoForConditionalGeneration


HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
CONFIGS = {
    "8 bits": {"load_in_8bit": True},
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}
# bitsandbytes' kernels want multiples of 64
SIZES = {
    "vision": {"hidden_size": 64, "intermediate_size": 128},
    "cross_attn_head_dim": 64,
    "perceiver_head_dim": 64,
}
TEXT = {"llama": {"hidden_size": 128, "intermediate_size": 256}, "otter_mpt": {"d_model": 128}}


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
@pytest.mark.parametrize("bits", CONFIGS)
def test_without_the_package_transformers_says_what_to_install(tmp_path, bits):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="requires bitsandbytes: `pip install -U bitsandbytes"):
        FlamingoForConditionalGeneration.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(**CONFIGS[bits])
        )


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
@torch.no_grad()
@pytest.mark.parametrize("decoder", TEXT)
@pytest.mark.parametrize("bits, agreement", [("8 bits", 0.99), ("4 bits", 0.85)])
def test_quantized_while_loading(tmp_path, decoder, bits, agreement):
    model = tiny_model(decoder, text=TEXT[decoder], **SIZES)
    model.save_pretrained(tmp_path)
    quantized = FlamingoForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**CONFIGS[bits]), device_map={"": "cpu"}
    )
    plain = [name for name, module in quantized.named_modules() if type(module) is torch.nn.Linear]
    assert plain == ["lm_head"]
    inputs = {"input_ids": row(1, 5), "pixel_values": images(1, 2)}
    logits = torch.stack([m(**inputs).logits.float().flatten() for m in (quantized, model)])
    assert torch.corrcoef(logits)[0, 1] > agreement
    assert quantized.generate(**inputs, max_new_tokens=4, min_new_tokens=4, pad_token_id=0).shape == (1, 16)
