"""Messages of the OpenAI API, with their pictures and videos, as messages of a processor."""

from dataclasses import replace

from .fetch import FetchPolicy, read_url
from .media import MediaLimits, image_part, open_image, read_frames, video_part


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class MessageReader:
    """
    Reads the messages of one request, within the limits for all its pictures together.

    Args:
        limits: what pictures and videos may take.
        policy: which addresses are read.
        num_frames: frames read of each video.
    """

    def __init__(self, limits: MediaLimits, policy: FetchPolicy, num_frames: int):
        self.limits = limits
        self.policy = policy
        self.num_frames = num_frames
        self._pictures = limits.pictures
        self._pixels = limits.total_pixels

    def read(self, messages: list) -> list[dict]:
        """
        Args:
            messages: `{"role", "content"}` with content a text or a list of parts of the types `text`, `image_url`
                and `video_url` (as vLLM and transformers have it).

        Returns:
            messages for `apply_chat_template`, contents being lists of parts, pictures PIL images.

        Raises:
            ValueError: naming the message, for anything else and for pictures that cannot be read.
        """
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages must be a list with at least one message.")
        return [self._read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]

    def _read_message(self, message, name: str) -> dict:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"{name}.role must be one of {', '.join(ROLES)}.")
        role, content = ROLES[message["role"]], message.get("content")
        for key, value in message.items():
            # clients send the empty fields of an answer back
            if key not in ("role", "content") and value:
                raise ValueError(f"{name} has {key!r}, which this server does not read; leave it out.")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise ValueError(f"{name}.content must be a text or a list of parts.")
        parts = [self._read_part(part, f"{name}.content[{index}]") for index, part in enumerate(content)]
        if role != "user" and any(part["type"] != "text" for part in parts):
            raise ValueError(f"{name}.content holds pictures, which only messages of the role user may.")
        return {"role": role, "content": parts}

    def _read_part(self, part, name: str) -> dict:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "image_url", "video_url"):
            for key in part.keys() - {"type", kind}:
                raise ValueError(f"{name} is of the type {kind} and has {key!r}, which it may not; leave it out.")
        if kind == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
        if kind not in ("image_url", "video_url"):
            raise ValueError(f"{name} must be of the type text (with a text), image_url or video_url.")
        url = part.get(kind)
        if isinstance(url, dict):
            # every model reads pictures in its own size, whatever the detail
            for key in url.keys() - {"url", "detail"}:
                raise ValueError(f"{name}.{kind} has {key!r}, which it may not; leave it out.")
            if url.get("detail") not in (None, "auto", "low", "high"):
                raise ValueError(f"{name}.{kind}.detail must be auto, low or high, not {url['detail']!r:.80}.")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str):
            raise ValueError(f'{name}.{kind} must be {{"url": "..."}}.')
        name = f"{name}.{kind}"
        if self._pictures <= 0 or self._pixels <= 0:
            raise ValueError(
                f"{name} is more than a request may hold: {self.limits.pictures} pictures and frames, or "
                f"{self.limits.total_pixels} pixels in all; send fewer or smaller ones."
            )
        data = read_url(url, name, self.policy)
        left = replace(self.limits, image_pixels=min(self.limits.image_pixels, self._pixels), pictures=self._pictures)
        frames = (
            [open_image(data, name, left)] if kind == "image_url" else read_frames(data, name, self.num_frames, left)
        )
        self._pictures -= len(frames)
        self._pixels -= sum(frame.width * frame.height for frame in frames)
        return image_part(frames[0]) if kind == "image_url" else video_part(frames)
