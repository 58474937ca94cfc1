"""The rules of `otter_hf.pictures`, at every place that takes a picture: the same pixels everywhere."""

import base64
import io
import struct
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import CLIPImageProcessorPil

from otter_hf import FlamingoProcessor, OtterHDImageProcessor, OtterHDProcessor, OtterProcessor
from otter_hf.data.collator import OtterCollator
from otter_hf.data.image_store import ImageStore
from otter_hf.data.images import decode_image
from otter_hf.data.parquet_writer import write_images
from otter_hf.data.pretraining.samples import ImageTextPairs, TextEncoder
from otter_hf.evaluation.benchmarks import images as benchmark_images
from otter_hf.pictures import ImageError, logger, read_image
from otter_hf.production.convert_it.writer import encode_picture
from otter_hf.serving.fetch import FetchPolicy
from otter_hf.serving.media import MediaLimits, open_image
from otter_hf.serving.messages import MessageReader
from otter_hf.testing import otter as otter_tiny
from otter_hf.testing import otterhd as otterhd_tiny


SIDE = 20
GREY = np.add.outer(np.arange(SIDE) * 6, np.arange(SIDE) * 6).astype(np.uint8)  # (20, 20), 0 to 228
RGB = np.stack([GREY, GREY[::-1], 255 - GREY.T], axis=-1)  # (20, 20, 3), no symmetry
ALPHA = np.where(GREY > 100, 255, 0).astype(np.uint8)
ON_WHITE = np.where(ALPHA[..., None] == 255, RGB, 255).astype(np.uint8)
GREY_RGB = np.repeat(GREY[..., None], 3, axis=-1)


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def with_exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def palette():
    """Two colours, of which one is transparent."""
    image = Image.fromarray(ALPHA // 255).convert("P")
    image.putpalette([9, 9, 9, 200, 100, 50])
    return image


def big_endian_tiff(levels):
    """Pillow's mode I;16B, which it reads and does not make of arrays."""
    height, width = levels.shape
    tags = [(256, width), (257, height), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags.append((279, levels.nbytes))
    directory = struct.pack(">H", len(tags)) + b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack(">2sHI", b"MM", 42, 8 + levels.nbytes) + levels.astype(">u2").tobytes() + directory + bytes(4)


TURNED = {
    2: RGB[:, ::-1],
    3: RGB[::-1, ::-1],
    4: RGB[::-1],
    5: RGB.transpose(1, 0, 2),
    6: np.rot90(RGB, 3),
    7: np.rot90(RGB, 2).transpose(1, 0, 2),
    8: np.rot90(RGB, 1),
}
CMYK = Image.fromarray(RGB).convert("CMYK")
FRAMES = [Image.fromarray(RGB), Image.new("RGB", (SIDE, SIDE), "blue")]
FILES = {
    "rgb": (encode(Image.fromarray(RGB)), RGB),
    "grey": (encode(Image.fromarray(GREY)), GREY_RGB),
    "black and white": (encode(Image.fromarray(ALPHA).convert("1")), np.repeat(ALPHA[..., None], 3, -1)),
    "16-bit grey": (encode(Image.fromarray(GREY.astype(np.uint16) * 257)), GREY_RGB),
    "big-endian 16-bit grey": (big_endian_tiff(GREY.astype(np.uint16) * 257), GREY_RGB),
    "float grey": (encode(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), GREY_RGB),
    "rgba": (encode(Image.fromarray(np.dstack([RGB, ALPHA]))), ON_WHITE),
    "grey and alpha": (
        encode(Image.fromarray(np.dstack([GREY, ALPHA]))),
        np.where(ALPHA[..., None] == 255, GREY_RGB, 255),
    ),
    "webp with alpha": (encode(Image.fromarray(np.dstack([RGB, ALPHA])), "WEBP", lossless=True), ON_WHITE),
    "palette with a transparent colour": (
        encode(palette(), transparency=0),
        np.where(ALPHA[..., None] == 255, np.uint8([200, 100, 50]), 255),
    ),
    "opaque rgba": (encode(Image.fromarray(RGB).convert("RGBA")), RGB),
    "cmyk": (encode(CMYK, "TIFF"), np.asarray(CMYK.convert("RGB"))),
    "several frames": (encode(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True), RGB),
    **{
        f"orientation {number}": (encode(Image.fromarray(RGB), exif=with_exif(number)), turned)
        for number, turned in TURNED.items()
    },
}


@pytest.fixture(scope="module")
def processors():
    """Processors that leave pixels as they are."""
    image_processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, do_normalize=False)
    tiny_hd = otterhd_tiny.tiny_processor()
    patches = OtterHDImageProcessor(
        size={"height": 60, "width": 80}, patch_size={"height": 10, "width": 10}, do_normalize=False
    )
    return {
        cls: cls(image_processor, cls.prepare_tokenizer(otter_tiny.build_tokenizer()))
        for cls in (FlamingoProcessor, OtterProcessor)
    } | {OtterHDProcessor: OtterHDProcessor(patches, tiny_hd.tokenizer)}


def seen(processor, image, **options):
    """The pixels `(H, W, 3)` that a processor makes of one image; sides of OtterHD's must be multiples of 10."""
    if isinstance(processor, OtterHDProcessor):
        batch = processor(text="x", images=image, return_tensors="pt", **options)
        _, rows, columns = batch["image_grid_thw"][0].tolist()
        patches = batch["pixel_values"].view(rows, columns, 10, 10, 3)
        pixels = patches.permute(0, 2, 1, 3, 4).reshape(rows * 10, columns * 10, 3)
    else:
        batch = processor(text="<image>x", images=image, return_tensors="pt", **options)
        pixels = batch["pixel_values"][0, 0, 0].permute(1, 2, 0)
    return (pixels * 255).round().numpy().astype(np.uint8)


def from_server(data, tmp_path, processors):
    url = {"url": "data:image/x;base64," + base64.b64encode(data).decode()}
    reader = MessageReader(MediaLimits(), FetchPolicy(), 16)
    messages = reader.read([{"role": "user", "content": [{"type": "image_url", "image_url": url}]}])
    return messages[0]["content"][0]["image"]


def from_store(data, tmp_path, processors):
    write_images(tmp_path / "X.parquet", [("a", data)])
    return ImageStore(tmp_path / "X.parquet", tmp_path / "cache")["a"]


def from_path(data, tmp_path):
    (tmp_path / "picture").write_bytes(data)
    return tmp_path / "picture"


def from_collator(data, tmp_path, processors):
    """A sample that a program made itself, with the picture as it opened it."""
    media = [[Image.open(io.BytesIO(data))]]
    sample = {"id": "a", "turns": [("q", "a")], "media_per_turn": [1], "media": media, "task_description": None}
    batch = OtterCollator(processors[OtterProcessor])([sample])
    return (batch["pixel_values"][0, 0, 0].permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)


def from_pretraining(data, tmp_path, processors):
    pairs = ImageTextPairs(mirror=0)
    encoder = TextEncoder(processors[OtterProcessor].tokenizer)
    return pairs("a", {"webp": data, "txt": b"words"}, encoder, Random(0)).images[0]


ENTRY_POINTS = {
    "reader, bytes": lambda data, tmp_path, processors: read_image(data),
    "reader, file": lambda data, tmp_path, processors: read_image(io.BytesIO(data)),
    "reader, base64": lambda data, tmp_path, processors: read_image(base64.b64encode(data).decode()),
    "Flamingo, path": lambda data, tmp_path, processors: seen(
        processors[FlamingoProcessor], str(from_path(data, tmp_path))
    ),
    "Otter, PIL": lambda data, tmp_path, processors: seen(processors[OtterProcessor], Image.open(io.BytesIO(data))),
    "OtterHD, PIL": lambda data, tmp_path, processors: seen(
        processors[OtterHDProcessor], Image.open(io.BytesIO(data))
    ),
    "OtterHD, Path": lambda data, tmp_path, processors: seen(processors[OtterHDProcessor], from_path(data, tmp_path)),
    "chat": lambda data, tmp_path, processors: open_image(str(from_path(data, tmp_path)), "x"),
    "server": from_server,
    "training": from_store,
    "collator": from_collator,
    "pretraining": from_pretraining,
    "evaluation": lambda data, tmp_path, processors: benchmark_images({"image": {"bytes": data, "path": None}})[0],
    "convert-it": lambda data, tmp_path, processors: Image.open(io.BytesIO(encode_picture(data, SIDE))),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_a_file_is_the_same_pixels_everywhere(entry_point, file, processors, tmp_path):
    data, expected = FILES[file]
    np.testing.assert_array_equal(ENTRY_POINTS[entry_point](data, tmp_path, processors), expected)


ARRAYS = {
    "uint8": (RGB, RGB),
    "channels first": (RGB.transpose(2, 0, 1), RGB),
    "one channel": (GREY[..., None], GREY_RGB),
    "one channel first": (GREY[None], GREY_RGB),
    "no channel": (GREY, GREY_RGB),
    "grey and alpha": (np.dstack([GREY, ALPHA]), np.where(ALPHA[..., None] == 255, GREY_RGB, 255)),
    "rgba": (np.dstack([RGB, ALPHA]), ON_WHITE),
    "int64": (RGB.astype(np.int64), RGB),
    "uint16": (RGB.astype(np.uint16) * 257, RGB),
    "float32": (RGB.astype(np.float32) / 255, RGB),
    "float16": ((RGB / 255).astype(np.float16), RGB),
    "float64 that overshoots a little": (np.clip(RGB / 255, 0.001, 1) * 1.001 - 0.0005, RGB),
    "bool": (GREY > 100, np.repeat(ALPHA[..., None], 3, -1)),
    "tensor": (torch.from_numpy(RGB.copy()).permute(2, 0, 1), RGB),
    "float tensor with a gradient": ((torch.from_numpy(RGB.copy()) / 255).requires_grad_(), RGB),
    "bool tensor": (torch.from_numpy(GREY > 100), np.repeat(ALPHA[..., None], 3, -1)),
}
REFUSED = {
    "float 0 to 255": (RGB.astype(np.float32), "go from 0.0 to 255.0, and floats must be of 0 to 1; give 0 to 255 as"),
    "float -1 to 1": (RGB / 127.5 - 1, "floats must be of 0 to 1"),
    "bfloat16 0 to 255": (torch.from_numpy(RGB.copy()).bfloat16(), "floats must be of 0 to 1"),
    "not a number": (np.full((8, 8), np.nan), "they must be finite"),
    "12 bits": (GREY.astype(np.uint16) * 16, "may be fewer than 16 bits"),
    "int32 of 16 bits": (GREY.astype(np.int32) * 257, "whole numbers must be of 0 to 255"),
    "int8": (GREY.astype(np.int8), "whole numbers must be of 0 to 255"),
    "three wide": (np.zeros((3, 20, 3), np.uint8), "could be the first or the last axis; say input_data_format="),
    "one high": (np.zeros((1, 20, 3), np.uint8), "could be the first or the last axis"),
    "five channels": (np.zeros((20, 20, 5), np.uint8), "no axis of 1, 3 or 4 channels"),
    "a vector": (np.zeros(20, np.uint8), r"its shape is \(20,\); give \(H, W\)"),
    "complex": (np.zeros((20, 20), complex), "its numbers are complex128"),
    "empty": (np.zeros((0, 20, 3), np.uint8), "has no pixels"),
    "mode I of 8 bits": (Image.fromarray(GREY).convert("I"), "convert it to mode L or I;16"),
    "mode F of 0 to 255": (Image.fromarray(GREY).convert("F"), "floats must be of 0 to 1"),
    "a number": (3, "it is a int; give a PIL image"),
    "no file": ("gone.png", "there is no such file"),
    "no file, no base64": ("gone!", "it is no file, no address and no base64 text"),
    "a folder": ("/", "it is no file, no address and no base64 text"),
    "nothing": ("", "it is no file, no address and no base64 text"),
    "other scheme": ("ftp://x/y.png", "ftp:// addresses are not read"),
    "text file": (io.StringIO("x"), "open it in binary mode"),
    "no picture": (b"nonsense", "it is of no known kind"),
    "a film": (b"\0\0\0\x18ftypisom" + bytes(16), "it is a film; give it as a video"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "EPS is a program"),
}
PROCESSORS = (FlamingoProcessor, OtterHDProcessor)


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("family", PROCESSORS)
def test_arrays_and_tensors(family, kind, processors):
    array, expected = ARRAYS[kind]
    np.testing.assert_allclose(seen(processors[family], array).astype(int), expected, atol="float16" in kind)
    assert read_image(array).mode == "RGB"


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("family", PROCESSORS)
def test_what_is_ambiguous_or_no_picture_is_refused_in_a_sentence(family, kind, processors):
    image, message = REFUSED[kind]
    with pytest.raises(ValueError, match=rf"^(Image 0|images\[0\]\[0\]) .*{message}.*\.$"):
        seen(processors[family], image)


@pytest.mark.parametrize("family", PROCESSORS)
def test_options_say_what_arrays_mean(family, processors):
    narrow = np.arange(3 * 10 * 3, dtype=np.uint8).reshape(3, 10, 3)
    upright = seen(processors[family], narrow, input_data_format="channels_last")
    turned = seen(processors[family], narrow, input_data_format="channels_first")
    np.testing.assert_array_equal(upright[:3], narrow)
    np.testing.assert_array_equal(turned[:, :3], narrow.transpose(1, 2, 0))
    floats = RGB.astype(np.float32) / 255
    np.testing.assert_array_equal(seen(processors[family], floats, do_rescale=False), RGB)
    for image in (RGB, Image.fromarray(RGB)):
        with pytest.raises(ValueError, match="do_rescale=False says that its numbers are floats of 0 to 1"):
            seen(processors[family], image, do_rescale=False)


@pytest.mark.parametrize("family", PROCESSORS)
def test_one_of_something_and_batches(family, processors):
    processor = processors[family]
    word = "<image>x" if family is FlamingoProcessor else "x"
    plain = "x"
    images = np.stack([RGB, 255 - RGB])  # (N, H, W, C)
    expected = processor(text=[word, word], images=[Image.fromarray(i) for i in images], return_tensors="pt")
    for batch in (images, torch.from_numpy(images), torch.from_numpy(images).permute(0, 3, 1, 2), list(images)):
        got = processor(text=[word, word], images=batch, return_tensors="pt")
        assert torch.equal(got["pixel_values"], expected["pixel_values"])
    second = processor(text=[plain, word], images=[None, Image.fromarray(RGB)], return_tensors="pt")
    nested = processor(text=[plain, word], images=[[], [RGB]], return_tensors="pt")
    assert torch.equal(second["pixel_values"], nested["pixel_values"])
    assert torch.equal(second["input_ids"], nested["input_ids"])


@pytest.mark.parametrize("family", PROCESSORS)
@pytest.mark.parametrize(
    "file", ["rgba", "orientation 6", "16-bit grey", "webp with alpha", "palette with a transparent colour"]
)
def test_the_way_of_2023(family, file, processors, tmp_path):
    data, _ = FILES[file]
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(seen(processors[family], from_path(data, tmp_path), legacy_pictures=True), expected)
    np.testing.assert_array_equal(decode_image(data, legacy=True), expected)
    write_images(tmp_path / "X.parquet", [("a", data)])
    store = ImageStore(tmp_path / "X.parquet", tmp_path / "cache", legacy_pictures=True)
    np.testing.assert_array_equal(store["a"], expected)


def test_a_picture_in_memory_is_not_turned_twice_or_changed():
    image = Image.open(io.BytesIO(FILES["orientation 6"][0]))
    np.testing.assert_array_equal(read_image(image), TURNED[6])
    assert image.getexif()[0x0112] == 6
    np.testing.assert_array_equal(read_image(ImageOps.exif_transpose(image)), TURNED[6])
    np.testing.assert_array_equal(read_image(read_image(image)), TURNED[6])


def test_sizes_are_looked_at_before_anything_is_decoded(monkeypatch):
    data = FILES["rgb"][0]
    with pytest.raises(ImageError, match=r"x is too large \(20 x 20 pixels are more than the limit of 399\); send a"):
        read_image(data, "x", max_pixels=399)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for image in (data, Image.fromarray(RGB), RGB):
        with pytest.raises(ImageError, match=r"x is too large .*; shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS"):
            read_image(image, "x")


def test_damaged_metadata_do_not_make_a_picture_unreadable():
    image = Image.fromarray(RGB)
    image.info["exif"] = b"Exif\x00\x00MM\x00*\xff\xff\xff\xff" + bytes(range(40))
    np.testing.assert_array_equal(read_image(image), RGB)


def test_nearly_black_pictures_are_told_of(monkeypatch):
    said = []
    monkeypatch.setattr(logger, "warning_once", said.append)
    dark = read_image(encode(Image.fromarray(GREY.astype(np.uint16) * 16)), "an X-ray")
    assert np.asarray(dark).max() == 228 * 16 // 257
    assert len(said) == 1 and said[0].startswith("an X-ray uses less than 12 of its 16 bits")


def test_addresses_are_fetched(monkeypatch):
    from huggingface_hub.utils import httpx

    def get(url, **options):
        if "gone" in url:
            return httpx.Response(404, request=httpx.Request("GET", url))
        return httpx.Response(200, content=FILES["rgba"][0], request=httpx.Request("GET", url))

    monkeypatch.setattr(httpx, "get", get)
    np.testing.assert_array_equal(read_image("https://host/picture"), ON_WHITE)
    with pytest.raises(ImageError, match="x cannot be read as an image: https://host/gone cannot be fetched .*404"):
        read_image("https://host/gone", "x")
