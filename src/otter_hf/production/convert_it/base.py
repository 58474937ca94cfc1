"""What a converter is: a list of sources, and how each becomes pictures."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from ...storage import AnyPath, to_path


PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


class LeftOut(OSError):
    """A source or picture cannot be used. `kind` is `"missing"`, `"damaged"`, `"expired"` or `"unreachable"`."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Source:
    """What is read in one piece: a picture, a pair of them, a clip, a video or a link.

    Args:
        name: what the names of its pictures begin with; no two sources have the same.
        place: where it is, as the converter understands it.
    """

    name: str
    place: Any


class Converter(ABC):
    """The pictures of one public set.

    Args:
        image_path: what the set's converter reads: a folder, or a JSON file, also at an address (`s3://bucket/videos`).
        image_root: folder of the pictures, where `image_path` is a JSON file that names them.

    Raises:
        FileNotFoundError: if one of them is not there.
    """

    short_name: ClassVar[str]
    original_name: ClassVar[str]
    # a killed run loses the shards it was writing, so costly sources share a shard with few others
    sources_per_shard: ClassVar[int] = 1000
    # what `image_path` has to be, for messages and help
    expects: ClassVar[str]

    def __init__(self, image_path: AnyPath, image_root: AnyPath | None = None):
        self.image_path = to_path(image_path)
        self.image_root = None if image_root is None else to_path(image_root)
        for path in (self.image_path, self.image_root):
            if path is not None and not path.exists():
                raise FileNotFoundError(f"{self.short_name} reads {self.expects}; {path} does not exist.")

    @abstractmethod
    def sources(self) -> Iterable[Source]:
        """All sources, in an order that does not change."""

    @abstractmethod
    def read(self, source: Source) -> Iterator[tuple[str, bytes | AnyPath | Image.Image]]:
        """Yields the pictures as `(name, picture)`; their ids are `<short name>_IMG_<name>`.

        Raises:
            LeftOut: if the source, or what remains of it, cannot be read.
        """
