"""CoNLL files, `.conll`, `.iob` and `.bio`: a word and its tags in each line, and a blank line after each sentence."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from minilm.data.columns import Column
from minilm.data.text_decoding import check_byte_order_mark, find_line_end, open_text, strip_line_end

# The word of the line that begins a document in the files of CoNLL-2003. Such a line is not a sentence.
_DOCUMENT_START = "-DOCSTART-"
# A tag of the schemes IOB, IOBES and BILOU.
_TAG = re.compile(r"O|[BIESLU]-\S+")
# The number of columns in CoNLL-U, the first id of a sentence, and the ids of the lines that are not words: `3-4` joins
# two words, and `8.1` is a word that the text leaves out. https://universaldependencies.org/format.html
_UNIVERSAL_COLUMNS = 10
_FIRST_ID = re.compile(r"1|1-[0-9]+|0\.1")
_NO_WORD = re.compile(r"[0-9]+[-.][0-9]+")


@dataclass(frozen=True)
class _Shape:
    """How the lines of a file are written, judged by its first line with a word."""

    line: int
    """The number of that line, from 1; 0 if there is none."""
    fields: int
    has_tabs: bool
    """Whether a tab separates the fields. If not, one or more spaces do."""
    is_universal: bool
    """Whether the file is CoNLL-U, whose first column numbers the words."""

    def split(self, line: str) -> list[str]:
        return line.split("\t") if self.has_tabs else [field for field in line.split(" ") if field]

    def find_positions(self) -> dict[str, int]:
        """Return the position of each column in a line, by its name. The first and the last column have two names."""
        tags = {"ner_tags": self.fields - 1} if self.fields > 1 else {}
        return {"tokens": 0, **tags, **{str(position + 1): position for position in range(self.fields)}}


def read_conll(path: str, columns: Sequence[Column], encoding: str) -> Iterator[tuple[int, list[Any]]]:
    """Yield the line at which each sentence begins, from 1, and for each of `columns` the list of its fields.

    The column `tokens` is the first of the file, and `ner_tags` the last. `1`, `2`, … are the columns by number. A tab
    separates the fields if the first line with a word has one; otherwise spaces do. Lines that begin a document
    (`-DOCSTART-`) are skipped, and so are comments: lines that begin with `# ` before the first word of a sentence.

    Raise ValueError that names the line: for another number of fields than in the first line with a word, for an empty
    field, for a line that may be a comment or the word `#`, and for a line of CoNLL-U that is not a word.
    """
    shape = _find_shape(path, encoding)
    positions = _find_positions(shape, columns, path)
    start, words = 0, list[list[str]]()
    for number, line in _read_lines(path, encoding):
        fields = shape.split(line)
        ends = not line.strip() or fields[0] == _DOCUMENT_START
        if ends and words:
            yield start, [[word[position] for word in words] for position in positions]
            words = []
        if ends or (not words and _is_comment(shape, line, f"{path}, line {number}")):
            continue
        _check_fields(shape, fields, f"{path}, line {number}")
        start = start if words else number
        words.append(fields)
    if words:
        yield start, [[word[position] for word in words] for position in positions]


def read_conll_column_names(path: str, encoding: str) -> list[str]:
    """Return the names of a file's columns."""
    return list(_find_shape(path, encoding).find_positions())


def _read_lines(path: str, encoding: str) -> Iterator[tuple[int, str]]:
    """Yield the number of each line, from 1, and the line without its end."""
    newline = find_line_end(path)
    with open_text(path, encoding, newline) as file:
        for number, line in enumerate(file, start=1):
            check_byte_order_mark(path, number, line)
            yield number, strip_line_end(line, newline)


def _find_shape(path: str, encoding: str) -> _Shape:
    """Return the shape of the first line with a word.

    A line that begins with `# ` may be a comment, so its shape is returned only if no other line has a word.
    """
    first = _Shape(line=0, fields=0, has_tabs=False, is_universal=False)
    for number, line in _read_lines(path, encoding):
        if not line.strip() or line.split()[0] == _DOCUMENT_START:
            continue
        if line.startswith("# ") and first.line:
            continue
        plain = _Shape(line=number, fields=0, has_tabs="\t" in line, is_universal=False)
        fields = plain.split(line)
        is_universal = plain.has_tabs and len(fields) == _UNIVERSAL_COLUMNS and bool(_FIRST_ID.fullmatch(fields[0]))
        first = _Shape(line=number, fields=len(fields), has_tabs=plain.has_tabs, is_universal=is_universal)
        if not line.startswith("# "):
            break
    return first


def _find_positions(shape: _Shape, columns: Sequence[Column], path: str) -> list[int]:
    """Return the position of each of `columns` in a line. Raise ValueError if the file does not have it."""
    positions = shape.find_positions()
    for column in columns if shape.line else ():
        if column.name not in positions:
            raise column.missing_error(path, list(positions))
    return [positions.get(column.name, 0) for column in columns]


def _is_comment(shape: _Shape, line: str, where: str) -> bool:
    """Return whether a line before the first word of a sentence is a comment."""
    if not line.startswith("# "):
        return False
    fields = shape.split(line)
    # CoNLL-U writes `# key = value`.
    if len(fields) != shape.fields or re.match(r"# \S+ = ", line):
        return True
    if _TAG.fullmatch(fields[-1]):
        return False
    raise ValueError(
        f"{where}: the line may be a comment or the word #; remove the comment, or separate the fields of all lines by "
        "tabs"
    )


def _check_fields(shape: _Shape, fields: list[str], where: str) -> None:
    """Raise ValueError for a line of a sentence that is not a word with its tags."""
    if len(fields) != shape.fields:
        separator = "tabs" if shape.has_tabs else "spaces"
        count = f"{len(fields)} field{'s' if len(fields) != 1 else ''}"
        raise ValueError(
            f"{where}: {count} where line {shape.line} has {shape.fields}; write as many in every line, separated by "
            f"{separator}"
        )
    if "" in fields:
        raise ValueError(f"{where}: field {fields.index('') + 1} is empty; fill it in, or remove the line")
    if shape.is_universal and _NO_WORD.fullmatch(fields[0]):
        raise ValueError(f"{where}: {fields[0]} is not a word of CoNLL-U with tags of its own; remove the line")
