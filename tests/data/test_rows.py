"""Tables of rows: cells of every kind by role, where each row comes from, and the splits of `load_documents`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import ClassLabel, Dataset, Features, Json, List, Value
from pyarrow import parquet

from minilm.config import Data
from minilm.data.columns import Column
from minilm.data.documents import load_documents, load_row_tables
from minilm.data.rows import Row, RowTable

MESSAGES = (Column(role="messages", name="messages", kind="json"),)
VALUE = (Column(role="value", name="value", kind="json"),)


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _load(source: str | tuple[str, ...], columns: Sequence[Column] = VALUE, **options: Any) -> RowTable:
    """Return all rows of the source."""
    return load_row_tables(Data(source=source, eval_split="train", **options), 0, columns)[0]


def _rows(table: RowTable, size: int = 1000) -> list[Row]:
    return [row for batch in table.iter_batches(size) for row in batch]


def _values(table: RowTable) -> list[Any]:
    return [row["value"] for row in _rows(table)]


def test_a_row_holds_its_cells_by_role_and_the_line_that_it_comes_from(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "\n"
        + json.dumps({"m": chat, "s": "x", "y": 2, "t": " a"})
        + "\n\n"
        + json.dumps({"m": None, "s": "", "y": 3, "t": "b"})
        + "\n"
    )
    columns = (
        Column(role="messages", name="m", kind="json"),
        Column(role="system", name="s", kind="json"),
        Column(role="rank", name="y", kind="label"),
        Column(role="prompt", name="t"),
    )
    table = _load(str(path), columns)
    assert len(table) == 2
    for _ in range(2):
        first, second = _rows(table)
        assert first == {"messages": chat, "system": "x", "rank": 2, "prompt": " a"}
        assert second == {"messages": None, "system": "", "rank": 3, "prompt": "b"}
        assert (first.where, second.where) == (f"{path}, line 2", f"{path}, line 4")


def test_rows_come_in_lists_of_the_size_that_is_asked_for(tmp_path: Path) -> None:
    table = _load(_write(tmp_path / "a.jsonl", [{"value": i} for i in range(7)]))
    assert [len(batch) for batch in table.iter_batches(3)] == [3, 3, 1]
    assert _values(table) == [*range(7)]


def test_rows_of_several_files_and_sources_name_their_own_file(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for name in ("many/a.jsonl", "many/b.jsonl", "c.jsonl"):
        _write(tmp_path / name, [{"value": f"{name} {i}"} for i in range(2)])
    table = _load((str(tmp_path / "many"), str(tmp_path / "c.jsonl")), weights=(1.0, 2.0))
    files = ["many/a.jsonl"] * 2 + ["many/b.jsonl"] * 2 + ["c.jsonl"] * 4
    lines = [1, 2, 1, 2, 1, 2, 1, 2]
    assert [row.where for row in _rows(table)] == [
        f"{tmp_path / file}, line {line}" for file, line in zip(files, lines, strict=True)
    ]
    assert _values(table) == [f"{file} {line - 1}" for file, line in zip(files, lines, strict=True)]


def test_a_copy_of_a_file_comes_from_the_cache_and_is_named_as_the_copy(tmp_path: Path) -> None:
    first, second = (_write(tmp_path / name, [{"value": [1]}]) for name in ("first.jsonl", "second.jsonl"))
    assert [row.where for row in _rows(_load(first))] == [f"{first}, line 1"]
    assert [row.where for row in _rows(_load(second))] == [f"{second}, line 1"]


def test_the_fingerprint_is_that_of_the_cells_and_their_roles(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"value": {"a": 1}}, {"value": 2}]
    lines = _load(_write(tmp_path / "a.jsonl", rows))
    (tmp_path / "b.json").write_text("\n\n" + json.dumps(rows, indent=2))
    other_role = _load(str(tmp_path / "b.json"), [Column(role="other", name="value", kind="json")])
    assert _load(str(tmp_path / "b.json")).fingerprint == lines.fingerprint
    assert other_role.fingerprint != lines.fingerprint
    others: list[list[dict[str, Any]]] = [
        [{"value": {"a": 1}}, {"value": "2"}],
        rows[::-1],
        rows[:1],
        [*rows, {"value": 2}],
    ]
    for changed in others:
        assert _load(_write(tmp_path / "c.jsonl", changed)).fingerprint != lines.fingerprint


@pytest.mark.parametrize("options", [{}, {"eval_split": "train[:30%]"}, {"eval_source": "same"}, {"weights": (1.5,)}])
def test_training_and_evaluation_rows_are_those_of_load_documents(tmp_path: Path, options: dict[str, Any]) -> None:
    source = _write(tmp_path / "a.jsonl", [{"text": f"text {i}" if i % 5 else " "} for i in range(40)])
    if "eval_source" in options:
        options = {"eval_source": source}
    data = Data(source=source, eval_fraction=0.25, **options)
    documents, held_out = load_documents(data, 3)
    table, parts = load_row_tables(data, 3, [Column(role="text", name="text")])
    assert [row["text"] for row in _rows(table)] == documents["text"][:]
    assert parts.keys() == held_out.keys()
    for name, part in parts.items():
        assert [row["text"] for row in _rows(part)] == held_out[name]["text"][:]
        assert (part is table) == (held_out[name] is documents) == ("eval_source" in options)
    lines = {row["text"]: row.where for row in _rows(table)}
    assert lines == {text: f"{source}, line {int(text[5:]) + 1}" for text in documents["text"]}


def test_rows_without_a_column_of_texts_are_all_kept(tmp_path: Path) -> None:
    values: list[Any] = ["", " ", None, [], {}, 0]
    assert _values(_load(_write(tmp_path / "a.jsonl", [{"value": value} for value in values]))) == values


def test_a_cell_of_a_delimited_file_is_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('value,n\n[1],01\n"{""a"": 2}",\nnull,3\n')
    columns = (*VALUE, Column(role="n", name="n", kind="json"))
    rows = _rows(_load(str(tmp_path / "a.csv"), columns))
    assert rows == [{"value": "[1]", "n": "01"}, {"value": '{"a": 2}', "n": ""}, {"value": "null", "n": "3"}]


@pytest.mark.parametrize("kind", ["text", "json"])
def test_a_text_file_has_the_column_text_under_any_role(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    rows = _rows(_load(str(tmp_path / "a.txt"), [Column(role="prompt", name="text", kind=kind)]))
    assert rows == [{"prompt": "one"}, {"prompt": "two"}]
    assert rows[1].where == f"{tmp_path / 'a.txt'}, line 2"
    for source in (str(tmp_path / "a.txt"), "pydocs"):
        with pytest.raises(ValueError, match=r"no column 'completion'\. There are: text\.\Z"):
            load_row_tables(Data(source=source), 0, [Column(role="completion", name="completion", kind=kind)])


def test_rows_of_pydocs_are_its_documents() -> None:
    table, parts = load_row_tables(Data(), 0, [Column(role="text", name="text")])
    documents, held_out = load_documents(Data(), 0)
    assert [row["text"] for row in _rows(table)] == documents["text"][:]
    assert [row["text"] for row in _rows(parts[""])] == held_out[""]["text"][:]
    assert _rows(table)[1].where == "pydocs, text 1"


def test_a_dotted_path_of_json_values_is_not_joined(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", [{"a": [{"b": "x"}, {"b": "y"}], "c": {"d": ["u", "v"]}}])
    columns = [Column(role="b", name="a.b", kind="json"), Column(role="d", name="c.d", kind="json")]
    columns.append(Column(role="text", name="c.d"))
    assert _rows(_load(source, columns, column="c.d")) == [{"b": ["x", "y"], "d": ["u", "v"], "text": "u v"}]


def _parquet(path: Path, value: Any) -> None:
    parquet.write_table(pyarrow.table({"value": value}), path)


def test_the_names_of_classes_are_kept_beside_their_ids(tmp_path: Path) -> None:
    names = ["O", "B-PER", "I-PER"]
    for folder, of_folder in (("one", names), ("two", names), ("three", names[::-1])):
        features = Features({"value": List(ClassLabel(names=of_folder)), "text": Value("string")})
        rows = Dataset.from_dict({"value": [[1, 2, 0]], "text": ["a"]}, features=features)
        rows.save_to_disk(tmp_path / folder)
        rows.to_parquet(tmp_path / f"{folder}.parquet")
    one, two, three = (str(tmp_path / name) for name in ("one", "two.parquet", "three"))
    table = _load((one, two))
    assert _values(table) == [[1, 2, 0]] * 2
    assert table.class_names == {"value": tuple(names)}
    with pytest.raises(
        ValueError, match=r"^column 'value': [^\n]*I-PER in [^\n]*B-PER, O in [^\n]*write all labels alike"
    ):
        _load((one, three))


def test_values_that_the_datasets_library_stores_as_json_text_are_parsed(tmp_path: Path) -> None:
    values = [{"a": [1, "x", None]}, [2.5], "text", None]
    nested = [[{"role": "user", "tools": {"n": i}}, {"role": "user", "tools": [i]}] for i in range(4)]
    features = Features({"value": Json(), "nested": List({"role": Value("string"), "tools": Json()})})
    rows = Dataset.from_dict({"value": values, "nested": nested}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "a.parquet")
    columns = (*VALUE, Column(role="nested", name="nested", kind="json"))
    for name in ("saved", "a.parquet"):
        found = _rows(_load(str(tmp_path / name), columns))
        assert found == [{"value": value, "nested": chat} for value, chat in zip(values, nested, strict=True)]


NO_JSON: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bytes": (lambda path: _parquet(path, [b"a", b"b"]), "row 0: column 'value' holds bytes, which JSON cannot hold"),
    "a date": (
        lambda path: _parquet(path, pyarrow.array([None, 0], pyarrow.timestamp("s"))),
        "row 1: column 'value' holds datetime, which JSON",
    ),
    "a decimal in a list": (
        lambda path: _parquet(path, pyarrow.array([[1]], pyarrow.list_(pyarrow.decimal128(3)))),
        "row 0: column 'value' holds Decimal, which JSON",
    ),
    "a map": (
        lambda path: _parquet(path, pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))),
        "row 0: column 'value' holds ArrowMap, which JSON",
    ),
    "NaN": (
        lambda path: path.write_text('{"value": 1}\n{"value": [NaN]}\n'),
        "line 2: [^\n]* nan, which is not a finite",
    ),
    "1e400": (lambda path: path.write_text('{"value": 1e400}\n'), "line 1: [^\n]* inf, which is not a finite"),
    "a long number": (
        lambda path: path.write_text('{"value": {"a": 1' + "0" * 5000 + "}}\n"),
        "line 1: [^\n]* inf, which is not a finite number that float64 can hold; change the row",
    ),
    "half a character": (
        lambda path: path.write_text('{"value": {"\\ud83d": 1}}\n'),
        r"line 1: column 'value' holds half a surrogate pair, such as \\ud83d, which is not a character",
    ),
    "a key twice": (
        lambda path: path.write_text('{"value": [{"role": "user", "role": "assistant"}]}\n'),
        "line 1: the key 'role' stands twice in one object, with different values",
    ),
    "no column": (lambda path: path.write_text('{"values": 1}\n'), "line 1: no column 'value': did you mean 'values'"),
}


@pytest.mark.parametrize("case", NO_JSON)
def test_what_json_cannot_hold_is_refused_with_its_row(tmp_path: Path, case: str) -> None:
    write, message = NO_JSON[case]
    path = tmp_path / ("a.jsonl" if "line" in message else "a.parquet")
    write(path)
    with pytest.raises(ValueError, match=rf"^{path}, {message}[^\n]*\Z"):
        _load(str(path))


def test_a_key_that_stands_twice_in_a_column_that_is_not_read_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"value": {"x": 1}, "more": {"x": 1, "x": 2}, "n": 1' + "0" * 5000 + "}\n")
    assert _values(_load(str(tmp_path / "a.jsonl"))) == [{"x": 1}]


def test_a_row_with_a_long_number_elsewhere_keeps_its_whole_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"value": 7, "n": 1' + "0" * 5000 + "}\n")
    (value,) = _values(_load(str(tmp_path / "a.jsonl")))
    assert (value, type(value)) == (7, int)


def test_settings_of_columns_that_are_not_read_are_refused(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", [{"messages": []}])
    for options, message in (
        ({"column": "body"}, "--data.column body: the objective reads other columns; leave it out"),
        ({"pair_column": "other"}, "--data.pair-column other: the objective reads no second text; leave it out"),
        ({"label_column": "tags"}, "--data.label-column tags: the objective reads no labels; leave it out"),
    ):
        with pytest.raises(ValueError, match=rf"^{message}\Z"):
            _load(source, MESSAGES, **options)
    with pytest.raises(ValueError, match=rf"^{source}: it has no rows \(split 'train\[:0\]'\)"):
        _load(source, MESSAGES, split="train[:0]")
    tags = [Column(role="tags", name="messages", kind="json")]
    assert len(_load(source, tags, label_column="messages")) == 1
