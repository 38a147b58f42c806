"""Files of JSON: an object a line, objects one after the other, or an array of them. Each object is a row."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from minilm.columns import Column, RepeatedKeys
from minilm.files import check_mark, open_text

_CHUNK = 2**20  # characters that are read at a time
_SPACE = re.compile(r"[ \t\r\n]*")
# An error this near to the end of what was read can come from a value that goes on: "-Infinity", two escapes.
_UNFINISHED = 16
_KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


def read_json(path: str, columns: Sequence[Column]) -> Iterator[tuple[int, list[Any]]]:
    """The line of each row, from 1, and its cells of `columns`; what else a row holds does not matter.

    Raises ValueError that names the line: of what is not JSON, of what is not an object, of a key of `columns` that
    stands twice with different values, and of a column that is not there.
    """
    parse = _Parser(columns)
    for line, row in _rows(path, parse):
        where = f"{path}, line {line}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {_KINDS.get(type(row), 'a number')} where an object with the text is expected")
        yield line, [column.find(row, where) for column in columns]


def read_json_names(path: str) -> list[str]:
    """The names in the first row of a file."""
    row = next(_rows(path, _Parser(())), (0, None))[1]
    return list(row) if isinstance(row, dict) else []


class _Parser:
    """Parses JSON as Python does, and marks repeated keys where they matter."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.keys = {part for column in columns for part in _parts(column.name)}
        self.signs = [f'"{key}"' for key in self.keys]
        # A key can also be written with escapes: \u0061 for ASCII, and \/ for a slash.
        self.plain = all(key.isascii() and key.isprintable() and not set(key) & set('/"\\') for key in self.keys)
        self.marking = json.JSONDecoder(object_pairs_hook=self._mark)
        self.usual = json.JSONDecoder()
        # Python refuses whole numbers of more than 4300 digits, which no column that is asked for can hold.
        self.long_numbers = json.JSONDecoder(object_pairs_hook=self._mark, parse_int=float)

    def whole(self, line: str) -> Any:
        """The value that is all of a line."""
        decoder = self.marking if self._suspicious(line, 0, len(line)) else self.usual
        try:
            return decoder.decode(line)
        except json.JSONDecodeError:
            raise
        except ValueError:
            return self.long_numbers.decode(line)

    def first(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at `start`, and where it ends."""
        try:
            value, end = self.usual.raw_decode(text, start)
        except json.JSONDecodeError:
            raise
        except ValueError:
            return self.long_numbers.raw_decode(text, start)
        return self.marking.raw_decode(text, start) if self._suspicious(text, start, end) else (value, end)

    def _suspicious(self, text: str, start: int, end: int) -> bool:
        """Whether one of the keys may stand twice in an object."""
        if not self.plain or text.find("\\u00", start, end) >= 0:
            return True
        return any(text.count(sign, start, end) > 1 for sign in self.signs)

    def _mark(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) == len(pairs):
            return row
        repeated = {key for key, value in pairs if key in self.keys and value != row[key]}
        if not repeated:
            return row
        marked = RepeatedKeys(row)
        marked.repeated = frozenset(repeated)
        return marked


def _parts(name: str) -> Iterator[str]:
    """What can be a key on a dotted path: each run of its parts."""
    parts = name.split(".")
    for start in range(len(parts)):
        for stop in range(start + 1, len(parts) + 1):
            yield ".".join(parts[start:stop])


def _rows(path: str, parse: _Parser) -> Iterator[tuple[int, Any]]:
    """The line and the value of each row."""
    with open_text(path) as file:
        window = _Window(path, file, parse)
        if window.mark() == "[":
            yield from _items(window)
            return
        file.seek(0)
        whole_lines = _lines_are_values(file, parse)
        file.seek(0)
        if whole_lines:
            yield from _values_of_lines(path, file, parse)
            return
        window = _Window(path, file, parse)
        while window.mark():
            yield window.line, window.value()


def _lines_are_values(file: TextIO, parse: _Parser) -> bool:
    """Whether each line is to be one value, by the first: an object can also be laid out over several lines."""
    line = next((line for line in file if line.strip()), "{}")
    try:
        parse.whole(line)
    except (ValueError, RecursionError):
        return next(file, "").lstrip().startswith("{")
    return True


def _values_of_lines(path: str, file: TextIO, parse: _Parser) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        try:
            yield number, parse.whole(line)
        except RecursionError as error:
            raise _too_deep(path, number) from error
        except json.JSONDecodeError as error:
            check_mark(path, number, line)
            if line.strip(" \t\r\n"):
                raise _not_json(path, number, error.msg) from error


def _items(window: "_Window") -> Iterator[tuple[int, Any]]:
    """The rows of an array, at whose beginning the window is."""
    window.move(window.place + 1)
    mark = window.mark()
    while mark != "]":
        start = window.line
        yield start, window.value()
        mark = window.mark()
        if mark == ",":
            window.move(window.place + 1)
            window.mark()
        elif mark != "]":
            missing = "a comma is missing before this row" if mark else "the array is not closed"
            raise _not_json(window.path, window.line, missing)
    window.move(window.place + 1)
    if window.mark():
        check_mark(window.path, window.line, window.text[window.place :])
        raise _not_json(window.path, window.line, "text follows the end of the array")


class _Window:
    """A part of a file's text, as long as the value that is read; `place` is where in it the reading is."""

    def __init__(self, path: str, file: TextIO, parse: _Parser) -> None:
        self.path, self.file, self.parse = path, file, parse
        self.text, self.place, self.line = "", 0, 1

    def move(self, place: int) -> None:
        self.line += self.text.count("\n", self.place, place)
        self.place = place

    def mark(self) -> str:
        """The next character that is no space, to which the window moves; nothing at the end."""
        while True:
            found = _SPACE.match(self.text, self.place)
            assert found is not None
            self.move(found.end())
            if self.place < len(self.text):
                return self.text[self.place]
            if not self._fill():
                return ""

    def value(self) -> Any:
        """The value that begins here, to whose end the window moves."""
        while True:
            try:
                value, end = self.parse.first(self.text, self.place)
            except RecursionError as error:
                raise _too_deep(self.path, self.line) from error
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - _UNFINISHED or error.msg.startswith("Unterminated")
                if cut and self._fill():
                    continue
                line = self.line + self.text.count("\n", self.place, error.pos)
                check_mark(self.path, line, self.text[error.pos :])
                raise _not_json(self.path, line, error.msg) from error
            if end > len(self.text) - _UNFINISHED and self._fill():
                continue  # a number can go on
            self.move(end)
            return value

    def _fill(self) -> bool:
        """Read on, as much again as is held; False at the end of the file."""
        more = self.file.read(max(_CHUNK, len(self.text) - self.place))
        if more:
            self.text, self.place = self.text[self.place :] + more, 0
        return bool(more)


def _not_json(path: str, line: int, why: str) -> ValueError:
    return ValueError(f"{path}, line {line}: no JSON, or cut off ({why})")


def _too_deep(path: str, line: int) -> ValueError:
    return ValueError(f"{path}, line {line}: lists and objects lie deeper in each other than can be read")
