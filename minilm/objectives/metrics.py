"""Exact evaluation of a classifier: gather all logits from all processes, then compute each figure once.

Axes: E examples, C labels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn

from minilm.data.corpus import Examples
from minilm.data.micro_batch import Collator
from minilm.models.temporary_changes import evaluation_mode
from minilm.objectives.evaluation import own_batches

_NAMES = {
    "single-label": ("accuracy", "f1", "matthews"),
    "multi-label": ("accuracy", "f1", "f1_macro"),
    "regression": ("pearson", "spearman", "mse"),
}


@dataclass(frozen=True, kw_only=True)
class Classified:
    """The logits of a classifier and the true labels."""

    problem: str
    parts: dict[str, int]
    """The number of examples of each part of the evaluation. The parts' examples follow one another in this order."""
    logits_ExC: NDArray[np.float64]
    labels: NDArray[Any]
    """An array as `minilm.data.labels.read_labels` returns it."""

    def figures(self) -> dict[str, float]:
        """Return the figures of all examples, and with several parts also those of each, named after the part."""
        figures = self._figures(slice(None))
        start = 0
        for name, count in self.parts.items() if len(self.parts) > 1 else ():
            part = self._figures(slice(start, start + count))
            figures |= {f"{figure}_{name}": value for figure, value in part.items()}
            start += count
        return figures

    def _figures(self, part: slice) -> dict[str, float]:
        """Return eval_loss (without class weights) and the problem's figures, as scikit-learn and SciPy define them.

        single-label: accuracy, matthews, and f1 (of class 1 if there are two classes, as in GLUE, or else the mean over
        classes). multi-label: accuracy (the share of examples with all labels right), f1 (over all labels together) and
        f1_macro. regression: pearson, spearman and mse. A correlation with a constant is 0.
        """
        # scikit-learn imports slowly.
        from sklearn import metrics

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
            predicted = logits_ExC > 0
            accuracy = float(metrics.accuracy_score(labels, predicted))
            return {**figures, "accuracy": accuracy, "f1": f1(predicted, "micro"), "f1_macro": f1(predicted, "macro")}
        classes = logits_ExC.argmax(1)
        figures["accuracy"] = float(metrics.accuracy_score(labels, classes))
        figures["f1"] = f1(classes, "binary" if logits_ExC.shape[1] == 2 else "macro")
        # With a single class scikit-learn returns 0 too, but warns.
        has_classes = len(np.union1d(labels, classes)) > 1
        figures["matthews"] = float(metrics.matthews_corrcoef(labels, classes)) if has_classes else 0.0
        return figures


def _losses(problem: str, logits: NDArray[np.float64], labels: NDArray[Any]) -> Any:
    """Return the loss of each example, float64[E]."""
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
    """Maximum number of tokens in a forward pass, padding included."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the figures."""
        names = ("eval_loss", *_NAMES[self.problem])
        parts = self.parts if len(self.parts) > 1 else ()
        return (*names, *(f"{name}_{part}" for part in parts for name in names))

    def __call__(self, accelerator: Accelerator, model: nn.Module) -> Classified:
        """Classify every example once. The processes share the examples and return the same result."""
        batches: list[tuple[NDArray[np.int64], torch.Tensor]] = []
        with evaluation_mode(model):
            for ids, batch in own_batches(accelerator, self.examples, self.collator, self.micro_tokens):
                batch = batch.to(accelerator.device)
                logits = model(batch.input_ids_T, batch.packing, batch.target_index_N, None, batch.type_ids_T)
                batches.append((ids, logits))
        table_ExC = torch.zeros(len(self.examples), batches[0][1].shape[1])
        for ids, logits in batches:
            table_ExC[ids] = logits.float().cpu()
        # One process has the logits of an example and all others have zeros, so the sum is exact.
        table_ExC = accelerator.reduce(table_ExC.to(accelerator.device)).cpu()
        labels = self.examples.labels
        assert labels is not None
        return Classified(problem=self.problem, parts=self.parts, logits_ExC=table_ExC.double().numpy(), labels=labels)


def lower_is_better(metric: str) -> bool:
    """Return whether the evaluation figure of this name is a loss."""
    return metric.startswith(("eval_loss", "perplexity", "bits_per_byte", "mse"))
