"""The tasks of GLUE (Wang et al. 2018) and SuperGLUE (Wang et al. 2019): columns, figures, splits and files.

`apply_glue_task` sets the columns and splits of a task on the hub, so that --data.config alone is enough.
`find_task_files` finds the files of a task's original download, and `minilm.data.glue_files` reads them. This file does
not import a large library.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minilm.config import Data
from minilm.utils.validation import suggest_name

HUB_IDS = {"GLUE": "nyu-mll/glue", "SuperGLUE": "aps/super_glue"}
"""The dataset of each benchmark on the hub."""
_BENCHMARKS = {**{id: name for name, id in HUB_IDS.items()}, "glue": "GLUE", "super_glue": "SuperGLUE"}

_SENTENCES = ("sentence1", "sentence2")
_PREMISE = ("premise", "hypothesis")
_ACCURACY = {"accuracy": "accuracy"}
_ACCURACY_AND_F1 = {"accuracy": "accuracy", "f1": "F1"}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of a benchmark. Its labels are in the column `label`."""

    name: str
    benchmark: str
    """GLUE or SuperGLUE."""
    config: str
    """The name of the task on the hub."""
    title: str
    """The name in papers, which is also the folder of the original download."""
    columns: tuple[str, str | None]
    """The columns of the first and the second text on the hub."""
    figures: Mapping[str, str]
    """The figures that the benchmark reports: the names in all_results.json, with the names in a table."""
    eval_splits: tuple[str, ...]


_MATCHED = ("validation_matched", "validation_mismatched")
_MNLI = {"accuracy_validation_matched": "accuracy m", "accuracy_validation_mismatched": "mm"}
# The task `ax` of GLUE is left out, because it has no training split. So are the tasks of SuperGLUE whose answers are
# spans or sets (MultiRC, ReCoRD) or whose inputs are marked words (WSC).
_TASKS = (
    ("GLUE", "cola", "CoLA", ("sentence", None), {"matthews": "Matthews"}),
    ("GLUE", "sst2", "SST-2", ("sentence", None), _ACCURACY),
    ("GLUE", "mrpc", "MRPC", _SENTENCES, _ACCURACY_AND_F1),
    ("GLUE", "qqp", "QQP", ("question1", "question2"), _ACCURACY_AND_F1),
    ("GLUE", "stsb", "STS-B", _SENTENCES, {"pearson": "Pearson", "spearman": "Spearman"}),
    ("GLUE", "mnli", "MNLI", _PREMISE, _MNLI),
    ("GLUE", "qnli", "QNLI", ("question", "sentence"), _ACCURACY),
    ("GLUE", "rte", "RTE", _SENTENCES, _ACCURACY),
    ("GLUE", "wnli", "WNLI", _SENTENCES, _ACCURACY),
    ("SuperGLUE", "boolq", "BoolQ", ("question", "passage"), _ACCURACY),
    ("SuperGLUE", "cb", "CB", _PREMISE, {"accuracy": "accuracy", "f1": "F1 (macro)"}),
    ("SuperGLUE", "copa", "COPA", ("premise", None), _ACCURACY),
    ("SuperGLUE", "rte", "RTE", _PREMISE, _ACCURACY),
    ("SuperGLUE", "wic", "WiC", _SENTENCES, _ACCURACY),
)


def _list_tasks() -> dict[str, Task]:
    """Return the tasks by name. The second task of the same name has the name of its benchmark before its own."""
    tasks: dict[str, Task] = {}
    for benchmark, config, title, columns, figures in _TASKS:
        name = f"{benchmark.lower()}-{config}" if config in tasks else config
        splits = _MATCHED if config == "mnli" else ("validation",)
        tasks[name] = Task(
            name=name,
            benchmark=benchmark,
            config=config,
            title=title,
            columns=columns,
            figures=figures,
            eval_splits=splits,
        )
    return tasks


TASKS = _list_tasks()
"""All tasks, by the names that `minilm suite --tasks` takes."""


def apply_glue_task(data: Data) -> Data:
    """Return `data` with the columns and the evaluation split of its task, unless it already names some.

    For a source that is neither GLUE nor SuperGLUE on the hub, return `data` unchanged. MNLI has two evaluation splits,
    joined by `+`. Raise ValueError for an unknown task.
    """
    if not isinstance(data.source, str) or data.source not in _BENCHMARKS or os.path.exists(data.source):
        return data
    tasks = {task.config: task for task in TASKS.values() if task.benchmark == _BENCHMARKS[str(data.source)]}
    if data.config not in tasks:
        name = suggest_name(data.config or "", list(tasks))
        raise ValueError(f"{data.source}: data.config names the task, not {name} Pass --data.config")
    task = tasks[data.config]
    if (data.column, data.pair_column) == (Data.column, None):
        column, pair_column = task.columns
        data = replace(data, column=column, pair_column=pair_column)
    if data.eval_source is None and data.eval_split is None:
        data = replace(data, eval_split="+".join(task.eval_splits))
    return data


@dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """The files of a task in the layout of its original download."""

    splits: dict[str, Path]
    """The file of each split, by the name of the split on the hub."""
    dev_ids: Path | None = None
    """For MRPC without train.tsv: the file with the ids of the pairs that GLUE takes out of the training file."""

    @property
    def paths(self) -> list[Path]:
        """All files, each once."""
        return [*dict.fromkeys((*self.splits.values(), *([self.dev_ids] if self.dev_ids else [])))]


def find_task_files(task: Task, folders: Sequence[str]) -> TaskFiles:
    """Return the files of a task below one of `folders`: those of the first folder that has all of them.

    The layouts are `MRPC/train.tsv` and `MRPC/dev.tsv` for GLUE, and `BoolQ/train.jsonl` and `BoolQ/val.jsonl` for
    SuperGLUE. For MRPC, `msr_paraphrase_train.txt` may take the place of `train.tsv`. Raise ValueError if a file is
    missing.
    """
    places = [Path(folder).expanduser() / task.title for folder in folders]
    existing = [place for place in places if place.is_dir()]
    if not existing:
        where = ", ".join(map(str, folders))
        raise ValueError(f"{task.name}: {where} has no folder {task.title}; download the task, or choose other --tasks")
    missing = ""
    for place in existing:
        files = _list_files(task, place)
        gone = [path.name for path in files.paths if not path.is_file()]
        if not gone:
            return files
        missing = missing or f"{task.name}: {place} has no {gone[0]}; download the task again, or choose other --tasks"
    raise ValueError(missing)


def _list_files(task: Task, place: Path) -> TaskFiles:
    """Return the files that a task has in its folder, whether they exist or not."""
    if task.benchmark == "SuperGLUE":
        return TaskFiles(splits={"train": place / "train.jsonl", "validation": place / "val.jsonl"})
    splits = {"train": place / "train.tsv"}
    splits |= {split: place / f"{split.replace('validation', 'dev')}.tsv" for split in task.eval_splits}
    original = place / "msr_paraphrase_train.txt"
    if task.name != "mrpc" or splits["train"].is_file() or not original.is_file():
        return TaskFiles(splits=splits)
    # The original training file of MRPC holds GLUE's validation pairs too. dev.tsv and dev_ids.tsv have their ids.
    dev, ids = splits["validation"], place / "dev_ids.tsv"
    if dev.is_file():
        return TaskFiles(splits={"train": original, "validation": dev}, dev_ids=dev)
    return TaskFiles(splits={"train": original, "validation": original}, dev_ids=ids)
