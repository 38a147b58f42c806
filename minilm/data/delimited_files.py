"""Delimited files, `.csv` and `.tsv`. Every cell is text, and every row has as many fields as the header."""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TextIO

from minilm.data.columns import Column
from minilm.data.text_decoding import check_byte_order_mark, find_line_end, open_text, strip_line_end, warn_once
from minilm.utils.local_files import get_ending

_DELIMITERS = (",", ";", "\t", "|")
# A field with an unclosed quote extends to the end of the file. The limit keeps it from filling the memory.
csv.field_size_limit(2**28)
# The first line that Excel writes to name the delimiter.
_SEPARATOR = re.compile(r"sep=(.)[\r\n]*")
# A whole field in quotes. A quote inside it is doubled.
_QUOTED_FIELD = re.compile(r'"(?:[^"]|"")*"')


@dataclass(frozen=True)
class _Dialect:
    """A delimited file, and how its rows are written."""

    path: str
    encoding: str
    newline: str
    delimiter: str
    quoted: bool = True
    """Whether quotes enclose fields. If not, quotes are text, and the delimiter is a tab."""
    problem: str = ""
    """Why a file with tabs cannot be read without quoting; empty if it can."""

    def open(self) -> AbstractContextManager[TextIO]:
        return open_text(self.path, self.encoding, self.newline)

    def read_rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the line at which each row begins, and its fields. Raise ValueError for a misplaced quote."""
        with self.open() as file:
            yield from _read_quoted_rows(self, file) if self.quoted else _read_plain_rows(self, file)

    def read_header(self) -> list[str]:
        """Return the fields of the first row. The list is empty for an empty file and after a misplaced quote."""
        try:
            return next(self.read_rows(), (0, []))[1]
        except ValueError:
            return []


def read_delimited(
    path: str, columns: Sequence[Column], encoding: str, delimiter: str | None
) -> Iterator[tuple[int, list[Any]]]:
    """Yield the line at which each row begins, counted from 1, and its cells of `columns`.

    An empty cell of a column of labels is None. Lines end at LF or CR LF, or at CR in a file without LF. Blank lines
    are skipped. A field that begins with a quote ends at the next quote that is not doubled. It may hold delimiters
    and line ends.

    delimiter: if None, a first line such as `sep=;` states it. Without such a line, it is the one of `, ; tab |` with
        which the header has all `columns`. If there is none, it is the usual one of the file's ending, or the first
        that splits the header if the usual one does not.

    If the delimiter is a tab and every line has as many tabs as the header, quotes are text, with one exception. Quotes
    enclose fields if every field with a quote is a well-formed quoted field and one of these is true: a field with a
    quote holds a doubled quote or a CR, or every name in the header is quoted. Only a program that quotes writes such a
    file.

    Raise ValueError that names the line: for a row whose number of fields differs from the header's, for a quote that
    is not closed, for text after a closing quote, for a missing column, and for a header that two delimiters fit.
    """
    dialect = _find_dialect(path, columns, encoding, delimiter)
    try:
        yield from _read_cells(dialect, columns)
    except ValueError as error:
        at = dialect.problem.partition(":")[0]
        if not dialect.problem or str(error).startswith(f"{path}, {at}:"):
            raise
        raise ValueError(f"{path}, {dialect.problem}. The file cannot be read with quotes either: {error}") from error


def _read_cells(dialect: _Dialect, columns: Sequence[Column]) -> Iterator[tuple[int, list[Any]]]:
    """Yield the rows of `read_delimited`, for a file in this dialect."""
    labels = [index for index, column in enumerate(columns) if column.kind == "label"]
    header, first = list[str](), True
    rows = dialect.read_rows()
    for line, fields in rows:
        if not header:
            header = fields
            positions = _find_positions(header, columns, f"{dialect.path}, line {line}")
            continue
        if len(fields) != len(header):
            if len(fields) == 1 < len(header) and not fields[0].strip():
                # A line of spaces is blank too.
                continue
            others = (fields for _, fields in rows) if first else None
            raise ValueError(_describe_wrong_count(dialect, line, fields, header, others))
        first = False
        cells: list[Any] = [fields[position] for position in positions]
        for index in labels:
            cells[index] = cells[index] or None
        yield line, cells


def read_delimited_header(path: str, columns: Sequence[Column], encoding: str, delimiter: str | None) -> list[str]:
    """Return the names of the columns, from the header."""
    return _name_columns(_find_dialect(path, columns, encoding, delimiter).read_header())


def read_tab_separated(path: str, encoding: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line at which each row of a file begins, and its fields, separated by tabs.

    No row is taken for a header, and rows may have different numbers of fields. Quotes are text, unless the file is
    quoted by the rule of `read_delimited`.
    """
    dialect = _find_quoting(_Dialect(path, encoding, find_line_end(path), "\t"))
    yield from replace(dialect, quoted=dialect.quoted and not dialect.problem).read_rows()


def _find_dialect(path: str, columns: Sequence[Column], encoding: str, delimiter: str | None) -> _Dialect:
    """Decide the delimiter and the quoting of a file."""
    newline = find_line_end(path)
    usual = _Dialect(path, encoding, newline, "\t" if get_ending(path) == ".tsv" else ",")
    dialect = replace(usual, delimiter=delimiter or _find_delimiter(usual, columns))
    return _find_quoting(dialect) if dialect.delimiter == "\t" else dialect


def _find_delimiter(usual: _Dialect, columns: Sequence[Column]) -> str:
    """Return the delimiter with which the header names the columns. Raise ValueError if two delimiters do.

    usual: the dialect with the usual delimiter of the file's ending.
    """
    with usual.open() as file:
        if stated := _SEPARATOR.fullmatch(file.readline()):
            return str(stated[1])
    candidates = [usual.delimiter, *(each for each in _DELIMITERS if each != usual.delimiter)]
    headers = {each: replace(usual, delimiter=each).read_header() for each in candidates}
    usual_header = headers[usual.delimiter]
    fitting = [each for each in candidates if all(column.name in _name_columns(headers[each]) for column in columns)]
    fitting = [each for each in fitting if each == usual.delimiter or headers[each] != usual_header]
    if len(fitting) > 1:
        listed = " and ".join(map(_name_delimiter, fitting))
        raise ValueError(f"{usual.path}, line 1: {listed} could be the delimiter; pass --data.delimiter")
    if fitting:
        if fitting[0] != usual.delimiter:
            warn_once(f"{usual.path}: {_name_delimiter(fitting[0])} separates the fields of its header")
        return fitting[0]
    if len(usual_header) == 1 and (several := [each for each in candidates if len(headers[each]) > 1]):
        return several[0]
    return usual.delimiter


def _name_delimiter(delimiter: str) -> str:
    return "a tab" if delimiter == "\t" else delimiter


def _skip_separator(file: TextIO) -> int:
    """Skip a first line such as `sep=;`, which Excel writes. Return the number of lines skipped, 0 or 1."""
    if _SEPARATOR.fullmatch(file.readline()):
        return 1
    file.seek(0)
    return 0


def _find_positions(header: list[str], columns: Sequence[Column], where: str) -> list[int]:
    """Return the position of each column's cell in a row. Raise ValueError for a missing column."""
    names = _name_columns(header)
    for column in columns:
        if column.name not in names:
            error = column.missing_error(where, names)
            if len(names) > 1:
                raise error
            raise ValueError(f"{error}{' Pass' if str(error).endswith('.') else ', or pass'} --data.delimiter")
        if header.count(column.name) > 1:
            warn_once(
                f"WARNING: {where}: {column.name!r} is the name of {header.count(column.name)} columns. The first is "
                f"read. To read the second, call it {column.name}.1"
            )
    return [names.index(column.name) for column in columns]


def _name_columns(header: list[str]) -> list[str]:
    """Return a name for each column, as pandas does: a repeated name gets a number, an empty one `Unnamed: 3`."""
    names: list[str] = []
    for position, name in enumerate(header):
        name = name or f"Unnamed: {position}"
        unique, number = name, 0
        while unique in names or (number and unique in header):
            number += 1
            unique = f"{name}.{number}"
        names.append(unique)
    return names


def _read_plain_rows(dialect: _Dialect, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Yield the line and the fields of each row of a file without quoting."""
    for number, line in enumerate(file, start=1 + _skip_separator(file)):
        check_byte_order_mark(dialect.path, number, line)
        if text := strip_line_end(line, dialect.newline):
            yield number, text.split("\t")


def _read_quoted_rows(dialect: _Dialect, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Yield the line at which each row begins, and its fields, of a file with quoting."""
    skipped = _skip_separator(file)
    # The csv module would end a row at a carriage return inside a line. A NUL replaces the carriage return until the
    # row is read. The text itself holds no NUL, because `open_text` refuses it.
    hidden, begins = False, True

    def hide(lines: Iterable[str]) -> Iterator[str]:
        nonlocal hidden, begins
        for number, line in enumerate(lines, start=1 + skipped):
            if begins:
                check_byte_order_mark(dialect.path, number, line)
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
            raise ValueError(_describe_wrong_quote(dialect, start, reader.line_num + skipped, error)) from error
        if fields is None:
            return
        if fields:
            yield start, [field.replace("\0", "\r") for field in fields] if hidden else fields


def _find_quoting(dialect: _Dialect) -> _Dialect:
    """Return the dialect of a file with tabs, quoted or not by the rule of `read_delimited`."""
    tabs, header_line = -1, 0
    # well_formed: every field with a quote is a well-formed quoted field.
    # proven: if they are well formed, only a program that quotes can have written the file.
    # opens: a field begins with a quote.
    well_formed, proven, opens = True, False, False
    with dialect.open() as file:
        for number, line in enumerate(file, start=1 + _skip_separator(file)):
            text = strip_line_end(line, dialect.newline)
            if not text or (tabs > 0 and not text.strip() and "\t" not in text):
                continue
            fields = text.split("\t") if tabs < 0 or (well_formed and '"' in text) else []
            if tabs < 0:
                tabs, header_line = text.count("\t"), number
                proven = all(_QUOTED_FIELD.fullmatch(name) for name in fields)
            elif text.count("\t") != tabs:
                count = _count_fields(text.count("\t") + 1)
                problem = f"line {number}: {count} where the header in line {header_line} has {tabs + 1}"
                return replace(dialect, problem=problem)
            for field in fields:
                if '"' in field:
                    well_formed &= _QUOTED_FIELD.fullmatch(field) is not None
                    proven |= '""' in field or "\r" in field
                    opens |= field.startswith('"')
    if opens and not (well_formed and proven):
        warn_once(f"{dialect.path}: quotes are text, because every line has as many tabs as the header")
    return replace(dialect, quoted=well_formed and proven)


def _count_fields(count: int) -> str:
    return f"{count} field{'s' if count > 1 else ''}"


def _describe_wrong_count(
    dialect: _Dialect, line: int, fields: list[str], header: list[str], others: Iterator[list[str]] | None
) -> str:
    """Return the error message for a row with too few or too many fields.

    others: the rows after it if it is the first row after the header, otherwise None.
    """
    what = f"{dialect.path}, line {line}: {_count_fields(len(fields))} where the header has {len(header)}"
    ends = sum(field.count("\n") for field in fields)
    if ends:
        return (
            f"{what}; quoted fields of this row hold {ends} line ends; "
            "if a quote is text, double it and quote its field"
        )
    name = _name_delimiter(dialect.delimiter)
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
    """Return (whether every row has `count` fields, whether the last field of every row is empty)."""
    if others is None:
        return False, False
    blank = not fields[-1]
    try:
        for row in others:
            if len(row) != count:
                return False, False
            blank &= not row[-1]
    except ValueError:
        # A later row cannot be read.
        return False, False
    return True, blank


def _describe_wrong_quote(dialect: _Dialect, start: int, line: int, error: csv.Error) -> str:
    """Return the error message for the quotes of a row that begins in line `start` and was read up to `line`."""
    if "expected after" in str(error):
        at = f"{dialect.path}, line {line}"
        begin = "" if start == line else f" (the row begins in line {start})"
        return f"{at}: text follows a closing quote{begin}; if the quote is text, double it and quote its field"
    opened = _find_open_quote(dialect, start)
    return (
        f"{dialect.path}, line {opened}: the quote that opens here is not closed; close it, or double it if it is text"
    )


def _find_open_quote(dialect: _Dialect, start: int) -> int:
    """Return the line of the quote that is still open at the end of the file. Its row begins in line `start`."""
    at, opened, inside = "start", start, False
    marks = re.compile(f'""|"|{re.escape(dialect.delimiter)}')
    with dialect.open() as file:
        for number, line in enumerate(itertools.islice(file, start - 1, None), start=start):
            place = 0
            if not inside:
                at = "start"
            while match := marks.search(line, place):
                if match.start() > place and not inside:
                    at = "text"
                if inside:
                    inside = match[0] != '"'
                    at = "text"
                elif match[0] == dialect.delimiter:
                    at = "start"
                elif at == "start":
                    inside, opened = True, number
                    place = match.start() + 1
                    continue
                place = match.end()
    return opened
