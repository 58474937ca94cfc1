"""Replies on disk: what an interrupted evaluation need not ask again."""

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from PIL import Image


class ReplyLog:
    """
    A JSON-lines file of replies under content addresses, read once and appended to as replies come.

    Several processes share a folder: each appends to a file of its own and reads all of them at the start. A line cut
    off by a kill is skipped.

    Args:
        folder: created if need be.
        rank: number of this process.
        context: what else a reply depends on, e.g. the model and its arguments; JSON.
    """

    def __init__(self, folder: str | Path, rank: int = 0, context: Any = None):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._context = context
        self._replies: dict[str, Any] = {}
        for path in sorted(folder.glob("replies-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    self._replies[entry["key"]] = entry["reply"]
                except (ValueError, KeyError, TypeError):
                    continue
        self._lock = threading.Lock()  # judges are asked by several threads
        path = folder / f"replies-{rank}.jsonl"
        cut_off = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        if cut_off:
            self._file.write("\n")

    def key(self, question: Any) -> str:
        """The address of the reply to `question`: JSON in which pictures may stand, which count by their pixels."""
        text = json.dumps([self._context, question], sort_keys=True, default=_fingerprint)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> Any:
        """The reply under `key`, or None."""
        return self._replies.get(key)

    def add(self, replies: dict[str, Any]) -> None:
        """Keep `{key: reply}`, on disk when this returns."""
        lines = [json.dumps({"key": key, "reply": reply}, ensure_ascii=False) for key, reply in replies.items()]
        with self._lock:
            self._replies |= replies
            self._file.write("".join(f"{line}\n" for line in lines))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _fingerprint(value) -> str:
    if isinstance(value, Image.Image):
        return f"{value.mode}{value.size}{hashlib.sha256(value.tobytes()).hexdigest()}"
    return str(value)
