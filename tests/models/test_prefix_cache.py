"""What prompts begin with, computed once: the same answers as from whole prompts."""

import pytest
import torch
from PIL import Image
from tiny_flamingo import GREEDY, IMAGE, assert_close, images, pad_rows, row, tiny_model

from otter_hf.models.prefix_cache import branch, compute_prefix, crop, expand, forget_media_behind, shared_length
from otter_hf.testing.otterhd import tiny_model as tiny_otterhd
from otter_hf.testing.otterhd import tiny_processor


PREFIX = row(1, 5, length=9)
# the second, padded by six, begins in the middle of the cached columns
ROWS = [torch.cat([PREFIX, end], dim=1) for end in (row(1, length=8, seed=1), row(length=2, seed=2), row(0, length=3))]
COUNTS = [3, 2, 3]


def flamingo_batch() -> dict[str, torch.Tensor]:
    ids, mask = pad_rows(ROWS, "left")
    pixels = torch.cat([images(num_media=2).expand(3, -1, -1, -1, -1, -1), images(3, seed=1)], dim=1)
    there = torch.tensor([[[int(i < count)] for i in range(3)] for count in COUNTS])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "pixel_attention_mask": there}


@pytest.mark.parametrize("decoder", ["llama", "otter_mpt", "gemma3_text", "opt", "falcon"])
def test_a_batch_goes_on_from_its_prefix(decoder):
    """RoPE, ALiBi, a sliding window of 8, learned positions; pixels or latents."""
    model, inputs = tiny_model(decoder), flamingo_batch()
    padding = [(mask == 0).sum().item() for mask in inputs["attention_mask"]]
    assert padding == [0, 6, 5]
    with torch.no_grad():
        pixels = inputs["pixel_values"].flatten(0, 1)
        latents = model.get_image_features(pixels).pooler_output.unflatten(0, (3, 3))
        given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        given["image_hidden_states"] = latents
        prefix = compute_prefix(model, {name: values[:1] for name, values in inputs.items()}, 9)
        assert prefix.get_seq_length() == 9 and prefix.num_media == 2
        for batch in (inputs, given):
            for beams in (1, 3):
                options = {**GREEDY, "max_new_tokens": 4, "num_beams": beams}
                expected = model.generate(**inputs, **options)
                cache = expand(prefix, [width for width in padding for _ in range(beams)])
                assert torch.equal(model.generate(**batch, past_key_values=cache, **options), expected)
        # beams that part from one reading of the prompt
        forget_media_behind(cache := expand(prefix, padding))
        whole = compute_prefix(model, given, given["input_ids"].shape[1] - 1, cache)
        forget_media_behind(whole)
        assert whole.num_media == 1
        branches = branch(whole, 3, room=2)
        texts = {name: given[name] for name in ("input_ids", "attention_mask")}
        assert torch.equal(model.generate(**texts, past_key_values=branches, **options), expected)
    assert prefix.get_seq_length() == 9  # nobody has changed it
    assert crop(prefix, 4).media_seen.tolist() == [1]


def test_logits_are_those_of_whole_rows():
    model, inputs = tiny_model(), flamingo_batch()
    alone = {"input_ids": ROWS[2], "pixel_values": inputs["pixel_values"][2:]}
    with torch.no_grad():
        cache = compute_prefix(model, alone, 9)
        expected = model(**alone).logits[0, 9:]
        rest = model(
            input_ids=ROWS[2][:, 9:].expand(2, -1),
            pixel_values=inputs["pixel_values"][2:, 2:].expand(2, -1, -1, -1, -1, -1),
            past_key_values=expand(cache, [0, 0]),
        )
    assert_close(rest.logits, expected.expand(2, -1, -1))


def test_otterhd_goes_on_from_its_prefix():
    processor = tiny_processor()
    model = tiny_otterhd(processor)
    pictures = [Image.new("RGB", (30, 20), color) for color in ("red", "blue")]

    def turn(text, picture=None):
        part = [{"type": "image", "image": picture}] if picture is not None else []
        return {"role": "user", "content": [*part, {"type": "text", "text": text}]}

    start = [turn("what?", pictures[0]), {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    inputs = processor.apply_chat_template(
        [[*start, turn("and this one?", pictures[1])], [*start, turn("so?")]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    mask = inputs["attention_mask"].bool()
    rows = [ids[own] for ids, own in zip(inputs["input_ids"], mask, strict=True)]
    counts = [int((ids == processor.image_token_id).sum()) for ids in rows]
    patches = [[patch.tolist() for patch in part] for part in inputs["pixel_values"].reshape(-1, 300).split(counts)]
    length = shared_length(rows, patches, processor.image_token_id)
    assert length > counts[1]
    alone = {"input_ids": rows[0][None], "pixel_values": inputs["pixel_values"].reshape(-1, 300)[: counts[0]]}
    prefix = compute_prefix(model, alone, length)
    padding = [(own == 0).sum().item() for own in mask]
    for beams in (1, 3):
        options = {"do_sample": False, "max_new_tokens": 4, "num_beams": beams}
        cache = expand(prefix, [width for width in padding for _ in range(beams)])
        expected = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, past_key_values=cache, **options), expected)


def test_what_prompts_share():
    rows = [ids[0] for ids in ROWS]
    assert shared_length(rows, ["abc", "ab", "abd"], IMAGE) == 9
    assert shared_length(rows, ["abc", "ab", "axd"], IMAGE) == 5  # up to the picture that differs
    assert shared_length(rows[:1], ["abc"], IMAGE) == 17
    assert shared_length([rows[0], rows[0][:4]], ["abc", "a"], IMAGE) == 4
    other = rows[0].clone()
    other[2] += 1
    assert shared_length([rows[0], other], ["abc", "abc"], IMAGE) == 2
