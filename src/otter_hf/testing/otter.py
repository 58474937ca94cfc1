"""A tiny Otter or Flamingo: one token per byte, pictures of 28x28, two of four layers gated."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from ..models import OtterForConditionalGeneration, OtterProcessor


def byte_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """One token per byte, so that a text has as many as one can count; `special_tokens` as `bos_token="<s>"`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A `byte_tokenizer` with `<s>` in front as Llama has it."""
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def tiny_processor(processor_class=OtterProcessor):
    """An Otter's or Flamingo's processor of 28x28 pictures with a byte tokenizer."""
    image_processor = CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False)
    return processor_class(image_processor, processor_class.prepare_tokenizer(build_tokenizer()))


def tiny_model(processor, model_class=OtterForConditionalGeneration):
    """A random Otter or Flamingo with open gates, in evaluation mode, for a processor of its kind."""
    torch.manual_seed(0)
    config = model_class.config_class(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            image_size=28,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=1,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=4,
            vocab_size=len(processor.tokenizer),
            pad_token_id=processor.tokenizer.pad_token_id,
        ),
        cross_attn_every_n_layers=2,
        cross_attn_num_heads=2,
        cross_attn_head_dim=16,
        cross_attn_gate_init=1.0,
        perceiver_depth=1,
        perceiver_num_latents=4,
        perceiver_num_heads=2,
        perceiver_head_dim=16,
        image_token_id=processor.image_token_id,
        end_of_chunk_token_id=processor.end_of_chunk_token_id,
        answer_token_id=getattr(processor, "answer_token_id", None),
        initializer_range=0.2,
    )
    return model_class(config).eval()
