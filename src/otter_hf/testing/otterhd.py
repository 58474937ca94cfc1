"""A tiny OtterHD: a tokenizer of Fuyu's kind with one token per letter, pictures of at most 60x80 in patches of 10."""

import string

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from ..models import OtterHDConfig, OtterHDForConditionalGeneration, OtterHDImageProcessor, OtterHDProcessor


END_OF_TEXT = "|ENDOFTEXT|"


def tiny_tokenizer() -> TokenizersBackend:
    """Numbers below 100, bytes, letters and marks, as Fuyu's tokenizer writes them."""
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
    """A processor whose pictures fit into `height` x `width` pixels, in square patches of `patch`."""
    image_processor = OtterHDImageProcessor(
        size={"height": height, "width": width}, patch_size={"height": patch, "width": patch}
    )
    return OtterHDProcessor(image_processor, tiny_tokenizer())


def tiny_config(processor: OtterHDProcessor, **text_config) -> OtterHDConfig:
    """Two layers of width 32; `text_config` changes single fields of the text model's configuration."""
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
            "max_position_embeddings": 2048,
            "rope_theta": 25000.0,
            **text_config,
        },
    )


def tiny_model(processor: OtterHDProcessor, **text_config) -> OtterHDForConditionalGeneration:
    """A model in evaluation mode whose weights are large enough for pictures to change what it says."""
    torch.manual_seed(0)
    model = OtterHDForConditionalGeneration(tiny_config(processor, **text_config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
