"""Exact evaluation of a classifier: every logit of every process in one table, and the figures taken from that.

Axes: E examples, C labels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn

from minilm.batch import Collator
from minilm.evaluate import own_batches
from minilm.model import evaluating
from minilm.tokens import Examples

_NAMES = {
    "single-label": ("accuracy", "f1", "matthews"),
    "multi-label": ("accuracy", "f1", "f1_macro"),
    "regression": ("pearson", "spearman", "mse"),
}


@dataclass(frozen=True, kw_only=True)
class Classified:
    """The logits of a classifier, and what they should say."""

    problem: str
    parts: dict[str, int]
    """Examples of each part of the evaluation, in this order; figures are taken of each besides those of all."""
    logits_ExC: NDArray[np.float64]
    labels: NDArray[Any]
    """As `minilm.labels.read_labels` gives them."""

    def figures(self) -> dict[str, float]:
        """The figures of all examples, and where there are several parts those of each, named after it."""
        figures = self._figures(slice(None))
        at = 0
        for name, count in self.parts.items() if len(self.parts) > 1 else ():
            part = self._figures(slice(at, at + count))
            figures |= {f"{figure}_{name}": value for figure, value in part.items()}
            at += count
        return figures

    def _figures(self, part: slice) -> dict[str, float]:
        """eval_loss (unweighted), and by problem, with the definitions of scikit-learn and SciPy:

        accuracy, f1 (of class 1 when there are two classes, as GLUE has it; else the mean over classes) and matthews
        for a single label; accuracy (all labels right), f1 (over all labels together) and f1_macro for several;
        pearson, spearman and mse for a regression. A correlation with a constant is 0.
        """
        from sklearn import metrics  # imports slowly

        logits_ExC, labels = self.logits_ExC[part], self.labels[part]
        figures = {"eval_loss": float(_losses(self.problem, logits_ExC, labels).mean())}

        def f1(predicted: NDArray[Any], average: str) -> float:
            return float(metrics.f1_score(labels, predicted, average=average, zero_division=0))

        if self.problem == "regression":
            from scipy import stats

            constant = np.ptp(logits_ExC) == 0 or np.ptp(labels) == 0
            for name, correlation in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
                figures[name] = 0.0 if constant else float(correlation(logits_ExC[:, 0], labels)[0])
            return {**figures, "mse": figures["eval_loss"]}
        if self.problem == "multi-label":
            found = logits_ExC > 0
            accuracy = float(metrics.accuracy_score(labels, found))
            return {**figures, "accuracy": accuracy, "f1": f1(found, "micro"), "f1_macro": f1(found, "macro")}
        classes = logits_ExC.argmax(1)
        figures["accuracy"] = float(metrics.accuracy_score(labels, classes))
        figures["f1"] = f1(classes, "binary" if logits_ExC.shape[1] == 2 else "macro")
        several = len(np.union1d(labels, classes)) > 1  # else scikit-learn says 0 too, with a warning
        figures["matthews"] = float(metrics.matthews_corrcoef(labels, classes)) if several else 0.0
        return figures


def _losses(problem: str, logits: NDArray[np.float64], labels: NDArray[Any]) -> Any:
    """Of each example, float64[E]."""
    if problem == "regression":
        return (logits[:, 0] - labels) ** 2
    if problem == "multi-label":
        return (np.logaddexp(0, logits) - labels * logits).mean(1)
    return np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(labels)), labels]


@dataclass(frozen=True, kw_only=True)
class ClassEvaluator:
    """The evaluation of a classifier on held-out examples; call it with the accelerator and the prepared model."""

    examples: Examples
    collator: Collator
    parts: dict[str, int]
    problem: str
    micro_tokens: int
    """Most tokens of a forward pass, padding included."""

    @property
    def names(self) -> tuple[str, ...]:
        """The figures of the evaluation."""
        names = ("eval_loss", *_NAMES[self.problem])
        parts = self.parts if len(self.parts) > 1 else ()
        return (*names, *(f"{name}_{part}" for part in parts for name in names))

    def __call__(self, accelerator: Accelerator, model: nn.Module) -> Classified:
        """Classify every example once, shared among the processes, all of which return the same."""
        done: list[tuple[NDArray[np.int64], torch.Tensor]] = []
        with evaluating(model):
            for ids, batch in own_batches(accelerator, self.examples, self.collator, self.micro_tokens):
                batch = batch.to(accelerator.device)
                logits = model(batch.input_ids_T, batch.packing, batch.target_index_N, None, batch.type_ids_T)
                done.append((ids, logits))
        table_ExC = torch.zeros(len(self.examples), done[0][1].shape[1])
        for ids, logits in done:
            table_ExC[ids] = logits.float().cpu()
        # An example is one process's, and zero everywhere else, so that the sum is exact.
        table_ExC = accelerator.reduce(table_ExC.to(accelerator.device)).cpu()
        labels = self.examples.labels
        assert labels is not None
        return Classified(problem=self.problem, parts=self.parts, logits_ExC=table_ExC.double().numpy(), labels=labels)
