"""Samples of pretraining: texts, thresholds, order of pictures, labels."""

import base64
import io
import json
from random import Random

import pytest
import torch
from PIL import Image
from pretraining_shards import document, padded, picture
from transformers import ByT5Tokenizer

from otter_hf import FlamingoProcessor
from otter_hf.data.pretraining import (
    ImageTextPairs,
    InterleavedDocuments,
    PretrainingCollator,
    RejectedSample,
    caption_labels,
    interleave,
    interleaved_labels,
)
from otter_hf.data.pretraining.samples import TextEncoder
from otter_hf.data.samples import SampleError


@pytest.fixture
def encoder(tiny_processor):
    return TextEncoder(tiny_processor.tokenizer)


def red(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]


def text_of(sample, encoder) -> str:
    return encoder.tokenizer.decode(sample.input_ids)


@pytest.mark.parametrize("kind", ["fast", "Python"])
def test_ids_are_those_of_the_tokenizer_whatever_it_was_asked_before(tiny_processor, kind):
    tokenizer = tiny_processor.tokenizer if kind == "fast" else FlamingoProcessor.prepare_tokenizer(ByT5Tokenizer())
    assert tokenizer.is_fast == (kind == "fast")
    encoder = TextEncoder(tokenizer)
    for text in ("<image>A café,\n two  lines<|endofchunk|>", "", "a" * 300):
        expected = tokenizer(text)["input_ids"]
        tokenizer(text, padding="max_length", max_length=5, truncation=True, split_special_tokens=True)
        assert encoder.encode(text, 1000) == expected
        assert encoder.encode(text, 4) == expected[:4]


# --- captions ---


@pytest.mark.parametrize("suffix", ["jpg", "png", "jpeg"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "base64"])
def test_caption_is_text_and_picture_is_read_from_bytes_or_base64(encoder, suffix, kind):
    data = base64.b64encode(picture(7)) if kind == "base64" else picture(7, kind=kind)
    parts = {suffix: data, "txt": " A café  \n".encode(), "json": b"{}"}
    sample = ImageTextPairs()("s", parts, encoder, Random(0))
    # 2023 wrote the Python form of the bytes into the prompt: <image>b'...'
    assert text_of(sample, encoder) == "<image>A café<|endofchunk|></s>"
    (image,) = sample.images
    assert image.size == (8, 8) and abs(red(image) - 7) <= 2


def test_picture_suffixes_are_picked_in_the_order_jpg_png_jpeg(encoder):
    parts = {"txt": b"x", "jpeg": picture(3), "png": picture(2), "jpg": picture(1)}
    builder = ImageTextPairs()
    for expected, suffix in ((1, "jpg"), (2, "png"), (3, "jpeg")):
        assert red(builder("s", parts, encoder, Random(0)).images[0]) == expected
        del parts[suffix]


def test_captions_are_cut_at_max_tokens(encoder):
    parts = {"png": picture(1), "txt": b"a" * 40}
    assert len(ImageTextPairs()("s", parts, encoder, Random(0)).input_ids) == 32
    # <image>, 29 letters, <|endofchunk|>, </s>
    fits = ImageTextPairs()("s", {**parts, "txt": b"a" * 29}, encoder, Random(0))
    assert len(fits.input_ids) == 32 and text_of(fits, encoder).endswith("<|endofchunk|></s>")


def test_special_tokens_in_a_caption_are_plain_text(encoder):
    sample = ImageTextPairs()("s", {"png": picture(1), "txt": b"an <image> here"}, encoder, Random(0))
    assert sample.input_ids.count(encoder.image_token_id) == 1


def test_mirroring_is_drawn_for_each_sample(encoder):
    image = Image.new("RGB", (2, 1), "black")
    image.putpixel((0, 0), (255, 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    parts = {"png": buffer.getvalue(), "txt": b"x"}

    def share(mirror):
        samples = [ImageTextPairs(mirror=mirror)("s", parts, encoder, Random(seed)) for seed in range(200)]
        return sum(sample.images[0].getpixel((0, 0)) == (0, 0, 0) for sample in samples) / 200

    assert share(0) == 0 and share(1) == 1 and 0.4 < share(0.5) < 0.6


@pytest.mark.parametrize(
    ("parts", "reason", "message"),
    [
        ({"txt": b"x", "gif": b"1"}, "missing part", "'s' has no picture .* it has"),
        ({"png": b"x"}, "missing part", "'s' has no txt"),
        ({"png": picture(1), "txt": b"\xff\xfe"}, "unreadable text", "'s' is no UTF-8"),
        ({"png": picture(1), "txt": b" \n"}, "empty text", "'s' is empty"),
        ({"png": b"\xff\xd8nothing", "txt": b"x"}, "unreadable image", "'s' cannot be read"),
        ({"png": b"no base64!", "txt": b"x"}, "unreadable image", "'s' cannot be read"),
    ],
)
def test_broken_pairs_are_refused_with_a_reason(encoder, parts, reason, message):
    with pytest.raises(SampleError, match=message) as error:
        ImageTextPairs()("s", parts, encoder, Random(0))
    assert error.value.reason == reason and not isinstance(error.value, RejectedSample)


def test_caption_labels():
    # 9=<image>, 8=<|endofchunk|>, 7=EOS, 6=BOS, 0=padding
    ids = torch.tensor([[6, 9, 1, 2, 8, 7], [9, 1, 8, 7, 0, 0]])
    mask = (ids != 0).long()
    assert caption_labels(ids, mask, 9).tolist() == [[-100, -100, 1, 2, 8, 7], [-100, 1, 8, 7, -100, -100]]
    # padding with EOS: the mask tells them apart
    ids[1, 4:] = 7
    assert caption_labels(ids, mask, 9).tolist()[1] == [-100, 1, 8, 7, -100, -100]


# --- interleaved documents ---


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([1, 2], "A.<image>B.<|endofchunk|><image>C.<|endofchunk|><EOS>"),
        ([0], "<image>A. B. C.<|endofchunk|><EOS>"),
        # 2023 had an empty chunk between the two: A.<image><|endofchunk|><image>B. C.
        ([1, 1], "A.<image><image>B. C.<|endofchunk|><EOS>"),
        ([0, 1, 2], "<image>A.<|endofchunk|><image>B.<|endofchunk|><image>C.<|endofchunk|><EOS>"),
        ([], "A. B. C.<|endofchunk|><EOS>"),
    ],
)
def test_interleaved_text(indices, text):
    assert interleave(["A.", "B.", "C."], indices, "<EOS>") == text


def build(encoder, sentences, images, seed=0, **options):
    data = document(sentences, images)
    return InterleavedDocuments(**options)("d", {"json": data}, encoder, Random(seed))


def big(number: int, size: int = 11_000) -> bytes:
    return padded(picture(number), size)


def test_pictures_are_in_the_order_of_the_sentences(encoder):
    # as in the example of MMC4's own README, where image_info has sentence 2 before sentence 1
    sample = build(encoder, ["A.", "B.", "C."], [(2, 0.5, big(22)), (1, 0.5, big(11)), (2, 0.5, big(23))])
    assert text_of(sample, encoder) == "A.<image>B.<|endofchunk|><image><image>C.<|endofchunk|></s>"
    assert [red(image) for image in sample.images] == [11, 22, 23]


@pytest.mark.parametrize(("size", "kept"), [(10_999, False), (11_000, True)])
def test_smallest_picture(encoder, size, kept):
    images = [(0, 0.5, big(1)), (1, 0.5, big(2)), (2, 0.5, big(3, size))]
    assert [red(image) for image in build(encoder, ["A.", "B.", "C."], images).images] == [1, 2] + [3] * kept


@pytest.mark.parametrize(("similarity", "kept"), [(0.3199999, False), (0.32, True)])
def test_smallest_similarity(encoder, similarity, kept):
    images = [(0, 0.5, big(1)), (1, 0.5, big(2)), (2, similarity, big(3))]
    assert [red(image) for image in build(encoder, ["A.", "B.", "C."], images).images] == [1, 2] + [3] * kept


@pytest.mark.parametrize("count", [4, 5, 6])
def test_the_first_five_pictures_that_are_kept_are_used(encoder, count):
    small = (0, 0.5, big(99, 10_999))
    images = [(count - i, 0.5, big(i)) for i in range(count)]
    sample = build(encoder, [f"{i}." for i in range(count + 1)], [small, *images])
    assert [red(image) for image in sample.images] == list(range(min(count, 5)))[::-1]


def test_documents_without_pictures_are_rejected(encoder):
    for images in ([], [(0, 0.5, big(1, 10_999))], [(0, 0.1, big(1))], [(7, 0.5, big(1))]):
        with pytest.raises(RejectedSample, match="'d' has no picture") as error:
            build(encoder, ["A."], images)
        assert error.value.reason == "no image"


@pytest.mark.parametrize("kind", ["bytes literal", "broken base64", "no picture"])
@pytest.mark.parametrize("whole", [0, 2])
def test_damaged_pictures_are_counted_and_are_no_threshold(encoder, kind, whole):
    text = base64.b64encode(big(1)).decode()
    damaged = {
        "bytes literal": f"b'{text}'",
        "broken base64": text[:-1] + "*!",
        "no picture": base64.b64encode(bytes(11_000)).decode(),
    }[kind]
    pictures = [damaged, damaged] + [base64.b64encode(big(number)).decode() for number in range(whole)]
    document = {
        "text_list": [f"{number}." for number in range(len(pictures))],
        "image_info": [
            {"matched_text_index": number, "matched_sim": 0.4, "image_base64": encoded}
            for number, encoded in enumerate(pictures)
        ],
    }
    parts = {"json": json.dumps(document).encode()}
    if whole:
        sample = InterleavedDocuments()("d", parts, encoder, Random(0))
        assert (len(sample.images), sample.num_unreadable) == (whole, 2)
    else:
        with pytest.raises(SampleError, match="'d' has no picture that can be read: 2 damaged") as error:
            InterleavedDocuments()("d", parts, encoder, Random(0))
        assert error.value.reason == "unreadable image" and not isinstance(error.value, RejectedSample)


def test_documents_with_one_picture_are_kept_by_a_coin(encoder):
    def is_kept(seed, **options):
        try:
            return len(build(encoder, ["A.", "B."], [(1, 0.5, big(1))], seed, **options).images) == 1
        except RejectedSample as error:
            assert error.reason == "single image"
            return False

    assert 0.4 < sum(is_kept(seed) for seed in range(200)) / 200 < 0.6
    assert not any(is_kept(seed, keep_single=0) for seed in range(20))
    assert all(is_kept(seed, keep_single=1) for seed in range(20))


def test_pictures_go_with_the_tokens_that_truncation_leaves(encoder):
    sentences = ["A" * 10, "B" * 10, "C" * 10]
    images = [(0, 0.5, big(1)), (1, 0.5, big(2)), (2, 0.5, big(3))]
    # <image>AAAAAAAAAA<|endofchunk|><image>BBBBBBBBBB<|endofchunk|><image>...: the third is token 25
    for max_tokens, expected in ((256, [1, 2, 3]), (25, [1, 2, 3]), (24, [1, 2])):
        sample = build(encoder, sentences, images, max_tokens=max_tokens)
        assert [red(image) for image in sample.images] == expected
        assert sample.input_ids.count(encoder.image_token_id) == len(expected)
    # one is left of two, and the coin counts what is left
    with pytest.raises(RejectedSample, match="single"):
        build(encoder, sentences, images, max_tokens=12, keep_single=0)
    with pytest.raises(RejectedSample, match="no picture"):
        build(encoder, ["A" * 300, "B"], [(1, 0.5, big(1)), (1, 0.5, big(2))])


def test_pictures_that_cannot_be_read_are_left_out_with_their_tokens(encoder):
    images = [(0, 0.5, big(1)), (1, 0.5, b"\xff" * 11_000), (2, 0.5, big(3))]
    sample = build(encoder, ["A.", "B.", "C."], images)
    assert text_of(sample, encoder) == "<image>A. B.<|endofchunk|><image>C.<|endofchunk|></s>"
    assert [red(image) for image in sample.images] == [1, 3]


@pytest.mark.parametrize("legacy", [False, True])
def test_palette_pictures_with_transparency(encoder, legacy):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 1), 1)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0)
    images = [(0, 0.5, padded(buffer.getvalue(), 11_000)), (1, 0.5, big(3))]
    (first, _) = build(encoder, ["A.", "B."], images, legacy_pictures=legacy).images
    # the transparent ground is white; 2023 dropped that it is transparent
    ground = (10, 20, 30) if legacy else (255, 255, 255)
    assert first.getpixel((0, 0)) == ground and first.getpixel((1, 1)) == (200, 100, 50)
    pair = {"png": images[0][2], "txt": b"A."}
    of_pair = ImageTextPairs(mirror=0.0, legacy_pictures=legacy)("p", pair, encoder, Random(0)).images[0]
    assert of_pair.getpixel((0, 0)) == ground


@pytest.mark.parametrize(
    "data", [b"{", b"[]", b'{"text_list": ["a"]}', b'{"text_list": [1], "image_info": []}', b'{"image_info": []}']
)
def test_broken_documents_are_refused(encoder, data):
    with pytest.raises(SampleError, match="'d' is no MMC4 document") as error:
        InterleavedDocuments()("d", {"json": data}, encoder, Random(0))
    assert error.value.reason == "unreadable text"


def test_interleaved_labels():
    # 9=<image>, 8=<|endofchunk|>, 7=EOS, 6=BOS, 0=padding
    ids = torch.tensor(
        [
            [6, 1, 9, 2, 3, 8, 9, 4, 8, 7],
            [9, 1, 8, 2, 3, 9, 9, 4, 8, 7],
            [1, 2, 9, 3, 8, 7, 0, 0, 0, 0],
        ]
    )
    assert interleaved_labels(ids, (ids != 0).long(), 9, 8).tolist() == [
        [-100, -100, -100, 2, 3, 8, -100, 4, 8, -100],
        [-100, 1, 8, -100, -100, -100, -100, 4, 8, -100],
        [-100, -100, -100, 3, 8, -100, -100, -100, -100, -100],
    ]


def test_batch_is_padded_and_pictures_stand_with_their_rows(tiny_processor, encoder):
    two = build(encoder, ["A.", "B."], [(0, 0.5, big(1)), (1, 0.5, big(2))])
    one = build(encoder, ["A long sentence."], [(0, 0.5, big(3))], keep_single=1)
    batch = PretrainingCollator(tiny_processor)([two, one], label_all=False)
    assert batch["pixel_values"].shape == (2, 2, 1, 3, 2, 2)
    reds = (batch["pixel_values"][:, :, 0, 0, 0, 0] * 255).round().tolist()
    assert reds == [[1, 2], [3, 0]]
    lengths = [len(two.input_ids), len(one.input_ids)]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert batch["input_ids"].shape == batch["labels"].shape == (2, max(lengths))
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ImageTextPairs, {"max_tokens": 1}),
        (ImageTextPairs, {"mirror": 2}),
        (InterleavedDocuments, {"min_similarity": 32}),
        (InterleavedDocuments, {"max_images": 0}),
        (InterleavedDocuments, {"keep_single": "half"}),
    ],
)
def test_wrong_options(kind, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        kind(**options)


def test_document_of_mmc4_with_more_keys(encoder):
    record = json.loads(document(["A.", "B."], [(0, 0.5, big(1)), (1, 0.5, big(2))]))
    record |= {"url": "http://x", "similarity_matrix": [[0.5, 0.1], [0.1, 0.5]], "could_have_url_duplicate": 0}
    sample = InterleavedDocuments()("d", {"json": json.dumps(record).encode()}, encoder, Random(0))
    assert len(sample.images) == 2
