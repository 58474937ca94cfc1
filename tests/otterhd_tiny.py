"""A tiny OtterHD for tests: Fuyu's kind of tokenizer with one token per letter, random weights, real processing."""

import string

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import set_seed
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from otter_hf.models.otterhd import (
    OtterHDConfig,
    OtterHDForConditionalGeneration,
    OtterHDImageProcessor,
    OtterHDProcessor,
)


END_OF_TEXT = "|ENDOFTEXT|"


def tiny_tokenizer() -> TokenizersBackend:
    special = ["<unk>", "<s>", "</s>", "|SPEAKER|", END_OF_TEXT, "|NEWLINE|"]
    pieces = special + [str(number) for number in range(100)] + [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = [(piece, 0.0) for piece in pieces]
    vocabulary += [(letter, -5.0) for letter in string.ascii_letters + string.punctuation + "▁"]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, pieces.index(END_OF_TEXT))]
    )
    return TokenizersBackend(tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token="<unk>")


def tiny_processor(height: int = 60, width: int = 80, patch: int = 10) -> OtterHDProcessor:
    image_processor = OtterHDImageProcessor(
        size={"height": height, "width": width}, patch_size={"height": patch, "width": patch}
    )
    return OtterHDProcessor(image_processor, tiny_tokenizer())


def tiny_config(processor: OtterHDProcessor, **text_config) -> OtterHDConfig:
    return OtterHDConfig(
        patch_size=processor.image_processor.patch_size.height,
        image_token_id=processor.image_token_id,
        bos_token_id=processor.end_of_text_id,
        eos_token_id=processor.end_of_text_id,
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "rope_theta": 25000.0,
            **text_config,
        },
    )


def tiny_model(processor: OtterHDProcessor, **text_config) -> OtterHDForConditionalGeneration:
    """A model in evaluation mode whose weights are large enough for pictures to change what it says."""
    set_seed(0)
    model = OtterHDForConditionalGeneration(tiny_config(processor, **text_config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
