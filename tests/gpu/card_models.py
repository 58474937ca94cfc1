"""Tiny models with heads of 64, which every build of flash attention takes, and what tests on a card ask them."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

from otter_hf import (
    FlamingoForConditionalGeneration,
    FlamingoProcessor,
    OtterConfig,
    OtterForConditionalGeneration,
)
from otter_hf.models.mpt import OtterMptConfig
from otter_hf.prompts import chat_template
from otter_hf.testing import otter, otterhd, tiny


CARD = torch.device("cuda", 0)
FAMILIES = ["otter", "otter-mpt", "flamingo", "otterhd"]
COLOURS = ("red", "green", "blue", "yellow", "black")
PICTURES = [Image.new("RGB", (40, 30 + 4 * i), colour) for i, colour in enumerate(COLOURS)]
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
NAMES_OF_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
needs_flash = pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn")
needs_bits = pytest.mark.skipif(not is_bitsandbytes_available(), reason="needs bitsandbytes")


def make(family: str):
    """A tiny model on the CPU with heads of 64, as flash attention wants, and its processor."""
    if family == "otterhd":
        processor = otterhd.tiny_processor()
        text = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
        return otterhd.tiny_model(processor, **text), processor
    processor = otter.tiny_processor(FlamingoProcessor) if family == "flamingo" else otter.tiny_processor()
    if processor.chat_template is None:
        processor.chat_template = chat_template("plain")
    model_class = type(tiny("otter")[0]) if family != "flamingo" else FlamingoForConditionalGeneration
    config = otter.tiny_model(processor, model_class).config
    size = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
    vision = {**config.vision_config.to_dict(), **size}
    config.vision_config = CLIPVisionConfig(**{key: value for key, value in vision.items() if key != "model_type"})
    if family == "otter-mpt":
        text = {"d_model": 128, "n_heads": 2, "n_layers": 4, "expansion_ratio": 2, "max_seq_len": 2048}
        config.text_config = AutoConfig.for_model("otter_mpt", vocab_size=len(processor.tokenizer), **text)
    else:
        pad = processor.tokenizer.pad_token_id
        config.text_config = LlamaConfig(
            **size, num_hidden_layers=4, vocab_size=len(processor.tokenizer), pad_token_id=pad
        )
    config.cross_attn_head_dim = config.perceiver_head_dim = 64
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model, processor


def turn(question, *pictures, answer=None):
    media = [{"type": "image", "image": picture} for picture in pictures]
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


CONVERSATIONS = [
    turn("what is it?", PICTURES[0]),
    [*turn("first?", PICTURES[1], answer="green"), *turn("and the second of these two?", PICTURES[2])],
]
EXAMPLES = [*turn("what colour?", PICTURES[0], answer="red"), *turn("this one?", PICTURES[1], answer="it is green")]


def prepare(processor, conversations, side="left"):
    processor.tokenizer.padding_side = side
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


@torch.no_grad()
def logits_of(model, inputs, device=CARD) -> torch.Tensor:
    """Logits of real tokens, `(N, V)` float32 on the CPU."""
    moved = inputs.to(device, model.dtype)
    logits = model(**moved).logits.float().cpu()
    return logits[inputs["attention_mask"].bool().cpu()]


def distance(logits, expected) -> float:
    assert logits.isfinite().all()
    return float((logits - expected).norm() / expected.norm())


def answer_of(model, inputs, **settings) -> torch.Tensor:
    length = inputs["input_ids"].shape[1]
    return model.generate(**inputs, **{**GREEDY, **settings})[:, length:].cpu()


def write_base(family: str, folder: Path) -> None:
    """A model of width 128 with two heads of 64, and its processor."""
    torch.manual_seed(0)
    if family == "otterhd":
        processor = otterhd.tiny_processor()
        model = otterhd.tiny_model(processor, hidden_size=128, intermediate_size=256, num_attention_heads=2)
    else:
        processor = otter.tiny_processor()
        tokens = {"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id}
        size = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
        text = {
            "llama": lambda: LlamaConfig(num_hidden_layers=4, **size, **tokens),
            "mpt": lambda: OtterMptConfig(d_model=128, n_heads=2, n_layers=4, max_seq_len=2048, **tokens),
        }
        config = OtterConfig(
            vision_config=CLIPVisionConfig(image_size=28, patch_size=14, num_hidden_layers=2, **size),
            text_config=text[family](),
            cross_attn_every_n_layers=2,
            cross_attn_num_heads=2,
            cross_attn_head_dim=64,
            cross_attn_gate_init=1.0,
            perceiver_depth=1,
            perceiver_num_latents=8,
            perceiver_num_heads=2,
            perceiver_head_dim=64,
            image_token_id=processor.image_token_id,
            end_of_chunk_token_id=processor.end_of_chunk_token_id,
            answer_token_id=processor.answer_token_id,
            initializer_range=0.05,
        )
        model = OtterForConditionalGeneration(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
