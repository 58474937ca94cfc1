"""What the parts of a shard's sample become: text, token ids and pictures.

The rules and thresholds are those of Otter's 2023 pretraining; MMC4 is https://huggingface.co/papers/2304.06939.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from ...prompts import END_OF_CHUNK_TOKEN, IMAGE_TOKEN, escape_reserved_tokens, reserved_tokens_of
from ...reading import parse_json
from ..images import decode_base64, decode_image
from ..samples import SampleError


class PretrainingSample(NamedTuple):
    """Token ids, and the pictures of their `<image>` tokens in the same order.

    `num_unreadable` pictures of the document were wanted, but damaged, and are left out of it.
    """

    id: str
    input_ids: list[int]
    images: list[Image.Image]
    num_unreadable: int = 0


class TextEncoder:
    """A tokenizer, and what the builders of samples need to know of it."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.eos_token = tokenizer.eos_token or ""
        self._reserved = reserved_tokens_of(tokenizer)

    def escape(self, text: str) -> str:
        """`text` without special tokens in it, see `escape_reserved_tokens`."""
        return escape_reserved_tokens(text, self._reserved)

    def encode(self, text: str, max_tokens: int) -> list[int]:
        """Token ids, with BOS where the tokenizer writes one; what is too long loses its end."""
        if not self.tokenizer.is_fast:
            # `verbose` would warn of rows longer than the model's limit
            return self.tokenizer(text, verbose=False)["input_ids"][:max_tokens]
        # the same without what else a call works out, as where in the text each token stands: that doubles the time
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        (encoding,) = backend.encode_batch_fast([text])
        return encoding.ids[:max_tokens]


class RejectedSample(SampleError):
    """A sample that is whole, but not wanted; `reason` says why. Such are counted, not warned of."""


@dataclass
class ImageTextPairs:
    """
    A picture and its caption: LAION, CC3M, CC12M and all that img2dataset writes.

    The picture is the part `jpg`, `png`, `jpeg` or `webp`, the first there is: an encoded picture of any kind, or
    base64 text of one, as LAION's shards of 2023 have it. The caption is the part `txt`, in UTF-8. Other parts are not
    used.

    Args:
        max_tokens: longer rows lose their end.
        mirror: chance of a picture to be mirrored; 2023 drew once for a whole batch.
        legacy_pictures: read pictures as the code of 2023 did, see `otter_hf.pictures`.
    """

    max_tokens: int = 32
    mirror: float = 0.5
    legacy_pictures: bool = False

    label_all = True  # every token is learned, not only those behind an image
    picture_suffixes = ("jpg", "png", "jpeg", "webp")

    def __post_init__(self):
        _check_range("max_tokens", self.max_tokens, 2)
        _check_range("mirror", self.mirror, 0, 1)
        _check_switch("legacy_pictures", self.legacy_pictures)

    def __call__(
        self, id: str, parts: Mapping[str, bytes], encoder: TextEncoder, generator: Random
    ) -> PretrainingSample:
        """
        Args:
            id: for messages.
            parts: bytes by suffix.
            encoder: of the tokenizer of a Flamingo or Otter.
            generator: of the random choices.

        Raises:
            SampleError: naming the sample and what is wrong with it.
        """
        data = next((parts[suffix] for suffix in self.picture_suffixes if suffix in parts), None)
        if data is None or "txt" not in parts:
            missing = "picture (jpg, png, jpeg or webp)" if data is None else "txt"
            raise SampleError(f"Sample {id!r} has no {missing}, it has {sorted(parts)}.", "missing part")
        try:
            caption = parts["txt"].decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise SampleError(f"The caption of sample {id!r} is no UTF-8 text: {error}.", "unreadable text") from None
        if not caption:
            raise SampleError(f"The caption of sample {id!r} is empty.", "empty text")
        mirrored = generator.random() < self.mirror
        try:
            # an encoded picture always has bytes outside of ASCII
            encoded = decode_base64(data.decode("ascii")) if data.isascii() else data
            image = decode_image(encoded, self.legacy_pictures)
        except (OSError, ValueError) as error:
            raise SampleError(f"The picture of sample {id!r} cannot be read: {error}.", "unreadable image") from None
        text = IMAGE_TOKEN + encoder.escape(caption) + END_OF_CHUNK_TOKEN + encoder.eos_token
        image = ImageOps.mirror(image) if mirrored else image
        return PretrainingSample(id, encoder.encode(text, self.max_tokens), [image])


@dataclass
class InterleavedDocuments:
    """
    Sentences with pictures between them: MMC4.

    The part `json` is a document of MMC4, where each entry of `image_info` has its picture as `image_base64`. Pictures
    with too few bytes, too little similarity to their sentence, or that cannot be read are left out, and of the others
    the first `max_images`. A document without a picture within the thresholds is rejected, one with a single picture
    most of the time; one whose pictures are damaged (base64 or picture) is an error.

    Args:
        min_image_bytes: of an encoded picture, in bytes; 11,000 is 2023's "more than 10 kB" in whole kB.
        min_similarity: of picture and sentence, `matched_sim`; the value itself is enough.
        max_images: that are kept, in the order of `image_info`.
        max_tokens: longer rows lose their end, and the pictures that stand there.
        keep_single: chance of a document with one picture left in its row to be kept.
        legacy_pictures: read pictures as the code of 2023 did, see `otter_hf.pictures`.
    """

    min_image_bytes: int = 11_000
    min_similarity: float = 0.32
    max_images: int = 5
    max_tokens: int = 256
    keep_single: float = 0.5
    legacy_pictures: bool = False

    label_all = False

    def __post_init__(self):
        _check_range("min_image_bytes", self.min_image_bytes, 0)
        _check_range("min_similarity", self.min_similarity, -1, 1)
        _check_range("max_images", self.max_images, 1)
        _check_range("max_tokens", self.max_tokens, 2)
        _check_range("keep_single", self.keep_single, 0, 1)
        _check_switch("legacy_pictures", self.legacy_pictures)

    def __call__(
        self, id: str, parts: Mapping[str, bytes], encoder: TextEncoder, generator: Random
    ) -> PretrainingSample:
        """As `ImageTextPairs`; raises `RejectedSample` for a document that the thresholds leave out."""
        sentences, candidates, num_unreadable = self._read(id, parts)
        sentences = [encoder.escape(sentence) for sentence in sentences]
        keeps_single = generator.random() < self.keep_single
        while candidates:
            # in the order of the sentences, which is that of their <image> tokens
            chosen = sorted(candidates[: self.max_images], key=lambda picture: picture.sentence)
            text = interleave(sentences, [picture.sentence for picture in chosen], encoder.eos_token)
            input_ids = encoder.encode(text, self.max_tokens)
            count = input_ids.count(encoder.image_token_id)
            if not count:
                break
            if count == 1 and not keeps_single:
                raise RejectedSample(f"Document {id!r} has a single picture.", "single image")
            images = [picture.image(self.legacy_pictures) for picture in chosen[:count]]
            broken = {picture.number for picture, image in zip(chosen, images, strict=False) if image is None}
            if not broken:
                return PretrainingSample(id, input_ids, images, num_unreadable)
            num_unreadable += len(broken)
            candidates = [picture for picture in candidates if picture.number not in broken]
        if num_unreadable and not candidates:
            raise SampleError(
                f"Document {id!r} has no picture that can be read: {num_unreadable} damaged.", "unreadable image"
            )
        raise RejectedSample(f"Document {id!r} has no picture within the thresholds.", "no image")

    def _read(self, id: str, parts: Mapping[str, bytes]) -> tuple[list[str], list["_Picture"], int]:
        """Sentences, the pictures within the thresholds, and how many of these are no base64."""
        if "json" not in parts:
            raise SampleError(f"Document {id!r} has no json part, it has {sorted(parts)}.", "missing part")
        try:
            document = parse_json(parts["json"])
            sentences = document["text_list"]
            if not all(isinstance(sentence, str) for sentence in sentences):
                raise TypeError("text_list is no list of texts")
            wanted = list(self._wanted(document["image_info"], len(sentences)))
            pictures = [picture for picture in wanted if picture is not None]
            return sentences, pictures, len(wanted) - len(pictures)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SampleError(
                f"Document {id!r} is no MMC4 document ({type(error).__name__}: {error}).", "unreadable text"
            ) from None

    def _wanted(self, image_info: Sequence[Mapping[str, Any]], num_sentences: int) -> Iterator["_Picture | None"]:
        """The pictures within the thresholds; None for a damaged one, whose place or size is not known."""
        for number, info in enumerate(image_info):
            try:
                encoded = info.get("image_base64")
                if encoded is None:
                    continue
                sentence, similarity = int(info["matched_text_index"]), float(info["matched_sim"])
                if not (similarity >= self.min_similarity and 0 <= sentence < num_sentences):
                    continue
                data = decode_base64(encoded)
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
                yield None
                continue
            if len(data) >= self.min_image_bytes:
                yield _Picture(number, sentence, data)


class _Picture(NamedTuple):
    number: int
    sentence: int
    data: bytes

    def image(self, legacy: bool) -> Image.Image | None:
        try:
            return decode_image(self.data, legacy)
        except OSError:
            return None


KINDS = {"pairs": ImageTextPairs, "interleaved": InterleavedDocuments}


def interleave(sentences: Sequence[str], image_sentences: Sequence[int], eos_token: str = "") -> str:
    """
    A document as one text: each picture stands in front of its sentence and ends the chunk before it.

    `A.` `B.` `C.` with pictures at sentences 1 and 2 is `A.<image>B.<|endofchunk|><image>C.<|endofchunk|>` and the EOS
    token. Pictures of one sentence stand together, with no empty chunk between them as 2023 had it.

    Args:
        sentences: their texts.
        image_sentences: the sentence of each picture, from 0.
    """
    pieces, chunk_is_open, glue = [], False, ""
    for number, sentence in enumerate(sentences):
        images = image_sentences.count(number)
        if images:
            pieces.append((END_OF_CHUNK_TOKEN if chunk_is_open else "") + IMAGE_TOKEN * images)
            chunk_is_open, glue = True, ""
        # no space stands beside a special token
        pieces.append(glue + sentence)
        glue = " "
    return "".join(pieces) + END_OF_CHUNK_TOKEN + eos_token


def _check_switch(name: str, value) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}.")


def _check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        limits = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
        raise ValueError(f"{name} must be a number {limits}, got {value!r}.")
