"""Text and images for Flamingo: one `<image>` per medium in the text, pixels batch first."""

from itertools import dropwhile
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.utils import cached_file
from transformers.video_utils import VideoInput

from ...films import check_sampling, read_video
from ...pictures import is_array, is_list, read_image
from ...prompts import reserved_tokens_of
from ..chat_processing import ChatProcessorMixin, as_rows, read_texts
from ..legacy import find_raw_config, is_legacy_config
from ..legacy_tokens import HUB_ARGUMENTS, add_special_tokens, load_tokenizer
from ..prepared_media import PreparedMedium, check_prepared


class FlamingoProcessor(ChatProcessorMixin):
    r"""
    A tokenizer that knows `<image>` and `<|endofchunk|>`, and an image processor.

    Every `<image>` in a text stands for one medium: an image, or a video given as frames. The output holds
    `input_ids (B, L)`, `attention_mask (B, L)`, `pixel_values (B, T, F, C, H, W)`, where T is the largest number of
    media of a text and F the largest number of frames of a medium, and `pixel_attention_mask (B, T, F)`; what has
    fewer is padded with zeros, and the mask is 0 there. Without it a model takes zeros for black frames.

    Args:
        image_processor: any image processor returning `pixel_values` of one size.
        tokenizer: see [`FlamingoProcessor.prepare_tokenizer`]. Its padding side is set to left, which generation
            needs; training collators pad on the right themselves.
        chat_template (`str`, *optional*): Jinja template.
        num_frames (`int`, *optional*): of an encoded film where a call does not say how many, as in training; else 16.

    Raises:
        ValueError: if a special token is missing in the tokenizer, or `num_frames` is no number of frames.
    """

    text_kwargs = {"padding": True}

    image_token = "<image>"
    end_of_chunk_token = "<|endofchunk|>"
    special_tokens = (end_of_chunk_token, image_token)
    # what follows the last of these in a text is the model's answer
    answer_start_token = image_token

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, num_frames=None, **kwargs):
        check_sampling(num_frames, None, None)
        self.num_frames = num_frames
        vocabulary = tokenizer.get_vocab()
        for token in self.special_tokens:
            if token not in vocabulary:
                raise ValueError(
                    f"The tokenizer has no {token!r}; add it with {type(self).__name__}.prepare_tokenizer(tokenizer) "
                    "and then call model.resize_token_embeddings(len(tokenizer))."
                )
        self.image_token_id = vocabulary[self.image_token]
        self.end_of_chunk_token_id = vocabulary[self.end_of_chunk_token]
        tokenizer.padding_side = "left"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def prepare_tokenizer(cls, tokenizer):
        """
        Add the special tokens a base tokenizer lacks, in the order of the 2023 code: `<|endofchunk|>`, `<image>`
        (Otter: `<answer>`), and `<PAD>` if it has no padding token. Returns the tokenizer.
        """
        return add_special_tokens(tokenizer, cls.special_tokens)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, tokenizer=None, tokenizer_reference=None, **kwargs):
        """
        As in the parent class. The tokenizer of a model of 2023 gives the ids of 2023, see `docs/conversion.md`.
        Images are resized by Pillow, as in 2023, also where torchvision is installed, which rounds otherwise:
        transformers would take torchvision's, whatever was saved. `backend="torchvision"` asks for it.

        Args:
            tokenizer (*optional*): a tokenizer, or the folder or repository of one, in place of the repository's own;
                many of 2023 have none. The special tokens it lacks are added.
            tokenizer_reference (`str`, *optional*): for a LLaMA tokenizer of 2023, the version of transformers whose
                ids it gives: `"4.28"` (default), with which Otter's models were trained, or `"4.35"`.

        Raises:
            OSError: if there is no tokenizer.
            ValueError: if a `tokenizer_reference` is unknown, or given for a tokenizer that is not of 2023.
        """
        hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        config = find_raw_config(pretrained_model_name_or_path, **hub_kwargs)
        legacy, num_rows = is_legacy_config(config), None
        if legacy:
            num_rows = config["text_config"].get("vocab_size")
        if isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(tokenizer, legacy=legacy, reference=tokenizer_reference)
        elif tokenizer is None and (legacy or tokenizer_reference is not None):
            tokenizer = load_tokenizer(
                pretrained_model_name_or_path, legacy=legacy, reference=tokenizer_reference, **hub_kwargs
            )
        elif tokenizer_reference is not None:
            raise ValueError(
                f"tokenizer_reference is {tokenizer_reference!r}, but tokenizer is a tokenizer already, which has its "
                "ids: give its folder, or leave tokenizer_reference out."
            )
        if tokenizer is not None:
            kwargs["tokenizer"] = add_special_tokens(tokenizer, cls.special_tokens, num_rows=num_rows)
        kwargs.setdefault("backend", "pil")
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _load_tokenizer_from_pretrained(cls, *args, tokenizer=None, backend=None, **kwargs):
        # the backend is the image processor's: a tokenizer would keep it as its own, and pass for a slow one
        return super()._load_tokenizer_from_pretrained(*args, **kwargs) if tokenizer is None else tokenizer

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # repositories of 2023 hold no image processor: the code took CLIP's, at the size of its vision tower
        hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        files = ("processor_config.json", "preprocessor_config.json")
        if any(
            cached_file(pretrained_model_name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
            for file in files
        ):
            return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        vision_config = find_raw_config(pretrained_model_name_or_path, **hub_kwargs).get("vision_config") or {}
        size = vision_config.get("image_size", 224)
        image_processor = CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
        tokenizer = cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs)
        return [image_processor, tokenizer]

    def __call__(
        self,
        images: ImageInput | list[ImageInput] | None = None,
        text: str | list[str] | None = None,
        videos: VideoInput | list[VideoInput] | None = None,
        audio: None = None,
        legacy_pictures: bool | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images: one image, a list or array of images, or per text a list, one image or None. A flat list is dealt
                out to the texts in order, one image per `<image>`. What an image may be, and how its numbers, axes,
                transparency and orientation are read, is in `otter_hf.pictures`.
            text: one text or a list of B texts.
            videos: as `images`; what a video may be is in `otter_hf.films`. Of an encoded one `num_frames` (default:
                those of the processor) frames evenly spaced in time are taken, or `fps` a second, or with
                `do_sample_frames=False` all; of frames all, unless `num_frames` is given. A text holds images or
                videos, not both.
            legacy_pictures (`bool`, defaults to `False`): read images as the code of 2023 did, without orientation
                and with transparency dropped.
            kwargs: those of the tokenizer and the image processor, `return_tensors`, and `return_mm_token_type_ids`:
                `mm_token_type_ids (B, L)`, 1 for `<image>`.

        Raises:
            ValueError: if images and `<image>` tokens differ in number, naming the text; if an image cannot be read,
                naming it; if `truncation` would cut an `<image>` or the `<answer>` of a prompt; for an option that
                does not exist; if there is nothing to process.
        """
        if audio is not None:
            raise ValueError("audio was given, but Flamingo sees images and videos only; leave it out.")
        if images is None and text is None and videos is None:
            raise ValueError("Nothing to process: give text, images or videos.")
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        return_tensors = merged["text_kwargs"].pop("return_tensors", None)
        with_types = merged["text_kwargs"].pop("return_mm_token_type_ids", None)
        merged["images_kwargs"].pop("return_tensors", None)

        data = {}
        counts = None
        if text is not None:
            texts = read_texts(text)
            data = dict(self.tokenizer(texts, **merged["text_kwargs"]))
            if merged["text_kwargs"].get("truncation") not in (None, False, "do_not_truncate"):
                self._check_cut(texts, data["input_ids"], merged["text_kwargs"])
            counts = [list(ids).count(self.image_token_id) for ids in data["input_ids"]]
            data.pop("token_type_ids", None)
            if with_types:
                data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if images is not None or videos is not None:
            options, images_kwargs = merged["videos_kwargs"], merged["images_kwargs"]
            sampling = {name: options.get(name) for name in ("num_frames", "fps", "do_sample_frames")}
            check_sampling(**sampling)
            sampling["default_num_frames"] = self.num_frames
            reading = {
                "legacy": bool(legacy_pictures),
                "input_data_format": images_kwargs.pop("input_data_format", None),
            }
            if images_kwargs.get("do_rescale") is False:
                # the reader makes 0 to 255 of floats of 0 to 1, and refuses all else
                reading["rescaled"] = True
                images_kwargs |= {"do_rescale": True, "rescale_factor": 1 / 255}
            pictures = deal_out(images, counts, "images", _is_image)
            clips = deal_out(videos, counts, "videos", _is_video)
            media = []
            for row in range(max(len(pictures), len(clips))):
                row_pictures, row_clips = ([*rows[row]] if row < len(rows) else [] for rows in (pictures, clips))
                if row_pictures and row_clips:
                    raise ValueError(
                        f"text[{row}] has both images and videos, whose order {self.image_token} tokens cannot tell; "
                        "pass the images as videos of one frame."
                    )
                media.append(
                    [
                        image if isinstance(image, PreparedMedium) else [read_image(image, name, **reading)]
                        for name, image in _named(f"images[{row}]", row_pictures)
                    ]
                    + [
                        clip if isinstance(clip, PreparedMedium) else read_video(clip, name, **sampling, **reading)
                        for name, clip in _named(f"videos[{row}]", row_clips)
                    ]
                )
            self.check_media_counts(counts, [len(row_media) for row_media in media])
            data |= self.pack_media(media, **merged["images_kwargs"])
        elif counts is not None:
            self.check_media_counts(counts, [0] * len(counts))
        return BatchFeature(data, tensor_type=return_tensors)

    def _fit_media(self, messages: list[dict]) -> list[dict]:
        """Beside a film a picture becomes one of one frame: the processor is given all pictures, then all films."""
        parts = [
            part for message in messages if isinstance(message.get("content"), list) for part in message["content"]
        ]
        if not any(part["type"] == "video" for part in parts):
            return messages

        def fit(part: dict, name: str) -> dict:
            if part["type"] != "image":
                return part
            (image,) = (part[key] for key in part if key != "type")
            if isinstance(image, PreparedMedium):
                return {"type": "video", "video": image}
            if isinstance(image, (str, Path)):
                image = read_image(image, name)  # a list of paths would be several films
            return {"type": "video", "video": [image]}

        return [
            {**message, "content": [fit(part, f"messages[{i}].content[{j}]") for j, part in enumerate(content)]}
            if isinstance(content := message.get("content"), list)
            else message
            for i, message in enumerate(messages)
        ]

    def _prepare_medium(self, kind: str, medium, **kwargs) -> PreparedMedium:
        pixels = self(**{f"{kind}s": [[medium]]}, return_tensors="pt", **kwargs)["pixel_values"]  # (1, 1, F, C, H, W)
        return PreparedMedium(pixels[0, 0])

    def _check_cut(self, texts: list[str], kept: list[list[int]], text_kwargs: dict) -> None:
        """Raise ValueError for the first text of which truncation left too little in `kept`."""
        limit = text_kwargs.get("max_length") or self.tokenizer.model_max_length
        specials = text_kwargs.get("add_special_tokens") is not False
        full = self.tokenizer(texts, add_special_tokens=specials, verbose=False)["input_ids"]
        image_id, answer_id = self.tokenizer.convert_tokens_to_ids([self.image_token, self.answer_start_token])
        for row, (before, after) in enumerate(zip(full, kept, strict=True)):
            after = list(after)
            if len(before) <= limit:
                continue
            lost = None
            if before.count(image_id) != after.count(image_id):
                lost = self.image_token
            elif answer_id in before and (answer_id not in after or (before[-1] == answer_id != after[-1])):
                lost = self.answer_start_token  # a prompt ends with it; behind it an answer may be cut
            if lost is not None:
                raise ValueError(
                    f"text[{row}] has {len(before)} tokens, and cutting it to max_length={limit} would take {lost} "
                    "away; allow more tokens or shorten the text."
                )

    def check_media_counts(self, token_counts: list[int] | None, media_counts: list[int]) -> None:
        """Raise ValueError for the first text whose `<image>` tokens and media differ in number."""
        for row, (tokens, media) in enumerate(zip(token_counts or media_counts, media_counts, strict=True)):
            if tokens != media:
                raise ValueError(
                    f"text[{row}] has {tokens} {self.image_token} token(s) but {media} image(s) or video(s); pass "
                    f"exactly one per {self.image_token}, in their order."
                )

    def pack_media(
        self, media: list[list[list[Image.Image] | PreparedMedium]], **images_kwargs
    ) -> dict[str, torch.Tensor]:
        """
        Preprocess nested media and lay them out batch first.

        Args:
            media: texts -> media (one per `<image>`) -> frames, or a medium that is ready.
            images_kwargs: for the image processor.

        Returns:
            `pixel_values (B, T, F, C, H, W)` float32, zero where a row has fewer media or a medium fewer frames, and
            `pixel_attention_mask (B, T, F)` int64, 1 for frames, 0 for padding. With no medium at all it is one zero
            image per row: in distributed training every rank must run the same modules, and the model encodes but
            never shows an image that no token refers to.
        """
        prepared = [medium for row in media for medium in row if isinstance(medium, PreparedMedium)]
        frames = [frame for row in media for m in row if not isinstance(m, PreparedMedium) for frame in m]
        shape = (len(media), max(map(len, media), default=0), max((len(m) for row in media for m in row), default=0))
        if not frames and not prepared:
            frames, shape = [Image.new("RGB", (8, 8))], (len(media), 1, 1)
        images_kwargs["return_tensors"] = "pt"
        pixels = torch.empty(0)
        if frames:
            pixels = self.image_processor(images=frames, **images_kwargs)["pixel_values"]  # (N, C, H, W)
        of_frame = tuple((pixels if frames else prepared[0].pixels).shape[1:])
        check_prepared(prepared, of_frame, "frames")
        packed = pixels.new_zeros(*shape, *of_frame)
        mask = torch.zeros(shape, dtype=torch.int64)  # (B, T, F)
        next_frame = iter(pixels)
        for i, row in enumerate(media):
            for j, medium in enumerate(row):
                mask[i, j, : len(medium)] = 1
                if isinstance(medium, PreparedMedium):
                    packed[i, j, : len(medium)] = medium.pixels
                    continue
                for k in range(len(medium)):
                    packed[i, j, k] = next(next_frame)
        return {"pixel_values": packed, "pixel_attention_mask": mask}

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs) -> list[str]:
        """
        The model's answer in each generated sequence: what follows the last `<answer>` (Flamingo: the last
        `<image>`), or the start if there is none, up to `<|endofchunk|>`.

        Args:
            generated_outputs: `(B, L)` ids from `generate`, with or without the prompt, or one sequence `(L,)`.
            skip_special_tokens, kwargs: for the tokenizer's `decode`.
        """
        start_id = self.tokenizer.convert_tokens_to_ids(self.answer_start_token)
        stop_ids = {self.end_of_chunk_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        lead_ids = {self.tokenizer.bos_token_id, self.tokenizer.pad_token_id}  # OPT begins with what it ends with
        answers = []
        for ids in as_rows(generated_outputs):
            if start_id in ids:
                ids = ids[len(ids) - ids[::-1].index(start_id) :]
            else:
                ids = list(dropwhile(lead_ids.__contains__, ids))
            end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
            text = self.tokenizer.decode(ids[:end], skip_special_tokens=skip_special_tokens, **kwargs)
            answers.append(text.strip())
        return answers

    @property
    def reserved_tokens(self) -> list[str]:
        """What the words of a user may not hold, see `otter_hf.prompts.escape_reserved_tokens`."""
        return reserved_tokens_of(self.tokenizer)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"]


def _named(name: str, items: list) -> list[tuple[str, object]]:
    return [(f"{name}[{i}]", item) for i, item in enumerate(items)]


def _is_image(item) -> bool:
    """Anything but a list, or an array of several pictures."""
    return not is_list(item) and not (is_array(item) and item.ndim > 3)


def _is_video(item) -> bool:
    """
    An encoded video, an array of frames, or a list of frames: of PIL images or arrays of one picture. A list of
    anything else is one of videos.
    """
    if is_list(item):
        return len(item) > 0 and all(
            isinstance(frame, Image.Image) or (is_array(frame) and frame.ndim < 4) for frame in item
        )
    return not (is_array(item) and item.ndim > 4)


def deal_out(media, counts: list[int] | None, kind: str, is_medium) -> list[list]:
    """
    One list of media per text, from one medium, a flat list (dealt out by `counts`), or per text a list, one medium
    or None.

    Args:
        media: what the user gave, or None.
        counts: `<image>` tokens of each text; None without texts.
        kind: what to call the media in an error.
        is_medium: tells a medium from a list of them.

    Raises:
        ValueError: if a flat list or the number of lists does not fit `counts`.
    """
    if media is None:
        return []
    media = [media] if is_medium(media) else list(media)
    if all(item is not None and is_medium(item) for item in media):
        counts = [len(media)] if counts is None else counts
        if sum(counts) != len(media):
            raise ValueError(
                f"{len(media)} {kind} were given for {sum(counts)} <image> token(s) in {len(counts)} text(s); pass "
                "exactly one per <image>."
            )
        remaining = iter(media)
        return [[next(remaining) for _ in range(count)] for count in counts]
    if counts is not None and len(media) != len(counts):
        raise ValueError(f"{len(media)} lists of {kind} were given for {len(counts)} text(s); pass one list per text.")
    return [[] if row is None else [row] if is_medium(row) else list(row) for row in media]


__all__ = ["FlamingoProcessor"]
