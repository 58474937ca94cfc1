"""Cross-attention of text to images: grouped by the image each token sees, beside a dense mask over all images.

    OMP_NUM_THREADS=2 python benchmarks/cross_attention.py      # about two minutes on two cores

One row of 512 tokens, 64 latents per image, 8 heads of 64, float32; the images are spread evenly or at random, and 8
tokens come before the first. Both sides get the same queries, keys and values, and their outputs are compared first.
The timed part is what runs in every gated layer: ours attends segment by segment, as the model does on a CPU; the peer
runs torch's scaled_dot_product_attention with a boolean mask over all images. Grouping and mask are made once per
forward pass, for all layers; they are timed in rows of their own. The last rows time the blocks that the model takes
in a compiled graph, and on CUDA without flash attention.
"""

import argparse

import torch
from _common import compare, report
from torch.nn.functional import scaled_dot_product_attention

from otter_hf.models.media_attention import make_media_blocks, make_media_segments, running_media_index
from otter_hf.models.varlen_attention import varlen_sdpa_attention_forward


LENGTH, LATENTS, HEADS, WIDTH = 512, 64, 8, 512


def heads(states: torch.Tensor) -> torch.Tensor:
    return states.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def dense_mask(media_index: torch.Tensor, num_media: int) -> torch.Tensor:
    of_latent = torch.arange(num_media).repeat_interleave(LATENTS) + 1
    # a token without image would be nan: let it look at the first, its output is set to 0
    return media_index.clamp(min=1)[:, None, :, None] == of_latent


def dense(query, key_value, mask, visible):
    key, value = key_value.flatten(1, 2).chunk(2, dim=-1)
    output = scaled_dot_product_attention(heads(query), heads(key), heads(value), attn_mask=mask)
    return output.transpose(1, 2).flatten(2) * visible


def make_groups(media_index, num_media: int, kind: str):
    if kind == "blocks" or num_media == 1:
        return make_media_blocks(media_index, num_media)
    return make_media_segments(media_index, num_media, LATENTS)


def grouped(query, key_value, groups):
    key, value = groups.gather_media(key_value).chunk(2, dim=-1)
    states = heads(groups.gather_tokens(query)), heads(key), heads(value)
    output, _ = varlen_sdpa_attention_forward(None, *states, None, is_causal=False, **groups.flash_kwargs)
    return groups.scatter_tokens(output.flatten(2))


def rows_for(num_media: int, batch_size: int, spread: str, kind: str, repeats: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    is_media = torch.zeros(batch_size, LENGTH, dtype=torch.bool)
    for row in is_media:
        at = torch.arange(num_media) * ((LENGTH - 8) // num_media)
        if spread == "at random":
            at[1:] = torch.randperm(LENGTH - 9, generator=generator)[: num_media - 1] + 1
        row[8 + at] = True
    media_index = running_media_index(is_media)
    query = torch.randn(batch_size, LENGTH, WIDTH, generator=generator, requires_grad=True)
    key_value = torch.randn(batch_size, num_media, LATENTS, 2 * WIDTH, generator=generator, requires_grad=True)
    gradient = torch.randn(batch_size, LENGTH, WIDTH, generator=generator)
    mask, visible = dense_mask(media_index, num_media), (media_index > 0)[..., None]
    groups = make_groups(media_index, num_media, kind)

    def both(output):
        return output, *torch.autograd.grad(output, (query, key_value), gradient)

    def ours():
        return both(grouped(query, key_value, groups))

    def peer():
        return both(dense(query, key_value, mask, visible))

    difference = max((a - b).abs().max().item() for a, b in zip(ours(), peer(), strict=True))
    extra = {"images": num_media, "batch_size": batch_size, "grouping": kind, "max_difference": difference}

    def forward(function, *args):
        with torch.no_grad():
            function(*args)

    name = f"{batch_size} x {LENGTH} tokens, {num_media} images {spread}, {kind}"
    return [
        compare(f"forward, {name}", lambda: forward(grouped, query, key_value, groups),
                lambda: forward(dense, query, key_value, mask, visible), repeats, **extra),
        compare(f"forward and backward, {name}", ours, peer, repeats, **extra),
        compare(f"grouping or mask, {name}", lambda: make_groups(media_index, num_media, kind),
                lambda: dense_mask(media_index, num_media), repeats, **extra),
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    rows = []
    for batch_size, spread in ((1, "evenly"), (1, "at random"), (4, "at random")):
        for num_media in (1, 2, 4, 8, 16):
            rows += rows_for(num_media, batch_size, spread, "segments", repeats)
    for spread in ("evenly", "at random"):
        rows += rows_for(16, 1, spread, "blocks", repeats)
    report("cross_attention", "scaled_dot_product_attention with a dense boolean mask", rows)


if __name__ == "__main__":
    main()
