"""Reads large JSON objects member by member, with little memory and in file order."""

import json
import re
from collections.abc import Iterator
from typing import Any

from ..reading import refuse_lfs_pointer
from ..storage import AnyPath, to_path


_WHITE_SPACE = re.compile(r"[ \t\n\r]*")
_CHUNK = 1 << 20  # characters
_LARGEST_VALUE = 1 << 28  # characters; a longer one is a broken file, not a record or a picture


def iter_json_object(path: AnyPath, key: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yields the `(name, value)` members of a JSON object in a file, in file order.

    Args:
        path: a UTF-8 JSON file whose top level is an object, also at an address.
        key: yield the members of the object under this key of the top level, in place of the top level's own.

    Raises:
        ValueError: naming the file and the place, if it is not JSON, not an object, or lacks `key`.
    """
    refuse_lfs_pointer(path)
    with to_path(path).open(encoding="utf-8-sig") as file:
        stream = _JsonStream(file)
        try:
            if key is None:
                yield from stream.members()
            else:
                found = False
                for name in stream.names():
                    if name != key:
                        stream.value()
                        continue
                    if found:
                        raise ValueError(f'"{key}" is there twice')
                    found = True
                    yield from stream.members()
                if not found:
                    raise ValueError(f'there is no "{key}" in it')
            stream.end()
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(
                f"{path} cannot be read as JSON, around character {stream.consumed + stream.position}: {reason}."
            ) from None


class _JsonStream:
    """A window on the text of a file, moved forward as values are decoded."""

    def __init__(self, file):
        self.file = file
        self.text = ""
        self.position = 0  # in text
        self.consumed = 0  # characters of the file in front of text
        self.ended = False
        self.decode = json.JSONDecoder().raw_decode

    def members(self) -> Iterator[tuple[str, Any]]:
        for name in self.names():
            yield name, self.value()

    def end(self) -> None:
        """Raises ValueError if something follows."""
        if found := self._next():
            raise ValueError(f"expected the end of the file, found {found!r}")

    def names(self) -> Iterator[str]:
        """Yields each name of an object; the caller must consume its value before the next."""
        self._expect("{")
        if self._next() == "}":
            self.position += 1
            return
        while True:
            if self._next() != '"':
                raise ValueError("expected a name in double quotes")
            name = self.value()
            if not _is_text(name):
                raise ValueError(f"the name {name!r} is not valid Unicode")
            self._expect(":")
            yield name
            if self._next() == "}":
                self.position += 1
                return
            self._expect(",")

    def value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = self.decode(self.text, self.position)
            except json.JSONDecodeError:
                # the value may go on behind the window
                if self.ended or len(self.text) - self.position > _LARGEST_VALUE:
                    raise
            except RecursionError:
                raise ValueError("its values are nested too deeply") from None
            else:
                # a number at the very end of the window may have more digits
                if end < len(self.text) or self.ended:
                    self.position = end
                    return value
            self._read_more()

    def _expect(self, character: str):
        found = self._next()
        if found != character:
            raise ValueError(f"expected {character!r}, found {found!r}" if found else f"ended before {character!r}")
        self.position += 1

    def _next(self) -> str:
        """The next character that is not white space, or "" at the end of the file."""
        while True:
            self.position = _WHITE_SPACE.match(self.text, self.position).end()
            if self.position < len(self.text):
                return self.text[self.position]
            if self.ended:
                return ""
            self._read_more()

    def _read_more(self):
        rest = self.text[self.position :]
        # doubling keeps the number of attempts at one long value logarithmic
        chunk = self.file.read(max(_CHUNK, len(rest)))
        self.ended = not chunk
        self.consumed += self.position
        self.text, self.position = rest + chunk, 0


def _is_text(name: str) -> bool:
    # JSON can spell half of a surrogate pair, which no file or table can hold
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)
