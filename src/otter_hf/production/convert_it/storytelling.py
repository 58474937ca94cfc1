"""Pictures of VIST, which are links to Flickr."""

import json
import random
import time
from collections.abc import Iterator
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from ...storage import AnyPath
from .base import Converter, LeftOut, Source


_LARGEST_PICTURE = 200 << 20
_GONE = (401, 403, 404, 410)
# what Flickr leads to in place of a picture that was taken down
_PLACEHOLDER = "photo_unavailable"


class VisualStoryTelling(Converter):
    """Downloads the pictures that a file `*.story-in-sequence.json` of VIST lists, as `<image id>`.

    `url_o` is tried first, then `url_m`. A picture whose links all answer that it is gone is left out as `"expired"`;
    one that could not be had for other reasons as `"unreachable"`, which is worth another run.

    Args:
        image_path: the file, `{"images": [{"id", "url_o", "url_m"}]}`.
        timeout: seconds that an answer may take to begin, and the whole picture ten times as many.
        attempts: how often a link is tried that fails in passing: timeouts, broken connections, 429 and 5xx.
        pause: seconds before the second attempt; each next pause is twice as long.

    Raises:
        ValueError: for impossible values of these three.
    """

    short_name, original_name = "VST", "video.VisualStoryTelling"
    sources_per_shard = 250
    expects = "a *.story-in-sequence.json of VIST"

    def __init__(
        self,
        image_path: AnyPath,
        image_root: AnyPath | None = None,
        *,
        timeout: float = 20,
        attempts: int = 4,
        pause: float = 1,
    ):
        if not (timeout > 0 and attempts >= 1 and pause >= 0):
            raise ValueError(
                f"Downloads need timeout > 0, attempts >= 1 and pause >= 0, got {timeout}, {attempts} and {pause}."
            )
        super().__init__(image_path, image_root)
        self.timeout, self.attempts, self.pause = timeout, attempts, pause

    def sources(self) -> Iterator[Source]:
        try:
            images = json.loads(self.image_path.read_text(encoding="utf-8-sig"))["images"]
            sources = {str(image["id"]): (image.get("url_o"), image.get("url_m")) for image in images}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.image_path} is not {self.expects}: {type(error).__name__} {error}.") from None
        for id, urls in sources.items():
            yield Source(id, tuple(dict.fromkeys(url for url in urls if url and isinstance(url, str))))

    def read(self, source: Source) -> Iterator[tuple[str, bytes]]:
        failures = []
        for url in source.place:
            try:
                yield source.name, download(url, timeout=self.timeout, attempts=self.attempts, pause=self.pause)
                return
            except LeftOut as failure:
                failures.append(failure)
        if not failures:
            raise LeftOut("missing", "the file has no link to it")
        # a link that may come back outweighs one that is gone
        kind = "expired" if all(failure.kind == "expired" for failure in failures) else "unreachable"
        raise LeftOut(kind, "; ".join(map(str, failures)))


def download(url: str, *, timeout: float, attempts: int, pause: float) -> bytes:
    """What a link leads to.

    Raises:
        LeftOut: `"expired"` if the server says that it is gone, else `"unreachable"` after all attempts.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise LeftOut("unreachable", f"{url}: no http link")
    for attempt in range(attempts):
        if attempt:
            # not all threads at the same time
            time.sleep(pause * 2 ** (attempt - 1) * random.uniform(0.5, 1))
        try:
            return _fetch(url, timeout)
        except HTTPError as error:
            reason = f"{url}: HTTP {error.code}"
            if error.code in _GONE:
                raise LeftOut("expired", reason) from None
            if error.code != 429 and error.code < 500:
                raise LeftOut("unreachable", reason) from None
        except (URLError, HTTPException, OSError) as error:
            if isinstance(error, LeftOut):
                raise
            reason = f"{url}: {getattr(error, 'reason', None) or error or type(error).__name__}"
    raise LeftOut("unreachable", f"{reason}, {attempts} times")


def _fetch(url: str, timeout: float) -> bytes:
    deadline = time.monotonic() + 10 * timeout
    # Flickr refuses the default name of Python's library
    with urlopen(Request(url, headers={"User-Agent": "otter-hf"}), timeout=timeout) as answer:
        if _PLACEHOLDER in answer.url:
            raise LeftOut("expired", f"{url}: leads to {answer.url}")
        expected = answer.headers.get("Content-Length")
        data = bytearray()
        # what has come, so that the time is looked at; not beyond the end, where Python below 3.11.8 waits
        while (expected is None or len(data) < int(expected)) and (piece := answer.read1(1 << 16)):
            data += piece
            if time.monotonic() > deadline:
                raise TimeoutError(f"not complete after {10 * timeout:g} s")
            if len(data) > _LARGEST_PICTURE:
                raise LeftOut("unreachable", f"{url}: more than {_LARGEST_PICTURE >> 20} MB")
    if expected is not None and len(data) != int(expected):
        raise TimeoutError(f"ended after {len(data)} of {expected} bytes")
    return bytes(data)
