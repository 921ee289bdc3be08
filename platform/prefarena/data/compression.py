"""Compressed files as streams, by the endings of their names; only a buffer is held in memory."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from typing import IO, Any, cast

import pyarrow as pa

#: Endings and the command that checks such a file.
CHECKS = {".gz": "gzip -t", ".zst": "zstd -t", ".zstd": "zstd -t", ".bz2": "bzip2 -t", ".xz": "xz -t"}
#: What files of these kinds begin with, and the ending that says so.
MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz"}


class Damaged(Exception):
    """A compressed file that cannot be read any further; the message says why."""


def ending(path: str) -> str:
    """The ending of a compressed file's name; empty for others."""
    return next((end for end in CHECKS if path.lower().endswith(end)), "")


class Decompressed:
    """The plain bytes of an open file. `read` raises Damaged where they break off or are not what the name says."""

    def __init__(self, raw: IO[bytes], path: str) -> None:
        self._is_compressed = bool(ending(path))
        self._stream = _stream(raw, ending(path))

    def read(self, size: int = -1) -> bytes:
        try:
            return self._stream.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
            raise Damaged(_what(error)) from None
        except OSError as error:
            if not self._is_compressed or error.errno is not None:
                raise
            raise Damaged(_what(error)) from None

    # What Arrow's readers ask of a file.
    closed = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        """Do nothing: the file is closed by whoever opened it."""


def _stream(raw: IO[bytes], end: str) -> Any:
    if end == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if end == ".bz2":
        return bz2.BZ2File(raw)
    if end == ".xz":
        return lzma.LZMAFile(raw)
    if end in (".zst", ".zstd"):
        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    return raw


def _what(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
