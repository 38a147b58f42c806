"""The exact evaluation of an objective: what all processes computed is gathered, then each figure is computed once.

Axes: U outputs of all evaluation examples, C numbers of an output, E examples, N targets.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from minilm.data.corpus import Examples, PreparedData
from minilm.data.example import NO_TARGET
from minilm.data.micro_batch import target_losses
from minilm.models.temporary_changes import evaluation_mode
from minilm.objectives.evaluation import iterate_local_batches, join_shares
from minilm.objectives.example_batches import ExampleCollator, arrange_outputs, count_targets
from minilm.objectives.metrics import MAX_EXPONENT

if TYPE_CHECKING:
    from minilm.objectives.objective import Objective

COUPLED_EXAMPLES = 128
"""How many examples, in their order, the evaluation loss of coupled examples compares at a time."""


@dataclass(frozen=True, kw_only=True)
class FigureTable:
    """The figures of an evaluation, computed already."""

    values: dict[str, float]
    per_example: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """As `minilm.objectives.evaluator.EvaluationResult.per_example`."""

    def figures(self) -> dict[str, float]:
        """Return the figures by name."""
        return self.values


@dataclass(frozen=True, kw_only=True)
class ExampleEvaluator:
    """The evaluation of the examples of an `Objective`: `eval_loss` and what its `metrics` returns."""

    objective: "Objective"
    prepared: PreparedData
    collator: ExampleCollator
    micro_tokens: int
    """Maximum number of tokens in a forward pass, padding included. The figures do not depend on it."""
    own_names: tuple[str, ...]
    """The names of what `metrics` returns, besides `eval_loss`."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the figures."""
        names = ("eval_loss", *self.own_names)
        return (*names, *(f"{name}_{part}" for part in _find_parts(self.prepared) for name in names))

    def __call__(self, accelerator: Accelerator, model: nn.Module) -> FigureTable:
        """Evaluate every example once. The processes share the examples, and all return the same result."""
        examples, outputs = self.prepared.eval, self.collator.outputs
        first_E1 = np.cumsum([0, *_count_outputs(examples, outputs)])
        batches: list[tuple[Tensor, Tensor]] = []
        with evaluation_mode(model):
            for ids, batch in iterate_local_batches(accelerator, examples, self.collator, self.micro_tokens):
                places = [np.arange(first_E1[i], first_E1[i + 1]) for i in ids]
                on_device = batch.to(accelerator.device)
                result = model(
                    on_device.input_ids_T, on_device.packing, on_device.target_index_N, None, on_device.type_ids_T
                )
                batches.append((torch.from_numpy(np.concatenate(places or [np.arange(0)])), result.float().cpu()))
        outputs_UxC = torch.zeros(int(first_E1[-1]), *batches[0][1].shape[1:])
        for place, part_UxC in batches:
            outputs_UxC[place] = part_UxC
        # One process has the outputs of an example and all others have zeros, so the sum is exact.
        outputs_UxC = accelerator.reduce(outputs_UxC.to(accelerator.device)).cpu()
        figures = self._compute_figures(outputs_UxC, first_E1, slice(0, len(examples)))
        for name, part in _find_parts(self.prepared).items():
            own = self._compute_figures(outputs_UxC, first_E1, part)
            figures |= {f"{figure}_{name}": value for figure, value in own.items()}
        return FigureTable(values=figures, per_example=self._describe_examples(outputs_UxC, first_E1))

    def _describe_examples(self, outputs_UxC: Tensor, first_E1: Any) -> dict[str, NDArray[Any]]:
        """Return `EvaluationResult.per_example`."""
        examples = len(self.prepared.eval)
        size = COUPLED_EXAMPLES if self.objective.couples_examples else max(1, examples)
        groups = (slice(start, min(examples, start + size)) for start in range(0, examples, size))
        parts = [self.objective.describe_examples(*self._arrange(outputs_UxC, first_E1, group)) for group in groups]
        values = {name: torch.cat([part[name] for part in parts]).detach().numpy() for name in parts[0]}
        if self.collator.outputs != "targets":
            return {**values, "targets": np.ones(examples, np.int64)}
        counts_E = np.diff(first_E1)
        place_U = np.repeat(np.arange(examples), counts_E)
        return {"loss": np.bincount(place_U, values["loss"], examples), "targets": counts_E}

    def _compute_figures(self, outputs_UxC: Tensor, first_E1: Any, part: slice) -> dict[str, float]:
        """Return the figures of some consecutive examples."""
        outputs, targets = self._arrange(outputs_UxC, first_E1, part)
        notes = self.prepared.eval.notes
        own_notes = [None] * (part.stop - part.start) if notes is None else notes[part]
        figures = self.objective.metrics_with_notes(outputs, targets, own_notes)
        metrics = {name: float(value) for name, value in figures.items()}
        if "eval_loss" in metrics:
            return metrics
        return {"eval_loss": self._compute_loss(outputs_UxC, first_E1, part), **metrics}

    def _compute_loss(self, outputs_UxC: Tensor, first_E1: Any, part: slice) -> float:
        """Return the mean loss of some consecutive examples."""
        if not self.objective.couples_examples:
            losses = self.objective.loss(*self._arrange(outputs_UxC, first_E1, part))
            return float(losses.double().mean())
        total = 0.0
        for start in range(part.start, part.stop, COUPLED_EXAMPLES):
            group = slice(start, min(part.stop, start + COUPLED_EXAMPLES))
            total += float(self.objective.loss(*self._arrange(outputs_UxC, first_E1, group)).double().sum())
        return total / float(part.stop - part.start)

    def _arrange(self, outputs_UxC: Tensor, first_E1: Any, part: slice) -> tuple[Tensor, Tensor]:
        """Return the outputs and the targets of some consecutive examples, as `Objective.loss` takes them."""
        examples = self.prepared.eval
        ids = range(part.start, part.stop)
        lengths = [examples.row_lengths(i) for i in ids]
        counts = None if examples.rows is None else [*map(len, lengths)]
        own_UxC = outputs_UxC[first_E1[part.start] : first_E1[part.stop]]
        arranged = arrange_outputs(own_UxC, self.objective.outputs, [n for own in lengths for n in own], counts)
        if self.collator.outputs != "targets":
            assert examples.labels is not None
            return arranged, torch.from_numpy(examples.labels[part])
        targets = torch.from_numpy(np.concatenate([examples.targets_of_tokens(i) for i in ids]))
        return arranged, targets[targets != NO_TARGET]


@dataclass(frozen=True, kw_only=True)
class TargetLossEvaluator:
    """The evaluation of a causal LM by the losses of its targets. The logits of the vocabulary are not kept."""

    prepared: PreparedData
    collator: ExampleCollator
    micro_tokens: int
    """Maximum number of tokens in a forward pass, padding included. The figures do not depend on it."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the figures."""
        parts = ("", *(f"_{part}" for part in _find_parts(self.prepared)))
        return tuple(f"{name}{part}" for part in parts for name in ("eval_loss", "perplexity"))

    def __call__(self, accelerator: Accelerator, model: nn.Module) -> FigureTable:
        """Evaluate every example once. The processes share the examples, and all return the same result."""
        examples = self.prepared.eval
        counts_E = count_targets(examples, range(len(examples)))
        nats_E = np.zeros(len(examples))
        with evaluation_mode(model):
            for ids, batch in iterate_local_batches(accelerator, examples, self.collator, self.micro_tokens):
                # The sums are taken on the CPU, since not every device has float64.
                nats_N = target_losses(model, batch.to(accelerator.device)).cpu().double().numpy()
                nats_E[ids] = np.bincount(np.repeat(np.arange(len(ids)), counts_E[ids]), nats_N, len(ids))
        (nats_E,) = join_shares(accelerator, nats_E)
        figures = dict[str, float]()
        parts = {f"_{name}": part for name, part in _find_parts(self.prepared).items()}
        for name, part in {"": slice(None), **parts}.items():
            loss = math.fsum(nats_E[part]) / int(counts_E[part].sum())
            figures |= {f"eval_loss{name}": loss, f"perplexity{name}": math.exp(min(loss, MAX_EXPONENT))}
        return FigureTable(values=figures, per_example={"loss": nats_E, "targets": counts_E})


def _find_parts(prepared: PreparedData) -> dict[str, slice]:
    """Return the examples of each part of the evaluation, if there are several parts."""
    sizes = prepared.eval_parts
    stops = np.cumsum([*sizes.values()]).tolist()
    parts = zip(sizes, stops, strict=True)
    return {name: slice(stop - sizes[name], stop) for name, stop in parts} if len(sizes) > 1 else {}


def _count_outputs(examples: Examples, outputs: str) -> list[int]:
    """Return the number of the model's outputs for each example."""
    if outputs == "targets":
        return [int(count) for count in count_targets(examples, range(len(examples)))]
    if outputs == "tokens":
        return [int(length) for length in examples.lengths]
    return [len(examples.row_lengths(i)) for i in range(len(examples))]
