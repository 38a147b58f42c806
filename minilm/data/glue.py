"""The tasks of GLUE (Wang et al. 2019): their columns and evaluation splits, so that --data.config alone is enough."""

import os
from dataclasses import replace

from minilm.config import Data
from minilm.utils.validation import suggest_name

_IDS = ("nyu-mll/glue", "glue")
# The columns of each task's first and second text. Every task has its labels in the column `label`. The task `ax` is
# left out, because it has no training split.
_COLUMNS = {
    "cola": ("sentence", None),
    "sst2": ("sentence", None),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "stsb": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


def apply_glue_task(data: Data) -> Data:
    """Return `data` with the columns and the evaluation split of its GLUE task, unless it already names some.

    For a source that is not GLUE, return `data` unchanged. MNLI has two evaluation splits, joined by `+`. Raise
    ValueError for an unknown task.
    """
    if not isinstance(data.source, str) or data.source not in _IDS or os.path.exists(data.source):
        return data
    if data.config not in _COLUMNS:
        task = suggest_name(data.config or "", list(_COLUMNS))
        raise ValueError(f"{data.source}: data.config names the task, not {task} Pass --data.config")
    if (data.column, data.pair_column) == (Data.column, None):
        column, pair_column = _COLUMNS[data.config]
        data = replace(data, column=column, pair_column=pair_column)
    if data.eval_source is None and data.eval_split is None:
        both = "validation_matched+validation_mismatched"
        data = replace(data, eval_split=both if data.config == "mnli" else "validation")
    return data
