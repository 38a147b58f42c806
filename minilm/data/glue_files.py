"""Read the original downloads of GLUE and SuperGLUE, and store a task as a dataset with the columns of the hub.

GLUE's files separate fields by tabs and have no quoting: a quote is text. SuperGLUE's files have a JSON object per
line.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from minilm.data.columns import Column, check_label, check_text
from minilm.data.delimited_files import read_tab_separated
from minilm.data.glue import HUB_IDS, Task, TaskFiles
from minilm.data.json_files import read_json
from minilm.data.label_column import DECIMAL_NUMBER
from minilm.data.text_decoding import detect_encoding
from minilm.utils.atomic_files import replace_folder
from minilm.utils.hub import describe_loading_error
from minilm.utils.validation import suggest_name

Row = dict[str, Any]

# The columns of GLUE's files whose names differ from those on the hub, by the names on the hub.
_RAW_NAMES: dict[str, dict[str, str]] = {
    "mrpc": {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    "qqp": {"label": "is_duplicate"},
    "stsb": {"label": "score"},
    "mnli": {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
}
# The file of CoLA has no header. Its columns are the source, the label, the author's mark, and the sentence.
_HEADERS = {"cola": ["source", "label", "star", "sentence"]}
_MRPC_IDS = ("#1 ID", "#2 ID")
_COPA_QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}


def store_task(task: Task, files: TaskFiles | None, folder: Path) -> list[str]:
    """Write the splits of a task to `folder`, as `save_to_disk` does. Return notes for the user.

    files: the files of the original download. If None, the task comes from the hub.

    Raise ValueError that names the file and the line at fault.
    """
    notes: list[str] = []
    rows = _load_rows(task) if files is None else _read_rows(task, files, notes)
    build = _ROW_BUILDERS.get(task.name, _keep_row)
    parts = {split: Dataset.from_list([build(row) for row in part]) for split, part in rows}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replace_folder(folder) as temporary:
        DatasetDict(parts).save_to_disk(temporary)
    return notes


def needs_store(task: Task) -> bool:
    """Return whether the texts of a task are put together from several columns, so that also the hub's are stored."""
    return task.name in _ROW_BUILDERS


def _keep_row(row: Row) -> Row:
    return row


def _build_wic(row: Row) -> Row:
    """Put the word whose meaning is asked for before the first sentence."""
    return {
        "sentence1": f"{row['word']}: {row['sentence1']}",
        "sentence2": row["sentence2"],
        "label": row["label"],
    }


def _build_copa(row: Row) -> Row:
    """Put the question behind the premise. The columns are those of `minilm.objectives.multiple_choice`."""
    question = f"{row['premise']} {_COPA_QUESTIONS[row['question']]}"
    return {"question": question, "choice1": row["choice1"], "choice2": row["choice2"], "answer": row["label"]}


_ROW_BUILDERS: dict[str, Callable[[Row], Row]] = {"wic": _build_wic, "copa": _build_copa}
# The columns of texts of the tasks whose texts are put together.
_TEXT_COLUMNS = {"wic": ("word", "sentence1", "sentence2"), "copa": ("premise", "question", "choice1", "choice2")}


def _list_columns(task: Task) -> list[Column]:
    """Return the columns to read, by their names in the files."""
    raw = _RAW_NAMES.get(task.name, {})
    names = _TEXT_COLUMNS.get(task.name) or tuple(name for name in task.columns if name is not None)
    columns = [Column(role=name, name=raw.get(name, name)) for name in names]
    return [*columns, Column(role="label", name=raw.get("label", "label"), kind="label")]


def _load_rows(task: Task) -> Iterator[tuple[str, Iterable[Row]]]:
    """Yield the name and the rows of each split on the hub. Labels have their names, except the numbers of COPA."""
    names = [column.role for column in _list_columns(task)]
    for split in ("train", *task.eval_splits):
        try:
            rows = datasets.load_dataset(HUB_IDS[task.benchmark], name=task.config, split=split)
        except Exception as error:
            # The library raises errors of many types.
            why = describe_loading_error(error, "dataset")
            raise ValueError(f"data source {HUB_IDS[task.benchmark]}: {why}") from error
        label = rows.features["label"]
        named = rows.select_columns(names)
        yield split, named if task.name == "copa" else ({**row, "label": label.int2str(row["label"])} for row in named)


def _read_rows(task: Task, files: TaskFiles, notes: list[str]) -> Iterator[tuple[str, Iterable[Row]]]:
    """Yield the name and the rows of each split in the files."""
    dev_ids = None if files.dev_ids is None else _read_ids(files.dev_ids)
    encoding = detect_encoding([str(path) for path in files.paths]) if task.benchmark == "GLUE" else "utf-8"
    for split, path in files.splits.items():
        read = _read_json(task, path) if task.benchmark == "SuperGLUE" else _read_tsv(task, path, encoding, notes)
        if dev_ids is None or path == files.dev_ids:
            rows = [row for row, _ in read]
        else:
            rows = [row for row, fields in read if (_find_ids(fields) in dev_ids) == (split != "train")]
        if not rows:
            raise ValueError(f"{path}: holds no row of the split {split}; download the task again")
        yield split, rows


def _read_json(task: Task, path: Path) -> Iterator[tuple[Row, Mapping[str, str]]]:
    """Yield the checked rows of a file of SuperGLUE."""
    columns = _list_columns(task)
    for line, cells in read_json(str(path), columns):
        row = _check_row(columns, cells, f"{path}, line {line}")
        if task.name == "copa" and row["question"] not in _COPA_QUESTIONS:
            raise ValueError(f"{path}, line {line}: the question is {row['question']!r}, not cause or effect")
        yield row, {}


def _read_tsv(task: Task, path: Path, encoding: str, notes: list[str]) -> Iterator[tuple[Row, Mapping[str, str]]]:
    """Yield the checked rows of a file of GLUE, each also with all its fields by the names of the header.

    Raise ValueError for a row whose number of fields differs from the header's. QQP has such rows. They are left out,
    as datasets leaves them out, with a note.
    """
    columns, header = _list_columns(task), _HEADERS.get(task.name, [])
    incomplete: list[int] = []
    for line, fields in read_tab_separated(str(path), encoding):
        where = f"{path}, line {line}"
        if not header:
            header = fields
            for column in columns:
                if column.name not in header:
                    raise ValueError(f"{where}: no column {suggest_name(column.name, header)} Download the file again")
            continue
        row = dict(zip(header, fields, strict=False))
        if task.name == "qqp" and not (len(fields) == len(header) and all(row[each.name].strip() for each in columns)):
            incomplete.append(line)
            continue
        if len(fields) != len(header):
            raise ValueError(f"{where}: {len(fields)} fields where {len(header)} are expected; download the file again")
        checked = _check_row(columns, [row[column.name] for column in columns], where)
        if task.name == "stsb":
            checked["label"] = _parse_score(checked["label"], where)
        yield checked, row
    if incomplete:
        count = f"{len(incomplete):,} incomplete row{'s are' if len(incomplete) > 1 else ' is'}"
        notes.append(f"{path}: {count} left out, the first in line {incomplete[0]}")


def _check_row(columns: list[Column], cells: list[Any], where: str) -> Row:
    """Return the cells by the names of the hub's columns. Raise ValueError for a cell that is not a text or a label."""
    for column, cell in zip(columns, cells, strict=True):
        if column.kind == "text":
            check_text(cell, column, where, blank=False)
        else:
            check_label(cell, column, where)
    return {column.role: cell for column, cell in zip(columns, cells, strict=True)}


def _parse_score(text: str, where: str) -> float:
    if not DECIMAL_NUMBER.fullmatch(text.strip()):
        raise ValueError(f"{where}: the score {text[:40]!r} is not a number; download the file again")
    return float(text)


def _read_ids(path: Path) -> set[tuple[str, ...]]:
    """Return the ids of the pairs in a file of MRPC."""
    rows = [fields for _, fields in read_tab_separated(str(path), detect_encoding([str(path)]))]
    missing = [name for name in _MRPC_IDS if not rows or name not in rows[0]]
    if missing:
        raise ValueError(f"{path}, line 1: no column {missing[0]!r}; download the file again")
    return {_find_ids(dict(zip(rows[0], fields, strict=False))) for fields in rows[1:]}


def _find_ids(fields: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(fields.get(name, "") for name in _MRPC_IDS)
