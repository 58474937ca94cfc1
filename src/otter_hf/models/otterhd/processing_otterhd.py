"""OtterHD's processor: text and images to the token sequence of Fuyu, and back.

A row with images is written as in 2023 (transformers 4.35's and Luodian/Otter's `FuyuProcessor`):

    image 1, image 2, ... `<s>` text `<0x04>`

where an image is its rows of patches, `|SPEAKER|` for a patch and `|NEWLINE|` after the last patch of a row, and
`<0x04>` (the character U+0004 in text) opens the answer. A row without images is `|ENDOFTEXT|` text. Images stand in
front of the text in the order given, unless the text places them itself with `|SPEAKER|`.
"""

from collections.abc import Sequence

import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, TextKwargs, Unpack
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from ...films import check_sampling
from ...pictures import is_list
from ...prompts import chat_template as format_chat_template
from ...prompts import escape_reserved_tokens
from ..chat_processing import UNSUPPORTED_TEXT_OPTIONS, ChatProcessorMixin, as_rows, read_texts
from ..prepared_media import PreparedMedium
from .image_processing_otterhd import OtterHDImageProcessor, OtterHDImagesKwargs
from .locations_otterhd import LOCATION, OtterHDLocationsMixin


IMAGE_TOKEN = "|SPEAKER|"
IMAGE_NEWLINE_TOKEN = "|NEWLINE|"
END_OF_TEXT_TOKEN = "|ENDOFTEXT|"
TEXT_START_TOKEN = "<s>"
ANSWER_TOKEN = "<0x04>"

# The tokenizer reads these as tokens wherever they stand in a text, also in one a user typed.
RESERVED_TOKENS = (
    IMAGE_TOKEN,
    IMAGE_NEWLINE_TOKEN,
    END_OF_TEXT_TOKEN,
    TEXT_START_TOKEN,
    "</s>",
    "<unk>",
    *(f"<0x0{code}>" for code in range(5)),
    *(chr(code) for code in range(5)),
)

# a conversation that ends with an answer ends as in training
_CONVERSATION_END = f"""\
{{%- if state.turns and not state.asked and not add_generation_prompt -%}}
    {{%- generation -%}}
        {{{{- '{END_OF_TEXT_TOKEN}' -}}}}
    {{%- endgeneration -%}}
{{%- endif -%}}
"""


class OtterHDTextKwargs(TextKwargs, total=False):
    r"""
    add_answer_token (`bool`, *optional*):
        Whether to end each row with `<0x04>`, after which the model answers. By default it is added where 2023 added
        it, to rows with images, unless the text holds one already. A row that ends with it never gets a second one.
    """

    add_answer_token: bool | None


class OtterHDProcessorKwargs(ProcessingKwargs, total=False):
    """Options of a call of the processor, by what they are for."""

    text_kwargs: OtterHDTextKwargs
    images_kwargs: OtterHDImagesKwargs
    _defaults = {"text_kwargs": {"padding": True, "return_mm_token_type_ids": False}}


class OtterHDProcessor(ChatProcessorMixin, OtterHDLocationsMixin):
    r"""
    Joins [`OtterHDImageProcessor`] and the tokenizer of Fuyu.

    Args:
        image_processor ([`OtterHDImageProcessor`]): turns images into patches.
        tokenizer ([`TokenizersBackend`]): Fuyu's Unigram tokenizer. The files call it `LlamaTokenizer`, whose class
            gives other ids: load with `OtterHDProcessor.from_pretrained`.
        chat_template (`str`, *optional*): Jinja template; defaults to the format OtterHD was trained with,
            `User:{question} Assistant:` and the answer after `<0x04>`. Reserved tokens in the messages are escaped.
        num_frames (`int`, *optional*): of a film in training, for programs that make pictures of films.
    """

    valid_processor_kwargs = OtterHDProcessorKwargs
    reserved_tokens = RESERVED_TOKENS
    modalities = ("text", "images")
    unsupported_text_options = (
        *UNSUPPORTED_TEXT_OPTIONS,
        "return_length",
        "return_special_tokens_mask",
        "return_token_type_ids",
        "sanitize_control_tokens",
    )

    def __init__(self, image_processor, tokenizer, chat_template: str | None = None, num_frames: int | None = None):
        check_sampling(num_frames, None, None)
        self.num_frames = num_frames
        vocabulary = tokenizer.get_vocab()
        for token in (IMAGE_TOKEN, IMAGE_NEWLINE_TOKEN, END_OF_TEXT_TOKEN, TEXT_START_TOKEN, ANSWER_TOKEN):
            if token not in vocabulary:
                raise ValueError(f"The tokenizer has no token {token!r}: use the tokenizer of a Fuyu checkpoint.")
        self.image_token = IMAGE_TOKEN
        self.image_newline_token = IMAGE_NEWLINE_TOKEN
        ids = tokenizer.convert_tokens_to_ids
        self.image_token_id, self.image_newline_id = ids(IMAGE_TOKEN), ids(IMAGE_NEWLINE_TOKEN)
        self.text_start_id, self.end_of_text_id = ids(TEXT_START_TOKEN), ids(END_OF_TEXT_TOKEN)
        self.answer_token_id = ids(ANSWER_TOKEN)
        if tokenizer("a\x04", add_special_tokens=False)["input_ids"][-1:] != [self.answer_token_id]:
            raise ValueError(
                f"{type(tokenizer).__name__} does not read U+0004 as {ANSWER_TOKEN}: load the tokenizer with "
                "OtterHDProcessor.from_pretrained or TokenizersBackend.from_pretrained."
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = "<unk>"  # id 0, as transformers pads Fuyu
        tokenizer.padding_side = "left"  # as generation needs it
        super().__init__(
            image_processor,
            tokenizer,
            chat_template=chat_template or format_chat_template("fuyu", RESERVED_TOKENS) + _CONVERSATION_END,
        )

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # neither Auto class will do: the files of 2023 name a broken image processor and the wrong tokenizer class
        kwargs.pop("backend", None)  # of image processors with several, as this one has not
        image_processor = OtterHDImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        tokenizer = TokenizersBackend.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if "token_type_ids" in tokenizer.model_input_names:
            tokenizer.model_input_names.remove("token_type_ids")
        return [image_processor, tokenizer]

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | Sequence[str] | None = None,
        videos=None,
        audio=None,
        **kwargs: Unpack[OtterHDProcessorKwargs],
    ) -> BatchFeature:
        r"""
        Prepares rows for the model.

        Args:
            images: an image, a list with one image per text (or any number of images for one text), or a list of lists
                with the images of each text, which may be empty or None. What an image may be, and how its numbers,
                axes, transparency and orientation are read, is in `otter_hf.pictures`.
            text: the prompt of each row; `None` with images is an empty prompt per image. `|SPEAKER|` in it is the
                place of an image; escape it in the words of a user with `escape_reserved_tokens`. Locations are
                written `<box>y1, x1, y2, x2</box>` and `<point>x, y</point>` in pixels of the image as given (the last
                image before the tag).
            add_answer_token (`bool`, *optional*): whether rows end with `<0x04>`, see [`OtterHDTextKwargs`].
            resolution, max_pixels, size, ...: options of [`OtterHDImageProcessor`].
            padding (`bool` or `str`, defaults to `True`): `True` or `"longest"`, `"max_length"`, or `False`.
            padding_side (`str`, *optional*): `"left"` (the tokenizer's default; padded with its pad token, as
                transformers does) or `"right"` (padded with `|ENDOFTEXT|`, as OtterHD's training did).
            pad_to_multiple_of (`int`, *optional*): pad to a multiple of this.
            truncation (`bool`, defaults to `False`), max_length (`int`, *optional*): cut the end of the *text*; image
                tokens and `<s>` are never cut. A text that holds a `<0x04>` is cut behind the last one only, and
                refused where that is not enough.
            return_offsets_mapping (`bool`, *optional*): also return for each token its first and last character (plus
                one) in the text, (0, 0) for those not from the text.
            return_mm_token_type_ids (`bool`, defaults to `False`): also return 1 for the tokens of images, `|NEWLINE|`
                included, and 0 for others.
            return_tensors (`str`, *optional*): `"pt"`, or lists when rows are not padded; by default `"pt"` where
                possible.

        Returns:
            `BatchFeature` with **input_ids** and **attention_mask** of shape `(B, L)` and, if there are images,
            **pixel_values** of shape `(N, patch size ** 2 * 3)`: the patches of all rows in the order of their tokens;
            and **image_grid_thw** of shape `(I, 3)`: 1, rows and columns of patches of each image, by which programs
            that know Qwen-VL's layout (TRL's GRPO) deal the patches out to rows again. The model needs it not.

        Raises:
            ValueError: for numbers of images and texts, or images and placeholders, that do not match; for a location
                that is not made of 4 or 2 numbers or has no token; for images and prompts longer than `max_length`;
                for videos and audio; for an option that does not exist; and for images that
                [`OtterHDImageProcessor`] refuses.
        """
        if videos is not None or audio is not None:
            raise ValueError("OtterHD reads images only: pass the frames of a video as images.")
        if text is None and images is None:
            raise ValueError("Give text, images or both.")
        options = self._merge_kwargs(
            OtterHDProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        texts, image_lists = self._match_images(None if text is None else read_texts(text), images)

        grids, factors, image_inputs = [], [], {}
        flat_images = [image for row in image_lists for image in row]
        if flat_images:
            media = self.image_processor.prepare(flat_images, **options["images_kwargs"])
            grids, factors = [medium.grid for medium in media], [medium.scale for medium in media]
            image_inputs = {
                "pixel_values": torch.cat([medium.pixels.float() for medium in media]),
                "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
            }

        rows, offsets, start = [], [], 0
        for index, (row_text, row_images) in enumerate(zip(texts, image_lists, strict=True)):
            end = start + len(row_images)
            try:
                tokens = self._encode(row_text, grids[start:end], factors[start:end], **options["text_kwargs"])
            except ValueError as error:
                raise ValueError(f"Row {index}: {error}") from error
            rows.append([token for token, _, _ in tokens])
            offsets.append([(begin, end) if begin >= 0 else (0, 0) for _, begin, end in tokens])
            start = end
        return self._collate(rows, offsets, image_inputs, **options["text_kwargs"])

    def encode(
        self,
        text: str,
        grids: Sequence[tuple[int, int]] = (),
        scale_factors: Sequence[tuple[float, float]] = (),
        add_answer_token: bool | None = None,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        **kwargs,
    ) -> tuple[list[int], list[int]]:
        """
        Token ids of one row.

        Args:
            text: the prompt, see `__call__`.
            grids: rows and columns of patches of each image (`patch_grids` of the image processor).
            scale_factors: vertical and horizontal scale of each image (`image_scale_factors`), used for locations;
                1 where left out.
            add_special_tokens: False leaves out the `|ENDOFTEXT|` in front of a row without images, for a text that
                goes on with another one.
            add_answer_token, truncation, max_length: see `__call__`.

        Returns:
            the ids, and for each the place of its first character in `text`, or -1 for tokens not from the text.
        """
        tokens = self._encode(
            text, grids, scale_factors, add_answer_token, add_special_tokens, truncation, max_length, **kwargs
        )
        return [token for token, _, _ in tokens], [start for _, start, _ in tokens]

    def _encode(
        self,
        text: str,
        grids: Sequence[tuple[int, int]],
        scale_factors: Sequence[tuple[float, float]],
        add_answer_token: bool | None = None,
        add_special_tokens: bool | None = True,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        **kwargs,
    ) -> list[tuple[int, int, int]]:
        """Token ids, each with its first character in `text` and the one behind its last, or -1 and -1."""
        scale_factors = scale_factors or [(1.0, 1.0)] * len(grids)
        pieces = text.split(IMAGE_TOKEN)
        in_front = len(grids) if len(pieces) == 1 else 0
        if not in_front and len(pieces) - 1 != len(grids):
            raise ValueError(
                f"the text places {len(pieces) - 1} images ({IMAGE_TOKEN}) but {len(grids)} were given: make them "
                "equal, or escape what a user typed with escape_reserved_tokens."
            )
        pieces = [""] * in_front + pieces
        tokens: list[tuple[int, int, int]] = []
        first_text = next((i for i, piece in enumerate(pieces) if piece), len(pieces) - 1)
        position = 0
        for index, piece in enumerate(pieces):
            if index:
                tokens += [(token, -1, -1) for token in self._image_ids(*grids[index - 1])]
            if index == first_text and (grids or add_special_tokens):
                tokens.append((self.text_start_id if grids else self.tokenizer.bos_token_id, -1, -1))
            tokens += self._encode_text(piece, position, scale_factors[index - 1] if index else None)
            position += len(piece) + (0 if index < in_front else len(IMAGE_TOKEN))

        openings = [place for place, (token, _, _) in enumerate(tokens) if token == self.answer_token_id]
        wanted = (bool(grids) and not openings) if add_answer_token is None else add_answer_token
        if not tokens:
            return []
        suffix = [(self.answer_token_id, -1, -1)] if wanted and tokens[-1][0] != self.answer_token_id else []
        excess = len(tokens) + len(suffix) - (max_length or 0)
        if truncation in (None, False, "do_not_truncate") or max_length is None or excess <= 0:
            return tokens + suffix
        texts = [place for place, (_, start, _) in enumerate(tokens) if start >= 0]
        if openings and excess <= len(texts) and texts[-excess] <= openings[-1]:
            raise ValueError(
                f"it has {len(tokens) + len(suffix)} tokens and would be cut before its answer starts, at "
                f"{ANSWER_TOKEN}: max_length={max_length} is too small."
            )
        return _cut_text(tokens, excess, max_length) + suffix

    def _prepare_medium(self, kind: str, medium, **kwargs) -> PreparedMedium:
        if kind != "image":
            raise ValueError("OtterHD reads images only: pass the frames of a video as images.")
        options = self._merge_kwargs(
            OtterHDProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        return self.image_processor.prepare([medium], **options["images_kwargs"])[0]

    def _image_ids(self, rows: int, columns: int) -> list[int]:
        return ([self.image_token_id] * columns + [self.image_newline_id]) * rows

    def _encode_text(
        self, text: str, position: int, scale_factors: tuple[float, float] | None
    ) -> list[tuple[int, int, int]]:
        """Ids of a piece of text that stands at `position`, with the places of each; translates locations."""
        tokens, start = [], 0
        # without an image there are no pixels to point at: tags are then words like others, as in 2023
        for match in LOCATION.finditer(text) if scale_factors is not None else ():
            tokens += self._tokenize(text[start : match.start()], position + start)
            place = (position + match.start(), position + match.end())
            tokens += [(token, *place) for token in self._location_ids(match, scale_factors)]
            start = match.end()
        return tokens + self._tokenize(text[start:], position + start)

    def _tokenize(self, text: str, position: int = 0) -> list[tuple[int, int, int]]:
        if not text:
            return []
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = encoded["offset_mapping"]
        return [
            (token, position + start, position + end)
            for token, (start, end) in zip(encoded["input_ids"], places, strict=True)
        ]

    def _match_images(self, texts: list[str] | None, images) -> tuple[list[str], list[list]]:
        """The texts, and the list of images of each."""
        if images is None:
            return texts, [[] for _ in texts]
        images = list(images) if _is_list(images) else [images]
        if texts is None:
            texts = [""] * len(images)
        if any(entry is None or _is_list(entry) for entry in images):
            rows = [[] if entry is None else list(entry) if _is_list(entry) else [entry] for entry in images]
        elif len(texts) == 1:
            rows = [images]
        elif len(texts) == len(images):
            rows = [[image] for image in images]
        else:
            counts = [row_text.count(IMAGE_TOKEN) for row_text in texts]
            if sum(counts) != len(images):
                raise ValueError(
                    f"{len(images)} images for {len(texts)} texts: give one per text, or a list of lists with the "
                    "images of each text."
                )
            remaining = iter(images)
            rows = [[next(remaining) for _ in range(count)] for count in counts]
        if len(rows) != len(texts):
            raise ValueError(f"{len(rows)} lists of images for {len(texts)} texts: give one list per text.")
        for index, row in enumerate(rows):
            if nested := [place for place, image in enumerate(row) if _is_list(image)]:
                raise ValueError(f"images[{index}][{nested[0]}] holds several images: give one for each place.")
        return texts, rows

    def _collate(
        self,
        rows: list[list[int]],
        offsets: list[list[tuple[int, int]]],
        image_inputs: dict,
        padding: bool | str = True,
        padding_side: str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_mm_token_type_ids: bool = False,
        return_offsets_mapping: bool | None = None,
        **kwargs,
    ) -> BatchFeature:
        side = padding_side or self.tokenizer.padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {side!r}.")
        if padding not in (True, False, None, "longest", "max_length", "do_not_pad"):
            raise ValueError(f"padding must be True, False, 'longest', 'max_length' or 'do_not_pad', got {padding!r}.")
        length = 0
        if padding in (True, "longest", "max_length"):
            length = max_length if padding == "max_length" and max_length is not None else max(map(len, rows))
            length += -length % (pad_to_multiple_of or 1)
        pad_id = self.tokenizer.pad_token_id if side == "left" else self.end_of_text_id
        input_ids, masks, places = [], [], []
        for row, row_offsets in zip(rows, offsets, strict=True):
            missing = max(length - len(row), 0)
            before, after = (missing, 0) if side == "left" else (0, missing)
            input_ids.append([pad_id] * before + row + [pad_id] * after)
            masks.append([0] * before + [1] * len(row) + [0] * after)
            places.append([(0, 0)] * before + row_offsets + [(0, 0)] * after)
        data = {"input_ids": input_ids}
        if return_attention_mask is not False:
            data["attention_mask"] = masks
        if return_offsets_mapping:
            data["offset_mapping"] = places
        if return_mm_token_type_ids:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(input_ids)
        if return_tensors is None and len({len(row) for row in input_ids}) == 1:
            return_tensors = "pt"
        return BatchFeature(data | image_inputs, tensor_type=return_tensors)

    @staticmethod
    def escape_reserved_tokens(text: str) -> str:
        """`text` with the tokens a user must not inject made ordinary text: `|SPEAKER|` becomes `| SPEAKER|`."""
        return escape_reserved_tokens(text, RESERVED_TOKENS)

    @property
    def image_token_ids(self) -> list[int]:
        return [self.image_token_id, self.image_newline_id]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_grid_thw"]

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Tokens and patches of images of the given (height, width), without processing them."""
        data = {}
        if image_sizes is not None:
            grids = [self.image_processor.get_patch_grid(height, width, kwargs) for height, width in image_sizes]
            data["num_image_tokens"] = [rows * (columns + 1) for rows, columns in grids]
            data["num_image_patches"] = [rows * columns for rows, columns in grids]
        return MultiModalData(**data)

    def post_process_image_text_to_text(
        self, generated_outputs, skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        """
        The answers in generated sequences, which may include the prompt.

        Args:
            generated_outputs: token ids `(B, L)` or one sequence `(L,)`; tensors, arrays or lists.
            skip_special_tokens: whether to leave out `|ENDOFTEXT|`.

        Returns:
            for each sequence the text after its last `<0x04>`, up to `|ENDOFTEXT|`, without surrounding spaces and
            newlines; of a sequence without `<0x04>`, the text without image tokens.
        """
        answers = []
        for ids in as_rows(generated_outputs):
            if self.answer_token_id in ids:
                ids = ids[len(ids) - ids[::-1].index(self.answer_token_id) :]
                if self.end_of_text_id in ids:
                    ids = ids[: ids.index(self.end_of_text_id) + 1]
            ids = [token for token in ids if token not in self.image_token_ids]
            answer = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)
            answers.append(answer.strip(" ").strip("\n"))
        return answers


def _is_list(images) -> bool:
    """Whether it holds several images: a list, or an array `(N, H, W, C)`."""
    return is_list(images) or getattr(images, "ndim", 0) > 3


def _cut_text(tokens: list[tuple[int, int, int]], excess: int, max_length: int) -> list[tuple[int, int, int]]:
    """`tokens` without the last `excess` of those that come from the text."""
    places = [place for place, (_, start, _) in enumerate(tokens) if start >= 0]
    if excess > len(places):
        raise ValueError(
            f"images and special tokens alone are more than max_length={max_length} tokens (by "
            f"{excess - len(places)}): allow more, or use smaller images (resolution, max_pixels)."
        )
    dropped = set(places[len(places) - excess :])
    return [token for place, token in enumerate(tokens) if place not in dropped]


__all__ = ["RESERVED_TOKENS", "OtterHDProcessor"]
