"""Files of fields between delimiters, `.csv` and `.tsv`: every cell is text, and every row has the header's fields."""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from minilm.columns import Column
from minilm.files import check_mark, ending, line_end, open_text, strip_line_end, warn_once

_DELIMITERS = (",", ";", "\t", "|")
_NAMES = {"\t": "a tab"}
# An unclosed quote takes all that follows: it must not fill the memory.
csv.field_size_limit(2**28)
_SEPARATOR = re.compile(r"sep=(.)[\r\n]*")
# A field as programs write it that quote a text with a quote in it, and one that shows that they did.
_QUOTED_FIELD = re.compile(r'"(?:[^"]|"")*"')


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
    newline = line_end(path)
    delimiter = delimiter or _find_delimiter(path, columns, encoding, newline)
    problem, quoted, first = "", True, True
    if delimiter == "\t":
        problem, quoted = _find_quoting(path, encoding, newline)
    with open_text(path, encoding, newline) as file:
        rows = _quoted_rows(path, file, delimiter, newline) if quoted else _plain_rows(path, file, newline)
        header: list[str] = []
        try:
            for line, fields in rows:
                if not header:
                    header = fields
                    places = _places(header, columns, f"{path}, line {line}")
                    labels = [place for place, column in zip(places, columns, strict=True) if column.role == "label"]
                    continue
                if len(fields) != len(header):
                    if len(fields) == 1 < len(header) and not fields[0].strip():
                        continue  # a line of spaces
                    others = (fields for _, fields in rows) if first else None
                    raise ValueError(_wrong_count(path, line, fields, header, delimiter, others))
                first = False
                cells: list[Any] = [fields[place] for place in places]
                if labels:
                    cells = [
                        cell or (None if column.role == "label" else cell)
                        for cell, column in zip(cells, columns, strict=True)
                    ]
                yield line, cells
        except ValueError as error:
            at = problem.partition(":")[0]
            if not problem or isinstance(error, UnicodeDecodeError) or str(error).startswith(f"{path}, {at}:"):
                raise
            raise ValueError(f"{path}, {problem}. Nor can the file be read with quotes: {error}") from error


def read_delimited_names(path: str, columns: Sequence[Column], encoding: str, delimiter: str | None) -> list[str]:
    """The names of a file's columns."""
    newline = line_end(path)
    delimiter = delimiter or _find_delimiter(path, columns, encoding, newline)
    quoted = delimiter != "\t" or _find_quoting(path, encoding, newline)[1]
    return _unique(_header(path, delimiter, encoding, newline, quoted=quoted))


def _find_delimiter(path: str, columns: Sequence[Column], encoding: str, newline: str) -> str:
    """What stands between the fields, by the header: what lets it name the columns that are asked for."""
    usual = "\t" if ending(path) == ".tsv" else ","
    with open_text(path, encoding, newline) as file:
        if stated := _SEPARATOR.fullmatch(file.readline()):
            return stated[1]
    candidates = [usual, *(each for each in _DELIMITERS if each != usual)]
    headers = {each: _header(path, each, encoding, newline) for each in candidates}
    fitting = [each for each in candidates if all(column.name in _unique(headers[each]) for column in columns)]
    fitting = [each for each in fitting if each == usual or headers[each] != headers[usual]]
    if len(fitting) > 1:
        listed = " and ".join(_NAMES.get(each, each) for each in fitting)
        raise ValueError(f"{path}, line 1: {listed} could separate the fields; pass --data.delimiter")
    if fitting:
        if fitting[0] != usual:
            warn_once(f"{path}: {_NAMES.get(fitting[0], fitting[0])} separates the fields, by the header")
        return fitting[0]
    if len(headers[usual]) == 1 and (several := [each for each in candidates if len(headers[each]) > 1]):
        return several[0]
    return usual


def _header(path: str, delimiter: str, encoding: str, newline: str, *, quoted: bool = True) -> list[str]:
    """The fields of the first row; none where the file has none, or where its quotes are wrong."""
    with open_text(path, encoding, newline) as file:
        rows = _quoted_rows(path, file, delimiter, newline) if quoted else _plain_rows(path, file, newline)
        try:
            return next(rows, (0, []))[1]
        except ValueError:
            return []


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


def _plain_rows(path: str, file: TextIO, newline: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a file without quoting, whose delimiter is a tab."""
    for number, line in enumerate(file, start=1 + _skip_separator(file)):
        check_mark(path, number, line)
        if text := strip_line_end(line, newline):
            yield number, text.split("\t")


def _quoted_rows(path: str, file: TextIO, delimiter: str, newline: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a file with quoting, each with the line at which it begins."""
    skipped = _skip_separator(file)
    # csv takes a carriage return for the end of a row, which inside a line it is not. A NUL stands for it meanwhile:
    # the text has none.
    hidden, begins = False, True

    def hide(lines: Iterable[str]) -> Iterator[str]:
        nonlocal hidden, begins
        for number, line in enumerate(lines, start=1 + skipped):
            if begins:
                check_mark(path, number, line)
                begins = False
            if "\r" in line and newline == "\n":
                body = strip_line_end(line, newline)
                if "\r" in body:
                    hidden = True
                    line = body.replace("\r", "\0") + line[len(body) :]
            yield line

    reader = csv.reader(hide(file), delimiter=delimiter, strict=True)
    while True:
        start, begins = reader.line_num + 1 + skipped, True
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                _wrong_quote(path, file, start, reader.line_num + skipped, delimiter, newline, error)
            ) from error
        if fields is None:
            return
        if fields:
            yield start, [field.replace("\0", "\r") for field in fields] if hidden else fields


def _find_quoting(path: str, encoding: str, newline: str) -> tuple[str, bool]:
    """(why a file with tabs is not one without quoting, or nothing; whether it is to be read with quotes)."""
    tabs, first, well_formed, sign, opens = -1, 0, True, False, False
    with open_text(path, encoding, newline) as file:
        for number, line in enumerate(file, start=1 + _skip_separator(file)):
            text = strip_line_end(line, newline)
            if not text or (tabs > 0 and not text.strip() and "\t" not in text):
                continue
            fields = text.split("\t") if tabs < 0 or (well_formed and '"' in text) else []
            if tabs < 0:
                tabs, first = text.count("\t"), number
                sign = all(_QUOTED_FIELD.fullmatch(name) for name in fields)
            elif text.count("\t") != tabs:
                count = _fields(text.count("\t") + 1)
                return f"line {number}: {count} where the header in line {first} has {tabs + 1}", True
            for field in fields:
                if '"' in field:
                    well_formed &= _QUOTED_FIELD.fullmatch(field) is not None
                    sign |= '""' in field or "\r" in field
                    opens |= field.startswith('"')
    if opens and not (well_formed and sign):
        warn_once(f"{path}: quotes are text, as every line has the header's number of tabs")
    return "", well_formed and sign


def _fields(count: int) -> str:
    return f"{count} field{'s' if count > 1 else ''}"


def _wrong_count(
    path: str, line: int, fields: list[str], header: list[str], delimiter: str, others: Iterator[list[str]] | None
) -> str:
    """What is wrong with a row of too few or too many fields; `others` are the rows after it where it is the first."""
    what = f"{path}, line {line}: {_fields(len(fields))} where the header has {len(header)}"
    ends = sum(field.count("\n") for field in fields)
    if ends:
        return f"{what}; quotes hold {ends} line ends of this row: double a quote that is text, and quote its field"
    name = _NAMES.get(delimiter, delimiter)
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


def _wrong_quote(path: str, file: TextIO, start: int, line: int, delimiter: str, newline: str, error: csv.Error) -> str:
    """What is wrong with the quotes of the row that begins in line `start` and is read up to `line`."""
    if "expected after" in str(error):
        at = f"{path}, line {line}"
        begin = "" if start == line else f" (the row begins in line {start})"
        return f"{at}: text follows a closing quote{begin}; double a quote that is text, and quote its field"
    opened = _line_of_open_quote(path, file, start, delimiter, newline)
    return f"{path}, line {opened}: the quote that opens here is not closed; close it, or double it if it is text"


def _line_of_open_quote(path: str, file: TextIO, start: int, delimiter: str, newline: str) -> int:
    """The line of the quote that is still open at the end of the file, of the row that begins in line `start`."""
    at, opened, inside = "start", start, False
    marks = re.compile(f'""|"|{re.escape(delimiter)}')
    with open_text(path, file.encoding, newline) as again:
        for number, line in enumerate(itertools.islice(again, start - 1, None), start=start):
            place = 0
            if not inside:
                at = "start"
            while found := marks.search(line, place):
                if found.start() > place and not inside:
                    at = "text"
                if inside:
                    inside = found[0] != '"'
                    at = "text"
                elif found[0] == delimiter:
                    at = "start"
                elif at == "start":
                    inside, opened = True, number
                    place = found.start() + 1
                    continue
                place = found.end()
    return opened
