"""What Gradio's chat remembers, as messages of the OpenAI API."""

import base64
import io
import mimetypes
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..films import is_film


# title of a message that says why there is no answer
FAILED = "No answer"


def to_messages(history: Sequence[dict], examples: Sequence[tuple[str | None, str, str]] = ()) -> list[dict]:
    """
    Args:
        history: messages of a `gr.Chatbot`, whose contents are texts, files, or lists of them. A message with files
            comes as several of the same role, which become one again. A question that has no answer but a message
            with the title `FAILED` is left out with it.
        examples: worked examples in front, `(path of a picture or None, question, answer)`; those without a question
            or an answer are left out.

    Returns:
        messages for `/v1/chat/completions`; files are data URLs.

    Raises:
        ValueError: naming a file that is neither a picture nor a video.
        OSError: for a file that is gone.
    """
    turns: list[tuple[str, list]] = []
    for path, question, answer in examples:
        if question and answer:
            files = [] if path is None else [{"path": path}]
            turns += [("user", [*files, question]), ("assistant", [answer])]
    for message in history:
        content = message["content"]
        content = content if isinstance(content, (list, tuple)) else [content]
        if (message.get("metadata") or {}).get("title") == FAILED:
            if turns and turns[-1][0] == "user":
                turns.pop()
        elif turns and turns[-1][0] == message["role"]:
            turns[-1][1].extend(content)
        else:
            turns.append((message["role"], list(content)))
    return [{"role": role, "content": [part for item in content for part in _parts(item)]} for role, content in turns]


def last_question(history: Sequence[dict]) -> tuple[list[dict], dict]:
    """The history in front of its last question, and that question as `{"text", "files"}`; what follows is dropped."""
    end = len(history)
    while end and history[end - 1]["role"] != "user":
        end -= 1
    start = end
    while start and history[start - 1]["role"] == "user":
        start -= 1
    items = []
    for message in history[start:end]:
        items += message["content"] if isinstance(message["content"], (list, tuple)) else [message["content"]]
    texts = [text for item in items if (text := _text(item))]
    return list(history[:start]), {"text": "\n".join(texts), "files": [path_of(i) for i in items if _text(i) is None]}


def edited(history: Sequence[dict], index: int | Sequence[int], text: str) -> list[dict]:
    """The history up to a message, in which another text stands; its files stay.

    Args:
        index: of the message, or of it and the part of its content, as in `gr.EditData`.
    """
    number, part = (index, None) if isinstance(index, int) else (index[0], index[-1] if len(index) > 1 else None)
    message = history[number]
    content = message["content"]
    content = list(content) if isinstance(content, (list, tuple)) else [content]
    if part is None or _text(content[part]) is None:
        texts = [place for place, item in enumerate(content) if _text(item) is not None]
        part = texts[-1] if texts else len(content)
    content[part : part + 1] = [text]
    return [*history[:number], {**message, "content": content}]


def _text(item) -> str | None:
    """A text of Gradio's; None for a file."""
    if isinstance(item, str):
        return item
    return item["text"] if item.get("type") == "text" else None


def path_of(item) -> str:
    """Where a file of Gradio's is."""
    item = item.get("file", item) if isinstance(item, dict) else item
    return item if isinstance(item, str) else item["path"]


def _parts(item) -> list[dict]:
    """One text or file of Gradio's; empty texts, which come beside files, say nothing."""
    text = _text(item)
    if text is not None:
        return [{"type": "text", "text": text}] if text else []
    path = Path(path_of(item))
    data = path.read_bytes()
    kind = _kind(path.name, data)
    media = kind.partition("/")[0]
    url = f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return [{"type": f"{media}_url", f"{media}_url": {"url": url}}]


def _kind(name: str, data: bytes) -> str:
    """The media type of a picture or video; ValueError for another file."""
    kind = mimetypes.guess_type(name)[0] or ""
    if kind.startswith(("image/", "video/")):
        return kind
    # by itself Python 3.11 knows neither WebP nor Matroska, and 3GP for a sound
    if is_film(data):
        return "video/mp4"
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return picture.get_format_mimetype() or "image/png"
    except UnidentifiedImageError:
        raise ValueError(f"{name} is neither a picture nor a video.") from None
