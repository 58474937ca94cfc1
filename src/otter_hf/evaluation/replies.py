"""Replies on disk: what an interrupted evaluation need not ask again."""

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.utils import logging

from ..pictures import is_array, to_numpy


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
            # a kill may cut a character in two; U+2028 and its like, which end no line here, may stand in a reply
            with path.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    try:
                        entry = json.loads(line)
                        self._replies[entry["key"]] = entry["reply"]
                    except (ValueError, KeyError, TypeError):
                        continue
        self._lock = threading.Lock()  # judges are asked by several threads
        path = folder / f"replies-{rank}.jsonl"
        cut_off = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8", errors="replace")  # half a surrogate pair
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


def answer_all(
    items: Sequence,
    question: Callable[[Any], Any],
    ask: Callable[[list, set[int]], Iterable[dict[int, Any]]],
    window: int,
    replies: ReplyLog | None = None,
    disable: bool | None = False,
) -> Iterator:
    """
    The replies to all items in their order, under a progress bar; each batch is on disk before the next is asked.

    Args:
        items: anything.
        question: what a reply depends on, for [`ReplyLog.key`]; of equal ones each has a reply of its own.
        ask: gets a window of items and the numbers of those without a reply; a batch at a time it gives replies by
            number, also of others that belong to the batch: a batch is asked as a whole, so that the same numbers come
            out as without an interruption.
        window: items that are known at a time, from which batches are made.
        replies: those of before, and where new ones are kept.
        disable: no bar; None: none where nobody looks at a terminal.
    """
    asked: Counter[str] = Counter()

    def key_of(item: Any) -> str:
        key = replies.key(question(item))
        asked[key] += 1
        # who asks the same again may want another draw
        return key if asked[key] == 1 else replies.key([key, asked[key]])

    with logging.tqdm(total=len(items), desc="Asking", disable=disable) as progress:
        for start in range(0, len(items), window):
            now = list(items[start : start + window])
            keys = [key_of(item) for item in now] if replies else []
            known = {number: replies.get(key) for number, key in enumerate(keys)}
            missing = {number for number in range(len(now)) if known.get(number) is None}
            progress.update(len(now) - len(missing))
            for found in ask(now, missing) if missing else ():
                if replies:
                    replies.add({keys[number]: reply for number, reply in found.items()})
                known |= found
                progress.update(len(missing & found.keys()))
            yield from (known[number] for number in range(len(now)))


def _fingerprint(value) -> str:
    if isinstance(value, Image.Image):
        return f"{value.mode}{value.size}{hashlib.sha256(value.tobytes()).hexdigest()}"
    if (
        is_array(value) and value.ndim and getattr(value.dtype, "kind", "f") in "buif"
    ):  # its text leaves most of it out
        array = to_numpy(value, "an array")
        return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"
    return str(value)
