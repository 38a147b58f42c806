"""The losses of a sequence classifier.

Axes: N examples of the micro-batch, C labels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from minilm.data.labels import Labels
from minilm.data.packing import Packing


class ClassificationLoss:
    """The loss of each example for these labels (`minilm.models.head.Loss`), as `compute_classification_losses`.

    device: where the losses will be computed. The weights of the classes are moved there once.
    """

    def __init__(self, labels: Labels, *, smoothing: float = 0.0, device: torch.device | None = None) -> None:
        self.problem = labels.problem
        self.weight_C = None if labels.weights is None else torch.from_numpy(labels.weights).to(device)
        self.smoothing = smoothing

    def __call__(self, logits_NxC: Tensor, labels: Tensor, packing: Packing) -> Tensor:
        """Return the loss of each example, float32[N]. Ignores `packing`."""
        return compute_classification_losses(logits_NxC, labels, self.problem, self.weight_C, self.smoothing)


def compute_classification_losses(
    logits_NxC: Tensor, labels: Tensor, problem: str, weight_C: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Return the loss of each example, float32[N].

    single-label (labels int64[N]): the cross entropy, with a share `smoothing` of the target spread evenly over all
    classes (Szegedy et al. 2016, section 7), times the weight of the example's class. multi-label (labels float32[N,
    C]): the mean over labels of their binary cross entropies. regression (labels float32[N]): the squared error.
    """
    if problem == "regression":
        return F.mse_loss(logits_NxC[:, 0], labels, reduction="none")
    if problem == "multi-label":
        return F.binary_cross_entropy_with_logits(logits_NxC, labels, reduction="none").mean(1)
    nats_N = F.cross_entropy(logits_NxC, labels, reduction="none", label_smoothing=smoothing)
    return nats_N if weight_C is None else nats_N * weight_C[labels]
