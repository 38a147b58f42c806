"""JSON files: one object per line, objects one after the other, or an array of objects. Each object is a row."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from minilm.data.columns import Column, DictWithRepeatedKeys, check_keys
from minilm.data.text_decoding import LinePlaces, check_byte_order_mark, open_text

# Number of characters to read at a time.
_CHUNK = 2**20
_SPACE = re.compile(r"[ \t\r\n]*")
# An error within this number of characters of the window's end may come from a value that continues after it, such as
# "-Infinity" or a pair of escapes.
_UNFINISHED = 16
_KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


def read_json(
    path: str, columns: Sequence[Column], places: LinePlaces | None = None
) -> Iterator[tuple[int, list[Any]]]:
    """Yield the line at which each row begins, from 1, and its cells of `columns`. Other keys of a row are ignored.

    places: the line to begin with, for a file with an object per line (`has_value_per_line`).

    Raise ValueError that names the line: for text that is not JSON, for a value that is not an object, for a key of
    `columns`, or inside a column of JSON values, that occurs twice with different values, and for a missing column.
    """
    parser = JsonParser(columns)
    for line, row in _read_rows(path, parser, places):
        where = f"{path}, line {line}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {_KINDS.get(type(row), 'a number')} where an object with the text is expected")
        yield line, parser.get_cells(columns, row, where)


def read_json_keys(path: str) -> list[str]:
    """Return the keys of the first row of a file."""
    row = next(read_values(path, ()), (0, None))[1]
    return list(row) if isinstance(row, dict) else []


def read_values(path: str, columns: Sequence[Column]) -> Iterator[tuple[int, Any]]:
    """Yield the line at which each value of a file begins, from 1, and the value.

    An object in which a key of `columns` occurs twice with different values is a `DictWithRepeatedKeys`.
    """
    return _read_rows(path, JsonParser(columns))


class JsonParser:
    """A parser of JSON that marks each object in which a key of `columns` occurs twice with different values.

    If one of the columns holds JSON values, every key counts as one of `columns`.
    """

    has_repeated_keys = False
    """Whether an object has been marked so far."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.all_keys = any(column.kind == "json" for column in columns)
        self.keys = {part for column in columns for part in _list_possible_keys(column.name)}
        self.quoted_keys = [f'"{key}"' for key in self.keys]
        # JSON can also write a key with escapes: \u0061 for a letter of ASCII, and \/ for a slash.
        self.plain = all(key.isascii() and key.isprintable() and not set(key) & set('/"\\') for key in self.keys)
        self.marking = json.JSONDecoder(object_pairs_hook=self._mark)
        self.fast = json.JSONDecoder()
        self.long_numbers = json.JSONDecoder(object_pairs_hook=self._mark, parse_int=_parse_integer)

    def parse_line(self, line: str) -> Any:
        """Parse a line that holds one value."""
        decoder = self.marking if self._may_repeat(line, 0, len(line)) else self.fast
        try:
            return decoder.decode(line)
        except json.JSONDecodeError:
            raise
        except ValueError:
            return self.long_numbers.decode(line)

    def parse_at(self, text: str, start: int) -> tuple[Any, int]:
        """Parse the value that begins at `start`. Return it and its end."""
        try:
            value, end = self.fast.raw_decode(text, start)
        except json.JSONDecodeError:
            raise
        except ValueError:
            return self.long_numbers.raw_decode(text, start)
        return self.marking.raw_decode(text, start) if self._may_repeat(text, start, end) else (value, end)

    def parse_text(self, text: str, where: str) -> Any:
        """Parse a text that holds one value. Raise ValueError that begins with `where` if it does not."""
        try:
            return self.parse_line(text)
        except RecursionError as error:
            raise _too_deep_error(where) from error
        except json.JSONDecodeError as error:
            raise _not_json_error(where, error.msg) from error

    def get_cells(self, columns: Sequence[Column], row: Mapping[str, Any], where: str) -> list[Any]:
        """Return the cells of `columns` in a row whose values this parser has made.

        Raise ValueError that begins with `where` for a missing column, and for a key that occurs twice with different
        values.
        """
        cells = [column.get_cell(row, where) for column in columns]
        if self.has_repeated_keys:
            for column, cell in zip(columns, cells, strict=True):
                if column.kind == "json":
                    check_keys(cell, where)
        return cells

    def _may_repeat(self, text: str, start: int, end: int) -> bool:
        """Return whether a key of `columns` may stand twice in an object of this part of the text."""
        if self.all_keys or not self.plain or text.find("\\u00", start, end) >= 0:
            return True
        return any(text.count(key, start, end) > 1 for key in self.quoted_keys)

    def _mark(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Return the object of these pairs: a `DictWithRepeatedKeys` if a key of `columns` has different values."""
        row = dict(pairs)
        if len(row) == len(pairs):
            return row
        repeated = {key for key, value in pairs if (self.all_keys or key in self.keys) and value != row[key]}
        if not repeated:
            return row
        marked = DictWithRepeatedKeys(row)
        marked.repeated = frozenset(repeated)
        self.has_repeated_keys = True
        return marked


def _parse_integer(digits: str) -> float:
    """Return an integer, or infinity if it has more than 4300 digits, which Python refuses to parse.

    A column that is not read may hold such a number.
    """
    try:
        return int(digits)
    except ValueError:
        return math.inf


def _list_possible_keys(name: str) -> Iterator[str]:
    """Yield each key that a dotted path may contain: for `a.b`, these are `a`, `a.b` and `b`."""
    parts = name.split(".")
    for start in range(len(parts)):
        for stop in range(start + 1, len(parts) + 1):
            yield ".".join(parts[start:stop])


def has_value_per_line(path: str) -> bool:
    """Return whether the rows of a file are read line by line."""
    with open_text(path) as file:
        parser = JsonParser(())
        if _Window(path, file, parser).skip_spaces() == "[":
            return False
        file.seek(0)
        return _has_value_per_line(file, parser)


def _read_rows(path: str, parser: JsonParser, places: LinePlaces | None = None) -> Iterator[tuple[int, Any]]:
    """Yield the line at which each row begins, and its value."""
    with open_text(path) as file:
        if places is not None:
            yield from _read_lines(path, places.iterate(file, "utf-8"), parser)
            return
        window = _Window(path, file, parser)
        if window.skip_spaces() == "[":
            yield from _read_array(window)
            return
        file.seek(0)
        whole_lines = _has_value_per_line(file, parser)
        file.seek(0)
        if whole_lines:
            yield from _read_lines(path, enumerate(file, start=1), parser)
            return
        window = _Window(path, file, parser)
        while window.skip_spaces():
            yield window.line, window.read_value()


def _has_value_per_line(file: TextIO, parser: JsonParser) -> bool:
    """Return whether each line is one value, judged by the first line. An object can also extend over several lines.

    If the first line is not JSON but the next line begins an object, the first line is taken for a damaged value.
    """
    line = next((line for line in file if line.strip()), "{}")
    try:
        parser.parse_line(line)
    except (ValueError, RecursionError):
        return next(file, "").lstrip().startswith("{")
    return True


def _read_lines(path: str, lines: Iterable[tuple[int, str]], parser: JsonParser) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line, except blank lines."""
    for number, line in lines:
        try:
            yield number, parser.parse_line(line)
        except RecursionError as error:
            raise _too_deep_error(f"{path}, line {number}") from error
        except json.JSONDecodeError as error:
            check_byte_order_mark(path, number, line)
            if line.strip(" \t\r\n"):
                raise _not_json_error(f"{path}, line {number}", error.msg) from error


def _read_array(window: "_Window") -> Iterator[tuple[int, Any]]:
    """Yield the line at which each item of an array begins, and its value. The window is at the opening bracket."""
    window.move(window.place + 1)
    character = window.skip_spaces()
    while character != "]":
        start = window.line
        yield start, window.read_value()
        character = window.skip_spaces()
        if character == ",":
            window.move(window.place + 1)
            window.skip_spaces()
        elif character != "]":
            why = "a comma is missing before this row" if character else "the array is not closed"
            raise _not_json_error(f"{window.path}, line {window.line}", why)
    window.move(window.place + 1)
    if window.skip_spaces():
        check_byte_order_mark(window.path, window.line, window.text[window.place :])
        raise _not_json_error(f"{window.path}, line {window.line}", "text follows the end of the array")


class _Window:
    """A part of a file's text that grows until it holds the value to read. `place` is the position in that part."""

    def __init__(self, path: str, file: TextIO, parser: JsonParser) -> None:
        self.path, self.file, self.parser = path, file, parser
        self.text, self.place, self.line = "", 0, 1

    def move(self, place: int) -> None:
        """Move forward to a place, and count the lines up to it."""
        self.line += self.text.count("\n", self.place, place)
        self.place = place

    def skip_spaces(self) -> str:
        """Move to the next character that is not white space, and return it; empty at the end of the file."""
        while True:
            spaces = _SPACE.match(self.text, self.place)
            assert spaces is not None
            self.move(spaces.end())
            if self.place < len(self.text):
                return self.text[self.place]
            if not self._fill():
                return ""

    def read_value(self) -> Any:
        """Return the value that begins here, and move to its end."""
        while True:
            try:
                value, end = self.parser.parse_at(self.text, self.place)
            except RecursionError as error:
                raise _too_deep_error(f"{self.path}, line {self.line}") from error
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - _UNFINISHED or error.msg.startswith("Unterminated")
                if cut and self._fill():
                    continue
                line = self.line + self.text.count("\n", self.place, error.pos)
                check_byte_order_mark(self.path, line, self.text[error.pos :])
                raise _not_json_error(f"{self.path}, line {line}", error.msg) from error
            if end > len(self.text) - _UNFINISHED and self._fill():
                # A number may continue after the window.
                continue
            self.move(end)
            return value

    def _fill(self) -> bool:
        """Add text to the window, at least as much as it still holds. Return False at the end of the file."""
        more = self.file.read(max(_CHUNK, len(self.text) - self.place))
        if more:
            self.text, self.place = self.text[self.place :] + more, 0
        return bool(more)


def _not_json_error(where: str, why: str) -> ValueError:
    return ValueError(f"{where}: not JSON, or cut off ({why})")


def _too_deep_error(where: str) -> ValueError:
    return ValueError(f"{where}: the lists and objects are nested too deeply; flatten the row")
