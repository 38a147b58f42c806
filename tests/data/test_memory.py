"""Documents from Python: read as those of a file, and refused at once if they are not documents."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from minilm.config import IN_MEMORY_EVAL_SOURCE, IN_MEMORY_SOURCE, Data
from minilm.data import sources
from minilm.data.columns import Column
from minilm.data.documents import load_all_documents, load_documents, load_row_tables
from minilm.data.memory import DocumentList, MemoryDocuments
from minilm.data.rows import Row, RowTable
from minilm.data.sources import build_columns, check_data_settings, fingerprint_sources
from minilm.data.streaming import stream_documents

TEXTS = [f"Text {i}, naïve." for i in range(40)]
TEXT = (Column(role="text", name="text"),)


def _rows(table: RowTable) -> list[Row]:
    return [row for batch in table.iter_batches() for row in batch]


def _load(documents: DocumentList, columns: tuple[Column, ...] = TEXT) -> list[Row]:
    """Return all rows of the documents."""
    memory = MemoryDocuments(documents, documents)
    train, parts = load_row_tables(Data(), 0, columns, memory)
    assert parts == {"": train}
    return _rows(train)


@pytest.mark.parametrize("form", ["texts", "rows", "dataset", "tuple", "selected"])
def test_documents_from_python_are_those_of_a_file(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.txt").write_text("".join(text + "\n" for text in TEXTS))
    rows = [{"text": text, "more": i} for i, text in enumerate(TEXTS)]
    documents: Any = {
        "texts": TEXTS,
        "rows": rows,
        "dataset": Dataset.from_list(rows),
        "tuple": tuple(TEXTS),
        "selected": Dataset.from_list([{"text": "no"}, *rows[::-1]]).select(range(len(TEXTS), 0, -1)),
    }[form]
    right = load_documents(Data(source=str(tmp_path / "a.txt"), eval_fraction=0.25), 5)
    found = load_documents(Data(eval_fraction=0.25), 5, memory=MemoryDocuments(documents))
    assert found[0][:] == right[0][:]
    assert found[1][""][:] == right[1][""][:]
    assert len(found[1][""]) == 10


def test_evaluation_documents_come_from_their_own_list_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    memory = MemoryDocuments(TEXTS, [{"text": "held out"}])
    train, parts = load_documents(Data(), 0, memory=memory)
    assert (train["text"][:], parts[""]["text"][:]) == (TEXTS, ["held out"])
    data = Data(eval_source=str(tmp_path / "a.txt"), document="paragraph")
    train, parts = load_documents(data, 0, memory=MemoryDocuments(TEXTS))
    assert (train["text"][:], parts[""]["text"][:]) == (TEXTS, ["one\ntwo"])


def test_a_row_is_named_by_its_index_and_list() -> None:
    rows = [{"text": "a", "x": {"y": [1]}}, {"text": " ", "x": {"y": [1]}}, {"text": "b", "x": {"y": []}}]
    columns = (*TEXT, Column(role="y", name="x.y", kind="json"))
    memory = MemoryDocuments(rows, Dataset.from_list(rows[::-1]))
    train, parts = load_row_tables(Data(), 0, columns, memory)
    assert _rows(train) == [{"text": "a", "y": [1]}, {"text": "b", "y": []}]
    assert [row.where for row in _rows(train)] == ["documents[0]", "documents[2]"]
    assert [row.where for row in _rows(parts[""])] == ["eval_documents[0]", "eval_documents[2]"]


def test_numbers_and_arrays_of_numpy_are_those_of_python_and_tuples_are_lists() -> None:
    values = [
        np.int64(3),
        np.float32(0.5),
        np.array([[1, 2]]),
        (1, ("a",)),
        np.str_("x"),
        OrderedDict(a=np.bool_(True)),
    ]
    found = _load([{"value": value} for value in values], (Column(role="value", name="value", kind="json"),))
    right = [3, 0.5, [[1, 2]], [1, ["a"]], "x", {"a": True}]
    assert [row["value"] for row in found] == right
    assert [type(row["value"]) for row in found] == [*map(type, right)]
    labels = _load([{"label": np.int64(i)} for i in range(3)], (Column(role="label", name="label", kind="label"),))
    assert labels == [{"label": i} for i in range(3)]


def test_the_names_of_classes_of_a_dataset_are_kept() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    train, _ = load_documents(Data(eval_fraction=0.5), 0, labels=True, memory=MemoryDocuments(rows))
    assert train.features["label"].names == ["no", "yes"]
    table, _ = load_row_tables(Data(eval_fraction=0.5), 0, build_columns(Data(), labels=True), MemoryDocuments(rows))
    assert table.class_names == {"label": ("no", "yes")}


def test_the_fingerprint_is_that_of_the_content() -> None:
    def fingerprint(documents: DocumentList) -> str:
        return load_row_tables(Data(), 0, TEXT, MemoryDocuments(documents, ["a"]))[0].fingerprint

    right = fingerprint(["a", "b"])
    assert fingerprint([{"text": "a", "more": 1}, {"text": "b", "more": object()}]) == right
    assert fingerprint(Dataset.from_dict({"text": ["b", "a"]}).select([1, 0])) == right
    for other in (["a", "c"], ["b", "a"], ["a"], ["a", "b", "b"]):
        assert fingerprint(other) != right


def test_a_list_that_has_changed_is_read_anew() -> None:
    documents = ["a", "b"]
    assert [row["text"] for row in _load(documents)] == ["a", "b"]
    documents[1] = "c"
    assert [row["text"] for row in _load(documents)] == ["a", "c"]


def test_a_dataset_is_identified_by_its_content_and_not_by_its_fingerprint() -> None:
    datasets = [Dataset(Dataset.from_dict({"text": [text]}).data, fingerprint="same") for text in "ab"]
    assert [_load(rows)[0]["text"] for rows in datasets] == ["a", "b"]


NOT_DOCUMENTS: dict[str, tuple[Any, str]] = {
    "a text": ("one text", "documents is str: pass a list of strings"),
    "a dictionary": ({"text": ["a"]}, "documents is dict: pass a list of strings"),
    "splits": (DatasetDict(train=Dataset.from_dict({"text": ["a"]})), "documents is DatasetDict: pass"),
    "a generator": ((text for text in TEXTS), "documents is generator: pass"),
    "a stream": (Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), "documents is IterableDataset: pass"),
    "nothing": ([], "documents is empty"),
    "an empty dataset": (Dataset.from_dict({"text": []}), "documents is empty"),
    "None": (None, "documents is NoneType"),
    "numbers": ([1, 2], r"documents\[0\] is int: pass a list of strings, a list of dictionaries or a datasets.Dataset"),
    "a number among texts": ([*TEXTS[:7], 7], r"documents\[7\] is int, but documents\[0\] is str: pass"),
    "a row among texts": (["a", {"text": "b"}], r"documents\[1\] is dict, but documents\[0\] is str"),
    "a text among rows": ([{"text": "b"}, "a"], r"documents\[1\] is str, but documents\[0\] is dict"),
    "a transform": (
        Dataset.from_dict({"text": ["a"]}).with_transform(lambda batch: batch),
        r"documents has a transform, which minilm does not apply; pass the result of documents.map\(...\)",
    ),
}


@pytest.mark.parametrize("case", NOT_DOCUMENTS)
def test_what_is_not_a_list_of_documents_is_refused_at_once(case: str) -> None:
    documents, message = NOT_DOCUMENTS[case]
    with pytest.raises(ValueError, match=rf"^{message}[^\n]*\Z"):
        MemoryDocuments(documents)
    if documents is not None:
        with pytest.raises(ValueError, match=rf"^eval_{message.replace(' documents', ' eval_documents')}[^\n]*\Z"):
            MemoryDocuments(["a"], documents)


BAD_ROWS: dict[str, tuple[list[Any], str]] = {
    "no column": ([{"text": "a"}, {"texts": "b"}], r"documents\[1\]: no column 'text': did you mean 'texts'"),
    "not a text": ([{"text": "a"}, {"text": 5}], r"documents\[1\]: column 'text' holds int where text is expected"),
    "half a character": (["a", "\ud83d"], r"documents\[1\]: column 'text' holds half a surrogate pair"),
    "only blank texts": ([" ", ""], r"documents: no document has text \(column 'text'\)"),
}
CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)
NO_JSON: dict[str, tuple[Any, str]] = {
    "an object of Python": (object(), "column 'text' holds object, which JSON cannot hold"),
    "a set": ([{1}], "column 'text' holds set, which JSON"),
    "a number as a key": ({1: 2}, "the key 1 of a dictionary is not a string"),
    "NaN": ({"a": np.float32("nan")}, "column 'text' holds nan, which is not a finite number"),
    "itself": (CIRCLE, "the lists and dictionaries are nested too deeply"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_refused_with_its_index(case: str) -> None:
    documents, message = BAD_ROWS[case]
    with pytest.raises(ValueError, match=rf"^{message}[^\n]*\Z"):
        _load(documents)


def test_a_bad_row_of_a_dataset_is_refused_with_its_index() -> None:
    rows = Dataset.from_dict({"text": ["a", None], "x": [{"y": 1}, None], "z": [b"a", b"b"]})
    with pytest.raises(ValueError, match=r"^documents\[1\]: column 'text' holds NoneType where text is expected"):
        _load(rows)
    with pytest.raises(ValueError, match=r"^documents: no column 'texts': did you mean 'text'"):
        _load(rows, (Column(role="text", name="texts"),))
    with pytest.raises(ValueError, match=r"^documents\[0\]: no column 'x.q': did you mean 'x.y'"):
        _load(rows, (Column(role="q", name="x.q", kind="json"),))
    with pytest.raises(ValueError, match=r"^documents\[0\]: column 'z' holds bytes, which JSON cannot hold"):
        _load(rows, (Column(role="z", name="z", kind="json"),))


@pytest.mark.parametrize("case", NO_JSON)
def test_a_value_that_json_cannot_hold_is_refused_with_its_index(case: str) -> None:
    value, message = NO_JSON[case]
    with pytest.raises(ValueError, match=rf"^documents\[1\]: {message}[^\n]*\Z"):
        _load([{"text": 1}, {"text": value}], (Column(role="text", name="text", kind="json"),))


REFUSED: dict[str, tuple[dict[str, Any], bool, str]] = {
    "delimiter": ({"delimiter": ";"}, False, "--data.delimiter ;: no source is .csv or .tsv; leave it out"),
    "document": ({"document": "file"}, False, "--data.document file: no source is .txt; leave it out"),
    "config": ({"config": "en"}, False, "--data.config en: no source is a dataset on the hub; leave it out"),
    "split": ({"split": "test"}, False, "--data.split test: documents from Python have no splits; leave it out"),
    "eval_split": ({"eval_split": "test"}, False, "data.eval_split: documents from Python have no splits; give"),
    "streaming": ({"streaming": True, "source": IN_MEMORY_SOURCE}, False, "data.streaming: only language models"),
    "column": ({"column": "body"}, False, r"documents\[0\]: no column 'body'\. There are: text\."),
    "source": ({"source": "a.csv"}, False, "data.source a.csv: documents were given from Python; leave one"),
    "eval_source": ({"eval_source": "a.csv"}, True, "data.eval_source a.csv: eval_documents were given from Python"),
    "eval_split of both": ({"eval_split": "test"}, True, "data.eval_split test: eval_documents were given"),
    "no eval_documents": (
        {"source": IN_MEMORY_SOURCE, "eval_source": IN_MEMORY_EVAL_SOURCE},
        False,
        "data.eval_source: the evaluation documents of this run were given from Python; pass eval_documents again",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_setting_that_cannot_apply_is_refused_by_name(case: str) -> None:
    options, both, message = REFUSED[case]
    with pytest.raises(ValueError, match=rf"^{message}[^\n]*\Z"):
        load_documents(Data(**options), 0, memory=MemoryDocuments(TEXTS, TEXTS[:2] if both else None))


def test_the_settings_of_a_run_record_that_its_documents_came_from_python() -> None:
    data = Data(eval_fraction=0.5)
    assert MemoryDocuments(TEXTS).update_settings(data) == replace(data, source=IN_MEMORY_SOURCE)
    recorded = MemoryDocuments(TEXTS, ["a"]).update_settings(data)
    assert (recorded.source, recorded.eval_source) == (IN_MEMORY_SOURCE, IN_MEMORY_EVAL_SOURCE)
    assert MemoryDocuments(TEXTS, ["a"]).update_settings(recorded) == recorded
    assert MemoryDocuments(TEXTS, TEXTS).update_settings(data).eval_source == IN_MEMORY_SOURCE
    assert fingerprint_sources(recorded) == {}
    assert load_documents(recorded, 0, memory=MemoryDocuments(TEXTS, ["a"]))[1][""]["text"][:] == ["a"]


def test_documents_that_are_not_given_again_are_missed_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "HfApi", None)
    monkeypatch.setattr(sources, "_load", None)
    message = r"these documents were given from Python, and are not stored; pass them to train again, or pass another"
    for read in (lambda data: load_documents(data, 0), load_all_documents, stream_documents):
        with pytest.raises(ValueError, match=rf"^--data.source <documents>: {message} --data.source\Z"):
            read(Data(source=IN_MEMORY_SOURCE))
        with pytest.raises(ValueError, match=rf"^--data.eval-source <eval_documents>: {message} --data.eval-source\Z"):
            read(Data(source=__file__.replace(".py", ".txt"), eval_source=IN_MEMORY_EVAL_SOURCE))


SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "What is this? I don't know [1].",
    "Zwei\nZeilen",
    "He said and/or he wrote",
    "naïve",
    "Hello!",
    "a" * 50 + " " + "b" * 5000,
)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_sentence_is_never_asked_of_the_hub(sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "HfApi", None)
    monkeypatch.setattr(sources, "_load", None)
    monkeypatch.setattr(sources, "use_cache_if_offline", None)
    message = (
        r"^data source ['\"][^\n]{,70}['\"] does not exist as a file or folder, and a dataset on the hub cannot have "
        r"this name; to train on texts from Python, pass documents=\[\.\.\.\]\Z"
    )
    for data in (Data(source=sentence), Data(source=("pydocs", sentence)), Data(eval_source=sentence)):
        with pytest.raises(ValueError, match=message):
            load_documents(data, 0)
        with pytest.raises(ValueError, match=message):
            check_data_settings(data, build_columns(data))
    with pytest.raises(ValueError, match=message):
        stream_documents(Data(source=sentence, streaming=True))
    assert fingerprint_sources(Data(source=sentence)) == {}


def test_a_file_whose_name_is_a_sentence_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "My notes, 2024.txt").write_text("one\ntwo\n")
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "x.txt").write_text("one\ntwo\n")
    for source in ("My notes, 2024.txt", "My notes*", "a b", "a b/*.txt"):
        assert load_all_documents(Data(source=source))["text"][:] == ["one", "two"]
    for source, why in (("My nots, 2024.txt", "no such file or folder"), ("a b/*.csv", "no such file or folder")):
        with pytest.raises(ValueError, match=rf"^data source {source.replace('*', '[*]')}: {why}\Z"):
            load_all_documents(Data(source=source))
