"""Grouped cross-attention against the dense mask it replaces."""

import pytest
import torch

from otter_hf.models.media_attention import (
    batch_first_media,
    make_media_blocks,
    make_media_segments,
    running_media_index,
)
from otter_hf.models.varlen_attention import varlen_sdpa_attention_forward


def dense(query, key_value, media_index):
    """The reference: every token over all latents of its row, all but those of its image masked out."""
    num_media, num_latents = key_value.shape[1:3]
    key, value = key_value.flatten(1, 2).chunk(2, dim=-1)  # (B, T*n, D)
    of_latent = torch.arange(num_media).repeat_interleave(num_latents) + 1  # (T*n,)
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(media_index[..., None] != of_latent, -1e30)
    return (scores.softmax(dim=-1) @ value) * (media_index > 0)[..., None]


def in_blocks(query, key_value, media_index):
    blocks = make_media_blocks(media_index, key_value.shape[1])
    key, value = blocks.gather_media(key_value).chunk(2, dim=-1)  # (N, n, D)
    weights = (blocks.gather_tokens(query) @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
    return blocks.scatter_tokens(weights @ value)


def in_segments(query, key_value, media_index):
    segments = make_media_segments(media_index, *key_value.shape[1:3])
    key, value = segments.gather_media(key_value).chunk(2, dim=-1)  # (1, N*n, D)
    states = (s[:, None] for s in (segments.gather_tokens(query), key, value))  # (1, 1, ., D)
    output, _ = varlen_sdpa_attention_forward(None, *states, None, is_causal=False, **segments.flash_kwargs)
    return segments.scatter_tokens(output.flatten(2))


def cases():
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, 1, 1), (2, 7, 1), (3, 1, 5), (2, 33, 2), (1, 129, 16), (2, 300, 7), (2, 5, 40)]
    for batch, length, num_media in sizes:
        index = torch.randint(0, num_media + 1, (batch, length), generator=generator)
        yield pytest.param(index, num_media, id=f"{batch}x{length}x{num_media}-any")
        yield pytest.param(index.sort(dim=1).values, num_media, id=f"{batch}x{length}x{num_media}-rising")
    yield pytest.param(torch.zeros(2, 20, dtype=torch.long), 3, id="none")
    yield pytest.param(torch.full((2, 70), 3), 3, id="all-last")
    yield pytest.param(torch.tensor([[4] * 65 + [1] * 64 + [0]]), 4, id="falling")


@pytest.mark.parametrize("grouped", [in_blocks, in_segments])
@pytest.mark.parametrize("media_index, num_media", list(cases()))
def test_equals_the_dense_mask_forward_and_backward(media_index, num_media, grouped):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(*media_index.shape, 8, generator=generator, requires_grad=True)
    key_value = torch.randn(media_index.shape[0], num_media, 3, 16, generator=generator, requires_grad=True)
    weight = torch.randn(*media_index.shape, 8, generator=generator)
    results = []
    for attend in (dense, grouped):
        output = attend(query, key_value, media_index)
        results.append((output, *torch.autograd.grad((output * weight).sum(), (query, key_value))))
    for reference, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("grouped", [in_blocks, in_segments])
def test_an_image_nobody_sees_may_hold_nan(grouped):
    key_value = torch.randn(1, 3, 2, 16)
    key_value[:, 1] = torch.nan
    media_index = torch.tensor([[0, 1, 1, 3, 3, 1]])
    assert grouped(torch.randn(1, 6, 8), key_value, media_index).isfinite().all()


def test_work_does_not_grow_with_the_number_of_images():
    slots = []
    for num_media in (2, 32):
        is_media = torch.zeros(1, 2048, dtype=torch.bool)
        is_media[:, : num_media * 20 : 20] = True  # the last segment is the longest by far
        media_index = running_media_index(is_media)
        slots.append(make_media_blocks(media_index, num_media).token_of_slot.numel())
    assert slots[1] < 1.6 * 2048 and slots[0] < 1.6 * 2048


def test_segments_in_order_copy_nothing():
    media_index = running_media_index(torch.arange(512)[None].expand(2, -1) % 32 == 0)
    segments = make_media_segments(media_index, 16, 4)
    key_value, query = torch.zeros(2, 16, 4, 6), torch.zeros(2, 512, 3)
    assert segments.gather_media(key_value).data_ptr() == key_value.data_ptr()
    assert segments.gather_tokens(query).data_ptr() == query.data_ptr()
    assert segments.flash_kwargs["cu_seq_lens_q"].tolist() == list(range(0, 1025, 32))
    assert segments.flash_kwargs["cu_seq_lens_k"].tolist() == list(range(0, 129, 4))


def test_images_nobody_sees_are_empty_segments():
    segments = make_media_segments(torch.tensor([[0, 2, 2], [0, 0, 0]]), 3, 4)
    # the first of a row takes what sees nothing
    assert segments.flash_kwargs["cu_seq_lens_q"].tolist() == [0, 1, 3, 3, 6, 6, 6]
    assert segments.seen.tolist() == [True, True, False, True, False, False]
    media = torch.full((2, 3, 4, 1), torch.nan)
    assert not segments.gather_media(media.requires_grad_())[0].view(6, 4)[~segments.seen].any()
    # without gradients nothing reads them, and nothing is copied
    assert segments.gather_media(media.detach()).data_ptr() == media.data_ptr()


@pytest.mark.slow
def test_a_compiled_graph_has_one_shape_for_all_values():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(in_blocks, fullgraph=True, backend=backend, dynamic=False)
    query, key_value = torch.randn(1, 8, 8), torch.randn(1, 4, 3, 16)
    for media_index in ([[0, 1, 1, 2, 4, 3, 3, 3]], [[1] * 8], [[4, 3, 2, 1] * 2]):
        media_index = torch.tensor(media_index)
        expected = dense(query, key_value, media_index)
        torch.testing.assert_close(compiled(query, key_value, media_index), expected, atol=1e-5, rtol=0)
    assert len(graphs) == 1


def test_running_index_counts_images_and_goes_on_from_a_cache():
    is_media = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    assert running_media_index(is_media).tolist() == [[0, 1, 1, 2, 2], [0] * 5]
    # the first row has three images and last looked at the second of them
    seen, in_view = torch.tensor([3, 1]), torch.tensor([2, 1])
    assert running_media_index(is_media, seen, in_view).tolist() == [[2, 4, 4, 5, 5], [1] * 5]


def test_layouts_of_pixel_values():
    assert batch_first_media(torch.zeros(2, 3, 4, 4), 2).shape == (2, 1, 1, 3, 4, 4)
    assert batch_first_media(torch.zeros(2, 5, 3, 4, 4), 2).shape == (2, 5, 1, 3, 4, 4)
    assert batch_first_media(torch.zeros(2, 5, 7, 3, 4, 4), 2).shape == (2, 5, 7, 3, 4, 4)
    for wrong in (torch.zeros(3, 4, 4), torch.zeros(3, 1, 1, 3, 4, 4)):
        with pytest.raises(ValueError, match="pixel_values has shape .* B = 2"):
            batch_first_media(wrong, 2)
