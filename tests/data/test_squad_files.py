"""SQuAD's JSON files: each question becomes a row, and a part that is missing is refused by its place."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from minilm.config import Data
from minilm.data.columns import Column
from minilm.data.documents import load_row_tables
from minilm.data.rows import Row
from minilm.data.tables import FileTable

SQUAD: dict[str, Any] = {
    "version": "v2.0",
    "data": [
        {
            "title": "Rivers",
            "paragraphs": [
                {
                    "context": "The  Nile is long.\nThe Po is not.",
                    "qas": [
                        {"id": "a", "question": "Long?", "answers": [{"text": "Nile", "answer_start": 5}]},
                        {"id": "b", "question": "Wide?", "answers": [], "is_impossible": True},
                    ],
                },
                {
                    "context": "Über die Brücke.",
                    "qas": [
                        {
                            "id": "c",
                            "question": "Where?",
                            "answers": [
                                {"text": "die Brücke", "answer_start": 5},
                                {"text": "Brücke", "answer_start": 9},
                            ],
                            "is_impossible": False,
                        }
                    ],
                },
            ],
        },
        {"title": "Empty", "paragraphs": []},
    ],
}
NAMES = ("id", "title", "context", "question", "answers", "is_impossible")


def _write(path: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def _read(path: Path, *names: str) -> list[Row]:
    columns = [Column(role=name, name=name, kind="json") for name in names]
    table, _ = load_row_tables(Data(source=str(path), eval_split="train"), 0, columns)
    return [row for batch in table.iter_batches() for row in batch]


@pytest.mark.parametrize("name", ["squad.json", "squad.json.gz", "indented.json"])
def test_each_question_is_a_row(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path / name, json.dumps(SQUAD, indent=2) if name == "indented.json" else SQUAD)
    rows = _read(path, *NAMES)
    expected = [
        {**question, "title": article["title"], "context": paragraph["context"]}
        for article in SQUAD["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    assert [dict(row) for row in rows] == [
        {**row, "is_impossible": row.get("is_impossible", False)} for row in expected
    ]
    assert [row.where for row in rows] == [f"{path}, question {number}" for number in (1, 2, 3)]


def test_json_of_other_kinds_is_read_as_before(tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", '{"data": "x"}\n{"data": [1]}\n')
    assert [(row["data"], row.where) for row in _read(path, "data")] == [
        ("x", f"{path}, line 1"),
        ([1], f"{path}, line 2"),
    ]
    assert _read(_write(tmp_path / "rows.json", [{"data": [{"paragraph": 1}]}]), "data")[0]["data"] == [
        {"paragraph": 1}
    ]


def _change(path: str, value: Any) -> dict[str, Any]:
    """Return SQUAD with another value at a path. None removes the key."""
    changed = json.loads(json.dumps(SQUAD))
    *outer, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    inner: Any = changed
    for part in outer:
        inner = inner[part]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return changed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_change("data.0.paragraphs.1.context", None), r"data\[0\]\.paragraphs\[1\]: .* a text 'context' here"),
        (_change("data.0.paragraphs.1.context", 7), r"data\[0\]\.paragraphs\[1\]: .* a text 'context' here"),
        (_change("data.0.paragraphs.0.qas", "x"), r"data\[0\]\.paragraphs\[0\]: .* a list 'qas' here"),
        (_change("data.1.paragraphs", None), r"data\[1\]: .* a list 'paragraphs' here"),
        (_change("data.0.paragraphs.0.qas.1.answers", None), r"paragraphs\[0\]\.qas\[1\]: .* a list 'answers' here"),
        (_change("data.0.paragraphs.0.qas.0", 3), r"paragraphs\[0\]\.qas\[0\]: .* a list 'answers' here"),
        (_change("data.0.paragraphs.0.qas.0.is_impossible", True), r"qas\[0\]: the question is impossible but has"),
        (_change("data.0.paragraphs.0.qas.1.question", None), r"paragraphs\[0\]\.qas\[1\]: no column 'question'"),
        (json.dumps(SQUAD) + ' {"a": 1}', "text follows the end of the object"),
        (json.dumps(SQUAD).replace('"id": "b"', '"id": "b", "id": "c"'), "the key 'id' stands twice"),
        (json.dumps(SQUAD)[:-1], "line 1: not JSON, or cut off"),
    ],
)
def test_a_wrong_part_is_refused_by_its_place(tmp_path: Path, content: Any, message: str) -> None:
    path = _write(tmp_path / "squad.json", content)
    with pytest.raises(ValueError, match=f"^{path}.*{message}") as error:
        _read(path, "context", "question", "answers")
    assert "\n" not in str(error.value)


def test_a_missing_column_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    path = _write(tmp_path / "squad.json", SQUAD)
    with pytest.raises(ValueError, match=r"no column 'contexts'. Did you mean context\?|'contexts'"):
        _read(path, "contexts")


def test_the_columns_of_a_file_are_those_of_a_row(tmp_path: Path) -> None:
    table = FileTable([str(_write(tmp_path / "squad.json", SQUAD))], Data())
    assert table.read_column_names([]) == [*NAMES]
    (batch,) = table.iter_batches([Column(role=name, name=name, kind="json") for name in table.read_column_names([])])
    assert batch.cells[0] == ["a", "b", "c"]
