"""What Gradio's chat remembers, as messages of the OpenAI API."""

import base64
import mimetypes
from collections.abc import Sequence
from pathlib import Path


def to_messages(history: Sequence[dict], examples: Sequence[tuple[str | None, str, str]] = ()) -> list[dict]:
    """
    Args:
        history: messages of a `gr.Chatbot`, whose contents are texts, files, or lists of them. A message with files
            comes as several of the same role, which become one again.
        examples: worked examples in front, `(path of a picture or None, question, answer)`; those without a question
            or an answer are left out.

    Returns:
        messages for `/v1/chat/completions`; files are data URLs.

    Raises:
        ValueError: naming a file that is neither a picture nor a video.
    """
    turns = []
    for path, question, answer in examples:
        if question and answer:
            files = [] if path is None else [{"path": path}]
            turns += [("user", [*files, question]), ("assistant", [answer])]
    for message in history:
        content = message["content"]
        content = content if isinstance(content, (list, tuple)) else [content]
        if turns and turns[-1][0] == message["role"]:
            turns[-1][1].extend(content)
        else:
            turns.append((message["role"], list(content)))
    return [{"role": role, "content": [part for item in content for part in _parts(item)]} for role, content in turns]


def _parts(item) -> list[dict]:
    """One text or file of Gradio's; empty texts, which come beside files, say nothing."""
    if isinstance(item, str):
        return [{"type": "text", "text": item}] if item else []
    if item.get("type") == "text":
        return _parts(item["text"])
    path = item["file"]["path"] if "file" in item else item["path"]
    kind = mimetypes.guess_type(path)[0] or ""
    media = kind.partition("/")[0]
    if media not in ("image", "video"):
        raise ValueError(f"{Path(path).name} is neither a picture nor a video.")
    data = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    return [{"type": f"{media}_url", f"{media}_url": {"url": f"data:{kind};base64,{data}"}}]
