"""The interface of an evaluation, which each objective provides."""

from collections.abc import Mapping
from typing import Any, Protocol

from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn


class EvaluationResult(Protocol):
    """The result of one evaluation over all processes."""

    def figures(self) -> dict[str, float]:
        """Return the figures by name. The keys are `Evaluator.names`, and `eval_loss` is one of them."""

    @property
    def per_example(self) -> Mapping[str, NDArray[Any]]:
        """Numbers of each evaluation example by name, in the order of the examples; the ledger of a run keeps them.

        `loss` is the sum of the losses of the example's targets in nats, `targets` their number, and `utf8_bytes` the
        bytes of text that they stand for, if they are text. `correct` says whether an answer is right. The mapping is
        empty if the evaluation has no such numbers.
        """


class Evaluator(Protocol):
    """The evaluation of a model on the evaluation examples."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the figures, in their order. The loop reads them before the first step."""

    def __call__(self, accelerator: Accelerator, model: nn.Module) -> EvaluationResult:
        """Evaluate every example once.

        The loop calls this on all processes at the same step. The processes share the examples, and all of them must
        return the same figures. The model must be in evaluation mode during the call and in its previous mode after
        it.

        model: the head (`Objective.head`) after `accelerator.prepare`.
        """
