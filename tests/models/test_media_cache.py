"""Caches that hold images: continuing, reordering, cropping."""

import copy

import pytest
import torch
from tiny_flamingo import IMAGE, assert_close, images, pad_rows, row, tiny_config, tiny_model
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from otter_hf.models.media_cache import MediaCacheMixin, with_media


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def new_cache(kind):
    config = tiny_config().text_config
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=32)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("cuts", [[6], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [3, 9]])
def test_in_pieces_equals_at_once(model, kind, cuts):
    """Rows with different numbers of images, in pieces with different numbers of new images (also none at all)."""
    ids = torch.cat([row(1, 4, 8), row(7, seed=1), row(seed=2)])
    pixels = images(3, 3)
    expected = model(input_ids=ids, pixel_values=pixels).logits
    cache, logits, start = new_cache(kind), [], 0
    for end in [*cuts, 12]:
        is_media = ids[:, start:end] == IMAGE
        done = (ids[:, :start] == IMAGE).sum(1)
        num_new = int(is_media.sum(1).max())
        new = None
        if num_new:
            new = torch.zeros(3, num_new, *pixels.shape[2:])
            for i in range(3):
                mine = pixels[i, done[i] : done[i] + is_media[i].sum()]
                new[i, : len(mine)] = mine
        output = model(input_ids=ids[:, start:end], pixel_values=new, past_key_values=cache)
        assert output.past_key_values is cache
        logits.append(output.logits)
        start = end
    assert_close(torch.cat(logits, dim=1), expected)


@torch.no_grad()
def test_explicit_index_that_looks_back(model):
    """The last token looks at the first of two images; a third image still comes third."""
    ids = row(1, 4, 8)
    media_index = torch.tensor([[0, 1, 1, 1, 2, 2, 1, 1, 3, 3, 2, 2]])
    pixels = images(1, 3)
    expected = model(input_ids=ids, pixel_values=pixels, media_index=media_index).logits
    for kind in ("dynamic", "static"):
        cache = new_cache(kind)
        first = model(
            input_ids=ids[:, :7], pixel_values=pixels[:, :2], media_index=media_index[:, :7], past_key_values=cache
        )
        assert cache.media_seen.tolist() == [2] and cache.media_in_view.tolist() == [1]
        # without an index the next tokens look where the last one looked, until a new image comes
        second = model(input_ids=ids[:, 7:9], pixel_values=pixels[:, 2:], past_key_values=cache)
        third = model(input_ids=ids[:, 9:], media_index=media_index[:, 9:], past_key_values=cache)
        assert_close(torch.cat([first.logits, second.logits, third.logits], dim=1), expected)


@torch.no_grad()
def test_reorder_select_repeat(model):
    ids = torch.cat([row(1, 4), row(2, seed=1), row(5, seed=2)])
    pixels = images(3, 2)
    next_ids = torch.tensor([[5], [6], [7]])

    def cached(rows=slice(None)):
        cache = new_cache("dynamic")
        model(input_ids=ids[rows], pixel_values=pixels[rows], past_key_values=cache)
        return cache

    def step(cache, tokens):
        return model(input_ids=tokens, past_key_values=cache).logits

    order = torch.tensor([2, 0, 0])
    reordered = cached()
    reordered.reorder_cache(order)
    assert_close(step(reordered, next_ids), step(cached(order), next_ids))

    selected = cached()
    selected.batch_select_indices(torch.tensor([1]))
    assert_close(step(selected, next_ids[:1]), step(cached(slice(1, 2)), next_ids[:1]))

    repeated = cached(slice(0, 1))
    repeated.batch_repeat_interleave(3)
    assert_close(step(repeated, next_ids), step(cached(torch.tensor([0, 0, 0])), next_ids))


@torch.no_grad()
def test_crop_takes_images_back(model):
    ids, pixels = row(1, 8), images(1, 2)
    cache = new_cache("dynamic")
    model(input_ids=ids, pixel_values=pixels, past_key_values=cache)
    cache.crop(-6)
    assert cache.media_seen.tolist() == [1]
    # another second image in place of the one taken back
    other = images(1, 1, seed=5)
    logits = model(input_ids=ids[:, 6:], pixel_values=other, past_key_values=cache).logits
    expected = model(input_ids=ids, pixel_values=torch.cat([pixels[:, :1], other], dim=1)).logits[:, 6:]
    assert_close(logits, expected)

    cache.crop(-12)
    assert cache.media_seen is None and cache.num_media == 0


@torch.no_grad()
def test_reset_and_reuse(model):
    for kind in ("dynamic", "static"):
        cache = new_cache(kind)
        model(input_ids=row(1), pixel_values=images(), past_key_values=cache)
        cache.reset() if kind == "static" else cache.crop(-12)
        logits = model(input_ids=row(2), pixel_values=images(seed=3), past_key_values=cache).logits
        assert_close(logits, model(input_ids=row(2), pixel_values=images(seed=3)).logits)


@torch.no_grad()
def test_a_copied_cache_is_independent(model):
    cache = new_cache("dynamic")
    model(input_ids=row(1), pixel_values=images(), past_key_values=cache)
    branch = copy.deepcopy(cache)
    first = model(input_ids=row(0, length=3), pixel_values=images(seed=1), past_key_values=branch).logits
    again = model(input_ids=row(0, length=3), pixel_values=images(seed=1), past_key_values=cache).logits
    assert_close(first, again)


@torch.no_grad()
def test_left_padded_chat_goes_on(model):
    first = [row(0, 2, length=7), row(1, length=4, seed=1)]
    second = [row(0, length=3, seed=2), row(length=3, seed=3)]
    ids, mask = pad_rows(first, "left")
    pixels = images(2, 3)
    cache = new_cache("dynamic")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        pixel_values=pixels[:, :2],
        past_key_values=cache,
    )
    more = torch.cat(second)
    full_mask = torch.cat([mask, torch.ones_like(more)], dim=1)
    logits = model(
        input_ids=more,
        attention_mask=full_mask,
        position_ids=(full_mask.cumsum(1) - 1)[:, -3:],
        pixel_values=pixels[:, 2:],
        past_key_values=cache,
    ).logits
    for i, images_of_row in enumerate([pixels[:1], pixels[1:, :1]]):
        alone = model(input_ids=torch.cat([first[i], second[i]], dim=1), pixel_values=images_of_row).logits
        assert_close(logits[i : i + 1], alone[:, -3:])


def test_the_cache_keeps_its_identity_and_unknown_ones_are_refused():
    cache = new_cache("dynamic")
    assert with_media(cache) is cache and isinstance(cache, MediaCacheMixin) and isinstance(cache, DynamicCache)
    with pytest.raises(TypeError, match="EncoderDecoderCache, which cannot hold images; use one of DynamicCache"):
        with_media(EncoderDecoderCache(new_cache("dynamic"), new_cache("dynamic")))
