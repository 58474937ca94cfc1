"""
A small Otter with random weights, and a tokenizer trained on the questions it will be asked.

    python examples/easy_vqa/build_tiny_otter.py --data out/demo/data --output out/demo/untrained

Its parts are those of any Otter: a vision tower of transformers (here a small ResNet), the perceiver resampler, gated
cross-attention in front of the layers of a decoder of transformers (here a small Llama).
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, LlamaConfig, PreTrainedTokenizerFast, ResNetConfig

from otter_hf import OtterConfig, OtterForConditionalGeneration, OtterProcessor
from otter_hf.data import chat_template, render


IMAGE_SIZE = 64


def main(data: Path, output: Path) -> None:
    """Writes the model folder `output` for the MIMIC-IT files in the folder `data`."""
    records = json.loads((data / "train_instructions.json").read_text(encoding="utf-8"))["data"].values()
    tokenizer = train_tokenizer([render([(record["instruction"], record["answer"])]) for record in records])
    processor = OtterProcessor(
        CLIPImageProcessorPil(
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            do_center_crop=False,
            image_mean=[0.5] * 3,
            image_std=[0.25] * 3,
        ),
        OtterProcessor.prepare_tokenizer(tokenizer),
        chat_template=chat_template("simple"),
    )
    processor.save_pretrained(output)
    torch.manual_seed(0)
    OtterForConditionalGeneration(config_for(processor)).save_pretrained(output)


def train_tokenizer(
    texts: list[str], processor_class=OtterProcessor, vocab_size: int = 512
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every frequent word is one token, with the special tokens of a processor."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        special_tokens=["<s>", "</s>", *processor_class.special_tokens],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    backend_of = tokenizer.backend_tokenizer
    backend_of.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def config_for(processor: OtterProcessor, config_class=OtterConfig) -> OtterConfig:
    """A model of 1.2 million parameters; a Flamingo's processor and configuration make it a Flamingo."""
    tokenizer = processor.tokenizer
    return config_class(
        vision_config=ResNetConfig(
            embedding_size=32,
            hidden_sizes=[64, 128],
            depths=[1, 1],
            layer_type="basic",
            downsample_in_first_stage=False,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        perceiver_depth=1,
        perceiver_num_latents=8,
        perceiver_num_heads=4,
        perceiver_head_dim=32,
        cross_attn_every_n_layers=1,
        cross_attn_num_heads=4,
        cross_attn_head_dim=32,
        # closed gates would keep a pretrained decoder as it is; this one has nothing to keep
        cross_attn_gate_init=1.0,
        initializer_range=0.05,
        image_token_id=processor.image_token_id,
        end_of_chunk_token_id=processor.end_of_chunk_token_id,
        answer_token_id=getattr(processor, "answer_token_id", None),
        bos_token_id=tokenizer.bos_token_id,
        # an answer ends with <|endofchunk|>, a text with </s>
        eos_token_id=[tokenizer.eos_token_id, processor.end_of_chunk_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("out/demo/data"))
    parser.add_argument("--output", type=Path, default=Path("out/demo/untrained"))
    arguments = parser.parse_args()
    main(arguments.data, arguments.output)
