"""The pictures that a query is about: which of an image store they are, and how an endpoint is shown them."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...data.image_store import ImageStore, natural_order
from ...pictures import encode_base64, encode_image
from ...storage import full_name, to_path
from .client import RejectedError
from .queries import Query


@dataclass(frozen=True)
class PictureOptions:
    """How endpoints that see are shown the pictures of each query.

    Args:
        stores: paths of the image store.
        prefix: what its ids begin with, in front of the names of [`Query`]; default: that of the kind.
        max_pictures: of a query; of more, as many are taken at even distances.
        size: of the longer side in pixels, at most; pictures go out as JPEG.
    """

    stores: Sequence[str]
    prefix: str | None = None
    max_pictures: int = 8
    size: int = 512

    def __post_init__(self):
        for name in ("max_pictures", "size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.stores:
            raise ValueError("with_pictures needs the path of an image store.")

    def to_json(self) -> dict[str, Any]:
        """As `run.json` holds it, with absolute paths."""
        return {**asdict(self), "stores": [full_name(to_path(store)) for store in self.stores]}


class QueryPictures:
    """The pictures of queries as parts of a chat message."""

    def __init__(self, options: PictureOptions, kind):
        self.options = options
        self.store = ImageStore(list(options.stores))
        self.finder = PictureFinder(self.store, options.prefix or f"{kind.short_name}_IMG_", kind)

    def names(self, query: Query) -> list[str]:
        """The pictures that are shown of a query, by their names without prefix."""
        ids = self.finder.find(query)
        count = min(len(ids), self.options.max_pictures)
        chosen = [ids[number * (len(ids) - 1) // max(1, count - 1)] for number in range(count)]
        return [id.removeprefix(self.finder.prefix) for id in chosen]

    def parts(self, query: Query) -> list[dict[str, Any]]:
        """`{"type": "image_url", ...}` for each picture shown; none for a query that is asked without any.

        Raises:
            RejectedError: if the store has none of them.
        """
        if query.pictures == ():
            return []
        names = self.names(query)
        if not names:
            raise RejectedError("no pictures in the image store")
        return [self._part(self.finder.prefix + name) for name in names]

    def _part(self, id: str) -> dict[str, Any]:
        try:
            picture = self.store[id]
        except OSError as error:
            raise RejectedError(f"picture {id} cannot be read: {error}") from None
        picture.thumbnail((self.options.size, self.options.size))
        data = encode_base64(encode_image(picture, "JPEG", quality=90))
        return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


class PictureFinder:
    """The image ids of a query."""

    def __init__(self, store: ImageStore, prefix: str, kind):
        self.store, self.prefix = store, prefix
        self.suffix = re.compile(kind.picture_suffix)
        self.ids = sorted(store)

    def example(self) -> str:
        """What is looked for, and what there is."""
        return f" Image ids must begin with {self.prefix!r} (image_prefix); the store has {self.ids[:1]} and so on."

    def find(self, query: Query) -> list[str]:
        """Ids of the pictures of a query, in their order."""
        if query.pictures is not None:
            wanted = (self.prefix + picture for picture in query.pictures)
            return [id for id in wanted if id in self.store]
        start = self.prefix + (query.prefix or query.id)
        found = []
        for position in range(bisect_left(self.ids, start), len(self.ids)):
            id = self.ids[position]
            if not id.startswith(start):
                break
            # a video a_b is not a frame of the video a
            if self.suffix.fullmatch(id, len(start)) and self._is_in_time(id, query):
                found.append(id)
        return sorted(found, key=natural_order)

    def _is_in_time(self, id: str, query: Query) -> bool:
        return query.seconds is None or query.seconds[0] <= int(id.rsplit("_", 1)[1]) <= query.seconds[1]
