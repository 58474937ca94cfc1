"""Reading the body of a request, which arrives as fast as a stranger likes."""

import asyncio
import json
import re

from fastapi import HTTPException, Request


# what a request may hold beside its texts: lists and objects cost more memory than their bytes
MAX_VALUES = 100_000
MAX_DEPTH = 64
_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKETS = re.compile(rb"[\[\]{}]")


class BodyReader:
    """
    Reads the JSON of requests. Bodies on their way hold no place in the queue; what they may take together is limited.

    Args:
        body_bytes: of one request.
        total_bytes: of all bodies that are on their way.
        seconds: for one body to arrive.
    """

    def __init__(self, body_bytes: int, total_bytes: int, seconds: float):
        self.body_bytes, self.total_bytes, self.seconds = body_bytes, total_bytes, seconds
        self._arriving = 0

    async def read(self, request: Request) -> dict:
        """
        The JSON object in the body of a request.

        Raises:
            HTTPException: 415 for another content type, 413 for too many bytes, 408 for too slow ones, 429 if others
                are taking all that may arrive at a time, 400 for what is no JSON object.
        """
        kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, f"Send the request as Content-Type: application/json, not {kind!r:.80}.")
        too_large = HTTPException(413, f"The request is larger than {self.body_bytes} bytes; send smaller pictures.")
        announced = request.headers.get("Content-Length", "")
        # a number of more digits is larger, and Python would not read it
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self.body_bytes):
            raise too_large
        data = bytearray()

        async def receive() -> None:
            async for chunk in request.stream():
                data.extend(chunk)
                self._arriving += len(chunk)
                if len(data) > self.body_bytes:
                    raise too_large
                if self._arriving > self.total_bytes:
                    raise HTTPException(
                        429, "Too many requests are arriving; try again in a moment.", headers={"Retry-After": "1"}
                    )

        try:
            await asyncio.wait_for(receive(), self.seconds)
            # megabytes of base64 take a moment, in which others are answered
            return await asyncio.to_thread(parse, bytes(data))
        except TimeoutError:
            raise HTTPException(408, f"The request did not arrive within {self.seconds:g} seconds.") from None
        finally:
            self._arriving -= len(data)


def _is_bounded(data: bytes) -> bool:
    opened = data.count(b"[") + data.count(b"{")
    # most requests are told by a count, which is all that a large one costs others
    if opened <= MAX_DEPTH and data.count(b",") <= MAX_VALUES - MAX_DEPTH:
        return True
    structure = _STRINGS.sub(b"", data)
    if sum(map(structure.count, (b"[", b"{", b","))) > MAX_VALUES:
        return False
    depth = 0
    for bracket in _BRACKETS.finditer(structure):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_DEPTH:
            return False
    return True


def parse(data: bytes) -> dict:
    """The JSON object in a body; HTTPException 400 if it is none or of more than `MAX_VALUES` and `MAX_DEPTH`."""
    if not _is_bounded(data):
        raise HTTPException(
            400, f"The request has more than {MAX_VALUES} values, or they are nested more than {MAX_DEPTH} deep."
        )
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "The body of the request is not JSON.") from error
    if not isinstance(body, dict):
        raise HTTPException(400, "The body of the request is not a JSON object.")
    return body
