"""Encoded pictures of training data, and base64 of them."""

from PIL import Image

from ..pictures import ImageError, decode_base64, encode_base64, encode_image, read_image
from ..storage import AnyPath, to_path


__all__ = ["decode_base64", "decode_image", "encode_base64", "image_bytes"]


def decode_image(data: bytes, legacy: bool = False, max_pixels: int | None = None) -> Image.Image:
    """
    Decodes a picture of any format that Pillow reads to RGB, by the rules of `otter_hf.pictures`.

    Truncated pictures are decoded as far as they go, as in the original.

    Args:
        data: the encoded picture.
        legacy: without orientation, and with transparency dropped, as the code of 2023 did.
        max_pixels: refuse more, before decoding; default: `PIL.Image.MAX_IMAGE_PIXELS`, half of what Pillow refuses,
            as a damaged header may state any size.

    Raises:
        OSError: if the bytes are no picture, or one that is too large.
    """
    try:
        limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
        return read_image(data, "the picture", legacy=legacy, truncated=True, max_pixels=limit)
    except ImageError as error:
        raise OSError(str(error).rstrip(".")) from error


def image_bytes(image: bytes | AnyPath | Image.Image) -> bytes:
    """The encoded bytes of a picture: files, also at addresses, and bytes as they are, PIL pictures as PNG."""
    if isinstance(image, bytes):
        return image
    return encode_image(image) if isinstance(image, Image.Image) else to_path(image).read_bytes()
