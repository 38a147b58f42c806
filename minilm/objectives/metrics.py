"""The figures of an evaluation, each computed once from the results of all processes.

Axes: V ids of the vocabulary, E examples, C labels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

LANGUAGE_MODEL_FIGURES = ("eval_loss", "perplexity", "bits_per_byte", "unigram_bits_per_byte")
# The figures of each problem, in addition to eval_loss.
CLASSIFICATION_FIGURES = {
    "single-label": ("accuracy", "f1", "matthews"),
    "multi-label": ("accuracy", "f1", "f1_macro"),
    "regression": ("pearson", "spearman", "mse"),
}
# exp(700) is close to the largest float64.
MAX_EXPONENT = 700.0


@dataclass(frozen=True, kw_only=True)
class EvaluationTotals:
    """Totals over the targets of a language model's evaluation. All its figures follow from them."""

    nats: float
    """Sum of -ln p over the targets."""
    targets: int
    """Number of targets."""
    utf8_bytes: int
    """UTF-8 bytes of the text that the targets stand for (`minilm.data.text_bytes`)."""
    unigram_nats: float
    """Sum of -ln p over the same targets under the unigram model of the training tokens."""
    per_example: Mapping[str, NDArray[Any]] = field(default_factory=dict, compare=False, repr=False)
    """As `minilm.objectives.evaluator.EvaluationResult.per_example`."""

    def figures(self) -> dict[str, float]:
        """Return eval_loss (nats per target), perplexity, bits_per_byte, and bits_per_byte of the unigram model."""
        loss = self.nats / self.targets
        # Nats divided by this number are bits per byte.
        scale = math.log(2) * max(1, self.utf8_bytes)
        return {
            "eval_loss": loss,
            "perplexity": math.exp(min(loss, MAX_EXPONENT)),
            "bits_per_byte": self.nats / scale,
            "unigram_bits_per_byte": self.unigram_nats / scale,
        }


def compute_unigram_nats(counts_V: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return -ln p of each id under a unigram model, float64[V], from the number of times that each id occurs.

    The probabilities have add-one smoothing.
    """
    nats_V: NDArray[np.float64] = np.log((counts_V + 1.0).sum()) - np.log(counts_V + 1.0)
    return nats_V


def find_problem(labels: NDArray[Any]) -> str:
    """Return the problem that an array of labels belongs to.

    int64[E] is `single-label`, float32[E, C] is `multi-label`, and float32[E] is `regression`.
    """
    if labels.dtype.kind == "i":
        return "single-label"
    return "multi-label" if labels.ndim == 2 else "regression"


def compute_classification_figures(logits_ExC: NDArray[np.float64], labels: NDArray[Any]) -> dict[str, float]:
    """Return eval_loss (without class weights) and the problem's figures, as scikit-learn and SciPy define them.

    single-label: accuracy, matthews, and f1 (of class 1 if there are two classes, as in GLUE, or else the mean over
    classes). multi-label: accuracy (the share of examples with all labels right), f1 (over all labels together) and
    f1_macro. regression: pearson, spearman and mse. A correlation with a constant is 0.

    labels: as in `find_problem`.
    """
    # scikit-learn imports slowly.
    from sklearn import metrics

    problem = find_problem(labels)
    figures = {"eval_loss": float(compute_label_losses(logits_ExC, labels).mean())}

    def f1(predicted: NDArray[Any], average: str) -> float:
        return float(metrics.f1_score(labels, predicted, average=average, zero_division=0))

    if problem == "regression":
        from scipy import stats

        constant = np.ptp(logits_ExC) == 0 or np.ptp(labels) == 0
        for name, correlation in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
            figures[name] = 0.0 if constant else float(correlation(logits_ExC[:, 0], labels)[0])
        return {**figures, "mse": figures["eval_loss"]}
    if problem == "multi-label":
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


def compute_tag_figures(expected: list[list[str]], predicted: list[list[str]], *, spans: bool) -> dict[str, float]:
    """Return precision, recall, f1 and accuracy of the tags of sentences; accuracy counts words.

    spans: the tags mark spans (IOB2). The other figures then count whole spans over all sentences, as seqeval and the
    CoNLL-2000 shared task define them: an I-x without a B-x before it begins a span. Otherwise they are means over the
    tags that are expected or predicted, as scikit-learn defines them.
    """
    if spans:
        # seqeval imports slowly.
        from seqeval import metrics as scores

        names = {"precision": scores.precision_score, "recall": scores.recall_score, "f1": scores.f1_score}
        figures = {name: float(score(expected, predicted, zero_division=0)) for name, score in names.items()}
        return {**figures, "accuracy": float(scores.accuracy_score(expected, predicted))}
    from sklearn import metrics

    flat = [[tag for sentence in side for tag in sentence] for side in (expected, predicted)]
    means = metrics.precision_recall_fscore_support(*flat, average="macro", zero_division=0)
    names_of_means = zip(("precision", "recall", "f1"), map(float, means[:3]), strict=True)
    return {**dict(names_of_means), "accuracy": float(metrics.accuracy_score(*flat))}


def compute_label_losses(logits_ExC: NDArray[np.float64], labels: NDArray[Any]) -> Any:
    """Return the loss of each example without class weights, float64[E]. labels: as in `find_problem`."""
    problem = find_problem(labels)
    if problem == "regression":
        return (logits_ExC[:, 0] - labels) ** 2
    if problem == "multi-label":
        return (np.logaddexp(0, logits_ExC) - labels * logits_ExC).mean(1)
    return np.logaddexp.reduce(logits_ExC, axis=1) - logits_ExC[np.arange(len(labels)), labels]


def lower_is_better(metric: str) -> bool:
    """Return whether the evaluation figure of this name is a loss."""
    return metric.removeprefix("ema_").startswith(("eval_loss", "perplexity", "bits_per_byte", "mse"))
