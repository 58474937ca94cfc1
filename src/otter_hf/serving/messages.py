"""Messages of the OpenAI API, with their pictures and videos, as messages of a processor."""

import time
from collections.abc import Callable
from dataclasses import replace

from ..films import DEFAULT_NUM_FRAMES
from ..models.chat_processing import media_parts_of
from ..reading import whole_characters
from .fetch import FetchPolicy, is_fetched, read_url
from .media import MediaLimits, image_part, open_image, read_frames, video_part


# how clients of vLLM send the frames of a film: JPEGs, with commas between them
_FRAMES = "data:video/jpeg;base64,"
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Cancelled(BaseException):
    """Nobody waits for the result. No Exception, which readers of pictures and films take for damage."""


class MessageReader:
    """
    Reads the messages of one request, within the limits for all its texts and pictures together: first `fetch`, which
    may wait for others, then `decode`, which takes memory.

    Args:
        limits: what texts, pictures and videos may take.
        policy: which addresses are read, how many and for how long.
        num_frames: frames read of each video; None if `decode` is told.
        is_cancelled: tells that nobody waits any more; the work then ends with [`Cancelled`].
    """

    def __init__(
        self,
        limits: MediaLimits,
        policy: FetchPolicy,
        num_frames: int | None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ):
        self.limits = limits
        self.policy = policy
        self.num_frames = num_frames
        self.is_cancelled = is_cancelled
        self._characters = 0
        self._media = 0
        self._fetches = policy.max_fetches
        self._bytes = policy.max_bytes
        self._deadline = time.monotonic() + policy.timeout

    def read(self, messages: list) -> list[dict]:
        """Both steps in one."""
        return self.decode(self.fetch(messages))

    def fetch(self, messages: list) -> list[dict]:
        """
        The messages with the bytes of their pictures and videos, for `decode`.

        Args:
            messages: `{"role", "content"}` with content a text or a list of parts of the types `text`, `image_url`
                and `video_url` (as vLLM and transformers have it; frames of a film as vLLM has them, too).

        Raises:
            ValueError: naming the message, for anything else, for what cannot be read, and for more than the limits.
        """
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages must be a list with at least one message.")
        # all is looked at before the first address is
        checked = [self._check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
        if checked[-1]["role"] != "user":
            raise ValueError(
                f"messages[{len(checked) - 1}] is the last and of the role {checked[-1]['role']}: end with a message "
                "of the role user, which is answered."
            )
        for part in media_parts_of(checked):
            url = part.pop("url")
            if part["type"] == "video_url" and url[: len(_FRAMES)].lower() == _FRAMES:
                part["data"] = self._frames(url[len(_FRAMES) :], part["name"])
            else:
                part["data"] = self._read(url, part["name"])
        return checked

    def decode(self, messages: list[dict], num_frames: int | None = None) -> list[dict]:
        """
        What `fetch` gave as messages for `apply_chat_template`, contents being lists of parts, pictures PIL images.

        Args:
            num_frames: of a video, where the reader was not told any; else 16.

        Raises:
            ValueError: naming the message, for pictures and videos that cannot be read or exceed the limits.
        """
        wanted = self.num_frames or num_frames or DEFAULT_NUM_FRAMES
        pictures, pixels = self.limits.pictures, self.limits.total_pixels
        for part in media_parts_of(messages):
            self._check()
            name = part["name"]
            if pictures <= 0 or pixels <= 0:
                raise self._too_many(name)
            left = replace(self.limits, image_pixels=min(self.limits.image_pixels, pixels), pictures=pictures)
            data = part.pop("data")
            if part.pop("type") == "image_url":
                frames = [open_image(data, name, left)]
                part |= image_part(frames[0])
            else:
                frames = read_frames(data, name, wanted, left, self._check)
                part |= video_part(frames)
            del part["name"]
            pictures -= len(frames)
            pixels -= sum(frame.width * frame.height for frame in frames)
        return messages

    def _too_many(self, name: str) -> ValueError:
        return ValueError(
            f"{name} is more than a request may hold: {self.limits.pictures} pictures and frames, or "
            f"{self.limits.total_pixels} pixels in all; send fewer or smaller ones."
        )

    def _check(self) -> None:
        if self.is_cancelled():
            raise Cancelled

    def _read(self, url: str, name: str) -> bytes:
        self._check()
        if is_fetched(url):
            self._fetches -= 1
            if self._fetches < 0:
                raise ValueError(
                    f"{name} is one address more than the {self.policy.max_fetches} that a request may name; send "
                    "pictures as data:...;base64,..."
                )
        left = max(self._deadline - time.monotonic(), 0)
        data = read_url(url, name, replace(self.policy, max_bytes=self._bytes, timeout=left))
        self._bytes -= len(data)
        return data

    def _frames(self, encoded: str, name: str) -> list[bytes]:
        if encoded.count(",") >= self.limits.padded_frames:
            raise ValueError(f"{name} has more than {self.limits.padded_frames} frames; send fewer of them.")
        frames = enumerate(encoded.split(","))
        return [self._read(f"data:;base64,{frame}", f"{name}, frame {number}") for number, frame in frames]

    def _check_message(self, message, name: str) -> dict:
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{name}.role must be one of {', '.join(ROLES)}.")
        role, content = ROLES[role], message.get("content")
        for key, value in message.items():
            # clients send the empty fields of an answer back
            if key not in ("role", "content") and value:
                raise ValueError(f"{name} has {key!r:.80}, which this server does not read; leave it out.")
        if content is None and role == "assistant":  # an answer may be without words
            content = ""
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise ValueError(f"{name}.content must be a text or a list of parts.")
        parts = [self._check_part(part, f"{name}.content[{index}]") for index, part in enumerate(content)]
        if role != "user" and any(part["type"] != "text" for part in parts):
            raise ValueError(f"{name}.content holds pictures, which only messages of the role user may.")
        return {"role": role, "content": parts}

    def _check_part(self, part, name: str) -> dict:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "image_url", "video_url"):
            for key in part.keys() - {"type", kind}:
                raise ValueError(f"{name} is of the type {kind} and has {key!r:.80}, which it may not; leave it out.")
        if kind == "text" and isinstance(part.get("text"), str):
            self._characters += len(part["text"])
            if self._characters > self.limits.text_characters:
                raise ValueError(
                    f"{name} makes the texts longer than {self.limits.text_characters} characters; shorten them."
                )
            return {"type": "text", "text": whole_characters(part["text"])}
        if kind not in ("image_url", "video_url"):
            raise ValueError(f"{name} must be of the type text (with a text), image_url or video_url.")
        name = f"{name}.{kind}"
        self._media += 1
        if self._media > self.limits.pictures:
            raise self._too_many(name)
        url = part.get(kind)
        if isinstance(url, dict):
            # every model reads pictures in its own size, whatever the detail
            for key in url.keys() - {"url", "detail"}:
                raise ValueError(f"{name} has {key!r:.80}, which it may not; leave it out.")
            if url.get("detail") not in (None, "auto", "low", "high"):
                raise ValueError(f"{name}.detail must be auto, low or high, not {url['detail']!r:.80}.")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str):
            raise ValueError(f'{name} must be {{"url": "..."}}.')
        return {"type": kind, "name": name, "url": url}
