"""Base64 and pictures: one lenient reader, one strict writer."""

import base64
import binascii
import io
import re
import threading
from pathlib import Path

from PIL import Image, ImageFile, UnidentifiedImageError


_DATA_URI = re.compile(r"data:[^,]*,")
_STANDARD_ALPHABET = str.maketrans("-_", "+/")
_pillow_settings = threading.Lock()


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


def decode_image(data: bytes) -> Image.Image:
    """Decodes a picture of any format that Pillow reads to RGB, transparency dropped.

    Truncated pictures are decoded as far as they go and pictures of any size are accepted, as in the original.

    Raises:
        OSError: if the bytes are no picture.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, Image.DecompressionBombError):
        return _decode_damaged_image(data)
    except Exception as error:  # Pillow's plugins raise SyntaxError, struct.error, ... on damaged files
        raise OSError(f"damaged picture: {error}") from error


def _decode_damaged_image(data: bytes) -> Image.Image:
    # Pillow keeps these two switches in its modules; they are put back at once
    with _pillow_settings:
        saved = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = True, None
        try:
            return Image.open(io.BytesIO(data)).convert("RGB")
        except UnidentifiedImageError:
            raise OSError(f"{len(data)} bytes that are no picture") from None
        except Exception as error:
            raise OSError(f"damaged picture: {error}") from error
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = saved


def image_bytes(image: bytes | str | Path | Image.Image) -> bytes:
    """The encoded bytes of a picture: files and bytes as they are, PIL pictures as PNG."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, Path)):
        return Path(image).read_bytes()
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
