"""Tiny random Flamingos and inputs for the model tests: 4 layers of width 32, two of them gated, open gates."""

import torch
from transformers import AutoConfig

import otter_hf.models.mpt  # noqa: F401  registers otter_mpt
from otter_hf import FlamingoConfig, FlamingoForConditionalGeneration


VOCAB, IMAGE, END, PAD = 99, 97, 98, 0
SIZE = 16  # pixels, 4 patches of 8

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# what each decoder's configuration wants beyond, or in place of, SMALL
DECODERS = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "gpt_neox": {"rotary_pct": 0.5},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0},
    "falcon": {"multi_query": True, "parallel_attn": True, "bias": False, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "tie_word_embeddings": True},
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo2": {},
    "phi3": {},
    "stablelm": {},
    "otter_mpt": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 4,
        "expansion_ratio": 2,
        "max_seq_len": 256,
        "tie_word_embeddings": True,
    },
}


def tiny_config(decoder="llama", text=None, vision=None, **kwargs) -> FlamingoConfig:
    """`text` and `vision` change single fields of the inner configurations, `kwargs` those of the outer one."""
    small = {"vocab_size": VOCAB} if decoder == "otter_mpt" else SMALL
    text_config = AutoConfig.for_model(decoder, **{**small, **DECODERS[decoder], **(text or {})})
    vision_config = {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 8,
        **(vision or {}),
    }
    settings = {
        "cross_attn_every_n_layers": 2,
        "cross_attn_num_heads": 2,
        "cross_attn_head_dim": 8,
        "cross_attn_ff_mult": 2,
        "cross_attn_gate_init": 1.0,
        "perceiver_depth": 2,
        "perceiver_num_latents": 3,
        "perceiver_num_heads": 2,
        "perceiver_head_dim": 8,
        "perceiver_ff_mult": 2,
        "image_token_id": IMAGE,
        "end_of_chunk_token_id": END,
    }
    return FlamingoConfig(text_config=text_config, vision_config=vision_config, **{**settings, **kwargs})


def tiny_model(decoder="llama", seed=0, **kwargs) -> FlamingoForConditionalGeneration:
    """A random model in eval mode whose weights are large enough for every part to matter to the logits."""
    torch.manual_seed(seed)
    model = FlamingoForConditionalGeneration(tiny_config(decoder, **kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


def row(*images_at, length=12, seed=0) -> torch.Tensor:
    """`(1, length)` random text with `<image>` at the given places."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE, (1, length), generator=generator)
    ids[:, list(images_at)] = IMAGE
    return ids


def images(num_rows=1, num_media=1, frames=1, seed=0) -> torch.Tensor:
    """`(B, T, F, 3, SIZE, SIZE)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_media, frames, 3, SIZE, SIZE, generator=generator)


def pad_rows(rows, side) -> tuple[torch.Tensor, torch.Tensor]:
    """`(1, L_i)` rows -> `input_ids (B, L)` and `attention_mask (B, L)`."""
    length = max(r.shape[1] for r in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(ids)
    for i, r in enumerate(rows):
        where = slice(length - r.shape[1], None) if side == "left" else slice(0, r.shape[1])
        ids[i, where], mask[i, where] = r[0], 1
    return ids, mask


# no end of sequence, so that every run is as long as asked for
GREEDY = {"do_sample": False, "eos_token_id": -1, "pad_token_id": PAD}


def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
