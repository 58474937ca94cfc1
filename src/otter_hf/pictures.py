"""The one reader of pictures: whatever a picture is given as becomes a PIL image in RGB, upright, 8 bits a channel.

Processors, chat, server, training data, data checks and evaluation read pictures here, so that a picture is the same
pixels wherever it is met (films: `otter_hf.films`). The rules:

* **Given as** bytes, a binary file, a path (`str` or `Path`), a `http(s)` or `file` URL, a `data:` URI, base64 text, a
  PIL image, an array or a tensor. The server hands over bytes only, see `otter_hf.serving.fetch`.
* **Numbers** of arrays and tensors: `uint8` and whole numbers are 0 to 255; floats of any width are 0 to 1; `bool` is
  black and white; `uint16` is 0 to 65535. What lies outside is refused, not clipped or wrapped: floats of 0 to 255 or
  -1 to 1 are, and so is `uint16` that never uses its highest bit, as it could hold 12 bits as well.
  `do_rescale=False` says that all pictures are floats of 0 to 1, as in transformers, and refuses others.
* **Axes**: `(H, W)`, `(H, W, C)` or `(C, H, W)` with 1 (grey), 2 (grey and alpha, last axis only), 3 (RGB) or 4
  (RGBA) channels. Where both the first and the last axis could be the channels (a picture 3 pixels wide), it is
  refused unless `input_data_format` says `"channels_first"` or `"channels_last"`.
* **Depth**: 16-bit grey is scaled to 8 bits by its depth (65535 is white), 32-bit floats as other floats. A picture
  that uses less than a sixteenth of its 16 bits becomes nearly black; that is said once, and by `data check`.
* **Transparency** is laid on white.
* **Orientation** of photographs (EXIF) is applied.
* **Several frames** in one file (GIF, WebP, AVIF, TIFF): the first is the picture; given as a film, all are.
* **CMYK** and other colours are converted by Pillow, without colour profiles.
* **Size** is limited before anything is decoded, by default as Pillow does: `2 * PIL.Image.MAX_IMAGE_PIXELS`. A
  picture more than 200 times as long as wide is refused: models that resize its short side would make it large.

`legacy=True` is how the code of 2023 read: Pillow's `convert("RGB")` alone, with transparency dropped, photographs as
they lie in the file, and 16-bit grey cut off at 255.
"""

import base64
import binascii
import io
import math
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.request import url2pathname

from PIL import Image, ImageFile, UnidentifiedImageError, features
from transformers.utils import logging

from .reading import is_lfs_pointer


logger = logging.get_logger(__name__)

# what chat, server and films read; Pillow has AVIF from 11.3 on, where it is built with it
FORMATS: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
FORMATS += ("AVIF",) * bool("avif" in features.modules and features.check_module("avif"))
_DATA_URI = re.compile(r"data:[^,]*,")
_STANDARD_ALPHABET = str.maketrans("-_", "+/")
_ORIENTATION = 0x0112
# what makes a picture upright, by the number EXIF gives its orientation
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# where Pillow keeps what may tell an orientation
_METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
# Pillow hands these to a program of their own
_PROGRAMS = ("EPS",)
# half of one of 255 steps: what rounds to a level is one, so that resized floats may overshoot a little
_TOLERANCE = 0.5 / 255
# of the longer to the shorter side; beyond it OtterHD's pictures shrink to a line. Qwen2-VL has the same limit
MAX_ASPECT_RATIO = 200
# by which pictures are found in a folder
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif")
_pillow_settings = threading.Lock()


class ImageError(ValueError):
    """A picture that cannot be read; the message is a sentence that begins with its name."""


class ImageTooLarge(ImageError):
    """Decodable, but more pixels than the limit."""


def _unreadable(name: str, reason: object) -> ImageError:
    return ImageError(f"{name} cannot be read as an image: {str(reason).rstrip('.')}.")


def decode_base64(text: str) -> bytes:
    """Decodes base64 of any common spelling.

    Accepts the standard and the URL-safe alphabet, also mixed, missing padding, white space anywhere, and a
    `data:...;base64,` prefix.

    Raises:
        ValueError: if anything else is in the text or its length is impossible.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        text = "".join(text.split())
        text = _DATA_URI.sub("", text, count=1) if text.startswith("data:") else text
        text = text.translate(_STANDARD_ALPHABET).rstrip("=")
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def encode_base64(data: bytes) -> str:
    """Encodes with the standard alphabet and padding, without line breaks or prefix."""
    return base64.b64encode(data).decode("ascii")


def encode_image(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """An encoded picture, in a format of Pillow with its options."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def read_image(
    image: Any,
    name: str = "image",
    *,
    legacy: bool = False,
    rescaled: bool = False,
    input_data_format: str | None = None,
    truncated: bool = False,
    max_pixels: int | None = None,
    formats: Sequence[str] | None = None,
    number_range: tuple | None = None,
) -> Image.Image:
    """
    A picture in RGB, by the rules of this module.

    Args:
        image: see the module; also a mapping with `bytes` or `path`, as `datasets` has it.
        name: what to call it in an error.
        legacy: read it as the code of 2023 did.
        rescaled: refuse what is no floats of 0 to 1: the meaning of `do_rescale=False`.
        input_data_format: `"channels_first"` or `"channels_last"`, for arrays whose axes could be either.
        truncated: decode a file that was cut off as far as it goes.
        max_pixels: refuse more; default: `2 * PIL.Image.MAX_IMAGE_PIXELS`.
        formats: of encoded pictures, as Pillow calls them; default: all it knows. EPS is never read, as
            Pillow starts a program for it.
        number_range: the smallest and largest number of all frames, where `image` is one of an array of frames.

    Raises:
        ImageError: a ValueError of one sentence that names it, for what cannot be read or is ambiguous.
    """
    image = undecoded(image)
    if is_array(image):
        array = to_numpy(image, name)
        if rescaled and array.dtype.kind != "f":
            raise _not_rescaled(name, array.dtype)
        return _array_to_rgb(_channels_last(array, name, input_data_format), name, max_pixels, number_range)
    if rescaled:
        raise _not_rescaled(name, type(image).__name__)
    if isinstance(image, Image.Image):
        return _to_rgb(image, name, legacy, max_pixels)
    if not isinstance(image, (str, bytes, bytearray, memoryview, Path)) and not hasattr(image, "read"):
        kind = type(image).__name__
        raise _unreadable(name, f"it is a {kind}; give a PIL image, an array, a path, a URL or encoded bytes")
    with open_source(image, name, "an image") as file:
        return _decode(file, name, legacy, truncated, max_pixels, formats)


def undecoded(source: Any) -> Any:
    """What is encoded in a mapping with `bytes` or `path`, as `datasets` has it; anything else as it is."""
    if isinstance(source, dict) and (source.get("bytes") is not None or source.get("path") is not None):
        return source["bytes"] if source.get("bytes") is not None else Path(source["path"])
    return source


def _not_rescaled(name: str, kind: object) -> ImageError:
    reason = f"do_rescale=False says that its numbers are floats of 0 to 1, and it is {kind}; leave do_rescale out"
    return _unreadable(name, reason)


def is_array(value: object) -> bool:
    """Whether it is an array or a tensor."""
    is_text = isinstance(value, (str, bytes))  # one of NumPy has all of these, too
    return not is_text and hasattr(value, "ndim") and hasattr(value, "dtype") and hasattr(value, "shape")


def is_list(value: Any) -> bool:
    """Whether it holds several: a list or tuple, a column of `datasets`, an array or series of objects or texts."""
    if is_array(value):
        # of NumPy and pandas, whose texts are objects, too; torch's types have no kind
        return len(value.shape) > 0 and getattr(value.dtype, "kind", None) in ("O", "U")
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def path_of_url(url: str) -> str:
    """The path in a `file://` address."""
    return url2pathname(url[len("file://") :].removeprefix("localhost"))


def open_source(source: Any, name: str, kind: str) -> BinaryIO:
    """
    What is encoded in `source` as a binary file that can be sought, to be closed by the caller.

    Args:
        source: a path, a http or file URL, a `data:` URI, base64 text, bytes, or a binary file, which is read from
            where it stands.
        name, kind: for errors: `f"{name} cannot be read as {kind}"`.

    Raises:
        ValueError: if there is nothing to be read.
    """
    try:
        if isinstance(source, str) and not (_is_file(source)):
            is_file_url = source[:7].lower() == "file://"
            source = Path(path_of_url(source)) if is_file_url else _text_bytes(source)
        if isinstance(source, (str, Path)):
            if not Path(source).is_file():
                raise ValueError("there is no such file")
            file = Path(source).open("rb")
            if is_lfs_pointer(file.read(64)):
                file.close()
                raise ValueError("it is a Git LFS pointer, not the file itself; download it with git lfs pull")
            file.seek(0)
            return file
        data = source.read() if hasattr(source, "read") else source
        if not isinstance(data, (bytes, bytearray, memoryview)):
            if hasattr(source, "read"):
                raise ValueError("its file holds text, not bytes; open it in binary mode")
            raise ValueError(f"it is a {type(source).__name__}; give a path, a URL, encoded bytes or a binary file")
        if is_lfs_pointer(bytes(data[:64])):
            raise ValueError("it is a Git LFS pointer, not the file itself; download it with git lfs pull")
        return io.BytesIO(data)
    except (OSError, ValueError) as error:
        raise ImageError(f"{name} cannot be read as {kind}: {error}.") from error


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with zeros in it: base64
        return False


def _text_bytes(text: str) -> bytes:
    """What a text that is no path of a file stands for."""
    if text.startswith(("http://", "https://")):
        return fetch(text)
    if "://" in text[:16]:
        raise ValueError(f"{text.partition('://')[0]}:// addresses are not read; give a path or a http address")
    # a mistyped path could be base64, which has no dots
    if "." in text and not text.startswith("data:"):
        raise ValueError("there is no such file")
    try:
        if not (data := decode_base64(text)) or (len(text) < 256 and Path(text).is_dir()):
            raise ValueError
        return data
    except ValueError:
        raise ValueError("it is no file, no address and no base64 text") from None


def fetch(url: str) -> bytes:
    """The bytes at a http address. For callers who may read every address; a server must not, see `serving.fetch`."""
    from huggingface_hub.utils import httpx

    try:
        response = httpx.get(url, follow_redirects=True)
        response.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{url} cannot be fetched ({error})") from error
    return response.content


def _kind(file: BinaryIO) -> str:
    """What a file is that Pillow does not know."""
    from .films import is_film

    file.seek(0)
    return "it is a film; give it as a video" if is_film(file.read(64)) else "it is of no known kind"


def _decode(
    file: BinaryIO, name: str, legacy: bool, truncated: bool, max_pixels: int | None, formats: Sequence[str] | None
) -> Image.Image:
    """The picture in an encoded file."""
    try:
        with Image.open(file, formats=formats) as image:
            if image.format in _PROGRAMS:
                raise _unreadable(name, f"{image.format} is a program, not a picture")
            return _to_rgb(image, name, legacy, max_pixels)
    except ImageError as error:
        # Pillow decodes within `_to_rgb`, whose refusals have no cause
        if error.__cause__ is None or not truncated:
            raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"{name} is too large ({str(error).partition(',')[0]}); {_advice(max_pixels)}.") from error
    except Exception as error:  # Pillow's plugins raise SyntaxError, struct.error, ... on damaged files
        if not truncated:
            raise _unreadable(name, _kind(file) if isinstance(error, UnidentifiedImageError) else error) from error
    file.seek(0)
    # Pillow keeps this switch in its module; it is put back at once
    with _pillow_settings:
        saved = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            return _decode(file, name, legacy, False, max_pixels, formats)
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = saved


def check_size(width: int, height: int, name: str, max_pixels: float | None = None) -> None:
    """Raise ImageError for a picture without pixels, ImageTooLarge for one with too many, or too long and narrow."""
    if not width or not height:
        raise ImageError(f"{name} has no pixels (size {(width, height)}): remove it or give a real image.")
    # read here, as programs set it
    limit = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else math.inf
    limit = limit if max_pixels is None else max_pixels
    if width * height > limit:
        raise ImageTooLarge(
            f"{name} is too large ({width} x {height} pixels are more than the limit of {limit}); "
            f"{_advice(max_pixels)}."
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageTooLarge(
            f"{name} of {width} x {height} pixels is more than {MAX_ASPECT_RATIO} times as long as wide: crop it."
        )


def _advice(max_pixels: float | None) -> str:
    return "shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS" if max_pixels is None else "send a smaller one"


def _to_rgb(image: Image.Image, name: str, legacy: bool, max_pixels: int | None) -> Image.Image:
    """A PIL image in RGB without metadata, so that nothing is applied a second time; itself if it is that already."""
    width, height = image.size
    check_size(width, height, name, max_pixels)
    if type(image) is Image.Image and image.mode == "RGB" and not image.info:
        return image
    try:
        image.load()
        turn = None if legacy else TURNS.get(orientation(image) or 1)
        if legacy:
            rgb = image.convert("RGB")
        elif image.mode.startswith("I;16") or image.mode in ("I", "F"):
            rgb = _deep_to_rgb(image, name)
        elif image.has_transparency_data:
            rgb = lay_on_white(image)
        else:
            rgb = image.convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # a PIL image decodes its file when it is loaded
        raise _unreadable(name, error) from error
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info = {}
    return rgb


def orientation(image: Image.Image) -> int | None:
    """The number of EXIF that says how a picture lies in its file, if it says so; a key of `TURNS` or 1."""
    if not any(key in image.info for key in _METADATA):
        return None
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata do not make a picture unreadable
        return None


def lay_on_white(image: Image.Image) -> Image.Image:
    """An image with transparency, of whatever mode, on a white ground, in RGB."""
    image = image.convert("RGBA")
    if image.getextrema()[3][0] == 255:  # nothing shows through
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image)
    return ground.convert("RGB")


def is_dark_by_depth(image: Image.Image) -> bool:
    """Whether a picture uses less than a sixteenth of its 16 bits, so that it is nearly black once it is scaled."""
    import numpy as np

    return image.mode.startswith("I;16") and 0 < np.asarray(image).max() < 4096


def _deep_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Grey of 16 or 32 bits. Its mode states the depth, unlike the numbers of an array."""
    import numpy as np

    if image.mode == "F":
        return _array_to_rgb(np.asarray(image), name, math.inf)
    levels = np.asarray(image).astype(np.int64)  # (H, W)
    if image.mode == "I" and (levels.min() < 0 or levels.max() > 65535 or 0 < levels.max() <= 255):
        found = f"its numbers (mode I) go from {levels.min()} to {levels.max()}"
        raise _unreadable(name, f"{found}, and depth is 16 bits in this mode; convert it to mode L or I;16")
    if is_dark_by_depth(image):
        logger.warning_once(
            f"{name} uses less than 12 of its 16 bits and is read as nearly black: scale it to 8 bits, or to all 16 "
            "(said once)."
        )
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        levels[levels == transparent] = 65535
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")


def to_numpy(array: Any, name: str) -> Any:
    """An array or tensor as a numpy array of numbers; floats that numpy lacks (bfloat16) become float32."""
    import numpy as np

    if hasattr(array, "detach"):  # a tensor of torch; numpy has no bfloat16
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    array = np.asarray(array)
    if array.dtype.kind not in "buif":
        raise _unreadable(name, f"its numbers are {array.dtype}; give uint8")
    return array


def _channels_last(array: Any, name: str, input_data_format: str | None) -> Any:
    """The array as `(H, W, C)`."""
    shape = tuple(array.shape)
    if 0 in shape:
        raise ImageError(f"{name} has no pixels (size {shape}): remove it or give a real image.")
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise _unreadable(name, f"its shape is {shape}; give (H, W), (H, W, C) or (C, H, W)")
    first, last = shape[0] in (1, 3, 4), shape[2] in (1, 2, 3, 4)
    wanted = None if input_data_format is None else str(getattr(input_data_format, "value", input_data_format))
    if wanted not in (None, "channels_first", "channels_last"):
        raise ValueError(f"input_data_format must be 'channels_first' or 'channels_last', got {input_data_format!r}.")
    if first and last and wanted is None:
        raise _unreadable(
            name,
            f"in its shape {shape} the channels could be the first or the last axis; say "
            "input_data_format='channels_first' or 'channels_last'",
        )
    if not (first if wanted == "channels_first" else last if wanted == "channels_last" else first or last):
        where = "" if wanted is None else f" where input_data_format={wanted!r} says"
        raise _unreadable(name, f"its shape {shape} has no axis of 1, 3 or 4 channels{where}")
    return array.transpose(1, 2, 0) if (wanted == "channels_first" or (wanted is None and first)) else array


def array_range(array: Any, name: str) -> tuple:
    """The smallest and largest number of an array or tensor."""
    array = to_numpy(array, name)
    return (array.min(), array.max()) if array.size else (0, 0)


def _array_to_rgb(array: Any, name: str, max_pixels: float | None, number_range: tuple | None = None) -> Image.Image:
    """An array `(H, W)` or `(H, W, C)` as a PIL image in RGB."""
    import numpy as np

    check_size(array.shape[1], array.shape[0], name, max_pixels)
    low, high = number_range or array_range(array, name)
    found = f"its numbers ({array.dtype}) go from {low} to {high}"
    if array.dtype.kind == "f":
        if not np.isfinite(low) or not np.isfinite(high):
            raise _unreadable(name, f"{found}; they must be finite")
        if low < -_TOLERANCE or high > 1 + _TOLERANCE:
            advice = "give 0 to 255 as uint8, and -1 to 1 as (x + 1) / 2"
            raise _unreadable(name, f"{found}, and floats must be of 0 to 1; {advice}")
        array = (array.astype(np.float32) * 255).round().clip(0, 255)
    elif array.dtype == np.uint16:
        if high < 1 << 15 and high > 0:
            advice = "scale them to 0 to 65535, or give uint8 of 0 to 255"
            raise _unreadable(name, f"{found}, which may be fewer than 16 bits; {advice}")
        array = (array.astype(np.uint32) + 128) // 257
    elif array.dtype.kind == "b":
        array = array * np.uint8(255)
    elif low < 0 or high > 255:
        raise _unreadable(name, f"{found}, and whole numbers must be of 0 to 255; scale them")
    array = np.ascontiguousarray(array.astype(np.uint8))
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    image = Image.fromarray(array)  # L, LA, RGB or RGBA
    return lay_on_white(image) if image.mode in ("LA", "RGBA") else image.convert("RGB")
