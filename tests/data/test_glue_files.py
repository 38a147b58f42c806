"""The original downloads of GLUE and SuperGLUE: each row is read as it was written, or an error names its line."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value, load_from_disk

from minilm.config import Data
from minilm.data.documents import load_documents
from minilm.data.glue import HUB_IDS, TASKS, apply_glue_task, find_task_files
from minilm.data.glue_files import store_task
from tests.fake_hub import replace_hub
from tests.glue_layout import LAYOUTS, TEXTS, write_task


def read_stored(name: str, *folders: Path, place: Path) -> tuple[Any, list[str]]:
    """Return the splits of a task as the suite stores them, as lists of rows, and the notes."""
    task = TASKS[name]
    notes = store_task(task, find_task_files(task, [*map(str, folders)]), place / "stored")
    return {split: rows.to_list() for split, rows in load_from_disk(str(place / "stored")).items()}, notes


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_row_of_glue_is_what_pythons_reader_without_quoting_reads(name: str, tmp_path: Path) -> None:
    folder, task = write_task(tmp_path / "raw", name), TASKS[name]
    stored, notes = read_stored(name, tmp_path / "raw", place=tmp_path)
    assert notes == []
    assert list(stored) == ["train", *task.eval_splits]
    header = LAYOUTS[name][0].split("\t") if LAYOUTS[name][0] else ["source", "label", "star", "sentence"]
    columns = {
        "mrpc": ["#1 String", "#2 String", "Quality"],
        "mnli": ["sentence1", "sentence2", "gold_label"],
        "qqp": ["question1", "question2", "is_duplicate"],
        "stsb": ["sentence1", "sentence2", "score"],
    }.get(name, [column for column in (*task.columns, "label") if column])
    for split, rows in stored.items():
        with (folder / f"{split.replace('validation', 'dev')}.tsv").open(encoding="utf-8", newline="") as file:
            expected = list(csv.DictReader(file, header, delimiter="\t", quoting=csv.QUOTE_NONE))
        expected = expected[1:] if LAYOUTS[name][0] else expected
        convert = float if name == "stsb" else str
        assert [[*row.values()] for row in rows] == [
            [*(row[column] for column in columns[:-1]), convert(row[columns[-1]])] for row in expected
        ]
        assert [*rows[0]] == [column for column in (*task.columns, "label") if column]


def test_mrpc_without_train_tsv_keeps_the_validation_pairs_out_of_training(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "raw", "mrpc")
    whole = (folder / "train.tsv").read_text(encoding="utf-8").splitlines()
    # The original file begins with a byte-order mark.
    (folder / "msr_paraphrase_train.txt").write_text("\n".join(whole) + "\n", encoding="utf-8-sig")
    (folder / "train.tsv").unlink()
    (folder / "dev.tsv").unlink()
    (folder / "dev_ids.tsv").write_text("#1 ID\t#2 ID\n1\t71\n4\t74\n", encoding="utf-8")
    stored, _ = read_stored("mrpc", tmp_path / "raw", place=tmp_path)
    assert [row["sentence1"] for row in stored["validation"]] == [TEXTS[1], TEXTS[4]]
    assert [row["sentence1"] for row in stored["train"]] == [TEXTS[number] for number in (0, 2, 3, 5)]
    (folder / "dev.tsv").write_text("\n".join([whole[0], whole[3]]) + "\n", encoding="utf-8")
    stored, _ = read_stored("mrpc", tmp_path / "raw", place=tmp_path)
    assert [row["sentence1"] for row in stored["validation"]] == [TEXTS[2]]
    assert [row["sentence1"] for row in stored["train"]] == [TEXTS[number] for number in (0, 1, 3, 4, 5)]


def test_incomplete_rows_of_qqp_are_left_out_with_a_note(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "raw", "qqp")
    with (folder / "train.tsv").open("a", encoding="utf-8") as file:
        file.write('9\t1\t2\tHow "is it?\n10\t1\t2\tWhat?\t\t1\n11\t1\t2\tWhy?\tWhy so?\t1\n')
    stored, notes = read_stored("qqp", tmp_path / "raw", place=tmp_path)
    assert [row["question1"] for row in stored["train"]] == [*TEXTS, "Why?"]
    assert notes == [f"{folder / 'train.tsv'}: 2 incomplete rows are left out, the first in line 8"]


BROKEN = {
    "a field too many": ("rte", "6\ta\tb\tc\tentailment", "line 8: 5 fields where 4 are expected"),
    "no text": ("rte", "6\ta\t \tentailment", "line 8: column 'sentence2' holds no text"),
    "no label": ("cola", "x\t\t\tA text.", "line 7: column 'label' holds no label"),
    "no score": ("stsb", "6\tn\tf\t1\t1\tn\tn\ta\tb\tgood", "line 8: the score 'good' is not a number"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_is_refused_with_its_line(case: str, tmp_path: Path) -> None:
    name, row, message = BROKEN[case]
    folder = write_task(tmp_path / "raw", name)
    with (folder / "train.tsv").open("a", encoding="utf-8") as file:
        file.write(f"{row}\n")
    with pytest.raises(ValueError, match=rf"^[^\n]*train\.tsv, {message}[^\n]*\Z"):
        read_stored(name, tmp_path / "raw", place=tmp_path)
    assert not (tmp_path / "stored").exists()


def test_a_file_with_another_header_is_refused(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "raw", "mrpc")
    (folder / "dev.tsv").write_text("label\tsentence1\tsentence2\n1\ta\tb\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^[^\n]*dev\.tsv, line 1: no column '#1 String'[^\n]*\Z"):
        read_stored("mrpc", tmp_path / "raw", place=tmp_path)


def test_the_files_of_a_task_come_from_the_first_folder_that_has_them(tmp_path: Path) -> None:
    (tmp_path / "super" / "RTE").mkdir(parents=True)
    folder = write_task(tmp_path / "glue", "rte")
    files = find_task_files(TASKS["rte"], [str(tmp_path / "super"), str(tmp_path / "glue")])
    assert files.splits == {"train": folder / "train.tsv", "validation": folder / "dev.tsv"}
    with pytest.raises(ValueError, match=r"superglue-rte: [^\n]*RTE has no train\.jsonl; [^\n]*--tasks\Z"):
        find_task_files(TASKS["superglue-rte"], [str(tmp_path / "super"), str(tmp_path / "glue")])
    with pytest.raises(ValueError, match=r"cola: [^\n]* has no folder CoLA; [^\n]*--tasks\Z"):
        find_task_files(TASKS["cola"], [str(tmp_path / "glue")])


SUPERGLUE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "boolq": ({"question": "is it", "passage": 'A "b".', "label": True}, {}),
    "cb": ({"premise": "a", "hypothesis": "b", "label": "contradiction"}, {}),
    "superglue-rte": ({"premise": "a", "hypothesis": "b", "label": "not_entailment"}, {}),
    "copa": (
        {"premise": "It fell.", "choice1": "a", "choice2": "b", "question": "effect", "label": 1},
        {"question": "It fell. What happened as a result?", "choice1": "a", "choice2": "b", "answer": 1},
    ),
    "wic": (
        {"word": "bank", "sentence1": "a bank", "sentence2": "b bank", "start1": 2, "label": False},
        {"sentence1": "bank: a bank", "sentence2": "b bank", "label": False},
    ),
}


@pytest.mark.parametrize("name", SUPERGLUE)
def test_the_files_of_superglue_are_read_with_the_columns_of_the_hub(name: str, tmp_path: Path) -> None:
    row, expected = SUPERGLUE[name]
    folder = tmp_path / "raw" / TASKS[name].title
    folder.mkdir(parents=True)
    for file in ("train.jsonl", "val.jsonl"):
        (folder / file).write_text(json.dumps({"idx": 3, **row}) + "\n", encoding="utf-8")
    stored, _ = read_stored(name, tmp_path / "raw", place=tmp_path)
    assert stored == {split: [expected or row] for split in ("train", "validation")}


def test_an_unknown_question_of_copa_is_refused_with_its_line(tmp_path: Path) -> None:
    folder = tmp_path / "COPA"
    folder.mkdir()
    row = {**SUPERGLUE["copa"][0], "question": "reason"}
    for file in ("train.jsonl", "val.jsonl"):
        (folder / file).write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: the question is 'reason', not cause or effect\Z"):
        read_stored("copa", tmp_path, place=tmp_path)


def _load_from_hub(path: str, *, name: str, split: str, **options: Any) -> Dataset:
    """Stand in for a load from the hub with a row of SuperGLUE as the hub has it."""
    assert path == HUB_IDS["SuperGLUE"]
    assert split in ("train", "validation")
    names = {"copa": ["choice1", "choice2"], "wic": ["False", "True"], "boolq": ["False", "True"]}[name]
    row = SUPERGLUE[name][0]
    kinds = {key: Value("string") for key in row if key not in ("label", "start1")}
    features = Features({**kinds, "label": ClassLabel(names=names)})
    return Dataset.from_list([{**{key: row[key] for key in kinds}, "label": int(row["label"])}] * 2, features=features)


@pytest.mark.parametrize("name", ["copa", "wic"])
def test_a_task_of_the_hub_whose_texts_are_put_together_has_the_rows_of_its_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", _load_from_hub)
    assert store_task(TASKS[name], None, tmp_path / "stored") == []
    rows = load_from_disk(str(tmp_path / "stored"))["validation"].to_list()
    expected = SUPERGLUE[name][1]
    assert rows == [{**expected, **({"label": "False"} if name == "wic" else {})}] * 2


def test_a_task_of_superglue_on_the_hub_needs_only_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_hub(monkeypatch, _load_from_hub)
    train, held_out = load_documents(Data(source="aps/super_glue", config="boolq"), seed=0, labels=True)
    assert train[0] == {"text": "is it", "pair": 'A "b".', "label": 1}
    assert len(held_out[""]) == 2
    with pytest.raises(ValueError, match=r"^super_glue: [^\n]*'bool': did you mean 'boolq'"):
        apply_glue_task(Data(source="super_glue", config="bool"))
