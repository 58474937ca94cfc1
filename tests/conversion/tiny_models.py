"""Small random models in folders, and what tests compare of them."""

import torch
from transformers import CLIPImageProcessorPil

from otter_hf import (
    FlamingoConfig,
    FlamingoForConditionalGeneration,
    FlamingoProcessor,
    OtterConfig,
    OtterForConditionalGeneration,
    OtterProcessor,
)
from otter_hf.conversion.tensors import open_checkpoint
from otter_hf.testing.otter import build_tokenizer


VISION = {"hidden_size": 32, "image_size": 28, "intermediate_size": 64, "num_attention_heads": 2}
VISION |= {"model_type": "clip_vision_model", "num_hidden_layers": 1, "patch_size": 14, "hidden_act": "quick_gelu"}
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
LLAMA |= {"num_hidden_layers": 2}
MPT = {"model_type": "otter_mpt", "d_model": 32, "n_heads": 2, "n_layers": 2}
FALCON = {"model_type": "falcon", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
TEXT_CONFIGS = {"llama": LLAMA, "mpt": MPT, "mosaic_gpt": MPT | {"qk_ln": True}, "falcon": FALCON}


def save_model(folder, model_type="otter", text_config=LLAMA, rows=0, seed=0, vision_config=None):
    """A random model of the original shape with its processor; `rows` is the size of its vocabulary, if not tight."""
    processor_class = {"otter": OtterProcessor, "flamingo": FlamingoProcessor}[model_type]
    tokenizer = processor_class.prepare_tokenizer(build_tokenizer())
    size = {"height": 28, "width": 28}
    processor = processor_class(CLIPImageProcessorPil(size=size, crop_size=size), tokenizer)
    vocabulary = tokenizer.get_vocab()
    torch.manual_seed(seed)
    config_class, model_class = {
        "otter": (OtterConfig, OtterForConditionalGeneration),
        "flamingo": (FlamingoConfig, FlamingoForConditionalGeneration),
    }[model_type]
    config = config_class(
        vision_config=vision_config or VISION,
        text_config=text_config | {"vocab_size": rows or len(tokenizer)},
        cross_attn_every_n_layers=2,
        cross_attn_gate_init=0.5,
        image_token_id=vocabulary["<image>"],
        end_of_chunk_token_id=vocabulary["<|endofchunk|>"],
        answer_token_id=vocabulary.get("<answer>"),
        pad_token_id=tokenizer.pad_token_id,
        tokenizer_vocab_size=len(tokenizer),
        initializer_range=0.2,
    )
    model = model_class(config).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def tensors_of(folder):
    return {name: tensor.load() for name, tensor in open_checkpoint(folder).items()}


def assert_equal_tensors(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def logits(model):
    torch.manual_seed(1)
    input_ids = torch.tensor([[5, model.config.image_token_id, 7, 8, 9]])
    with torch.no_grad():
        return model(input_ids=input_ids, pixel_values=torch.randn(1, 3, 28, 28)).logits
