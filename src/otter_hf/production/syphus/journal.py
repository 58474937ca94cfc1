"""What happened in a run, appended to a file line by line, so that a killed run asks nothing twice."""

import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...thinking import strip_thinking


logger = logging.get_logger(__name__)


class Journal:
    """The events of a run, each a line of JSON with `event` and the `id` of the query:

    * `sent`: a request goes out.
    * `batch`: requests for all of `ids` are in the batch file that `id` names.
    * `reply`: its reply, with text, token counts and cost. On disk before the next is asked for.
    * `error`: an attempt failed, with the reason, and token counts and cost where it was charged for.
    * `failed`: the query was given up, with the reason.

    A line that a kill cut off is passed over, and removed on opening for writing. All threads of one process may
    append; one process at a time may write.

    Args:
        path: the file, which has to be there.
        writable: whether events will be appended.

    Raises:
        ValueError: naming the line, if one in the middle is no event.
    """

    def __init__(self, path: str | Path, writable: bool = False):
        self.path = Path(path)
        self.replies: dict[str, int] = {}  # place in the file of the reply to each query
        self.failed: dict[str, str] = {}  # reasons
        self.in_batch: set[str] = set()
        self.batch_files: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.prompt_tokens = self.completion_tokens = 0
        self.cost = 0.0
        self.lost = 0  # requests whose outcome a kill took with it
        self._outstanding: set[str] = set()
        self._lock = threading.Lock()
        self._file = open(self.path, "a+b" if writable else "rb")
        self._read(writable)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def _read(self, writable: bool) -> None:
        self._file.seek(0)
        start = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                if writable:
                    logger.warning(f"The last line of {self.path} was cut off: it is removed.")
                    self._file.truncate(start)
                break
            try:
                self._take(json.loads(line), start)
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"Line {number} of {self.path} is no event: restore the file.") from None
            start += len(line)
        # what has not come back will not any more
        self.lost += len(self._outstanding)
        self._outstanding.clear()

    def append(self, event: str, id: str, *, durable: bool = True, **fields: Any) -> None:
        """Adds an event; with `durable`, it is on disk when this returns."""
        content = {"event": event, "id": id, **fields}
        line = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._lock:
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(line)
            self._file.flush()
            if durable:
                os.fsync(self._file.fileno())
            self._take(content, start)

    def _take(self, event: dict[str, Any], start: int) -> None:
        id, kind = event["id"], event["event"]
        if kind == "batch":
            self.in_batch.update(event["ids"])
            self.batch_files.add(id)
            self.counts["sent"] += len(event["ids"])
            for asked in event["ids"]:
                self.failed.pop(asked, None)
        elif kind == "sent":
            self.lost += id in self._outstanding
            self._outstanding.add(id)
            # what is asked again is neither any more
            self.failed.pop(id, None)
            self.in_batch.discard(id)
        elif kind in ("reply", "error", "failed"):
            self._outstanding.discard(id)
            self.in_batch.discard(id)
        else:
            raise ValueError(kind)
        self.counts[kind] += 1
        if kind == "reply":
            self.replies[id] = start
        if "prompt_tokens" in event:
            self.counts["charged"] += 1
            self.prompt_tokens += event["prompt_tokens"]
            self.completion_tokens += event["completion_tokens"]
            self.cost += event["cost"]
        elif kind == "failed":
            self.failed[id] = event["reason"]

    def is_settled(self, id: str, retry_failed: bool = False) -> bool:
        """Whether the query needs no request: it has a reply, is in a batch, or was given up."""
        return id in self.replies or (not retry_failed and (id in self.failed or id in self.in_batch))

    def reply(self, id: str) -> dict[str, Any] | None:
        """The `reply` event of a query, its text without thoughts, which the file keeps; None if it has none."""
        if id not in self.replies:
            return None
        with self._lock:
            self._file.seek(self.replies[id])
            event = json.loads(self._file.readline())
        return {**event, "text": strip_thinking(event["text"])}
