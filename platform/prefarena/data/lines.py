"""Lines of JSON from a file, in chunks of bounded size, with their numbers.

Lines end at b"\\n" alone: other characters that Unicode calls line ends may stand inside a JSON string. A line over a
limit is passed over without ever being held whole, so memory is bounded whatever a file holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prefarena.data.arrays import ArrayLines, Readable
from prefarena.data.compression import MAGIC
from prefarena.data.rejections import NOT_AN_OBJECT, NOT_JSON, NOT_UTF8, Unusable

_BOM = b"\xef\xbb\xbf"
_ICONV = "convert it, for example by `iconv -f UTF-16 -t UTF-8`"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # UTF-32 begins with them too, or with a NUL


@dataclass(frozen=True)
class Lines:
    """Whole lines; `first` is the number of the first, from 1. `too_long`: one line over the limit, not held."""

    first: int
    data: bytes
    too_long: bool = False


class WrongFile(Exception):
    """A file that holds something other than lines of JSON; the message says what it holds, and what to do."""


def read_lines(stream: Readable, chunk_bytes: int, most_bytes: int) -> Iterator[Lines]:
    """All lines of a stream, about `chunk_bytes` of them at a time; those of more than `most_bytes` by themselves.

    The elements of a JSON array count as lines. Raises WrongFile where the beginning shows another kind of file, and
    BadArray where an array is not whole.
    """
    first, rest, too_long, started = 1, b"", False, False
    while piece := stream.read(chunk_bytes):
        if not started:
            piece, started = _checked_start(piece), True
            if piece.lstrip().startswith(b"["):
                stream = ArrayLines(piece, stream)
                piece = stream.read(chunk_bytes)
        if too_long:
            _, newline, piece = piece.partition(b"\n")
            if not newline:
                continue
            yield Lines(first, b"", too_long=True)
            first, too_long = first + 1, False
        whole, newline, rest = (rest + piece).rpartition(b"\n")
        if newline:
            yield from _within(Lines(first, whole), most_bytes)
            first += whole.count(b"\n") + 1
        if len(rest) > most_bytes:
            rest, too_long = b"", True
    if rest or too_long:
        yield Lines(first, rest, too_long)


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises Unusable where it holds none.

    NaN and Infinity pass, as Python and others write them: what a column may hold is said where it is used.
    """
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Unusable(NOT_UTF8, f"byte 0x{line[error.start]:02x} at character {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise Unusable(NOT_JSON, f"{error.msg.removesuffix(' at')} at character {error.pos + 1}") from None
    except RecursionError:
        raise Unusable(NOT_JSON, "nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise Unusable(NOT_JSON, str(error)) from None
    if not isinstance(value, dict):
        raise Unusable(NOT_AN_OBJECT, type(value).__name__)
    return value


def _within(lines: Lines, most_bytes: int) -> Iterator[Lines]:
    """The lines as they are, or one by one where some are over the limit."""
    if len(lines.data) <= most_bytes:
        yield lines
        return
    for number, line in enumerate(lines.data.split(b"\n"), start=lines.first):
        too_long = len(line) > most_bytes
        yield Lines(number, b"" if too_long else line, too_long)


def _checked_start(piece: bytes) -> bytes:
    """The beginning of a file without a UTF-8 byte order mark."""
    for mark, end in MAGIC.items():
        if piece.startswith(mark):
            raise WrongFile(f"is compressed, but not named so; rename it to end in {end}")
    if piece.startswith(b"PAR1"):
        raise WrongFile("is a parquet file; rename it to end in .parquet")
    if piece.startswith(_UTF16) or b"\0" in piece[:4]:
        raise WrongFile(f"is UTF-16, UTF-32 or binary, not UTF-8; {_ICONV}")
    return piece.removeprefix(_BOM)
