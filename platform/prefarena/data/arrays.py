"""Reading a JSON array as lines, one element each, while holding only a piece of it.

In JSON a line end stands only between tokens, never in a string, so an element becomes a line when its line ends become
spaces; the commas between elements become line ends.
"""

from __future__ import annotations

import re
from typing import Protocol

_OUTSIDE = re.compile(rb'["\[\]{},\n\r]')
_INSIDE = re.compile(rb'["\\]')


class Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


class BadArray(Exception):
    """A file that begins as a JSON array but is not one; the message says why."""


class ArrayLines:
    """A stream that gives the elements of the array in `stream` as lines; `start` was read from it already."""

    def __init__(self, start: bytes, stream: Readable) -> None:
        self._start = start
        self._stream = stream
        self._depth = 0
        self._in_string = self._is_escaped = self._is_closed = False

    def read(self, size: int = -1, /) -> bytes:
        """Return about `size` bytes, or none at the end. Raises BadArray where the array does not end, or goes on."""
        while True:
            piece, self._start = self._start or self._stream.read(size), b""
            if not piece:
                if not self._is_closed:
                    raise BadArray("holds a JSON array that is not closed; get or write the file again")
                return b""
            if found := self._lines(piece):
                return found

    def _lines(self, piece: bytes) -> bytes:
        out: list[bytes] = []
        at = 0
        while at < len(piece):
            if self._is_closed:
                if piece[at:].strip():
                    raise BadArray(
                        "holds a JSON array with something else after it; write one array, or one object on each line"
                    )
                break
            at = self._string(piece, at, out) if self._in_string else self._structure(piece, at, out)
        return b"".join(out)

    def _string(self, piece: bytes, at: int, out: list[bytes]) -> int:
        """Take the rest of a string, as far as the piece has it."""
        begin = at
        if self._is_escaped:
            self._is_escaped, at = False, at + 1
        while found := _INSIDE.search(piece, at):
            at = found.end()
            if found[0] == b'"':
                self._in_string = False
                break
            if at == len(piece):
                self._is_escaped = True
                break
            at += 1
        else:
            at = len(piece)
        out.append(piece[begin:at])
        return at

    def _structure(self, piece: bytes, at: int, out: list[bytes]) -> int:
        found = _OUTSIDE.search(piece, at)
        if found is None:
            out.append(piece[at:])
            return len(piece)
        out.append(piece[at : found.start()])
        mark = found[0]
        if mark in b"[{":
            out.append(mark if self._depth else b"")
            self._depth += 1
        elif mark in b"]}":
            self._depth -= 1
            self._is_closed = self._depth == 0
            out.append(b"" if self._is_closed else mark)
        elif mark == b",":
            out.append(b"\n" if self._depth == 1 else mark)
        elif mark == b'"':
            self._in_string = True
            out.append(mark)
        else:
            out.append(b" ")
        return found.end()
