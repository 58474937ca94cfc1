"""Sets of videos and of frames taken from videos: dense captions, Ego4D, TV captions."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

from PIL import Image

from ...data.image_store import natural_order
from ...storage import AnyPath
from .base import PICTURE_SUFFIXES, Converter, Source
from .frames import frames_by_second


VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")


class _Videos(Converter):
    """A frame per second of each video of a folder, as `<video>_<second>`."""

    sources_per_shard = 16
    expects = "a folder of videos"
    digits: ClassVar[int]

    def sources(self) -> Iterator[Source]:
        for path in sorted(self.image_path.iterdir(), key=natural_order):
            if path.suffix.lower() in VIDEO_SUFFIXES:
                yield Source(path.stem, path)

    def read(self, source: Source) -> Iterator[tuple[str, Image.Image]]:
        for second, frame in frames_by_second(source.place):
            yield f"{source.name}_{second:0{self.digits}d}", frame


class DenseCaptions(_Videos):
    """Videos of ActivityNet Captions."""

    short_name, original_name = "DC", "video.DenseCaptions"
    digits = 4


class Ego4D(_Videos):
    """Videos of Ego4D."""

    short_name, original_name = "E4D", "fpv.EGO4D"
    sources_per_shard = 4
    digits = 8


class TVCaptions(Converter):
    """Frames of TVQA: folders `<show>_frames/<clip>/`, of each clip at most 16 frames."""

    short_name, original_name = "TVC", "video.TVCaptions"
    sources_per_shard = 100
    expects = "a folder with bbt_frames, castle_frames, ... in it, each with a folder of pictures per clip"

    def sources(self) -> Iterator[Source]:
        for folder in sorted(self.image_path.glob("*_frames")):
            show = folder.name.split("_")[0]
            for clip in sorted((path for path in folder.iterdir() if path.is_dir()), key=natural_order):
                yield Source(clip.name if clip.name.startswith(show) else f"{show}_{clip.name}", clip)

    def read(self, source: Source) -> Iterator[tuple[str, AnyPath]]:
        frames = [path for path in source.place.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES]
        for path in spread(sorted(frames, key=natural_order)):
            yield f"{source.name}_{path.stem}", path


def spread(items: Sequence, limit: int = 16) -> list:
    """At most `limit` items, each from the middle of one of `limit` equal parts; all of them if they are no more."""
    if len(items) <= limit:
        return list(items)
    return [items[(2 * part + 1) * len(items) // (2 * limit)] for part in range(limit)]
