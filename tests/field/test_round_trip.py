"""Law 7: every cell is read as it was written, in every format, mapped and streamed.

Python's csv and json, and pyarrow, write the files. `python -m tests.field.test_round_trip --files 20000 --seed 1`
tries more files.
"""

import argparse
import csv
import gzip
import io
import json
import logging
import random
import re
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from minilm.config import Data
from minilm.data.sources import build_columns, load_rows, stream_rows
from tests.file_writers import write_mds, write_tar

pytestmark = pytest.mark.scorecard(32)

FILES = 1200
# One file in this many has more than 10,000 rows, after which some readers guess the types again.
LONG = 400
# Pieces of text that make readers guess: quotes, delimiters, line ends, words for missing values, numbers, dates.
PIECES = (
    *'"",;|\t\n\r\'\\/{}[]:#= ',
    *("\r\n", '""', '"a"', ' "', '",', "\\n", "\\u0041", "\\ud83d", "&amp;", "<s>", "sep=;"),
    *("\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\ufeff", "\u200b", "\xa0", "\u0301", "\x01"),
    *("NA", "nan", "None", "null", "true", "01", "1", "-0", "1.0", "1e5", "2020-01-01", "Infinity"),
    *("a", "word", "some words", "naïve", "“quoted”", "😀", "漢字", "שלום", "🏳️‍🌈"),
)
NAMES = ("text", "sentence 1", "#1 String", "a.b", "naïve", 'say "x"', "x,y", "a;b", "1", "label.text", "text.1")
LABELS: tuple[tuple[Any, ...], ...] = (("01", "1", "001"), ("yes", "no", "NA"), (3, 0, -2), ("1", "x"), ("1.0", "01"))
FORMS = ("csv", "plain tsv", "quoted tsv", "jsonl", "json", "txt", "parquet", "arrow", "mds", "tar")


@dataclass(frozen=True)
class Written:
    """A file, and the cells that it holds."""

    form: str
    name: str
    content: bytes
    texts: list[str]
    labels: list[Any] | None
    options: dict[str, Any]


def make(draw: random.Random, long: bool = False) -> Written:
    """Return a file of random rows in a random format."""
    form = draw.choice(FORMS)
    count = draw.randint(10_001, 10_400) if long else draw.randint(1, 6)
    columns = draw.sample(NAMES, draw.randint(1, 3))
    labels = draw.choice(LABELS) if form != "txt" and draw.random() < 0.4 else None
    rows = [[_cell(draw, long) for _ in columns] for _ in range(count)]
    if labels is not None:
        columns.append("label")
        for number, row in enumerate(rows):
            # The last rows hold each of the labels, and the other rows the first label.
            row.append(labels[number % len(labels)] if number >= count - len(labels) else labels[0])
        if count < len(labels):
            rows += [[*rows[0][:-1], label] for label in labels]
    place = draw.randrange(len(columns) - (labels is not None))
    if form not in ("jsonl", "json", "parquet", "arrow", "mds", "tar"):
        rows = [[str(cell) for cell in row] for row in rows]
        # minilm refuses a byte-order mark at the beginning of a line.
        rows = [[cell.lstrip("\ufeff") for cell in row] for row in rows]
    options: dict[str, Any] = {"column": columns[place]}
    rows, content, ending = WRITERS[form](draw, columns, rows, place, options)
    if form not in ("parquet", "arrow") and draw.random() < 0.2:
        content, ending = gzip.compress(content, 1), ending + ".gz"
    right = None if labels is None else [_expected_label(row[-1], labels) for row in rows]
    return Written(form, f"a{ending}", content, [row[place] for row in rows], right, options)


def _cell(draw: random.Random, long: bool) -> str:
    """Return a text of any characters, often of those that readers misread."""
    kind = draw.random()
    if kind < 0.06:
        return draw.choice(("", " ", "\t", "  \u2003"))
    if kind < 0.2 and not long:
        return "".join(chr(_point(draw)) for _ in range(draw.randint(1, 8)))
    return "".join(draw.choice(PIECES) for _ in range(draw.randint(1, 3 if long else 7)))


def _point(draw: random.Random) -> int:
    """Return a code point that is neither a surrogate nor NUL."""
    point = draw.randrange(1, 0x110000 if draw.random() < 0.5 else 0x300)
    return point if not 0xD800 <= point < 0xE000 else 0x41


def _expected_label(label: Any, labels: tuple[Any, ...]) -> Any:
    """Return the label to expect: a number if all labels of the column are written as whole numbers."""
    whole = all(re.fullmatch(r"-?(0|[1-9]\d*)", str(each)) for each in labels)
    return int(label) if whole and not isinstance(labels[0], str) else label


def _encoded(draw: random.Random, text: str) -> bytes:
    """Encode as UTF-8, sometimes with a byte-order mark, and always if the text begins with one."""
    mark = text.startswith("\ufeff") or draw.random() < 0.2
    return text.encode("utf-8-sig" if mark else "utf-8")


def _write_csv(draw: random.Random, columns: Any, rows: Any, place: int, options: Any) -> Any:
    delimiter = draw.choice(",,;\t|")
    end = draw.choice(("\r\n", "\n"))
    # Before Python 3.13, csv leaves a carriage return without quotes where lines end in LF alone.
    quoting = draw.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)) if end == "\r\n" else csv.QUOTE_ALL
    if len(columns) == 1 or draw.random() < 0.2 or any(set(name) & set(",;|") for name in columns):
        options["delimiter"] = "tab" if delimiter == "\t" else delimiter
    return (*_by_csv(draw, [columns, *rows], delimiter=delimiter, lineterminator=end, quoting=quoting), ".csv")


def _write_quoted_tsv(draw: random.Random, columns: Any, rows: Any, place: int, options: Any) -> Any:
    return (*_by_csv(draw, [columns, *rows], delimiter="\t"), ".tsv")


def _by_csv(draw: random.Random, rows: Any, **form: Any) -> Any:
    """Return the rows, and what Python's csv writes for them.

    In a file of tabs with line ends in its texts, the number of tabs per line must show that it is quoted. Where it
    does not, a space replaces each line end.
    """
    while True:
        file = io.StringIO()
        csv.writer(file, **form).writerows(rows)
        tabs = {line.count("\t") for line in file.getvalue().split("\n")[:-1]}
        cells = [cell for row in rows for cell in row]
        if form["delimiter"] != "\t" or len(tabs) > 1 or not any("\n" in cell for cell in cells):
            return rows[1:], _encoded(draw, file.getvalue())
        rows = [[cell.replace("\n", " ") for cell in row] for row in rows]


def _write_plain_tsv(draw: random.Random, columns: Any, rows: Any, place: int, options: Any) -> Any:
    """Write without quoting, so that a cell cannot hold a tab or a line end."""
    end = draw.choice(("\r\n", "\n"))
    columns = [name.replace('"', "'") for name in columns]
    options["column"] = columns[place]
    rows = [[re.sub(r"[\t\n]", " ", cell).rstrip("\r") for cell in row] for row in rows]
    # One quote shows that no program quoted the file, and no line may be empty.
    rows[0][0] += '" '
    rows = [[cell or (" " if len(columns) == 1 else cell) for cell in row] for row in rows]
    return rows, _encoded(draw, "".join("\t".join(row) + end for row in [columns, *rows])), ".tsv"


def _write_jsonl(draw: random.Random, columns: Any, rows: Any, place: int, options: Any) -> Any:
    end, ascii_only = draw.choice(("\n", "\r\n", "\n\n")), draw.random() < 0.5
    lines = []
    for number, row in enumerate(rows):
        extra = draw.choice((number, str(number), [number, None], {"text": "no"}, None, 1e300, 10**30))
        pairs = [*zip(columns, row, strict=True), ("more", extra)]
        draw.shuffle(pairs)
        lines.append(json.dumps(dict(pairs), ensure_ascii=ascii_only) + end)
    return rows, _encoded(draw, "".join(lines)), ".jsonl"


def _write_json(draw: random.Random, columns: Any, rows: Any, place: int, options: Any) -> Any:
    objects = [dict(zip(columns, row, strict=True)) for row in rows]
    text = json.dumps(objects, ensure_ascii=draw.random() < 0.5, indent=draw.choice((None, 1)))
    return rows, _encoded(draw, text), ".json"


def _write_text(draw: random.Random, columns: Any, rows: Any, place: int, options: Any) -> Any:
    end = draw.choice(("\n", "\r\n"))
    options.clear()
    rows = [[re.sub(r"\n", " ", cell).rstrip("\r") for cell in row] for row in rows]
    return rows, _encoded(draw, "".join(row[place] + end for row in rows)), ".txt"


def _table(columns: Any, rows: Any) -> Any:
    return pyarrow.table({name: [row[number] for row in rows] for number, name in enumerate(columns)})


def _write_parquet(draw: random.Random, columns: Any, rows: Any, place: int, options: Any) -> Any:
    file = io.BytesIO()
    parquet.write_table(_table(columns, rows), file, row_group_size=draw.choice((3, 100_000)))
    return rows, file.getvalue(), ".parquet"


def _write_arrow(draw: random.Random, columns: Any, rows: Any, place: int, options: Any) -> Any:
    file, table = io.BytesIO(), _table(columns, rows)
    with draw.choice((pyarrow.ipc.new_stream, pyarrow.ipc.new_file))(file, table.schema) as writer:
        writer.write_table(table)
    return rows, file.getvalue(), ".arrow"


def _write_mds(draw: random.Random, columns: Any, rows: Any, place: int, options: Any) -> Any:
    encodings = {name: "int" if isinstance(cell, int) else "str" for name, cell in zip(columns, rows[0], strict=True)}
    return rows, write_mds([dict(zip(columns, row, strict=True)) for row in rows], encodings), ".mds"


def _write_tar(draw: random.Random, columns: Any, rows: Any, place: int, options: Any) -> Any:
    """Write the texts as they are, and the labels as JSON."""
    if columns[-1] == "label":
        options["label_column"] = "label.json"
    files = []
    for number, row in enumerate(rows):
        cells = [*zip(columns, row, strict=True)]
        draw.shuffle(cells)
        for name, cell in cells:
            ending, content = ("label.json", json.dumps(cell).encode()) if name == "label" else (name, None)
            files.append((f"part/{number}.{ending}", _encoded(draw, cell) if content is None else content))
    return rows, write_tar(files, draw.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))), ".tar"


WRITERS: dict[str, Callable[..., Any]] = {
    "csv": _write_csv,
    "plain tsv": _write_plain_tsv,
    "quoted tsv": _write_quoted_tsv,
    "jsonl": _write_jsonl,
    "json": _write_json,
    "txt": _write_text,
    "parquet": _write_parquet,
    "arrow": _write_arrow,
    "mds": _write_mds,
    "tar": _write_tar,
}


def check(written: Written, folder: Path) -> None:
    """Raise AssertionError unless every cell is read as it was written."""
    path = folder / written.name
    path.write_bytes(written.content)
    data = Data(source=str(path), **written.options)
    mapped = load_rows(data, str(path), "train", build_columns(data, labels=written.labels is not None)).dataset
    assert mapped["text"][:] == written.texts, written
    if written.labels is not None:
        assert mapped["label"][:] == written.labels, written
        assert [*map(type, mapped["label"])] == [*map(type, written.labels)], written
    streamed = [text for batch in stream_rows(data, str(path), "train") for text in batch]
    assert streamed == [text for text in written.texts if text.strip()], written


def try_files(count: int, seed: int) -> Counter[str]:
    """Write and read `count` files, and return the number of files of each form."""
    tried = Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            written = make(random.Random(f"{seed} {number}"), long=number % LONG == LONG - 1)
            check(written, Path(folder))
            tried[written.form] += 1
    return tried


def test_rows_of_random_files_are_read_as_they_were_written(figure: Callable[[str], None]) -> None:
    tried = try_files(FILES, seed=0)
    assert {*tried} == {*FORMS}
    figure(f"{tried.total():,} files in {len(tried)} forms, every cell equal")


@given(draw=st.randoms(use_true_random=False))
@settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, max_examples=60)
def test_rows_of_files_that_hypothesis_chooses_are_read_as_they_were_written(draw: random.Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(make(draw), Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=FILES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("minilm").setLevel(logging.ERROR)
    start = time.perf_counter()
    for form, count in sorted(try_files(options.files, options.seed).items()):
        print(f"{form:<12} {count:,} files")
    print(f"every cell equal, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
