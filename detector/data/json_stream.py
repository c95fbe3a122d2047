"""Read a large annotation file element by element, so that memory holds one element and not the file.

LVIS v1's training file is over 1 GB of text, which `json.load` turns into several times as much in Python
objects.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK = 1 << 22  # bytes read at a time
LONGEST_ELEMENT = 1 << 26  # characters; the longest annotations of LVIS take less than 1 % of it

_NOT_SPACE = re.compile(r"[^ \t\n\r]")


class JsonError(ValueError):
    """The file is not the JSON object it should be: cut off, malformed, or not text."""


def iter_members(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield (key, element) for every element of the arrays in the top-level object, and (key, value) for
    other values.

    An empty array yields (key, []) once, so that every key is seen. Raises JsonError naming the position of
    the fault, OSError if the file is unreadable.
    """
    with open(path, "rb") as file:
        yield from _Reader(file).members()


class _Reader:
    def __init__(self, file: Any) -> None:
        self.file = file
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.scan = json.JSONDecoder().raw_decode
        self.text = ""
        self.at = 0
        self.passed = 0  # characters dropped from the front of text
        self.ended = False

    def members(self) -> Iterator[tuple[str, Any]]:
        self._expect("{")
        if self._take("}"):
            return self._finish()
        while True:
            key = self._value()
            if not isinstance(key, str):
                raise self._error("expected a key in double quotes")
            self._expect(":")
            if self._take("["):
                if self._take("]"):
                    yield key, []
                else:
                    while True:
                        yield key, self._value()
                        if not self._take(","):
                            break
                    self._expect("]")
            else:
                yield key, self._value()
            if not self._take(","):
                break
        self._expect("}")
        return self._finish()

    def _finish(self) -> None:
        if self._peek():
            raise self._error("expected the end of the file")

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self.scan(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.ended:
                    raise self._error(f"cut off or malformed: {error.msg}", error.pos) from None
                if len(self.text) - self.at > LONGEST_ELEMENT:
                    raise self._error(f"no complete element within {LONGEST_ELEMENT} characters") from None
                # Reading at least as much again keeps the cost of repeated attempts linear.
                self._read(max(CHUNK, len(self.text) - self.at))
                continue
            except ValueError as error:  # an integer of more digits than Python converts
                raise self._error(str(error)) from None
            except RecursionError:
                raise self._error("nested too deeply") from None
            # A number that touches the end of the text may go on in the next chunk.
            if end == len(self.text) and not self.ended:
                self._read(CHUNK)
                continue
            self.at = end
            return value

    def _peek(self) -> str:
        """The next character that is not white space, "" at the end of the file."""
        if self.text[self.at : self.at + 1] > " ":
            return self.text[self.at]
        while True:
            found = _NOT_SPACE.search(self.text, self.at)
            self.at = found.start() if found else len(self.text)
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._read(CHUNK)

    def _take(self, mark: str) -> bool:
        found = self._peek() == mark
        self.at += found
        return found

    def _expect(self, mark: str) -> None:
        if not self._take(mark):
            raise self._error(f"expected {mark!r}, found {self._peek() or 'the end of the file'!r}")

    def _read(self, size: int) -> None:
        data = self.file.read(size)
        self.ended = len(data) < size
        try:
            fresh = self.decode(data, self.ended)
        except UnicodeDecodeError as error:
            raise self._error(f"not UTF-8 text: {error.reason}") from None
        self.passed += self.at
        self.text = self.text[self.at :] + fresh
        self.at = 0

    def _error(self, message: str, at: int | None = None) -> JsonError:
        return JsonError(f"{message} (at character {self.passed + (self.at if at is None else at)})")
