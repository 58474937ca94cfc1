"""One training sample: from a row of a MIMIC-IT table to turns of text and their media."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image
from transformers.utils import logging

from ..films import FilmLimits, is_film, read_video
from ..prompts import IMAGE_TOKEN, clean_text
from .image_store import ImageStore


logger = logging.get_logger(__name__)

IMAGE_TEXT = "IMAGE_TEXT"
TEXT_ONLY = "TEXT_ONLY"
VIDEO_TEXT = "VIDEO_TEXT"
IMAGE_TEXT_IN_CONTEXT = "IMAGE_TEXT_IN_CONTEXT"
TASK_GROUPS = (IMAGE_TEXT, TEXT_ONLY, VIDEO_TEXT, IMAGE_TEXT_IN_CONTEXT)


class _OptionalKeys(TypedDict, total=False):
    task_description: str | None
    task_group: str
    dataset: str
    resolution: int
    media_places: list[list[int]]


class Sample(_OptionalKeys):
    """One training example, not yet rendered or tokenised.

    `media` holds one list of frames per image or video, in the order of their placeholders: an image has one frame.
    `media_per_turn` tells how many of them each turn brings; it adds up to `len(media)`.
    Optional keys: `task_description`, a line in front of the prompt, `task_group` and `dataset`, where it is from, and
    `resolution`, for OtterHD the side of the square in pixels that its images are resized to; `media_places`, for each
    turn the characters of its instruction in front of each of its media, where not all stand in front (see `render`).
    """

    id: str
    turns: list[tuple[str, str]]
    media_per_turn: list[int]
    media: list[list[Image.Image]]


class SampleError(ValueError):
    """A sample that cannot be used. `reason` is a short name under which such samples are counted."""

    # torch raises errors of data loader workers again with the message as only argument, behind a traceback
    def __init__(self, message: str, reason: str = "unusable"):
        if message.startswith("Caught SampleError in DataLoader worker"):
            message = message.rpartition("SampleError: ")[2].strip()
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class SampleOptions:
    """How samples are made.

    Args:
        num_frames: number of frames a video is resampled to.
        max_context: largest number of context turns or examples; the latest are kept. `None` for all.
        keep_symbols: `False` deletes most punctuation like the original's default, see `clean_text`.
        use_task_description: draw one of the dataset's task descriptions for each sample.
        legacy_pictures: read pictures as the code of 2023 did, see `otter_hf.pictures`.
        frame_side: shorter sides of film frames are shrunk to so many pixels, which should be what the model reads, as
            they are decoded; None keeps them as they are.
        max_image_pixels: of a picture, or of a frame of a film; one with more cannot be used. See `decode_image`.
    """

    num_frames: int = 32
    max_context: int | None = None
    keep_symbols: bool = True
    use_task_description: bool = False
    legacy_pictures: bool = False
    frame_side: int | None = None
    max_image_pixels: int | None = None

    def __post_init__(self):
        if self.max_image_pixels is not None and self.max_image_pixels < 1:
            raise ValueError(f"max_image_pixels must be at least 1, got {self.max_image_pixels}.")
        if self.num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {self.num_frames}.")
        if self.max_context is not None and self.max_context < 0:
            raise ValueError(f"max_context must not be negative, got {self.max_context}.")

    def open_store(self, paths: Sequence[str], cache_dir: str | Path | None = None) -> ImageStore:
        """The image store whose pictures are read by these options; errors as for `ImageStore`."""
        return ImageStore(paths, cache_dir, self.legacy_pictures, self.max_image_pixels)


def frame_indices(num_available: int, num_frames: int) -> list[int]:
    """`num_frames` indices evenly spaced from the first to the last of `num_available` frames, rounded down.

    Repeats frames if there are fewer than asked for. `ValueError` if there are none.
    """
    if num_available < 1:
        raise ValueError("There are no frames to choose from.")
    return np.linspace(0, num_available - 1, num_frames, dtype=int).tolist()


def build_sample(
    row: Mapping[str, Any],
    store: ImageStore,
    task_group: str,
    options: SampleOptions,
    *,
    images_as: str = "frames",
    task_descriptions: Sequence[str] = (),
    generator: random.Random | None = None,
) -> Sample:
    """Makes the sample of one row of `load_mimicit`'s dataset.

    Where the media come from and stand depends on the group:

    * `IMAGE_TEXT`: the images of the record, in front of the first turn; the context are earlier turns about them.
    * `VIDEO_TEXT`: as one video, resampled to `num_frames` frames.
    * `IMAGE_TEXT_IN_CONTEXT`: each context example has its own images in front of its own turn.
    * `TEXT_ONLY`: none.

    A film in the store (an encoded one, see `otter_hf.films`) is a medium of its own in every group, and only its
    `num_frames` frames are decoded, evenly spaced in time.

    The `system` text of the row is the line in front of the prompt, in place of a drawn task description.

    If a record says `images_in_text`, every record of the sample brings its own images; those of that record are media
    of their own and stand where its instruction has an `<image>`. `frames_per_medium` says of how many images each
    medium is made: of a film with more than `num_frames` so many are taken.

    Args:
        row: a row with the columns of `otter_hf.data.formats.FEATURES`.
        store: the images.
        task_group: one of `TASK_GROUPS`.
        options: see `SampleOptions`.
        images_as: several images of one record are the `"frames"` of one medium (one `<image>`, as the original
            trained), or `"media"` of their own (one `<image>` each).
        task_descriptions: what to draw a task description from.
        generator: the random state to draw with, needed with `use_task_description`.

    Raises:
        SampleError: naming the sample and the image, if a text, frame or image is missing or unreadable, or if images
            and places in the text differ in number.
    """
    context = row["context"]
    placed = any(record.get("images_in_text") for record in (*context, row))
    if options.max_context is not None and not placed:
        context = context[max(0, len(context) - options.max_context) :]
    records = [*context, row]
    about_row = task_group in (IMAGE_TEXT, VIDEO_TEXT) and not placed
    if about_row and any(turn["image_ids"] != row["image_ids"] for turn in context):
        logger.warning_once(
            f"Some context in the group {task_group} is about other images than its sample, whose images it is shown "
            f"with: does the dataset belong to {IMAGE_TEXT_IN_CONTEXT}?"
        )

    def media_of(record: Mapping[str, Any]) -> list[list[Image.Image]]:
        ids = record["image_ids"]
        if task_group == TEXT_ONLY:
            return []
        if counts := record.get("frames_per_medium"):
            of_medium = iter(ids)
            return [_medium_of_frames(row["id"], [*islice(of_medium, count)], store, options) for count in counts]
        if not ids:
            return [_load_video(row["id"], ids, store, options.num_frames, {})] if is_video(record) else []
        # of a video one picture tells that the others are its frames
        asked = ids[:1] if task_group == VIDEO_TEXT else ids
        loaded = {id: _load_medium(row["id"], id, store, animated=is_video(record) and len(ids) == 1) for id in asked}
        if any(not isinstance(medium, Image.Image) for medium in loaded.values()):
            loaded |= {id: _load_medium(row["id"], id, store) for id in ids if id not in loaded}
            return [_frames_of(row["id"], id, loaded[id], options) for id in ids]
        if is_video(record):
            return [_load_video(row["id"], ids, store, options.num_frames, loaded)]
        images = [loaded[id] for id in ids]
        return [[image] for image in images] if record.get("images_in_text") or images_as == "media" else [images]

    def is_video(record: Mapping[str, Any]) -> bool:
        return task_group == VIDEO_TEXT and bool(about_row or record["image_ids"])

    media = [media_of(row)] if about_row else [media_of(record) for record in records]
    media += [[]] * (len(records) - len(media))
    description = row.get("system")
    if description is None and options.use_task_description and task_descriptions:
        description = generator.choice(task_descriptions)
    turns = [
        _turn(row["id"], record, len(of_turn), options.keep_symbols)
        for record, of_turn in zip(records, media, strict=True)
    ]
    sample = {
        "id": row["id"],
        "turns": [turn for turn, _ in turns],
        "media_per_turn": [len(of_turn) for of_turn in media],
        "media": [medium for of_turn in media for medium in of_turn],
        "task_description": description,
    }
    if placed:
        sample["media_places"] = [places for _, places in turns]
        # later turns may talk about the media of those that are left out
        while options.max_context is not None and len(sample["turns"]) > options.max_context + 1:
            sample = drop_oldest_turn(sample)
    return sample


def drop_oldest_turn(sample: Sample) -> Sample:
    """The sample without its first turn.

    Images of that turn are dropped with it if the next turn brings its own (in-context examples); otherwise the next
    turn still talks about them, and they move to its front.
    """
    counts = sample["media_per_turn"]
    moved = 0 if counts[1] else counts[0]
    shorter = {
        **sample,
        "turns": sample["turns"][1:],
        "media_per_turn": [moved + counts[1], *counts[2:]],
        "media": sample["media"][counts[0] - moved :],
    }
    if "media_places" in sample:
        places = sample["media_places"]
        shorter["media_places"] = [[0] * moved + places[1], *places[2:]]
    return shorter


def frames_as_media(sample: Sample) -> Sample:
    """The sample with each frame as a medium of its own, for models that have no videos."""
    media = iter(sample["media"])
    per_turn = [[next(media) for _ in range(count)] for count in sample["media_per_turn"]]
    of_frames = {
        **sample,
        "media": [[frame] for of_turn in per_turn for frames in of_turn for frame in frames],
        "media_per_turn": [sum(map(len, of_turn)) for of_turn in per_turn],
    }
    if "media_places" in sample:
        of_frames["media_places"] = [
            [place for place, frames in zip(places, of_turn, strict=True) for _ in frames]
            for places, of_turn in zip(sample["media_places"], per_turn, strict=True)
        ]
    return of_frames


def _turn(id: str, record: Mapping[str, Any], num_media: int, keep_symbols: bool) -> tuple[tuple[str, str], list[int]]:
    """Instruction and answer, and the places of the media in the instruction."""
    for key in ("instruction", "answer"):
        if record[key] is None:
            message = f"Sample {id!r} cannot be used: record {record['id']!r} has no {key} text."
            raise SampleError(message, reason=f"missing {key}")
    answer = clean_text(record["answer"], answer=True, keep_symbols=keep_symbols)
    if not record.get("images_in_text"):
        return (clean_text(record["instruction"], keep_symbols=keep_symbols), answer), [0] * num_media
    pieces = record["instruction"].split(IMAGE_TOKEN)
    if len(pieces) - 1 != num_media:
        message = (
            f"Sample {id!r} cannot be used: the instruction of record {record['id']!r}, which says images_in_text, "
            f"has {len(pieces) - 1} {IMAGE_TOKEN} for {num_media} images."
        )
        raise SampleError(message, reason="images and places")
    if not keep_symbols:
        pieces = [clean_text(piece, keep_symbols=False) for piece in pieces]
    text = "".join(pieces)
    instruction = clean_text(text)
    stripped = text.find(instruction)
    ends = accumulate(map(len, pieces[:-1]))
    return (instruction, answer), [min(max(end - stripped, 0), len(instruction)) for end in ends]


def _load_video(
    id: str, image_ids: list[str], store: ImageStore, num_frames: int, loaded: Mapping[str, Image.Image]
) -> list[Image.Image]:
    if not image_ids:
        message = f"Sample {id!r} of the group {VIDEO_TEXT} has no image_ids: it needs its frames."
        raise SampleError(message, reason="no frames")
    indices = frame_indices(len(image_ids), num_frames)
    frames = {}
    for index in sorted(set(indices)):
        frame = loaded.get(image_ids[index]) or _load_medium(id, image_ids[index], store)
        if not isinstance(frame, Image.Image):
            message = f"Sample {id!r} has frames, and the film {image_ids[index]!r} among them."
            raise SampleError(message, reason="unreadable image")
        frames[index] = frame
    return [frames[index] for index in indices]


def _medium_of_frames(id: str, image_ids: list[str], store: ImageStore, options: SampleOptions) -> list[Image.Image]:
    """A film of several frames, or what one id stands for."""
    if len(image_ids) > 1:
        return _load_video(id, image_ids, store, min(options.num_frames, len(image_ids)), {})
    return _frames_of(id, image_ids[0], _load_medium(id, image_ids[0], store), options)


def _load_medium(id: str, medium_id: str, store: ImageStore, animated: bool = False) -> Image.Image | bytes | Path:
    """A picture, or a film as it lies; with `animated` a GIF is one."""
    try:
        medium = store.medium(medium_id)
        if isinstance(medium, Path) or is_film(medium) or (animated and medium.startswith(b"GIF8")):
            return medium
        return store.decode(medium)
    except KeyError:
        message = f"Sample {id!r} needs image {medium_id!r}, which its image store does not have."
        raise SampleError(message, reason="missing image") from None
    except OSError as error:
        message = f"Sample {id!r} needs image {medium_id!r}, which cannot be decoded ({error})."
        raise SampleError(message, reason="unreadable image") from None


def _frames_of(
    id: str, medium_id: str, medium: Image.Image | bytes | Path, options: SampleOptions
) -> list[Image.Image]:
    """The frames of a medium of its own: a picture has one, a film `num_frames`, evenly spaced in time."""
    if isinstance(medium, Image.Image):
        return [medium]
    pixels = Image.MAX_IMAGE_PIXELS if options.max_image_pixels is None else options.max_image_pixels
    limits = FilmLimits(short_side=options.frame_side)
    limits = replace(limits, frame_pixels=min(limits.frame_pixels, pixels or limits.frame_pixels))
    try:
        frames = read_video(medium, "the film", num_frames=options.num_frames, limits=limits)
    except ValueError as error:
        message = f"Sample {id!r} needs film {medium_id!r}, which cannot be decoded ({str(error).rstrip('.')})."
        raise SampleError(message, reason="unreadable film") from None
    return [frames[index] for index in frame_indices(len(frames), options.num_frames)]
