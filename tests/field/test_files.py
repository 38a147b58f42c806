"""Files as users have them: every row is read as it was written, or a one-line error names the place.

The expected rows come from Python's csv and json, from pyarrow, or are written here, never from minilm itself.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
import tempfile
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from pyarrow import parquet

from minilm.config import Batch, Classification, Config, Data, MaskedLM, Model, Run, Tokens
from minilm.config.command_line import parse_flags
from minilm.data import fingerprints
from minilm.data.documents import load_all_documents, load_documents
from minilm.data.fingerprints import fingerprint_files
from minilm.data.sources import build_columns, fingerprint_sources, load_rows, stream_rows
from minilm.data.streaming import stream_documents
from minilm.objectives.factory import prepare_data
from minilm.train import train
from minilm.utils.cache import CacheError
from tests.file_writers import write_index, write_mds, write_tar, write_tar_of_texts

pytestmark = pytest.mark.scorecard(31)

PARAPHRASES = (
    "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    '1\t11\t21\tThe pie business does not suit us .\t" The pie business is not for us .\n'
    '0\t12\t22\tHe looked forward to it .\tHis wife said he was " 100 percent behind it " and glad .\n'
    "0\t13\t23\tThe dollar was flat .\tThe dollar was down 0.1 percent .\n"
    "1\t14\t24\tThey wait until October .\tThey decide in October .\n"
)
PARAPHRASE_ROWS = [line.split("\t") for line in PARAPHRASES.splitlines()[1:]]
MIB = 2**20


@dataclass(frozen=True)
class Situation:
    """Files, and the rows that they hold or the error that they give."""

    files: dict[str, bytes | str]
    rows: Sequence[dict[str, Any]] = ()
    says: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    warns: str = ""
    source: str = ""
    """A path below the folder of the files; by default the first file."""


def texts(*rows: str) -> list[dict[str, str]]:
    return [{"text": text} for text in rows]


def labelled(*rows: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in rows]


def lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def written(rows: Sequence[Sequence[str]], **options: Any) -> str:
    """Return rows as Python's csv writes them."""
    file = io.StringIO()
    csv.writer(file, **options).writerows(rows)
    return file.getvalue()


def as_parquet(table: pyarrow.Table) -> bytes:
    file = io.BytesIO()
    parquet.write_table(table, file, row_group_size=2)
    return file.getvalue()


def as_arrow(table: pyarrow.Table, kind: Any = pyarrow.ipc.new_stream) -> bytes:
    file = io.BytesIO()
    with kind(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def with_classes(*names: str) -> bytes:
    file = io.BytesIO()
    features = Features({"text": Value("string"), "label": ClassLabel(names=[*names])})
    Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).to_parquet(file)
    return file.getvalue()


LABEL = {"label_column": "label"}
ODD = ["form\ffeed", "line\u2028separator", "next\u0085line", "vertical\vtab", "unit\x1fseparator", "zero\u200bwidth"]
COLUMNS = pyarrow.table({"text": ["a", "b", "c"], "other": [1, 2, 3], "label": [2, 0, 1]})
DELIMITED = {
    "a byte-order mark where files without quotes were joined": Situation(
        {"a.tsv": "text\tn\na\t1\n\ufefftext\tn\nb\t2\n"}, says="a.tsv, line 3: begins with a byte-order mark"
    ),
    "a byte-order mark where files with quotes were joined": Situation(
        {"a.csv": 'text,n\n"a\n\ufeffa",1\n\n\ufeff"b",2\n'}, says="a.csv, line 5: begins with a byte-order mark"
    ),
    "a byte-order mark at a line inside quotes, and inside a line": Situation(
        {"a.csv": 'text,n\n"a\n\ufeffb",1\n"\ufeffc",2\n'}, texts("a\n\ufeffb", "\ufeffc")
    ),
    "CR LF, cut after the last CR": Situation(
        {"a.csv": '"text","n"\r\n"a","1"\r\n"b","2"\r'}, texts("a", "b"), options={"delimiter": ","}
    ),
    "row names without a name in the header": Situation(
        {"a.csv": '"text","n"\n"1","a",1\n"2","b",2\n'},
        says="a.csv, line 2: 3 fields where the header has 2, and every row has one field more than the header; "
        "add the name of the first column to it",
    ),
    "row names without a name in a header of tabs": Situation(
        {"a.tsv": '"text"\t"n"\n"1"\t"a"\t1\n"2"\t"b"\t2\n'},
        says="every row has one field more than the header; add the",
    ),
    "a comma ends every row": Situation(
        {"a.csv": "text,n\na,1,\nb,2,\n"}, says="line 2: .*every row ends in ,; end the header in , too"
    ),
    "a comma ends a row": Situation(
        {"a.csv": "text,n\na,1,\nb,2\n"},
        says="line 2: 3 fields where the header has 2; remove the , at the end of the row",
    ),
    "a comma ends the header": Situation(
        {"a.csv": "text,n,\na,1\nb,2\n"},
        says="line 2: 2 fields where the header has 3; remove the , at the end of the header",
    ),
    "a comma in the first row alone": Situation(
        {"a.csv": "text,n\na,b,1\nb,2\n"},
        says="line 2: 3 fields where the header has 2; put a text that holds , in quotes",
    ),
    # Quotes
    "a file of GLUE, whose quotes are text": Situation(
        {"a.tsv": PARAPHRASES},
        [{"text": row[3], "pair": row[4], "label": int(row[0])} for row in PARAPHRASE_ROWS],
        options={"column": "#1 String", "pair_column": "#2 String", "label_column": "Quality"},
        warns="a.tsv: quotes are text, because every line has as many tabs as the header",
    ),
    "a quote opens the last field of the last line of a .tsv": Situation(
        {"a.tsv": 'text\tlabel\na\tb\nc\t"d\n'}, labelled(("a", "b"), ("c", '"d')), options=LABEL
    ),
    "a .tsv whose quotes are whole words": Situation(
        {"a.tsv": 'id\ttext\n1\t"Hello," he said\n'}, texts('"Hello," he said')
    ),
    "a .tsv with one field that is all in quotes": Situation(
        {"a.tsv": 'id\ttext\n1\t"Yes."\n2\tNo.\n'}, texts('"Yes."', "No.")
    ),
    "a .tsv by a program that quotes, with tabs and line ends in texts": Situation(
        {"a.tsv": written([["text", "n"], ["a\tb", "1"], ['say "c"\nd', "2"]], delimiter="\t")},
        texts("a\tb", 'say "c"\nd'),
    ),
    "a .tsv by a program that quotes, with no more than quotes in texts": Situation(
        {"a.tsv": written([["text", "n"], ['say "c"', "1"], ["d", "2"]], delimiter="\t")}, texts('say "c"', "d")
    ),
    "a .tsv with all in quotes": Situation(
        {"a.tsv": written([["text", "n"], ["a", "1"], ["b", "2"]], delimiter="\t", quoting=csv.QUOTE_ALL)},
        texts("a", "b"),
    ),
    "a .tsv that fits neither with quotes nor without": Situation(
        {"a.tsv": 'text\tlabel\na\t1\nb\n"c\t2\n'}, says="a.tsv, line 3: 1 field where the header "
    ),
    "a .tsv with too many tabs, and a quote elsewhere": Situation(
        {"a.tsv": 'text\tlabel\n"a\t1\nb\t1\t2\n'},
        says="a.tsv, line 3: 3 fields where the header in line 1 has 2. The file .* line 2: the quote that opens here",
    ),
    "a .csv with quotes, commas and line ends": Situation(
        {"a.csv": written([["text", "n"], ["a, b", "1"], ['say "c"', "2"], ["d\ne\r\nf", "3"], ["", "4"]])},
        texts("a, b", 'say "c"', "d\ne\r\nf", ""),
    ),
    "a quote inside a field of a .csv": Situation({"a.csv": 'text,n\na 5" disk,1\n'}, texts('a 5" disk')),
    "text behind a closing quote": Situation(
        {"a.csv": 'text,n\na,1\n"b" c,2\n'}, says="a.csv, line 3: text follows a closing quote"
    ),
    "quotes that a backslash escapes": Situation(
        {"a.csv": 'text,n\n"he said \\"no\\" twice",1\n'}, says="a.csv, line 2: text follows a closing quote"
    ),
    "a quote that is not closed": Situation(
        {"a.csv": 'text,n\na,1\n"b,2\nc,3\n' + "d,4\n" * 500},
        says="a.csv, line 3: the quote that opens here is not closed",
    ),
    "a quote that is not closed, behind one over several lines": Situation(
        {"a.csv": 'text,n\n"a\n\nb","c\nd,4\n'}, says="a.csv, line 4: the quote that opens here is not closed"
    ),
    "a quote that swallows rows": Situation(
        {"a.csv": 'text,n\n"a,1\nb,2\nc","d",3\n'},
        says="a.csv, line 2: 3 fields where the header has 2; quoted fields of this row hold 2 line ends",
    ),
    # Counts
    "a comma in a text without quotes": Situation(
        {"a.csv": "text,label\nJones,f\nSmith, John,m\n"},
        says="a.csv, line 3: 3 fields where the header has 2",
        options=LABEL,
    ),
    "a comma at the end of a row": Situation(
        {"a.csv": "text,n\na,1\nb,2,\n"}, says="a.csv, line 3: 3 fields where the header has 2"
    ),
    "a comma at the end of all rows and of the header": Situation({"a.csv": "text,n,\na,1,\nb,2,\n"}, texts("a", "b")),
    "a row that is too short": Situation(
        {"a.csv": "n,text\n1,a\n2\n"}, says="a.csv, line 3: 1 field where the header has 2"
    ),
    "a short row of a .tsv": Situation(
        {"a.tsv": "n\ttext\n1\ta\n2\n"}, says="a.tsv, line 3: 1 field where the header has 2"
    ),
    "a short row behind rows over several lines": Situation(
        {"a.csv": 'text,n\n"a\nb\nc",1\nd\n'}, says="a.csv, line 5: 1 field where the header has 2"
    ),
    "blank lines": Situation({"a.csv": "\ntext,n\n\na,1\n  \nb,2\n\n"}, texts("a", "b")),
    "blank lines of a .tsv": Situation({"a.tsv": "\ntext\tn\n\na\t1\n  \nb\t2\n\n"}, texts("a", "b")),
    # Types
    "classes with leading zeros, in more than 10,000 rows": Situation(
        {"a.csv": "id,text,label\n" + "".join(f"{n},t{n},{'01' if n % 2 else '1'}\n" for n in range(25_000))},
        labelled(*((f"t{n}", "01" if n % 2 else "1") for n in range(25_000))),
        options=LABEL,
    ),
    "a long number in a column that nobody asked for": Situation(
        {"a.csv": "id,text\n" + "".join(f"{n or 10**21},t{n}\n" for n in reversed(range(12_000)))},
        texts(*(f"t{n}" for n in reversed(range(12_000)))),
    ),
    "texts that look like numbers, dates and missing values": Situation(
        {"a.csv": "text,n\n007,1\n1.50,2\nNA,3\n2020-01-01,4\nTrue,5\n1e5,6\nnan,7\n"},
        texts("007", "1.50", "NA", "2020-01-01", "True", "1e5", "nan"),
    ),
    "whole numbers as labels": Situation(
        {"a.csv": "text,label\na,3\nb, 0\nc,7\n"}, labelled(("a", 3), ("b", 0), ("c", 7)), options=LABEL
    ),
    "a label with a point far down": Situation(
        {"a.csv": "text,label\n" + "a,1\n" * 11_000 + "b,1.5\n"},
        labelled(*[("a", 1.0)] * 11_000, ("b", 1.5)),
        options=LABEL,
    ),
    "a word among whole numbers far down": Situation(
        {"a.csv": "text,label\n" + "a,1\n" * 11_000 + "b,one\n"},
        labelled(*[("a", "1")] * 11_000, ("b", "one")),
        options=LABEL,
    ),
    "whole numbers in one file, numbers in the next": Situation(
        {"in/a.csv": "text,label\na,1\n", "in/b.csv": "label,text\n2.5,b\n"},
        labelled(("a", 1.0), ("b", 2.5)),
        options=LABEL,
        source="in",
    ),
    "a word for a missing number among numbers": Situation(
        {"a.csv": "text,label\na,1.5\nb,NaN\n"},
        says="a.csv, line 3: column 'label' holds 'NaN', but .*a.csv, line 2 holds a number",
        options=LABEL,
    ),
    "words for missing numbers among words": Situation(
        {"a.csv": "text,label\na,NaN\nb,None\nc,word\nd,1\n"},
        labelled(("a", "NaN"), ("b", "None"), ("c", "word"), ("d", "1")),
        options=LABEL,
    ),
    "decimals with a plus": Situation(
        {"a.csv": "text,label\na,+1.5\nb,0.5\nc,+2\nd,1\ne,-0\n"},
        labelled(("a", 1.5), ("b", 0.5), ("c", 2.0), ("d", 1.0), ("e", -0.0)),
        options=LABEL,
    ),
    "a point far below whole numbers with a plus": Situation(
        {"a.csv": "text,label\n" + "a,+1\nb,1\n" * 6_000 + "c,1.5\n"},
        labelled(*[("a", 1.0), ("b", 1.0)] * 6_000, ("c", 1.5)),
        options=LABEL,
    ),
    "whole numbers with a plus": Situation(
        {"a.csv": "text,label\na,+1\nb,-1\nc,0\n"}, labelled(("a", "+1"), ("b", "-1"), ("c", "0")), options=LABEL
    ),
    "telephone numbers": Situation(
        {"a.csv": "text,label\na,+4930123\nb,030123\n"}, labelled(("a", "+4930123"), ("b", "030123")), options=LABEL
    ),
    "a leading zero beside decimals": Situation(
        {"a.csv": "text,label\na,01\nb,1.5\n"}, labelled(("a", "01"), ("b", "1.5")), options=LABEL
    ),
    "plus infinity beside numbers": Situation(
        {"a.csv": "text,label\na,1.5\nb,+inf\n"}, says="line 3: column 'label' holds '.inf'", options=LABEL
    ),
    "a whole number beyond 64 bits beside decimals": Situation(
        {"a.csv": f"text,label\na,{10**20}\nb,0.5\n"}, labelled(("a", 1e20), ("b", 0.5)), options=LABEL
    ),
    "an empty label": Situation(
        {"a.csv": "text,label\na,1\nb,\n"}, says="a.csv, line 3: column 'label' holds no label", options=LABEL
    ),
    "whole numbers beyond 64 bits as labels": Situation(
        {"a.csv": f"text,label\na,{10**20}\nb,7\n"}, labelled(("a", str(10**20)), ("b", "7")), options=LABEL
    ),
    # Delimiters, encodings, names
    **{
        f"a .csv with {name}": Situation({"a.csv": f"n{mark}text\n1{mark}a, b\n2{mark}c\n"}, texts("a, b", "c"))
        for name, mark in (("semicolons", ";"), ("tabs", "\t"), ("bars", "|"))
    },
    "a .csv that says what separates it": Situation({"a.csv": "sep=;\r\nn;text\r\n1;a,b\r\n"}, texts("a,b")),
    "a delimiter that is not recognised": Situation(
        {"a.csv": "n^text\n1^a\n"}, says=r"no column 'text'.*n\^text.* --data.delimiter"
    ),
    "a delimiter that is given": Situation({"a.csv": "n^text\n1^a\n"}, texts("a"), options={"delimiter": "^"}),
    "a .csv with commas in the text and tabs that are given": Situation(
        {"a.csv": "n\ttext\n1\ta, b\n"}, texts("a, b"), options={"delimiter": "tab"}
    ),
    "a byte-order mark before a header": Situation({"a.csv": "\ufefftext,n\na,1\n"}, texts("a")),
    "a byte-order mark before a header in quotes": Situation({"a.csv": '\ufeff"text","n"\n"a","1"\n'}, texts("a")),
    "UTF-16, as a spreadsheet saves it": Situation(
        {"a.tsv": "text\tn\na\t1\n".encode("utf-16")}, says="a.tsv, line 1: the file is UTF-16; convert"
    ),
    "lines that end in CR LF": Situation({"a.csv": "n,text\r\n1,a\r\n2,b\r\n"}, texts("a", "b")),
    "lines of a .tsv that end in CR LF": Situation({"a.tsv": "n\ttext\r\n1\ta\r\n2\tb\r\n"}, texts("a", "b")),
    "lines that end in CR alone": Situation({"a.csv": "n,text\r1,a\r2,b\r"}, texts("a", "b")),
    "a CR inside a text": Situation({"a.csv": "n,text\n1,a\rb\n2,c\n"}, texts("a\rb", "c")),
    "a CR inside a text in quotes": Situation({"a.csv": 'n,text\n1,"a\rb\r\nc"\n'}, texts("a\rb\r\nc")),
    "characters that other programs take for line ends": Situation(
        {"a.csv": written([["text", "n"], *([text, "1"] for text in ODD)])}, texts(*ODD)
    ),
    "the same of a .tsv": Situation({"a.tsv": "text\tn\n" + "".join(f"{text}\t1\n" for text in ODD)}, texts(*ODD)),
    "a repeated name, the first": Situation(
        {"a.csv": "text,text\na,b\n"}, texts("a"), warns="'text' is the name of 2 columns. The first is read"
    ),
    "a repeated name, the second": Situation({"a.csv": "text,text\na,b\n"}, texts("b"), options={"column": "text.1"}),
    "a column without a name": Situation({"a.csv": ",text\n0,a\n1,b\n"}, texts("a", "b")),
    "a name with a point": Situation(
        {"a.csv": "id,reviews.text\n1,a\n"}, texts("a"), options={"column": "reviews.text"}
    ),
    "columns in another order in the next file": Situation(
        {"in/a.csv": "text,n\na,1\n", "in/b.csv": "n;text;more\n2;b;x\n"}, texts("a", "b"), source="in"
    ),
    "a column that the next file lacks": Situation(
        {"in/a.csv": "text,n\na,1\n", "in/b.csv": "n,body\n2,b\n"},
        says="b.csv, line 1: no column 'text'. There are: body, n",
        source="in",
    ),
    "a header that two delimiters fit": Situation(
        {"a.csv": "c;x,c\n1;2\n"},
        says="line 1: , and ; could be the delimiter; pass --data.delimiter",
        options={"column": "c"},
    ),
    "a folder with the name of a file": Situation(
        {"in.csv/b.csv": "text\na\n", "c.csv": "text\nb\n"}, texts("b"), source="*.csv"
    ),
    "a field of 300,000 characters": Situation({"a.csv": f"text,n\n{'x' * 300_000},1\n"}, texts("x" * 300_000)),
    "gzip": Situation(
        {"a.tsv.gz": gzip.compress(PARAPHRASES.encode())},
        texts(*(r[4] for r in PARAPHRASE_ROWS)),
        options={"column": "#2 String"},
    ),
}
LATE = [{"text": f"t{n}", "extra": n} for n in range(15_000)]
JSON = {
    "a byte-order mark where files were joined": Situation(
        {"a.jsonl": '{"text": "a"}\n\ufeff{"text": "b"}\n'}, says="a.jsonl, line 2: begins with a byte-order mark"
    ),
    "a byte-order mark where arrays were joined": Situation(
        {"a.json": '[{"text": "a"}]\n\ufeff[{"text": "b"}]\n'}, says="a.json, line 2: begins with a byte-order mark"
    ),
    "a byte-order mark where objects over lines were joined": Situation(
        {"a.json": '{\n"text": "a"\n}\n\ufeff{\n"text": "b"\n}\n'}, says="a.json, line 4: begins with a byte-order mark"
    ),
    "a byte-order mark inside a text": Situation({"a.jsonl": '{"text": "\ufeffa"}\n' * 2}, texts(*["\ufeffa"] * 2)),
    "a mistyped name inside a column": Situation(
        {"a.jsonl": lines({"reviews": {"text": "a", "body": "b"}})},
        says=r"line 1: no column 'reviews\.txt': did you mean 'reviews\.text'\? "
        r"There are: reviews\.body, reviews\.text\. Pass --data\.column",
        options={"column": "reviews.txt"},
    ),
    "a name inside a column of texts": Situation(
        {"a.jsonl": lines({"reviews": "a"})},
        says=r"line 1: no column 'reviews\.text', because 'reviews' has no columns inside; pass another --data.column",
        options={"column": "reviews.text"},
    ),
    "a field that changes its type late": Situation(
        {"a.jsonl": lines(*LATE, {"text": "end", "extra": {"a": [1, "b"]}})},
        texts(*(row["text"] for row in LATE), "end"),
    ),
    "a field that is missing in the second file, and another order": Situation(
        {"in/a.jsonl": lines({"text": "a", "x": 1}), "in/b.jsonl": lines({"y": [1], "text": "b"})},
        texts("a", "b"),
        source="in",
    ),
    "records that look like agent traces": Situation(
        {"a.jsonl": lines(*({"type": "user", "message": {"role": "user"}, "text": t} for t in "ab"))}, texts("a", "b")
    ),
    "a repeated key far down": Situation(
        {"a.jsonl": lines(*LATE, '{"text": "a", "text": "b"}')}, says="line 15001: the key 'text' stands twice"
    ),
    "a repeated key, written with an escape": Situation(
        {"a.jsonl": lines('{"text": "a", "te\\u0078t": "b"}')}, says="line 1: the key 'text' stands twice"
    ),
    "a repeated key that nobody asked for": Situation(
        {"a.jsonl": lines('{"n": 1, "text": "a", "n": 2, "m": {"text": 1, "text": 2}}')}, texts("a")
    ),
    "a repeated key with the same value": Situation({"a.jsonl": lines('{"text": "a", "text": "a"}')}, texts("a")),
    "half a surrogate pair far down": Situation(
        {"a.jsonl": lines(*LATE, '{"text": "a\\ud83d"}')}, says="line 15001: column 'text' holds half a surrogate pair"
    ),
    "half a surrogate pair that nobody asked for": Situation(
        {"a.jsonl": lines('{"text": "a", "n": "\\ud83d"}')}, texts("a")
    ),
    "a whole surrogate pair": Situation({"a.jsonl": lines('{"text": "\\ud83d\\ude00"}')}, texts("😀")),
    "a label that changes its type": Situation(
        {"a.jsonl": lines({"text": "a", "label": 1}, {"text": "b", "label": "1"})},
        says="line 2: column 'label' holds '1', a text, but .*a.jsonl, line 1 holds a whole number",
        options=LABEL,
    ),
    "a label that is a list of lists": Situation(
        {"a.jsonl": lines({"text": "a", "label": [[1], [2]]})},
        says=r"line 1: column 'label' holds \[\[1\], \[2\]\] where a label is expected: a number",
        options=LABEL,
    ),
    "lists and numbers as labels": Situation(
        {"a.jsonl": lines({"text": "a", "label": [1, 2]}, {"text": "b", "label": 1})},
        says="line 2: column 'label' holds 1, a whole number, but .*a.jsonl, line 1 holds a list of whole numbers",
        options=LABEL,
    ),
    "whole numbers and numbers as labels": Situation(
        {"a.jsonl": lines({"text": "a", "label": 1}, {"text": "b", "label": 1.5})},
        labelled(("a", 1.0), ("b", 1.5)),
        options=LABEL,
    ),
    "a label beyond 64 bits": Situation(
        {"a.jsonl": lines({"text": "a", "label": 10**20})},
        says=r"line 1: column 'label' holds 10000.*a whole one from -2\*\*63 to 2\*\*63 - 1",
        options=LABEL,
    ),
    "numbers that nobody asked for": Situation(
        {
            "a.jsonl": lines(
                '{"n": NaN, "text": "a"}', '{"n": -Infinity, "text": "b"}', f'{{"n": {"9" * 5000}, "text": "c"}}'
            )
        },
        texts("a", "b", "c"),
    ),
    "a label that is not a number": Situation(
        {"a.jsonl": lines('{"text": "a", "label": 1.5}', '{"text": "b", "label": NaN}')},
        says="line 2: column 'label' holds nan",
        options=LABEL,
    ),
    "a row that nests deeply": Situation(
        {"a.jsonl": lines(f'{{"n": {"[" * 400 + "]" * 400}, "text": "a"}}')}, texts("a")
    ),
    "a row that nests too deeply": Situation(
        {"a.jsonl": lines({"text": "a"}, "[" * 10**5 + "]" * 10**5)}, says="a.jsonl, line 2: "
    ),
    "blank lines": Situation({"a.jsonl": '\n{"text": "a"}\n\n  \n{"text": "b"}\n'}, texts("a", "b")),
    "line ends of JSON": Situation({"a.jsonl": '{"text": "a"}\r\n{"text": "b"}\r\n'}, texts("a", "b")),
    "CR alone between rows": Situation({"a.jsonl": '{"text": "a"}\r{"text": "b"}\r'}, texts("a", "b")),
    "a byte-order mark": Situation({"a.jsonl": '\ufeff{"text": "a"}\n'}, texts("a")),
    "characters that other programs take for line ends": Situation(
        {"a.jsonl": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in ODD)}, texts(*ODD)
    ),
    "an array": Situation({"a.json": json.dumps(texts("a", "b", "[c]"), indent=2)}, texts("a", "b", "[c]")),
    "an array on one line, longer than what is read at a time": Situation(
        {"a.json": json.dumps(texts(*(f"{n} {'x' * 1000}" for n in range(2500))))},
        texts(*(f"{n} {'x' * 1000}" for n in range(2500))),
    ),
    "an empty array": Situation({"in/a.json": "[]", "in/b.json": '[{"text": "a"}]'}, texts("a"), source="in"),
    "an array with a fault": Situation(
        {"a.json": '[\n{"text": "a"},\n{"text": "b"}\n{"text": "c"}]'},
        says="a.json, line 4: not JSON, or cut off .a comma",
    ),
    "an array that is not closed": Situation(
        {"a.json": '[\n{"text": "a"},\n{"text": "b"}\n'}, says="a.json, line 4: not JSON, or cut off"
    ),
    "objects laid out over lines": Situation(
        {"a.json": "\n".join(json.dumps(row, indent=1) for row in texts("a", "b"))}, texts("a", "b")
    ),
    "a row that is cut off": Situation(
        {"a.jsonl": '{"text": "a"}\n{"text": "b\n{"text": "c"}\n'}, says="a.jsonl, line 2: not JSON"
    ),
    "a row that is not an object": Situation(
        {"a.jsonl": '{"text": "a"}\n"b"\n'}, says="line 2: a string where an object"
    ),
    "null for a row": Situation({"a.jsonl": '{"text": "a"}\nnull\n'}, says="line 2: null where an object"),
    "a row without the text": Situation(
        {"a.jsonl": lines({"text": "a"}, {"txet": "b"})},
        says="line 2: no column 'text': did you mean 'txet'.* --data.column",
    ),
    "null for a text": Situation(
        {"a.jsonl": lines({"text": "a"}, {"text": None})}, says="line 2: column 'text' holds NoneType"
    ),
    "bytes that are not UTF-8": Situation(
        {"a.jsonl": b'{"text": "a"}\n{"text": "\xe9"}\n'}, says="a.jsonl, line 2: not UTF-8"
    ),
    "a name with a point": Situation(
        {"a.jsonl": lines({"reviews.text": "a"})}, texts("a"), options={"column": "reviews.text"}
    ),
    "a path with a point in a name": Situation(
        {"a.jsonl": lines({"x.y": {"z": "a"}})}, texts("a"), options={"column": "x.y.z"}
    ),
    "a name before a path": Situation(
        {"a.jsonl": lines({"a": {"b": "no"}, "a.b": "yes"})}, texts("yes"), options={"column": "a.b"}
    ),
    "a file without rows": Situation({"a.jsonl": "\n\n"}),
    "a file without rows beside another": Situation(
        {"in/a.jsonl": "", "in/b.jsonl": lines({"text": "b"})}, texts("b"), source="in"
    ),
    "a carriage return and a NUL inside texts": Situation({"a.jsonl": lines({"text": "a\rb\0c"})}, texts("a\rb\0c")),
}
COLUMNAR = {
    **{
        f"{name}, of which others differ": Situation(
            {
                f"in/a{ending}": write(COLUMNS),
                f"in/b{ending}": write(COLUMNS.drop_columns("other").append_column("n", [["x"] * 3])),
            },
            labelled(*[("a", 2), ("b", 0), ("c", 1)] * 2),
            options=LABEL,
            source="in",
        )
        for name, ending, write in (
            ("columns of Parquet", ".parquet", as_parquet),
            ("columns of a stream of Arrow", ".arrow", as_arrow),
            ("columns of a file of Arrow", ".arrow", lambda table: as_arrow(table, pyarrow.ipc.new_file)),
        )
    },
    "a dictionary": Situation(
        {"a.parquet": as_parquet(pyarrow.table({"text": pyarrow.array(["a", "b", "a"]).dictionary_encode()}))},
        texts("a", "b", "a"),
    ),
    **{
        f"{kind} of Arrow": Situation(
            {"a.arrow": as_arrow(pyarrow.table({"text": pyarrow.array(["a", "b"], kind)}))}, texts("a", "b")
        )
        for kind in (pyarrow.large_string(), pyarrow.string_view())
    },
    "different widths of labels": Situation(
        {
            "in/a.parquet": as_parquet(COLUMNS),
            "in/b.parquet": as_parquet(COLUMNS.set_column(2, "label", [pyarrow.array([2, 0, 1], "uint8")])),
        },
        labelled(*[("a", 2), ("b", 0), ("c", 1)] * 2),
        options=LABEL,
        source="in",
    ),
    "an unsigned label beyond what int64 holds": Situation(
        {"a.parquet": as_parquet(pyarrow.table({"text": ["a"], "label": pyarrow.array([2**63 + 1], "uint64")}))},
        says=r"row 0: column 'label' holds 9223372036854775809 .*a whole one from -2\*\*63 to 2\*\*63 - 1",
        options=LABEL,
    ),
    "decimal labels": Situation(
        {"a.parquet": as_parquet(pyarrow.table({"text": ["a", "b"], "label": [Decimal("1.50"), Decimal("2.00")]}))},
        labelled(("a", 1.5), ("b", 2.0)),
        options=LABEL,
    ),
    "times for texts": Situation(
        {"a.parquet": as_parquet(pyarrow.table({"text": pyarrow.array([1], pyarrow.timestamp("ns"))}))},
        says=r"a.parquet: column 'text' holds the type timestamp\[ns\] where text",
    ),
    "bytes for texts": Situation(
        {"a.parquet": as_parquet(pyarrow.table({"text": [b"a"]}))}, says="column 'text' holds the type binary"
    ),
    "numbers for texts": Situation(
        {"a.parquet": as_parquet(pyarrow.table({"text": [1]}))}, says="row 0: column 'text' holds int"
    ),
    "a name with a point beside a path": Situation(
        {"a.parquet": as_parquet(pyarrow.table({"a": [{"b": "no"}], "a.b": ["yes"]}))},
        texts("yes"),
        options={"column": "a.b"},
    ),
    "a path": Situation(
        {"a.parquet": as_parquet(pyarrow.table({"a": [{"b": "yes", "c": 1}]}))}, texts("yes"), options={"column": "a.b"}
    ),
    "a missing text": Situation(
        {"a.parquet": as_parquet(pyarrow.table({"text": ["a", "b", None]}))}, says="row 2: column 'text' holds NoneType"
    ),
    "names of classes": Situation(
        {"a.parquet": with_classes("no", "yes")}, labelled(("a", 1), ("b", 0)), options=LABEL
    ),
    "other names of classes in the next file": Situation(
        {"in/a.parquet": with_classes("no", "yes"), "in/b.parquet": with_classes("yes", "no")},
        says="b.parquet: the classes of column 'label' are yes, no, but in",
        options=LABEL,
        source="in",
    ),
    "gzip": Situation({"a.parquet.gz": gzip.compress(as_parquet(COLUMNS))}, texts("a", "b", "c")),
    "gzip with a name in capitals": Situation(
        {"A.PARQUET.GZ": gzip.compress(as_parquet(COLUMNS))}, texts("a", "b", "c")
    ),
}
TEXT = {
    "a byte-order mark in a line, and two at the beginning": Situation(
        {"a.txt": "\ufeff\ufeffa\nb\ufeffc\n"}, texts("\ufeffa", "b\ufeffc")
    ),
    "a byte-order mark where files were joined": Situation(
        {"a.txt": "\ufeffa\nb\n\ufeffc\n"}, says=r"a.txt, line 3: begins with a byte-order mark \(U\+FEFF\).*remove"
    ),
    "a line in Windows-1252 among UTF-8": Situation(
        {"a.txt": "naïve\n".encode() * 3 + "naïve\n".encode("cp1252") + b"a\n"},
        says="a.txt, line 4: not UTF-8, but line 1 is; correct the line, or convert the file",
    ),
    "UTF-8 that is cut in its last character": Situation(
        {"a.txt": "a\n日本\n".encode() + "日".encode()[:2]}, says="a.txt, line 3: not UTF-8, but line 2 is"
    ),
    "Windows-1252 whose letters stand alone": Situation(
        {"a.txt": "a\nnaïve “x”\n".encode("cp1252")}, texts("a", "naïve “x”"), warns="line 2: not UTF-8, so the file is"
    ),
    "a last line that is cut after its CR": Situation({"a.txt": "a\r\nb\r"}, texts("a", "b")),
    "a byte-order mark": Situation({"a.txt": "\ufeffa\nb\n"}, texts("a", "b")),
    "a byte-order mark in gzip": Situation({"a.txt.gz": gzip.compress("\ufeffa\nb\n".encode())}, texts("a", "b")),
    "UTF-16": Situation(
        {"a.txt": "a\nb\n".encode("utf-16-be").join([b"\xfe\xff", b""])}, says="a.txt, line 1: the file is UTF-16"
    ),
    "gzip with a name in capitals": Situation({"A.TXT.GZ": gzip.compress(b"a\nb\n")}, texts("a", "b")),
    "CR LF": Situation({"a.txt": "a\r\nb\r\n"}, texts("a", "b")),
    "CR alone": Situation({"a.txt": "a\rb\r"}, texts("a", "b")),
    "a CR inside a line": Situation({"a.txt": "a\rb\nc\n"}, texts("a\rb", "c")),
    "characters that other programs take for line ends": Situation({"a.txt": "\n".join(ODD)}, texts(*ODD)),
    "paragraphs": Situation(
        {"a.txt": "a\nb\n\n\n \nc\r\nd\n"}, texts("a\nb", "c\nd"), options={"document": "paragraph"}
    ),
}


class Marker:
    """An object whose pickle ends the process when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


STR = {"text": "str"}
SHARD = write_mds(texts("a", "b", "c"), STR)
OTHER = write_mds(texts("d"), STR)
TWO_SHARDS = {"in/shard.00000.mds": SHARD, "in/shard.00001.mds": OTHER}
INDEX = write_index({"shard.00000.mds": SHARD, "shard.00001.mds": OTHER})


def packed(codec: str, content: bytes) -> bytes:
    """Return bytes compressed by pyarrow."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def changed(content: bytes, place: int) -> bytes:
    """Return bytes of which one is another."""
    return content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]


ZSTD = packed("zstd", SHARD)
ZSTD_INDEX = write_index({"shard.00000.mds": SHARD}, **{"shard.00000.mds.zstd": ZSTD})
MDS = {
    "a folder": Situation({**TWO_SHARDS, "in/index.json": INDEX}, texts("a", "b", "c", "d"), source="in"),
    "a glob": Situation({**TWO_SHARDS, "in/index.json": INDEX}, texts("d"), source="in/*1.mds"),
    "folders below a folder, with an index of them all": Situation(
        {
            "in/a/s.mds": OTHER,
            "in/a/index.json": write_index({"s.mds": OTHER}),
            "in/b/s.mds": SHARD,
            "in/b/index.json": write_index({"s.mds": SHARD}),
            "in/index.json": write_index({"a/s.mds": OTHER, "b/s.mds": SHARD}),
        },
        texts("d", "a", "b", "c"),
        source="in",
    ),
    "a folder that an index above it lists is missing": Situation(
        {"in/a/s.mds": OTHER, "in/index.json": write_index({"a/s.mds": OTHER, "b/s.mds": SHARD})},
        says="in/index.json: the shard b/s.mds is not in the folder; copy it there",
        source="in",
    ),
    "a shard of another size than an index two folders above it says": Situation(
        {"in/a/b/s.mds": OTHER, "in/index.json": write_index({"a/b/s.mds": SHARD})},
        says=rf"in/a/b/s.mds: {len(OTHER)} bytes where index.json says {len(SHARD)}; copy the shard again",
        source="in",
    ),
    "a folder whose shards the index above it does not list": Situation(
        {"in/s.mds": OTHER, "in/a/s.mds": SHARD, "in/index.json": write_index({"s.mds": OTHER})},
        says="in/a/s.mds: index.json does not list the shard; remove it",
        source="in",
    ),
    "a folder with an index of its own, which the one above it does not list": Situation(
        {
            "in/s.mds": OTHER,
            "in/index.json": write_index({"s.mds": OTHER}),
            "in/z/s.mds": SHARD,
            "in/z/index.json": write_index({"s.mds": SHARD}),
        },
        texts("d", "a", "b", "c"),
        source="in",
    ),
    "an index above the source": Situation(
        {"in/a/s.mds": OTHER, "in/index.json": write_index({"b/s.mds": SHARD})}, texts("d"), source="in/a"
    ),
    "no index": Situation({"a.mds": SHARD}, texts("a", "b", "c")),
    "no rows, beside a shard with rows": Situation(
        {"in/a.mds": write_mds([], STR), "in/b.mds": OTHER}, texts("d"), source="in"
    ),
    **{
        f"compressed with {codec}": Situation({f"shard.00000.mds.{ending}": packed(codec, SHARD)}, texts("a", "b", "c"))
        for ending, codec in (("zstd", "zstd"), ("gz", "gzip"), ("bz2", "bz2"), ("br", "brotli"))
    },
    "a name in capitals": Situation({"A.MDS": SHARD}, texts("a", "b", "c")),
    "names in capitals, some compressed": Situation(
        {"in/a.mds": OTHER, "in/b.MDS.ZSTD": ZSTD, "in/c.mds.GZ": packed("gzip", OTHER)},
        texts("d", "a", "b", "c", "d"),
        source="in",
    ),
    "compressed, with an index": Situation(
        {"in/shard.00000.mds.zstd": ZSTD, "in/index.json": ZSTD_INDEX}, texts("a", "b", "c"), source="in"
    ),
    "with and without compression": Situation(
        {"in/shard.00000.mds.zstd": ZSTD, "in/shard.00000.mds": SHARD, "in/index.json": ZSTD_INDEX},
        texts("a", "b", "c"),
        source="in",
    ),
    "compressed with snappy": Situation(
        {"shard.00000.mds.snappy": SHARD}, says=r"00000.mds.snappy: minilm does not unpack .snappy; write the .* zstd"
    ),
    "compressed and cut off": Situation(
        {"shard.00000.mds.zstd": ZSTD[:-9]}, says="00000.mds.zstd: cannot be unpacked; copy the shard again"
    ),
    "a shard that is missing": Situation(
        {"in/shard.00000.mds": SHARD, "in/index.json": INDEX},
        says="in/index.json: the shard shard.00001.mds is not in the folder; copy it there",
        source="in",
    ),
    "a shard of another size": Situation(
        {**TWO_SHARDS, "in/shard.00001.mds": SHARD, "in/index.json": INDEX},
        says=rf"in/shard.00001.mds: {len(SHARD)} bytes where index.json says {len(OTHER)}; copy the shard again",
        source="in",
    ),
    "a shard that the index does not list": Situation(
        {**TWO_SHARDS, "in/shard.00002.mds": SHARD, "in/index.json": INDEX},
        says="in/shard.00002.mds: index.json does not list the shard; remove it",
        source="in",
    ),
    "an index that is cut off": Situation(
        {**TWO_SHARDS, "in/index.json": INDEX[:50]}, says="in/index.json: not an index of MDS shards", source="in"
    ),
    "columns of all types, of which one is a pickle": Situation(
        {
            "a.mds": write_mds(
                [{"text": "naïve", "label": 2**40, "x": 1.5, "p": pickle.dumps(Marker()), "a": b""}] * 2,
                {"text": "str", "label": "int", "x": "float32", "p": "pkl", "a": "bytes"},
            )
        },
        labelled(*[("naïve", 2**40)] * 2),
        options=LABEL,
    ),
    "decimals for labels": Situation(
        {"a.mds": write_mds([{"text": "a", "label": 0.5}], {"text": "str", "label": "float32"})},
        labelled(("a", 0.5)),
        options=LABEL,
    ),
    "names for labels": Situation(
        {"a.mds": write_mds([{"text": "a", "label": "01"}], {"text": "str", "label": "str"})},
        labelled(("a", "01")),
        options=LABEL,
    ),
    "pickles for labels": Situation(
        {"a.mds": write_mds([{"text": "a", "label": pickle.dumps(Marker())}], {"text": "str", "label": "pkl"})},
        says="a.mds: column 'label' has the encoding pkl, which minilm does not read; write it as str, json",
        options=LABEL,
    ),
    "a path": Situation(
        {"a.mds": write_mds([{"a": {"b": ["x", "y"]}}, {"a": {"b": ["z"]}}], {"a": "json"})},
        texts("x y", "z"),
        options={"column": "a.b"},
    ),
    "a path into what is not JSON": Situation(
        {"a.mds": write_mds([{"a": {"b": "x"}}, {"a": b'{"b": '}], {"a": "json"})},
        says="a.mds, row 1: not JSON, or cut off",
        options={"column": "a.b"},
    ),
    "a key that stands twice": Situation(
        {"a.mds": write_mds([{"a": b'{"b": "x", "b": "y"}'}], {"a": "json"})},
        says="a.mds, row 0: the key 'b' stands twice in one object",
        options={"column": "a.b"},
    ),
    "another column": Situation(
        {"a.mds": SHARD}, says="a.mds: no column 'txt': did you mean 'text'", options={"column": "txt"}
    ),
    "bytes for texts": Situation(
        {"a.mds": write_mds([{"text": b"a"}], {"text": "bytes"})},
        says="a.mds: column 'text' holds the encoding bytes where text is expected",
    ),
    "a text that is not UTF-8": Situation(
        {"a.mds": write_mds([{"text": "a"}, {"text": b"na\xefve"}], STR)},
        says="a.mds, row 1: the text is not UTF-8; write the file again",
    ),
    "cut off": Situation({"a.mds": SHARD[:-1]}, says="a.mds: not a shard of MDS, or cut off; copy it again"),
    "too long": Situation({"a.mds": SHARD + b"x"}, says="a.mds: not a shard of MDS, or cut off"),
    "another version": Situation(
        {"a.mds": write_mds(texts("a"), STR, version=3)}, says="a.mds: version 3 of MDS, where minilm reads version 2"
    ),
    "another format": Situation({"a.mds": write_mds(texts("a"), STR, format="x")}, says="a.mds: not a shard of MDS"),
    "a damaged place": Situation(
        {"a.mds": changed(SHARD, 9)}, says="a.mds, row 0: the shard is damaged; copy it again"
    ),
    "a damaged size": Situation({"a.mds": changed(SHARD, len(SHARD) - 5)}, says="a.mds, row 2: the shard is damaged"),
}
TXT = {"column": "txt"}
ROWS = (("x/1.txt", "one\n"), ("x/1.json", '{"a": "eins"}'), ("x/2.json", '{"a": "zwei"}'), ("x/2.txt", "two"))
TAR_FILE = write_tar(ROWS)
# The headers of this format take 512 bytes, and so does each content.
PLAIN_TAR = write_tar(ROWS, tarfile.USTAR_FORMAT)


def with_link() -> bytes:
    """Return a tar of a folder and a symbolic link."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("folder/1.txt", tarfile.SYMTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "/etc/passwd"
            tar.addfile(header)
    return file.getvalue()


TAR = {
    "rows": Situation({"a.tar": TAR_FILE}, texts("one\n", "two"), options=TXT),
    "a path": Situation({"a.tar": TAR_FILE}, texts("eins", "zwei"), options={"column": "json.a"}),
    "several tars": Situation(
        {"in/a.tar": TAR_FILE, "in/b.tar.gz": gzip.compress(TAR_FILE)},
        texts(*["one\n", "two"] * 2),
        options=TXT,
        source="in",
    ),
    **{
        f"long names of the format {kind}": Situation(
            {"a.tar": write_tar([(f"{name * 200}.txt", name) for name in "äb"], kind)}, texts("ä", "b"), options=TXT
        )
        for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    },
    "the same name in two folders": Situation(
        {"a.tar": write_tar([("a.b/1.txt", "a"), ("./c/1.txt", "b"), ("/d/1.txt", "c")])},
        texts("a", "b", "c"),
        options=TXT,
    ),
    "hidden files": Situation(
        {"a.tar": write_tar([("./1.txt", "a"), ("./._1.txt", b"\xff"), (".git/2.txt", "no"), ("../3.txt", "b")])},
        texts("a", "b"),
        options=TXT,
    ),
    "several dots": Situation(
        {"a.tar": write_tar([("1.en.txt", "a"), ("1.de.txt", "b")])}, texts("b"), options={"column": "de.txt"}
    ),
    "files that are not text and not read": Situation(
        {"a.tar": write_tar([("1.png", b"\xff\0"), ("1.txt", "a"), ("1.json", b"{")])}, texts("a"), options=TXT
    ),
    "JSON with an ending before": Situation(
        {"a.tar": write_tar([("1.text", "a"), ("1.label.json", "3")])},
        labelled(("a", 3)),
        options={"label_column": "label.json"},
    ),
    "a byte-order mark": Situation({"a.tar": write_tar([("1.txt", "\ufeffa\ufeff")])}, texts("a\ufeff"), options=TXT),
    "another column": Situation(
        {"a.tar": TAR_FILE}, says=r"a.tar, row 0 \('x/1'\): no column 'text'.* are: json, txt. Pass"
    ),
    "a row without the column": Situation(
        {"a.tar": write_tar([*ROWS, ("x/3.json", "{}")])},
        says=r"a.tar, row 2 \('x/3'\): no column 'txt'. There are: json. Pass --data.column",
        options=TXT,
    ),
    "a path that is missing": Situation(
        {"a.tar": write_tar([*ROWS, ("x/3.json", "{}")])},
        says=r"row 2 \('x/3'\): no column 'json.a'",
        options={"column": "json.a"},
    ),
    "a path into what is not JSON": Situation(
        {"a.tar": write_tar([*ROWS, ("x/3.json", '{"a": ')])},
        says="a.tar, row 2, file 'x/3.json': not JSON, or cut off",
        options={"column": "json.a"},
    ),
    "a text that is not UTF-8": Situation(
        {"a.tar": write_tar([*ROWS, ("x/3.txt", b"na\xefve")])},
        says="a.tar, row 2, file 'x/3.txt': not UTF-8; convert the file",
        options=TXT,
    ),
    "a file twice": Situation(
        {"a.tar": write_tar([*ROWS, ROWS[3]])},
        says="a.tar, row 1, file 'x/2.txt': the tar holds this file twice",
        options=TXT,
    ),
    "a name without an ending": Situation(
        {"a.tar": write_tar([*ROWS, ("LICENSE", "")])},
        says="a.tar, row 2, file 'LICENSE': the name has no ending, which would be its column",
        options=TXT,
    ),
    "a link": Situation(
        {"a.tar": with_link()}, says="a.tar, file 'folder/1.txt': a link or a device; put the", options=TXT
    ),
    "not a tar": Situation({"a.tar": "text\n" * 300}, says="a.tar: not a tar, or damaged or cut off; copy it again"),
    "cut off in a file": Situation(
        {"a.tar": PLAIN_TAR[: 512 * 7 + 2]},
        says="a.tar, at or after file 'x/2.txt': the tar is damaged or",
        options=TXT,
    ),
    "cut off in a file that is not read": Situation(
        {"a.tar": PLAIN_TAR[: 512 * 5 + 2]}, says="a.tar, at or after file 'x/2.json': the tar is", options=TXT
    ),
    "cut off in a header": Situation(
        {"a.tar": PLAIN_TAR[: 512 * 6 + 9]}, says="a.tar, at or after file 'x/2.json': the tar is", options=TXT
    ),
    "cut off between files": Situation(
        {"a.tar": PLAIN_TAR[: 512 * 6]}, says="a.tar, at or after file 'x/2.json': the tar is", options=TXT
    ),
    "a damaged header": Situation(
        {"a.tar": changed(PLAIN_TAR, 512 * 4 + 1)}, says="a.tar, at or after file 'x/1.json': the tar is", options=TXT
    ),
    "tars that were joined": Situation(
        {"a.tar": PLAIN_TAR * 2}, says="a.tar: data follows the end of the tar, as if tars were joined", options=TXT
    ),
    "gzip that is cut off": Situation(
        {"a.tar.gz": gzip.compress(TAR_FILE)[:-5]}, says="a.tar.gz, at or after file 'x/2.txt': the tar is", options=TXT
    ),
}
TABLES = {"delimited": DELIMITED, "JSON": JSON, "columns": COLUMNAR, "text": TEXT, "MDS": MDS, "tar": TAR}
SITUATIONS = {f"{kind}: {name}": situation for kind, table in TABLES.items() for name, situation in table.items()}


def put(folder: Path, situation: Situation) -> Data:
    """Write the files of a situation, and return the settings that read them."""
    for name, content in situation.files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    source = situation.source or next(iter(situation.files))
    return Data(source=str(folder / source), **situation.options)


def _read(data: Data, split: str, *, labels: bool = False) -> Dataset:
    """Return the rows of a split of the only source."""
    return load_rows(data, data.sources[0], split, build_columns(data, labels=labels)).dataset


@pytest.mark.parametrize("name", SITUATIONS)
def test_rows_are_read_as_they_were_written_or_an_error_names_the_place(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    situation = SITUATIONS[name]
    data = put(tmp_path, situation)
    labels = "label_column" in situation.options
    if situation.says:
        with pytest.raises(ValueError, match=rf"^[^\n]*{situation.says}[^\n]*\Z"):
            _read(data, "train", labels=labels)
        if not labels:
            with pytest.raises(ValueError, match=rf"^[^\n]*{situation.says}[^\n]*\Z"):
                [*stream_rows(data, data.sources[0], "train")]
        return
    mapped = _read(data, "train", labels=labels)
    assert [*mapped] == [*situation.rows]
    for value, right in zip(mapped["label"] if labels else (), (row["label"] for row in situation.rows), strict=False):
        assert type(value) is type(right)
    streamed = [text for batch in stream_rows(data, data.sources[0], "train") for text in batch]
    assert streamed == [row["text"] for row in situation.rows if row["text"].strip()]
    assert situation.warns in caplog.text


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def run_of(data: Data, folder: Path, objective: Any) -> Config:
    """Return the configuration of one step on four documents."""
    return Config(
        data=data,
        objective=objective,
        model=Model(type="bert", config=SMALL),
        tokens=Tokens(kind="characters"),
        batch=Batch(examples=4, max_length=128),
        run=Run(max_steps=1, output_dir=str(folder), overwrite=True),
    )


def texts_of(prepared: Any, part: str = "train") -> list[str]:
    """Return the texts of a run's examples, decoded by its tokenizer of characters."""
    examples = getattr(prepared, part)
    return [prepared.tokenizer.decode(examples[index], skip_special_tokens=True) for index in range(len(examples))]


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
def test_a_file_of_glue_gives_all_its_rows_in_a_training_run(tmp_path: Path, streaming: bool) -> None:
    source = tmp_path / "train.tsv"
    source.write_text(PARAPHRASES)
    data = Data(source=str(source), eval_source=str(source), column="#2 String", streaming=streaming)
    config = run_of(data, tmp_path / "out", MaskedLM())
    assert texts_of(prepare_data(config)) == [row[4] for row in PARAPHRASE_ROWS]
    train(config)


def test_a_file_of_glue_gives_all_its_rows_to_a_classifier(tmp_path: Path) -> None:
    source = tmp_path / "train.tsv"
    source.write_text(PARAPHRASES)
    columns = {"column": "#1 String", "pair_column": "#2 String", "label_column": "Quality"}
    data = Data(source=str(source), eval_source=str(source), **columns)
    rows = [{"text": row[3], "pair": row[4], "label": int(row[0])} for row in PARAPHRASE_ROWS]
    assert [*load_documents(data, 0, labels=True)[0]] == rows
    labels = prepare_data(run_of(data, tmp_path / "out", Classification())).train.labels
    assert labels is not None
    assert labels.tolist() == [row["label"] for row in rows]


def test_a_part_of_a_delimited_file_has_the_label_type_of_the_whole_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "a,1\n" * 6 + "b,2.5\n" * 2 + "c,\n")
    data = Data(source=str(tmp_path / "a.csv"))
    parts = {
        "train[:5]": [1.0] * 5,
        "train[5:8]": [1.0, 2.5, 2.5],
        "train[:34%]": [1.0] * 3,
        "train[6:7]+train[:1]": [2.5, 1.0],
    }
    for split, right in parts.items():
        part = _read(data, split, labels=True)["label"][:]
        assert part == right
        assert all(isinstance(label, float) for label in part)
    with pytest.raises(ValueError, match="line 10: column 'label' holds no label"):
        _read(data, "train[5:]", labels=True)


def test_a_column_where_no_source_has_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\nb\n" * 20)
    (tmp_path / "a.csv").write_text("body\na\nb\n")
    data = Data(source=str(tmp_path / "a.txt"), column="body")
    for read in (lambda: load_documents(data, 0), lambda: stream_documents(replace(data, streaming=True))):
        with pytest.raises(ValueError, match=r"^--data\.column body: a \.txt file has no columns; leave it out"):
            read()
    both = Data(
        source=(str(tmp_path / "a.txt"), str(tmp_path / "a.csv")), eval_source=str(tmp_path / "a.csv"), column="body"
    )
    assert len(load_documents(both, 0)[0]) == 42


# (the source, the settings, the error; empty if the settings are right)
SETTINGS = {
    "a delimiter of .jsonl": ("a.jsonl", {"delimiter": ";"}, "--data.delimiter ;: no source is .csv or .tsv"),
    "a delimiter of .txt": ("a.txt", {"delimiter": ";"}, "--data.delimiter ;: no source is .csv or .tsv"),
    "a delimiter of pydocs": ("pydocs", {"delimiter": "tab"}, "--data.delimiter tab: no source is .csv or .tsv"),
    "a delimiter of a saved dataset": ("saved", {"delimiter": ","}, "--data.delimiter ,: no source is .csv or .tsv"),
    "a delimiter of .csv": ("a.csv", {"delimiter": ","}, ""),
    "a delimiter of .csv to evaluate on": ("a.txt", {"delimiter": ",", "eval_source": "a.csv"}, ""),
    "paragraphs of .jsonl": ("a.jsonl", {"document": "paragraph"}, "--data.document paragraph: no source is .txt"),
    "paragraphs of a saved dataset": ("saved", {"document": "paragraph"}, "--data.document paragraph: no source is"),
    "paragraphs of pydocs": ("pydocs", {"document": "file"}, "--data.document file: no source is .txt"),
    "paragraphs of .txt": ("a.txt", {"document": "paragraph"}, ""),
    "a configuration of .csv": ("a.csv", {"config": "en"}, "--data.config en: no source is a dataset on the hub"),
    "a configuration of a saved dataset": ("saved", {"config": "en"}, "--data.config en: no source is a dataset on"),
    "a configuration of pydocs": ("pydocs", {"config": "en"}, "--data.config en: no source is a dataset on the hub"),
    "a split of pydocs": ("pydocs", {"split": "train[:10]"}, r"--data.split train\[:10\]: pydocs has no splits"),
    "a split of pydocs to evaluate on": (
        "a.txt",
        {"eval_source": "pydocs", "eval_split": "test"},
        "--data.eval-split test: pydocs has no splits",
    ),
    "a second text of pydocs": ("pydocs", {"pair_column": "b"}, "--data.pair-column b: pydocs has no columns"),
    "a second text of .txt": ("a.txt", {"pair_column": "b"}, "--data.pair-column b: a .txt file has no columns"),
    "labels for a language model": ("a.csv", {"label_column": "n"}, "--data.label-column n: the objective reads no"),
    "a label separator for a language model": ("a.csv", {"label_separator": "|"}, "--data.label-separator |: the obj"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_without_effect_is_refused_before_a_file_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a\n\nb\n" * 20)
    Path("a.csv").write_text("text,n\n" + "a,1\n" * 40)
    Path("a.jsonl").write_text('{"text": "a"}\n' * 40)
    Dataset.from_dict({"text": ["a"] * 40}).save_to_disk("saved")
    source, options, says = SETTINGS[name]
    data = Data(source=source, **options)
    if not says:
        assert len(load_documents(data, 0)[0]) > 0
        return
    streamed = (
        [] if "pydocs" in (source, data.eval_source) or data.document == "file" else [replace(data, streaming=True)]
    )
    for module in ("tables", "streaming"):
        monkeypatch.setattr(f"minilm.data.{module}.fingerprint_files", lambda paths: pytest.fail("a file was read"))
    for read in (lambda: load_documents(data, 0), *(partial(stream_documents, each) for each in streamed)):
        with pytest.raises(ValueError, match=rf"^{says.replace('|', '[|]')}[^\n]*; leave it out\Z"):
            read()


def test_the_kind_of_document_of_a_recipe_holds_only_for_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "a.txt").write_text("a\n")
    recipe = Config(data=Data(source="input.txt", document="file"))
    sources = {name: ["--data.source", str(tmp_path / name)] for name in ("a.jsonl", "a.txt")}
    assert parse_flags(recipe, arguments=sources["a.jsonl"]).data.document == "line"
    assert parse_flags(recipe, arguments=sources["a.txt"]).data.document == "file"
    given = parse_flags(recipe, arguments=[*sources["a.jsonl"], "--data.document", "paragraph"])
    with pytest.raises(ValueError, match=r"--data\.document paragraph: no source is \.txt; leave it out"):
        load_documents(given.data, 0)


def test_a_warning_about_a_file_comes_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    contents = {"a.csv": "text;n\n" + "a;1\n" * 40, "b.txt": "a\nna\xefve\n" * 20}
    for name, warning in (("a.csv", "separates the fields of its header"), ("b.txt", "is read as Windows-1252")):
        path = tmp_path / name
        path.write_text(contents[name], encoding="cp1252")
        for streaming in (False, True):
            data = Data(source=str(path), eval_source=str(path), streaming=streaming)
            if streaming:
                train, parts = stream_documents(data)
                for stream in (train, *parts.values()):
                    assert len([*stream.texts()]) == 40
            else:
                load_documents(data, 0)
        assert caplog.text.count(warning) == 1


def test_a_saved_dataset_without_rows_is_empty(tmp_path: Path) -> None:
    columns = Features({"text": Value("string")})
    nothing = Dataset.from_dict({"text": []}, features=columns)
    nothing.save_to_disk(tmp_path / "nothing")
    DatasetDict(train=Dataset.from_dict({"text": ["a", "b"]}), test=nothing).save_to_disk(tmp_path / "parts")
    for streaming in (False, True):
        for name, split in (("nothing", "train"), ("parts", "test"), ("nothing", "train[:5]")):
            data = Data(source=str(tmp_path / name), split=split, streaming=streaming)
            with pytest.raises(ValueError, match=rf"^data source {tmp_path / name}: it is empty\Z"):
                [*stream_rows(data, data.sources[0], split)] if streaming else _read(data, split)
    data = Data(source=str(tmp_path / "parts"))
    assert _read(data, "train")["text"][:] == ["a", "b"]


WRITERS = {
    "a.txt": lambda rows: lines(*rows),
    "a.csv": lambda rows: written([["text"], *([row] for row in rows)]),
    "a.jsonl": lambda rows: lines(*({"text": row} for row in rows)),
    "a.parquet": lambda rows: as_parquet(pyarrow.table({"text": rows})),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
@pytest.mark.parametrize("name", WRITERS)
def test_other_texts_with_the_same_time_and_size_are_read_again(tmp_path: Path, name: str, streaming: bool) -> None:
    path = tmp_path / name
    data = Data(source=str(path), eval_source=str(path), streaming=streaming)

    def rewrite(word: str) -> list[str]:
        rows = [f"{word} {number}" for number in range(10)]
        content = WRITERS[name](rows)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.utime(path, ns=(10**18, 10**18))
        return rows

    for word in ("apple", "grape", "apple"):
        right = rewrite(word)
        config = run_of(data, tmp_path / "out", MaskedLM())
        assert texts_of(prepare_data(config)) == right
        (facts,) = fingerprint_sources(data)[str(path)]
        assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        if streaming:
            assert [*stream_documents(data)[0].texts()] == right
        else:
            assert load_documents(data, 0)[0]["text"][:] == load_all_documents(data)["text"][:] == right


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
@pytest.mark.parametrize("change", ["touched", "copied"])
def test_the_time_and_the_inode_of_a_file_do_not_change_the_fingerprint(
    tmp_path: Path, change: str, streaming: bool
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {number}\n" for number in range(40)))
    config = run_of(Data(source=str(path), streaming=streaming), tmp_path / "out", MaskedLM())
    before = prepare_data(config).train.fingerprint
    if change == "touched":
        os.utime(path, ns=(10**18, 10**18))
    else:
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        path.chmod(0o600)
    assert prepare_data(config).train.fingerprint == before


@pytest.mark.parametrize("count", [1, 3])
def test_the_fingerprint_of_a_file_of_a_large_source_is_its_size_time_and_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr("minilm.data.fingerprints._HASHED_BYTES", 100)
    monkeypatch.setattr("minilm.data.fingerprints._BLOCK_BYTES", 2)
    paths = [tmp_path / f"{number}.txt" for number in range(count)]
    for path in paths:
        path.write_bytes(b"a" * 200)
        os.utime(path, ns=(1, 1))
    fingerprints_of_versions = []
    for content, time in (
        (b"a" * 200, 1),
        (b"a" * 198 + b"bb", 1),
        (b"bb" + b"a" * 198, 1),
        (b"a" * 200, 2),
        (b"a" * 201, 1),
        (b"a" * 200, 1),
    ):
        paths[-1].write_bytes(content)
        os.utime(paths[-1], ns=(time, time))
        fingerprints_of_versions.append(json.dumps(fingerprint_files([*map(str, paths)])))
    assert fingerprints_of_versions[0] == fingerprints_of_versions[5]
    assert len({*fingerprints_of_versions}) == 5


def test_little_is_read_of_a_source_of_many_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{number}.txt" for number in range(20)]
    for path in paths:
        path.touch()
        os.truncate(path, 2**29)
    monkeypatch.setattr(fingerprints, "hash_file", lambda path: pytest.fail("a whole file was hashed"))
    before = psutil.Process().io_counters().read_chars
    assert {facts["bytes"] for facts in fingerprint_files([*map(str, paths)])} == {2**29}
    assert psutil.Process().io_counters().read_chars - before < 20 * 2**19


def test_another_process_does_not_hash_a_large_file_again_unless_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "_CACHED_BYTES", 100)
    monkeypatch.setattr(fingerprints, "_CLOCK_SECONDS", -1.0)
    hash_file, hashed = fingerprints.hash_file, list[str]()
    monkeypatch.setattr(fingerprints, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    for size in (99, 100):
        (tmp_path / f"{size}").write_bytes(b"a" * size)
    found = list[dict[str, Any]]()
    for _ in range(3):
        # A new process remembers nothing.
        fingerprints._recall_hash.cache_clear()
        found += fingerprint_files([str(tmp_path / "100")])
        fingerprint_files([str(tmp_path / "99")])
    assert found == [hash_file(tmp_path / "100")] * 3
    assert sorted(hashed) == ["100", "99", "99", "99"]
    os.utime(tmp_path / "100", ns=(1, 1))
    (tmp_path / "100").write_bytes(b"b" * 100)
    assert fingerprint_files([str(tmp_path / "100")]) == [hash_file(tmp_path / "100")] != found[:1]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\n" * 3000)
    batches = stream_rows(Data(source=str(path)), str(path), "train")
    next(batches)
    path.write_text("b\n" * 3000)
    with pytest.raises(ValueError, match=r"a\.txt: the file changed while it was read; start again"):
        list(batches)


@pytest.mark.parametrize("name", ["a.mds.zstd", "a.mds.gz", "a.parquet.gz"])
def test_a_full_folder_for_temporary_files_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = as_parquet(pyarrow.table({"text": ["a", "b", "c"]}))
    content = {"a.mds.zstd": ZSTD, "a.mds.gz": packed("gzip", SHARD), "a.parquet.gz": packed("gzip", table)}[name]
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(tempfile, "TemporaryFile", partial(open, "/dev/full", "w+b"))
    says = rf"^the disk is full while \S+/{name} is unpacked in \S+: free some space there, or set TMPDIR [^\n]+\Z"
    with pytest.raises(CacheError, match=says):
        [*stream_rows(Data(source=str(tmp_path / name)), str(tmp_path / name), "train")]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt", "a.mds", "a.mds.zstd", "a.tar"])
def test_reading_holds_a_part_of_a_file_in_memory(tmp_path: Path, name: str) -> None:
    text = "x" * 999
    rows = {
        "a.csv": "text,n\n" + f"{text},1\n" * 16_000,
        "a.tsv": "text\tn\n" + f"{text}\t1\n" * 16_000,
        "a.jsonl": f'{{"text": "{text}"}}\n' * 16_000,
        "a.json": "[" + ",".join([f'{{"text": "{text}"}}'] * 16_000) + "]",
        "a.txt": f"{text}\n" * 16_000,
    }
    if name in rows:
        (tmp_path / name).write_text(rows.pop(name))
    elif name == "a.tar":
        (tmp_path / name).write_bytes(write_tar_of_texts([text] * 16_000))
    else:
        shard = write_mds(texts(text) * 16_000, STR)
        (tmp_path / name).write_bytes(packed("zstd", shard) if name.endswith("zstd") else shard)
        del shard
    rows.clear()
    tracemalloc.start()
    count = sum(map(len, stream_rows(Data(source=str(tmp_path / name)), str(tmp_path / name), "train")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 16_000
    assert peak < 12 * MIB  # of 16


def test_a_command_has_a_flag_for_the_delimiter(tmp_path: Path, run: Any) -> None:
    path = tmp_path / "a.csv"
    path.write_text("n^text\n1^a [MASK]\n")
    status, _, error = run("fill-mask", str(tmp_path / "none"), "--file", str(path))
    assert (status, len(error)) == (2, 1)
    assert error[0].endswith("Pass --column, or pass --delimiter")
    _, _, error = run("fill-mask", str(tmp_path / "none"), "--file", str(path), "--delimiter", "^")
    assert "there is no such folder" in error[0]
