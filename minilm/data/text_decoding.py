"""Text in files: decode it, split it into lines, and name the line that cannot be read."""

import codecs
import gzip
import io
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import IO, Any, TextIO, cast

from minilm.utils.local_files import is_gzip

log = logging.getLogger("minilm")

# Number of bytes or characters that are decoded at a time.
_BLOCK = 2**20
# Log each warning once, however often a run reads the file.
warn_once = lru_cache(maxsize=None)(log.warning)
# A character that takes several bytes in UTF-8. Text in Windows-1252 hardly ever contains such bytes.
_MULTIBYTE = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}|\xed[\x80-\x9f][\x80-\xbf]"
    rb"|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2}"
)
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def open_bytes(path: str) -> IO[bytes]:
    """Open a file for reading, and unpack it if its name ends in .gz."""
    return cast(IO[bytes], gzip.open(path)) if is_gzip(path) else open(path, "rb")


class _NulError(ValueError):
    """A file of text holds a NUL."""


class _NulCheck(io.RawIOBase):
    """Reads the bytes of another file, and raises _NulError at a NUL."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = cast(io.BufferedIOBase, file)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        if b"\0" in bytes(buffer[:count]):
            raise _NulError
        return count


@contextmanager
def open_text(path: str, encoding: str = "utf-8", newline: str = "\n") -> Iterator[TextIO]:
    """Open a file as text, without its byte-order mark. A line ends only at `newline`, and includes it.

    If the block fails to read or decode the file, or reads a NUL, raise ValueError that names the line.
    """
    try:
        with open_bytes(path) as file:
            _refuse_utf_16(path, file)
            checked = io.BufferedReader(_NulCheck(file), _BLOCK)
            yield io.TextIOWrapper(checked, "utf-8-sig" if encoding == "utf-8" else encoding, newline=newline)
    except (UnicodeDecodeError, _NulError, OSError, EOFError, zlib.error) as error:
        line, problem = _find_undecodable_line(path, encoding)
        raise ValueError(f"{path}, line {line}: {problem}; convert the file" if line else f"{path}: {error}") from error


def find_line_end(path: str) -> str:
    """Return the line end of a file: a line feed, or a carriage return if the file has no line feed.

    So a carriage return inside a line is text, but it ends the lines of a file from an old Macintosh.
    """
    with open_text(path, "latin-1") as file:
        while block := file.read(_BLOCK):
            if "\n" in block:
                return "\n"
    return "\r"


class LinePlaces:
    """Where to begin in a file, and where the lines that have been read begin.

    line, byte: the line to begin with, from 1, and where it begins, as `pop` returned them.
    """

    def __init__(self, line: int = 1, byte: int = 0) -> None:
        self.line, self.byte = line, byte
        self._bytes = dict[int, int]()

    def iterate(self, file: TextIO, encoding: str) -> Iterator[tuple[int, str]]:
        """Yield the number of each line of a file that `open_text` has opened, and the line."""
        at = self.byte
        if at:
            file.seek(at)
        elif encoding == "utf-8":
            at = len(codecs.BOM_UTF8) * (file.buffer.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8)
            file.seek(0)
        for number, line in enumerate(file, start=self.line):
            self._bytes[number] = at
            at += len(line) if line.isascii() else len(line.encode(encoding))
            yield number, line

    def pop(self, lines: Sequence[int]) -> list[tuple[int, int]]:
        """Return each of these lines with the byte at which it begins, and forget all lines that were read so far."""
        places = [(line, self._bytes[line]) for line in lines]
        self._bytes.clear()
        return places


def strip_line_end(line: str, newline: str) -> str:
    """Return a line without its end: `newline`, or CR LF if `newline` is LF."""
    line = line.removesuffix(newline)
    return line.removesuffix("\r") if newline == "\n" else line


def detect_encoding(files: Sequence[str]) -> str:
    """Return the encoding of files: `utf-8`, or `cp1252` (Windows-1252) with a warning.

    Files are Windows-1252 if none of them is UTF-8 and none holds a multi-byte character of UTF-8. Raise ValueError
    that names the file and the line if a file has neither encoding, or if the files have different encodings.
    """
    others = {name: line for name in files if (line := _find_undecodable_line(name, "utf-8")[0])}
    for name, line in others.items():
        if len(others) < len(files) or _find_undecodable_line(name, "cp1252")[0]:
            raise ValueError(
                f"{name}, line {line}: not UTF-8, or it holds a NUL character, which is not text; convert the file"
            )
        if other := _find_multibyte_line(name):
            raise ValueError(
                f"{name}, line {line}: not UTF-8, but line {other} is; correct the line, or convert the file"
            )
        warn_once(f"{name}, line {line}: not UTF-8, so the file is read as Windows-1252")
    return "cp1252" if others else "utf-8"


def _refuse_utf_16(path: str, file: IO[bytes]) -> None:
    """Raise ValueError if the file begins with a byte-order mark of UTF-16."""
    if file.read(2) in _UTF_16:
        raise ValueError(f"{path}, line 1: the file is UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`")
    file.seek(0)


def _find_undecodable_line(name: str, encoding: str) -> tuple[int, str]:
    """Return the number of the first line, from 1, that cannot be decoded or holds a NUL, and what is wrong with it.

    If there is none, return 0 and "".
    """
    number = 0
    try:
        with open_bytes(name) as file:
            _refuse_utf_16(name, file)
            if _is_text(file, encoding):
                return 0, ""
            file.seek(0)
            for line in file:
                number += 1
                if "\0" in line.decode(encoding):
                    return number, "it holds a NUL character, which is not text"
    except UnicodeDecodeError:
        return number, "not UTF-8"
    except (OSError, EOFError, zlib.error) as error:
        advice = "change its permissions" if isinstance(error, PermissionError) else "copy the file again"
        raise ValueError(f"{name}, after line {number}: cannot be read; {advice} ({error})") from error
    return 0, ""


def _find_multibyte_line(name: str) -> int:
    """Return the number of the first line, from 1, that holds a multi-byte character of UTF-8; 0 if there is none."""
    with open_bytes(name) as file:
        return next((number for number, line in enumerate(file, start=1) if _MULTIBYTE.search(line)), 0)


def check_byte_order_mark(path: str, number: int, line: str) -> None:
    """Raise ValueError if a line after the first begins with a byte-order mark, which is not text.

    Such a mark is left when files are joined. `open_text` removes the mark of the first line.
    """
    if number > 1 and line.startswith("\ufeff"):
        raise ValueError(
            f"{path}, line {number}: begins with a byte-order mark (U+FEFF), as if files were joined; remove it"
        )


def _is_text(file: IO[bytes], encoding: str) -> bool:
    """Return whether a file can be decoded and holds no NUL. It reads blocks, which is faster than reading lines."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        while block := file.read(_BLOCK):
            if "\0" in decoder.decode(block):
                return False
        decoder.decode(b"", final=True)
    except (UnicodeDecodeError, OSError, EOFError, zlib.error):
        return False
    return True
