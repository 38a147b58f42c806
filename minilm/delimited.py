"""Files of fields between delimiters, `.csv` and `.tsv`: every cell is text, and every row has the header's fields."""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TextIO

from minilm.columns import Column
from minilm.files import check_mark, ending, line_end, open_text, strip_line_end, warn_once

_DELIMITERS = (",", ";", "\t", "|")
# An unclosed quote takes all that follows: it must not fill the memory.
csv.field_size_limit(2**28)
_SEPARATOR = re.compile(r"sep=(.)[\r\n]*")
# A field as programs write it that quote a text with a quote in it, and one that shows that they did.
_QUOTED_FIELD = re.compile(r'"(?:[^"]|"")*"')


@dataclass(frozen=True)
class _Dialect:
    """A file and how its rows are written."""

    path: str
    encoding: str
    newline: str
    delimiter: str
    quoted: bool = True
    """Whether a field can be in quotes. Without them the delimiter is a tab."""
    problem: str = ""
    """Why a file of tabs cannot be read without quotes; empty where it can."""

    def open(self) -> AbstractContextManager[TextIO]:
        return open_text(self.path, self.encoding, self.newline)

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the line at which each row begins, and its fields. Raises ValueError for wrong quotes."""
        with self.open() as file:
            yield from _quoted_rows(self, file) if self.quoted else _plain_rows(self, file)

    def header(self) -> list[str]:
        """Return the fields of the first row; none where the file has none, or where its quotes are wrong."""
        try:
            return next(self.rows(), (0, []))[1]
        except ValueError:
            return []


def read_delimited(
    path: str, columns: Sequence[Column], encoding: str, delimiter: str | None
) -> Iterator[tuple[int, list[Any]]]:
    """The line of each row, from 1, and its cells of `columns`; an empty cell of a label is None.

    Lines end at LF or CRLF (at CR where the file has no LF), and blank lines are no rows. A field that begins with a
    quote ends at the next one that is not doubled, and may hold delimiters and line ends. Without a `delimiter`, the
    header decides it: that of the file's ending, or else the first of `, ; tab |` by which it names the columns.

    A file whose delimiter is a tab is not quoted, so that quotes are text, where each line has the header's number of
    tabs; unless each field with a quote is written as a quoted one, and one holds doubled quotes or a CR, or the whole
    header is in quotes: only a program that quotes writes that.

    Raises ValueError that names the line: for another number of fields than the header's, for a quote that is not
    closed, for text behind a closing quote, and for a column that is not there.
    """
    dialect = _find_dialect(path, columns, encoding, delimiter)
    try:
        yield from _read_cells(dialect, columns)
    except ValueError as error:
        at = dialect.problem.partition(":")[0]
        if not dialect.problem or str(error).startswith(f"{path}, {at}:"):
            raise
        raise ValueError(f"{path}, {dialect.problem}. Nor can the file be read with quotes: {error}") from error


def _read_cells(dialect: _Dialect, columns: Sequence[Column]) -> Iterator[tuple[int, list[Any]]]:
    labels = [index for index, column in enumerate(columns) if column.role == "label"]
    header, first = list[str](), True
    rows = dialect.rows()
    for line, fields in rows:
        if not header:
            header = fields
            places = _places(header, columns, f"{dialect.path}, line {line}")
            continue
        if len(fields) != len(header):
            if len(fields) == 1 < len(header) and not fields[0].strip():
                continue  # a line of spaces
            others = (fields for _, fields in rows) if first else None
            raise ValueError(_wrong_count(dialect, line, fields, header, others))
        first = False
        cells: list[Any] = [fields[place] for place in places]
        for index in labels:
            cells[index] = cells[index] or None
        yield line, cells


def read_delimited_names(path: str, columns: Sequence[Column], encoding: str, delimiter: str | None) -> list[str]:
    """The names of a file's columns."""
    return _unique(_find_dialect(path, columns, encoding, delimiter).header())


def _find_dialect(path: str, columns: Sequence[Column], encoding: str, delimiter: str | None) -> _Dialect:
    newline = line_end(path)
    usual = _Dialect(path, encoding, newline, "\t" if ending(path) == ".tsv" else ",")
    dialect = replace(usual, delimiter=delimiter or _find_delimiter(usual, columns))
    return _find_quoting(dialect) if dialect.delimiter == "\t" else dialect


def _find_delimiter(usual: _Dialect, columns: Sequence[Column]) -> str:
    """What stands between the fields, by the header: what lets it name the columns that are asked for."""
    with usual.open() as file:
        if stated := _SEPARATOR.fullmatch(file.readline()):
            return str(stated[1])
    candidates = [usual.delimiter, *(each for each in _DELIMITERS if each != usual.delimiter)]
    headers = {each: replace(usual, delimiter=each).header() for each in candidates}
    usual_header = headers[usual.delimiter]
    fitting = [each for each in candidates if all(column.name in _unique(headers[each]) for column in columns)]
    fitting = [each for each in fitting if each == usual.delimiter or headers[each] != usual_header]
    if len(fitting) > 1:
        listed = " and ".join(map(_name_of, fitting))
        raise ValueError(f"{usual.path}, line 1: {listed} could separate the fields; pass --data.delimiter")
    if fitting:
        if fitting[0] != usual.delimiter:
            warn_once(f"{usual.path}: {_name_of(fitting[0])} separates the fields, by the header")
        return fitting[0]
    if len(usual_header) == 1 and (several := [each for each in candidates if len(headers[each]) > 1]):
        return several[0]
    return usual.delimiter


def _name_of(delimiter: str) -> str:
    return "a tab" if delimiter == "\t" else delimiter


def _skip_separator(file: TextIO) -> int:
    """Skip a first line such as `sep=;`, which Excel writes and reads; return how many lines that is, 0 or 1."""
    if _SEPARATOR.fullmatch(file.readline()):
        return 1
    file.seek(0)
    return 0


def _places(header: list[str], columns: Sequence[Column], where: str) -> list[int]:
    """Where in a row the cells of the columns are."""
    names = _unique(header)
    for column in columns:
        if column.name not in names:
            error = column.missing(where, names)
            raise ValueError(f"{error}, or pass --data.delimiter" if len(names) == 1 else str(error))
        if header.count(column.name) > 1:
            warn_once(
                f"WARNING: {where}: {column.name!r} is the name of {header.count(column.name)} columns; the first is "
                f"read, and the next is {column.name}.1"
            )
    return [names.index(column.name) for column in columns]


def _unique(header: list[str]) -> list[str]:
    """The names of the columns: a repeated one gets a number, as in pandas, and an empty one a name."""
    names: list[str] = []
    for place, name in enumerate(header):
        name = name or f"Unnamed: {place}"
        unique, number = name, 0
        while unique in names or (number and unique in header):
            number += 1
            unique = f"{name}.{number}"
        names.append(unique)
    return names


def _plain_rows(dialect: _Dialect, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """The rows of a file without quoting, whose delimiter is a tab."""
    for number, line in enumerate(file, start=1 + _skip_separator(file)):
        check_mark(dialect.path, number, line)
        if text := strip_line_end(line, dialect.newline):
            yield number, text.split("\t")


def _quoted_rows(dialect: _Dialect, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """The rows of a file with quoting, each with the line at which it begins."""
    skipped = _skip_separator(file)
    # csv takes a carriage return for the end of a row, which inside a line it is not. A NUL stands for it meanwhile:
    # the text has none.
    hidden, begins = False, True

    def hide(lines: Iterable[str]) -> Iterator[str]:
        nonlocal hidden, begins
        for number, line in enumerate(lines, start=1 + skipped):
            if begins:
                check_mark(dialect.path, number, line)
                begins = False
            if "\r" in line and dialect.newline == "\n":
                body = strip_line_end(line, dialect.newline)
                if "\r" in body:
                    hidden = True
                    line = body.replace("\r", "\0") + line[len(body) :]
            yield line

    reader = csv.reader(hide(file), delimiter=dialect.delimiter, strict=True)
    while True:
        start, begins = reader.line_num + 1 + skipped, True
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(_wrong_quote(dialect, start, reader.line_num + skipped, error)) from error
        if fields is None:
            return
        if fields:
            yield start, [field.replace("\0", "\r") for field in fields] if hidden else fields


def _find_quoting(dialect: _Dialect) -> _Dialect:
    """Decide whether a file of tabs is quoted, as `read_delimited` says."""
    tabs, first, well_formed, sign, opens = -1, 0, True, False, False
    with dialect.open() as file:
        for number, line in enumerate(file, start=1 + _skip_separator(file)):
            text = strip_line_end(line, dialect.newline)
            if not text or (tabs > 0 and not text.strip() and "\t" not in text):
                continue
            fields = text.split("\t") if tabs < 0 or (well_formed and '"' in text) else []
            if tabs < 0:
                tabs, first = text.count("\t"), number
                sign = all(_QUOTED_FIELD.fullmatch(name) for name in fields)
            elif text.count("\t") != tabs:
                count = _fields(text.count("\t") + 1)
                return replace(
                    dialect, problem=f"line {number}: {count} where the header in line {first} has {tabs + 1}"
                )
            for field in fields:
                if '"' in field:
                    well_formed &= _QUOTED_FIELD.fullmatch(field) is not None
                    sign |= '""' in field or "\r" in field
                    opens |= field.startswith('"')
    if opens and not (well_formed and sign):
        warn_once(f"{dialect.path}: quotes are text, as every line has the header's number of tabs")
    return replace(dialect, quoted=well_formed and sign)


def _fields(count: int) -> str:
    return f"{count} field{'s' if count > 1 else ''}"


def _wrong_count(
    dialect: _Dialect, line: int, fields: list[str], header: list[str], others: Iterator[list[str]] | None
) -> str:
    """What is wrong with a row of too few or too many fields; `others` are the rows after it where it is the first."""
    what = f"{dialect.path}, line {line}: {_fields(len(fields))} where the header has {len(header)}"
    ends = sum(field.count("\n") for field in fields)
    if ends:
        return f"{what}; quotes hold {ends} line ends of this row: double a quote that is text, and quote its field"
    name = _name_of(dialect.delimiter)
    if len(fields) == len(header) + 1:
        extra, blank = _compare_counts(fields, others, len(header) + 1)
        if extra and blank:
            return f"{what}, and every row ends in {name}; end the header in {name} too"
        if extra:
            return f"{what}, and every row has one field more than the header; add the name of the first column to it"
        if not fields[-1]:
            return f"{what}; remove the {name} at the end of the row"
    if len(fields) + 1 == len(header) and not header[-1]:
        return f"{what}; remove the {name} at the end of the header"
    if len(fields) > len(header):
        return f"{what}; put a text that holds {name} in quotes, or pass --data.delimiter"
    return f"{what}; give the row its missing fields, or pass --data.delimiter"


def _compare_counts(fields: list[str], others: Iterator[list[str]] | None, count: int) -> tuple[bool, bool]:
    """(whether every row has `count` fields, whether the last of them is always empty)."""
    if others is None:
        return False, False
    blank = not fields[-1]
    try:
        for row in others:
            if len(row) != count:
                return False, False
            blank &= not row[-1]
    except ValueError:  # a later row cannot be read
        return False, False
    return True, blank


def _wrong_quote(dialect: _Dialect, start: int, line: int, error: csv.Error) -> str:
    """What is wrong with the quotes of the row that begins in line `start` and is read up to `line`."""
    if "expected after" in str(error):
        at = f"{dialect.path}, line {line}"
        begin = "" if start == line else f" (the row begins in line {start})"
        return f"{at}: text follows a closing quote{begin}; double a quote that is text, and quote its field"
    opened = _line_of_open_quote(dialect, start)
    return (
        f"{dialect.path}, line {opened}: the quote that opens here is not closed; close it, or double it if it is text"
    )


def _line_of_open_quote(dialect: _Dialect, start: int) -> int:
    """The line of the quote that is still open at the end of the file, of the row that begins in line `start`."""
    at, opened, inside = "start", start, False
    marks = re.compile(f'""|"|{re.escape(dialect.delimiter)}')
    with dialect.open() as file:
        for number, line in enumerate(itertools.islice(file, start - 1, None), start=start):
            place = 0
            if not inside:
                at = "start"
            while found := marks.search(line, place):
                if found.start() > place and not inside:
                    at = "text"
                if inside:
                    inside = found[0] != '"'
                    at = "text"
                elif found[0] == dialect.delimiter:
                    at = "start"
                elif at == "start":
                    inside, opened = True, number
                    place = found.start() + 1
                    continue
                place = found.end()
    return opened
