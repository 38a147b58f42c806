"""Labels and second texts: each row keeps its own, and a row without one is an error."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from minilm.config import Data
from minilm.data.documents import load_documents
from minilm.data.glue import apply_glue_task
from tests.fake_hub import replace_hub

LABELS: dict[str, list[Any]] = {
    "integers": [3, 0, 7],
    "floats": [0.5, -1.0, 4.0],
    "names": ["spam", "ham", "None"],
    "names of the alphabet": ["NA", "null", "true"],
    "several integers": [[1, 2], [0], []],
    "several names": [["a", "b"], [], ["c"]],
}
GLUE = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "stsb": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


def _source(folder: Path, rows: list[dict[str, Any]], name: str = "a.jsonl") -> str:
    if name.endswith(".jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(folder / name)
    else:
        Dataset.from_list(rows).to_csv(folder / name)
    return str(folder / name)


def _read(source: str, **options: Any) -> Dataset:
    """Return all rows, in their order."""
    data = Data(source=source, eval_source=source, **options)
    train, held_out = load_documents(data, seed=0, labels=True)
    assert train[:] == held_out[""][:]
    return train


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in LABELS
        for kind in (".jsonl", ".parquet", ".csv")
        if not (kind == ".csv" and "several" in name)  # a cell holds no list
    ],
)
def test_a_label_keeps_its_type(tmp_path: Path, name: str, kind: str) -> None:
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(LABELS[name])]
    found = _read(_source(tmp_path, rows, f"a{kind}"))
    assert found[:] == {"text": ["text 0", "text 1", "text 2"], "label": LABELS[name]}
    assert [type(label) for label in found["label"]] == [type(label) for label in LABELS[name]]


def test_columns_of_any_name_and_depth_become_text_pair_and_label(tmp_path: Path) -> None:
    rows = [{"q": {"first": f"a {i}", "rest": [f"b {i}", "c"]}, "y": {"gold": f"class {i % 2}"}} for i in range(3)]
    found = _read(_source(tmp_path, rows), column="q.first", pair_column="q.rest", label_column="y.gold")
    assert found.column_names == ["text", "pair", "label"]
    assert found[2] == {"text": "a 2", "pair": "b 2 c", "label": "class 0"}


@pytest.mark.parametrize("path", ["label", "gold.label"])
def test_the_names_of_a_class_label_and_their_order_are_kept(tmp_path: Path, path: str) -> None:
    names = ["no", "maybe", "a yes"]
    rows = Dataset.from_dict(
        {"text": ["a", "b"], "label": [2, 0]},
        features=Features({"text": Value("string"), "label": ClassLabel(names=names)}),
    )
    if path != "label":
        rows = rows.map(
            lambda row: {"gold": {"label": row["label"]}},
            remove_columns="label",
            features=Features({"text": Value("string"), "gold": {"label": ClassLabel(names=names)}}),
        )
    rows.save_to_disk(tmp_path / "saved")
    found = _read(str(tmp_path / "saved"), label_column=path)
    assert found["label"][:] == [2, 0]
    assert found.features["label"].names == names


def test_without_labels_a_row_is_dropped_if_all_its_texts_are_blank(tmp_path: Path) -> None:
    rows = [{"text": text, "other": other} for text, other in (("a", ""), (" \n", "\t"), (" \n", "b"))]
    source = _source(tmp_path, rows)
    train, _ = load_documents(Data(source=source, eval_source=source, pair_column="other"), seed=0)
    assert train[:] == {"text": ["a", " \n"], "pair": ["", "b"]}


PAIR = {"pair_column": "other"}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "blank text": ({"text": " \n"}, {}, "line 3: column 'text' holds no text"),
    "blank pair": ({"other": ""}, PAIR, "line 3: column 'other' holds no text"),
    "number for a pair": ({"other": None}, PAIR, "line 3: column 'other' holds NoneType where text"),
    "no label": ({"label": None}, {}, "line 3: column 'label' holds no label"),
    "unknown label column": ({}, {"label_column": "labl"}, "'labl': did you mean 'label'.* --data.label-column"),
    "unknown pair column": ({}, {"pair_column": "othr"}, "'othr': did you mean 'other'.* --data.pair-column"),
}
BAD_LABELS: dict[str, tuple[Any, str]] = {
    "an object": ({"a": 1}, "holds {'a': 1} where a label is expected"),
    "no finite number in a list": ([float("inf")], r"holds \[inf\] where a label"),
    "None in a list": ([1, None], "holds None in a list"),
    "an empty name": ("", "holds no label"),
    "no finite number": (float("nan"), "holds nan where a label"),
    "a blank name": (" ", "holds no label"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_row_without_a_text_or_label_is_refused_with_its_line(tmp_path: Path, case: str) -> None:
    change, options, message = REFUSED[case]
    rows = [{"text": "a", "other": "b", "label": 1} for _ in range(4)]
    rows[2] |= change
    with pytest.raises(ValueError, match=rf"^[^\n]*a\.jsonl[^\n]*{message}[^\n]*\Z"):
        _read(_source(tmp_path, rows), **options)


@pytest.mark.parametrize("case", BAD_LABELS)
def test_a_cell_that_is_not_a_label_is_refused_with_its_line(tmp_path: Path, case: str) -> None:
    value, message = BAD_LABELS[case]
    with pytest.raises(ValueError, match=rf"^[^\n]*line 1: column 'label' {message}[^\n]*\Z"):
        _read(_source(tmp_path, [{"text": "a", "label": value}] * 2))


@pytest.mark.parametrize(("source", "message"), [("a.txt", "a .txt file has no labels"), ("pydocs", "has no labels")])
def test_a_source_that_has_no_labels_says_so(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=message):
        load_documents(Data(source=source if source == "pydocs" else str(tmp_path / source)), seed=0, labels=True)


def test_sources_whose_labels_differ_in_type_are_refused(tmp_path: Path) -> None:
    sources = tuple(
        _source(tmp_path, [{"text": "a", "label": label}] * 4, name)
        for name, label in (("a.jsonl", 1), ("b.jsonl", "one"))
    )
    types = r"Value\('int64'\) in [^\n]*a\.jsonl, Value\('string'\) in [^\n]*b\.jsonl"
    with pytest.raises(ValueError, match=rf"^data\.label_column: [^\n]*{types}; write all labels alike\Z"):
        load_documents(Data(source=sources, eval_fraction=0.5), seed=0, labels=True)


def _glue_part(task: str, split: str) -> Dataset:
    """Return two rows with the columns of the dataset on the hub. Their texts name their split and column."""
    columns = {name: [f"{split} {name} {i}" for i in range(2)] for name in GLUE[task]}
    kind = Value("float32") if task == "stsb" else ClassLabel(names=["not", "yes"])
    features = Features({name: Value("string") for name in columns} | {"label": kind, "idx": Value("int32")})
    return Dataset.from_dict(columns | {"label": [1, 0], "idx": [0, 1]}, features=features)


@pytest.mark.parametrize(("source", "task"), [("glue", "cola"), *(("nyu-mll/glue", task) for task in GLUE)])
def test_a_task_of_glue_needs_only_its_name(task: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, *, name: str, split: str, **options: Any) -> Dataset:
        assert (path, name) == (source, task)
        return _glue_part(name, split)

    replace_hub(monkeypatch, load_dataset)
    train, held_out = load_documents(Data(source=source, config=task), seed=0, labels=True)
    roles = ("text", "pair")[: len(GLUE[task])]
    assert train.column_names == [*roles, "label"]
    assert train[1] == {r: f"train {c} 1" for r, c in zip(roles, GLUE[task], strict=True)} | {"label": 0}
    splits = ["validation_matched", "validation_mismatched"] if task == "mnli" else [""]
    assert [*held_out] == splits
    assert [part["text"][0] for part in held_out.values()] == [
        f"{split or 'validation'} {GLUE[task][0]} 0" for split in splits
    ]


def test_settings_of_the_user_override_those_of_a_task() -> None:
    data = Data(source="glue", config="mrpc", pair_column="idx", eval_split="train[:10]")
    assert apply_glue_task(data) == data
    assert apply_glue_task(Data(source="glue", config="mrpc", eval_source="a.csv")).eval_split is None
    assert apply_glue_task(Data(source="imdb")) == Data(source="imdb")


@pytest.mark.parametrize(
    ("config", "message"), [("mprc", "did you mean 'mrpc'"), (None, "There are: cola"), ("ax", "ax")]
)
def test_an_unknown_task_of_glue_is_refused_with_a_list_of_tasks(config: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^nyu-mll/glue: [^\n]*{message}[^\n]* --data.config\Z"):
        load_documents(Data(source="nyu-mll/glue", config=config), seed=0, labels=True)


def test_eval_split_evaluates_each_split_that_it_names(tmp_path: Path) -> None:
    splits = ("train", "validation_matched", "validation_mismatched")
    DatasetDict({split: _glue_part("mnli", split) for split in splits}).save_to_disk(tmp_path / "saved")
    data = Data(source=str(tmp_path / "saved"), column="premise", eval_split="+".join(splits[1:]))
    _, held_out = load_documents(data, seed=0, labels=True)
    assert {name: part["text"][0] for name, part in held_out.items()} == {s: f"{s} premise 0" for s in splits[1:]}
