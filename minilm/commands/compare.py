"""Compare two models on the same evaluation examples: paired differences with their intervals and p-values."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from minilm.commands.evaluate import evaluate_examples
from minilm.commands.seeds import SUMMARY
from minilm.config import Data
from minilm.runs.checkpoint import is_checkpoint
from minilm.runs.ledger import FACTS, ExampleTable, find_evaluations, read_evaluation, step_of
from minilm.runs.run_facts import RESULTS

# The number of resamples, which is smaller if it times the number of documents is more than `_RESAMPLED_DOCUMENTS`. A
# p-value is at least 1 / (resamples + 1).
_MOST_RESAMPLES, _FEWEST_RESAMPLES = 9999, 999
_RESAMPLED_DOCUMENTS = 2 * 10**8
# The number of documents in memory at a time, over all resamples.
_BATCH_DOCUMENTS = 2**21
_SEED = 0
# For each figure, the arrays whose sums it divides, and its unit in those of the first one.
_FIGURES = {
    "bits_per_byte": ("loss", "utf8_bytes", math.log(2)),
    "eval_loss": ("loss", "targets", 1.0),
    "accuracy": ("correct", "targets", 1.0),
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of a figure between two models: the second minus the first."""

    figure: str
    """`bits_per_byte`, `eval_loss` or `accuracy`."""
    first: float
    second: float
    difference: float
    low: float
    """The limits of the 95% interval of the difference."""
    high: float
    p: float
    """The two-sided p-value of the hypothesis that the two models are equally good."""
    count: int
    """The number of documents, of examples if they join documents, or of seeds."""
    unit: str
    """`documents`, `examples` or `seeds`."""

    def __str__(self) -> str:
        half = (self.high - self.low) / 2
        # Two digits of the interval, and no more than a float32 has.
        digits = min(6, max(3, 1 - math.floor(math.log10(half)))) if half else 3
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.2g}"
        name = self.figure.replace("eval_", "evaluation ").replace("_", " ")
        return f"{self.difference:+.{digits}f} ± {half:.{digits}f} {name}, {p}, {self.count:,} {self.unit}"


def compare_models(first: str | Path, second: str | Path, data: Data | None = None) -> list[Difference]:
    """Return the difference of each figure of two models, given by the folder of a run, a checkpoint, or a hub id.

    With `data`, both are evaluated on all its documents. Without, the ledger of a run has its last evaluation, or that
    of the checkpoint; a model without one repeats the evaluation of its run. The folders of `--seeds` are compared by
    the seeds that both have. Raise ValueError if the two were not evaluated on the same documents, or cannot be
    compared for another reason.
    """
    seeds = [_find_seeds(Path(name)) for name in (first, second)]
    if all(seeds):
        common = sorted(seeds[0] & seeds[1])
        runs = [[load_table(str(Path(name, f"seed-{seed}")), data) for name in (first, second)] for seed in common]
        return compare_seeds(runs)
    for name, other, own in zip((first, second), (second, first), seeds, strict=True):
        if own:
            raise ValueError(f"{name} has runs of several seeds, and {other} has not: compare one of its runs")
    return compare_tables(*(load_table(str(name), data) for name in (first, second)))


def _find_seeds(folder: Path) -> set[int]:
    """Return the seeds of the finished runs in the output folder of `--seeds`; none for another folder."""
    if not (folder / SUMMARY).is_file():
        return set()
    return {
        int(seed)
        for each in json.loads((folder / SUMMARY).read_text(encoding="utf-8")).values()
        for seed in each["values"]
    }


def load_table(name: str, data: Data | None) -> ExampleTable:
    """Return what an evaluation of the model knows of each example, from the ledger of its run if that has it."""
    folder = Path(name)
    run = folder.absolute().parent if is_checkpoint(folder) else folder
    evaluations = find_evaluations(run)
    if run is not folder:
        evaluations = [path for path in evaluations if folder.name == f"checkpoint-{step_of(path)}"]
    if data is not None or not evaluations or (run is folder and _ends_with_best(run)):
        return evaluate_examples(name, data)
    return read_evaluation(evaluations[-1])


def _ends_with_best(run: Path) -> bool:
    """Return whether a finished run has the weights of its best evaluation, which need not be the last one."""
    if not (run / RESULTS).is_file():
        return False
    settings: Any = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return bool(settings["config"]["run"]["load_best"])


def compare_tables(first: ExampleTable, second: ExampleTable) -> list[Difference]:
    """Return the difference of each figure that two evaluations have in common. Raise ValueError if there is none."""
    tables = first, second
    figures = find_common_figures(*tables)
    unit = "documents" if {"document", "correct"} & first.arrays.keys() else "examples"
    differences = []
    for figure in figures:
        numerator, denominator, scale = _FIGURES[figure]
        sums = [_sum_by_document(table, name) for table in tables for name in (numerator, denominator)]
        count = max(map(len, sums))
        sums = [np.pad(each, (0, count - len(each))) for each in sums]
        # A document without a target does not change a figure.
        has_target = (sums[1] > 0) | (sums[3] > 0)
        difference = _compare_ratios(figure, *(each[has_target] for each in sums), scale=scale, unit=unit)
        if figure == "accuracy":
            difference = replace(difference, p=_compare_answers(*(table.arrays["correct"] for table in tables)))
        differences.append(difference)
    return differences


def compare_seeds(runs: Sequence[Sequence[ExampleTable]]) -> list[Difference]:
    """Return the mean difference of each figure over seeds, by the t-test of pairs.

    runs: for each seed, the evaluations of the first and of the second model. Raise ValueError for fewer than two
    seeds, and if the runs of a seed have no figure in common.
    """
    if len(runs) < 2:
        raise ValueError(
            f"an interval needs two seeds or more that both folders have; they share {len(runs)}: train more seeds"
        )
    differences = []
    common = [find_common_figures(*pair) for pair in runs]
    for figure in (figure for figure in common[0] if all(figure in each for each in common)):
        first_S, second_S = np.array([[_compute_figure(table, figure) for table in pair] for pair in runs]).T
        test = stats.ttest_rel(second_S, first_S)
        interval = test.confidence_interval(0.95)
        equal = np.array_equal(first_S, second_S)  # the t-test divides 0 by 0
        differences.append(
            Difference(
                figure=figure,
                first=float(first_S.mean()),
                second=float(second_S.mean()),
                difference=float((second_S - first_S).mean()),
                low=0.0 if equal else float(interval.low),
                high=0.0 if equal else float(interval.high),
                p=1.0 if equal else float(test.pvalue),
                count=len(runs),
                unit="seeds",
            )
        )
    return differences


def _compute_figure(table: ExampleTable, figure: str) -> float:
    numerator, denominator, scale = _FIGURES[figure]
    return float(table.arrays[numerator].sum(dtype=np.float64) / table.arrays[denominator].sum() / scale)


def find_common_figures(first: ExampleTable, second: ExampleTable) -> list[str]:
    """Return the figures in which two evaluations can be compared. Raise ValueError that says why there is none."""
    if first.identity["objective"] != second.identity["objective"]:
        objectives = " and ".join(table.identity["objective"] for table in (first, second))
        raise ValueError(f"the models have different objectives, {objectives}, whose losses cannot be compared")
    if first.identity["loss"] != second.identity["loss"]:
        settings = " and ".join(table.identity["loss"] for table in (first, second))
        raise ValueError(f"the losses of the models have different settings and cannot be compared: {settings}")
    if first.identity["documents"] != second.identity["documents"]:
        raise ValueError(
            "the evaluation documents of the models, or their labels, are not the same (data.eval_fraction holds out "
            "other documents for another run.seed): give --data.source, so that both are evaluated on its documents"
        )
    if not all(np.isfinite(table.arrays["loss"]).all() for table in (first, second)):
        raise ValueError("a loss is not a finite number, so that the models have no difference")
    known = first.arrays.keys() & second.arrays.keys()
    same_tokens = first.identity["examples"] == second.identity["examples"]
    ours, theirs = ([table.arrays.get(name, np.zeros(0)) for name in FACTS] for table in (first, second))
    if same_tokens and all(map(np.array_equal, ours, theirs)):
        return [figure for figure, (*names, _) in _FIGURES.items() if known.issuperset(names)]
    if "correct" in known:
        # Each document is one example, whatever the tokenizer.
        return ["eval_loss", "accuracy"]
    whole = all(table.identity["overflow"] == "split" for table in (first, second))
    if {"document", "utf8_bytes"} <= known and first.identity["objective"] == "CausalLM" and whole:
        return ["bits_per_byte"]
    reason = {
        "MaskedLM": "they have different tokenizers, so that their masks hide different text",
        "CausalLM": "they have different tokenizers, and their examples are not whole documents (batch.layout "
        "blocks or tokens.overflow truncate)",
    }.get(first.identity["objective"], "their tokenizers or settings are different")
    if same_tokens:
        reason = "objective.eval_rate, batch.max_length, batch.layout or tokens.overflow of their runs differ"
    raise ValueError(f"the models were not evaluated on the same examples of the documents: {reason}")


def _sum_by_document(table: ExampleTable, name: str) -> NDArray[np.float64]:
    """Return the sums of an array over the examples of each document."""
    document = table.arrays.get("document", np.arange(len(table)))
    return np.bincount(document, table.arrays[name]).astype(np.float64)


def _compare_ratios(figure: str, *sums: NDArray[np.float64], scale: float, unit: str) -> Difference:
    """Return the difference of two ratios of sums over documents.

    The interval is a bootstrap over documents. The p-value is that of a permutation test, in which each document
    exchanges its shares of the two ratios.

    sums: by document, the numerator and the denominator of the first ratio, then those of the second.
    """
    count = len(sums[0])
    if count < 2:
        raise ValueError(f"the evaluation has a single one of its {unit}, so that the difference has no interval")

    def compute_ratios(*sums: NDArray[np.float64], axis: int = -1) -> list[Any]:
        above, below, above2, below2 = (each.sum(axis) for each in sums)
        return [above / (below * scale), above2 / (below2 * scale)]

    def compute_difference(*sums: NDArray[np.float64], axis: int = -1) -> Any:
        first, second = compute_ratios(*sums, axis=axis)
        return second - first

    settings: dict[str, Any] = {
        "vectorized": True,
        "n_resamples": min(_MOST_RESAMPLES, max(_FEWEST_RESAMPLES, _RESAMPLED_DOCUMENTS // count)),
        "batch": max(1, _BATCH_DOCUMENTS // count),
    }
    interval = stats.bootstrap(
        sums, compute_difference, paired=True, method="percentile", random_state=_SEED, **settings
    ).confidence_interval
    shares = [above / (below.sum() * scale) for above, below in (sums[:2], sums[2:])]
    test = stats.permutation_test(
        shares,
        lambda ours, theirs, axis: theirs.sum(axis) - ours.sum(axis),
        permutation_type="samples",
        random_state=_SEED,
        **settings,
    )
    first, second = map(float, compute_ratios(*sums))
    return Difference(
        figure=figure,
        first=first,
        second=second,
        difference=second - first,
        low=float(interval.low),
        high=float(interval.high),
        p=float(test.pvalue),
        count=count,
        unit=unit,
    )


def _compare_answers(first_E: NDArray[np.bool_], second_E: NDArray[np.bool_]) -> float:
    """Return the p-value of McNemar's exact test: of the answers that only one model has right, each has half."""
    gained, lost = int((second_E & ~first_E).sum()), int((first_E & ~second_E).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
