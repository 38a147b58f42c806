"""Datasets on the hub: each cell is read as it was written, or an error says what to change."""

import csv
import io
import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Features, Value, load_dataset_builder

from minilm.config import Data
from minilm.data.columns import Column
from minilm.data.documents import load_documents, load_row_tables
from minilm.data.hub_datasets import load_from_hub
from minilm.data.streaming import stream_documents

TEXTS = ["hello", 'a "quoted" text', "5", "[1]"]
MIXED = r"^data source some/rows: column 'text' holds values that are not text, of which [^\n]+; write them as text\Z"


def _put_on_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *files: str, kind: str = "json", features: Any = None
) -> Data:
    """Let the library find files of a kind on the hub, and return the settings that read them.

    features: what the dataset's card says about the types.
    """
    paths = [str(folder / f"train-{number}.{kind}") for number in range(len(files))]
    for path, content in zip(paths, files, strict=True):
        Path(path).write_text(content)

    def open_builder(path: str, *, name: Any, revision: Any, cache_dir: Any) -> Any:
        builder = load_dataset_builder(kind, data_files=paths, cache_dir=cache_dir or str(folder / "cache"))
        builder.info.features = features
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", open_builder)
    monkeypatch.setattr("minilm.data.sources.fetch_revision", lambda source: "abc")
    monkeypatch.setattr("minilm.data.streaming.fetch_revision", lambda source: "abc")
    monkeypatch.setattr("minilm.data.sources.use_cache_if_offline", lambda source, kind: False)
    return Data(source="some/rows", eval_split="train")


def _lines(cells: Sequence[Any], **others: Any) -> str:
    return "".join(json.dumps({"text": cell, **others}) + "\n" for cell in cells)


def _read(data: Data, *, streaming: bool) -> list[str]:
    if streaming:
        return [*stream_documents(replace(data, streaming=True))[0].texts()]
    return list(load_documents(data, 0)[0]["text"])


BAD = {
    "a number among texts": ["hello", 5],
    "numbers": [5, 7],
    "objects": [{"a": 1}, {"a": 2}],
    "an object among texts": ["hello", {"a": 1}],
    "a list among texts": ["hello", ["a"]],
}
DATES = (
    r"^data source some/rows: column 'text' holds texts that look like dates, which the datasets library would "
    r"rewrite; download the files and give them as the source\Z"
)


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
@pytest.mark.parametrize("case", BAD)
def test_cells_that_become_text_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, streaming: bool
) -> None:
    data = _put_on_hub(tmp_path, monkeypatch, _lines(TEXTS), _lines(BAD[case]))
    with pytest.raises(ValueError, match=MIXED):
        _read(data, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
def test_dates_that_would_be_rewritten_are_refused_and_files_of_them_are_read_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    data = _put_on_hub(tmp_path, monkeypatch, _lines(TEXTS), _lines(["2020-01-02", "2020-01-03"]))
    with pytest.raises(ValueError, match=DATES):
        _read(data, streaming=streaming)
    files = replace(data, source=str(tmp_path / "train-*.json"))
    assert _read(files, streaming=streaming) == [*TEXTS, "2020-01-02", "2020-01-03"]


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
def test_texts_of_json_are_read_as_they_are_and_other_columns_may_hold_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    others = [_lines(TEXTS, other=other) for other in ("a", 5, {"b": 1}, None)]
    data = _put_on_hub(tmp_path, monkeypatch, *others, _lines(["x"]), _lines(["y"], other="b") + _lines(["z"], other=5))
    assert _read(data, streaming=streaming) == [*TEXTS * 4, "x", "y", "z"]


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
def test_cells_inside_objects_that_become_text_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    files = ['{"a": {"text": "hello"}}\n', '{"a": {"text": "hello"}}\n{"a": {"text": 5}}\n', '{"a": {"text": 5}}\n']
    for bad in files[1:]:
        folder = tmp_path / str(len(bad))
        folder.mkdir()
        data = _put_on_hub(folder, monkeypatch, files[0], bad)
        data = replace(data, column="a.text")
        with pytest.raises(ValueError, match=r"^data source some/rows: column 'a.text' holds values that are not text"):
            _read(data, streaming=streaming)


@pytest.mark.parametrize("prepared_by", ["minilm", "the library"])
def test_a_copy_in_which_the_column_was_not_compared_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared_by: str
) -> None:
    data = _put_on_hub(tmp_path, monkeypatch, _lines(["hello"], other="x"), _lines([5], other="y"))
    if prepared_by == "minilm":
        assert _read(replace(data, column="other"), streaming=False) == ["x", "y"]
    else:
        builder = datasets.load_dataset_builder("some/rows", name=None, revision=None, cache_dir=None)
        builder.download_and_prepare()
        assert list(builder.as_dataset(split="train")["text"]) == ["hello", "5"]
    with pytest.raises(ValueError, match=MIXED):
        _read(data, streaming=False)


def test_chats_whose_messages_have_different_keys_are_read_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        [{"role": "user", "content": '"5"'}, {"role": "assistant", "content": "{}"}],
        [{"role": "user", "content": "5"}, {"role": "assistant", "content": "", "calls": [{"arguments": {"a": 1}}]}],
        [{"role": "user", "content": "5"}, {"role": "assistant", "content": "", "calls": [{"arguments": {"b": "x"}}]}],
    ]
    content = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
    data = _put_on_hub(tmp_path, monkeypatch, content, content)
    columns = [Column(role="messages", name="messages", kind="json")]
    found = load_row_tables(data, 0, columns)[0].dataset["messages"]
    assert [json.loads(cell) for cell in found] == rows * 2


def test_the_reader_of_json_can_be_sent_to_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _put_on_hub(tmp_path, monkeypatch, _lines(TEXTS), _lines(BAD["a number among texts"]))
    text = Column(role="text", name="text")
    rows = load_from_hub("some/rows", [text], name=None, split="train", revision=None, streaming=True)
    with pytest.raises(ValueError, match="column 'text' holds values that are not text"):
        [*pickle.loads(pickle.dumps(rows))]


# Cells that pandas would take for numbers, truth values or nothing.
ODD = ["007", "NA", "None", "nan", "1e5", "True", "1.0", " x ", "2020-01-02", "5,5", 'a "quoted" text', "two\nlines"]


def _csv(rows: Sequence[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
@pytest.mark.parametrize("named", [False, True], ids=["no types", "types"])
def test_texts_of_csv_are_read_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool, streaming: bool
) -> None:
    files = [[cell] for cell in ODD] + [ODD, ODD[::-1]]
    contents = [_csv([["text", "other"], *([cell, other] for cell in cells for other in ("5", ""))]) for cells in files]
    features = Features({"text": Value("string"), "other": Value("int64")}) if named else None
    data = _put_on_hub(tmp_path, monkeypatch, *contents, kind="csv", features=features)
    assert _read(data, streaming=streaming) == [cell for cells in files for cell in cells for _ in range(2)]


@pytest.mark.parametrize(
    "labels", [["01", "1"], ["3", "12"], ["2.5", "3"], ["NA", "x"], ["True", "False"], ["None", "5"]]
)
def test_labels_of_csv_are_those_of_the_same_file_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: list[str]
) -> None:
    content = _csv([["text", "label"], *([f"text {number}", label] for number, label in enumerate(labels * 2))])
    data = _put_on_hub(tmp_path, monkeypatch, content, kind="csv")
    columns = [Column(role="text", name="text"), Column(role="label", name="label", kind="label")]

    def read(data: Data) -> Any:
        try:
            rows = load_row_tables(data, 0, columns)[0].dataset
        except ValueError as error:
            return str(error).partition("column ")[2].partition(",")[0]
        return rows["label"][:], str(rows.features["label"])

    assert read(data) == read(replace(data, source=str(tmp_path / "train-0.csv")))


def test_labels_of_csv_have_the_names_that_the_card_of_the_dataset_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    content = _csv([["text", "label"], ["007", "1"], ["NA", "0"]])
    data = _put_on_hub(tmp_path, monkeypatch, content, kind="csv", features=features)
    columns = [Column(role="text", name="text"), Column(role="label", name="label", kind="label")]
    rows = load_row_tables(data, 0, columns)[0].dataset
    assert rows["text"][:] == ["007", "NA"]
    assert rows["label"][:] == [1, 0]
    assert rows.features["label"].names == ["no", "yes"]


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
@pytest.mark.parametrize("rows", [["hello, world,1", "bye, bye,2"], ["a,1", "hello, world,1"]])
def test_rows_of_csv_with_more_cells_than_the_header_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[str], streaming: bool
) -> None:
    data = _put_on_hub(tmp_path, monkeypatch, "\n".join(["text,label", *rows]), kind="csv")
    with pytest.raises(ValueError, match=r"^data source some/rows: .*(more cells than the header|Expected 2 fields)"):
        _read(data, streaming=streaming)
