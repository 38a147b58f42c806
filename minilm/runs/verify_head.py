"""A comparison of a head with the plain model on a few rows of the run's own data.

The trials at construction (`minilm.models.shortcut_trials`) use random ids and short rows. `verify_head` compares
losses and gradients of real rows, once, before the first step. It leaves out a shortcut that changes them, and names it
in a warning.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from minilm.config import Config
from minilm.data.corpus import Examples, PreparedData
from minilm.data.micro_batch import Collator, MicroBatch, target_losses
from minilm.data.packing import pack
from minilm.distributed.launch import on_all_ranks
from minilm.models.embeddings import vocabulary_size
from minilm.models.head import SHARED_FORWARD, Head
from minilm.models.temporary_changes import evaluation_mode
from minilm.objectives.factory import build_objective

log = logging.getLogger("minilm")

_ROWS = 4
_FLOPS, _FLOPS_ON_CPU = 5e12, 5e10  # a device does about this many in a second
_LOGITS_PER_ROW = 2**25  # at most: 128 MiB
_SHORTEST_TOKENS = 16  # a row is not cut to fewer
# Relative differences that are allowed. On trained weights rounding makes less than a hundredth of them.
_VALUES_TOLERANCE, _GRADIENTS_TOLERANCE = 1e-4, 1e-2
_SAMPLE_EXAMPLES = 4096  # the rows are chosen among these
_WHOLE_ELEMENTS = 2**16  # a gradient of more is not compared element by element


def verify_head(config: Config, head: Head, prepared: PreparedData, *, trained: bool = True) -> None:
    """Compare losses and gradients of some of the run's rows with the plain model's; give up what changes them.

    The decision depends on the current weights, and is the same on all processes. If the head is not `trained`, the
    rows come from the evaluation, and gradients are not compared.
    """
    examples = prepared.train if trained else prepared.eval

    def collator_of(padded: bool) -> Collator:
        seed = config.run.seed if trained else None
        objective = build_objective(config.objective)
        return objective.collator(prepared.tokenizer, examples, seed=seed, padded=padded, multiple=1)

    with on_all_ranks():
        own_names = _find_wrong_shortcuts(head, examples, collator_of, trained=trained)
    names = sorted({name for part in gather_object([own_names]) for name in part})
    if names:
        head.drop_shortcuts(names)
        log.warning(
            f"on rows of this data {type(head.model).__name__} gives other losses or gradients than transformers by "
            f"minilm's shortcut{'s' * (len(names) > 1)} {', '.join(names)}: left out, so that a step takes longer"
        )


def _find_wrong_shortcuts(
    head: Head, examples: Examples, collator_of: Callable[[bool], Collator], *, trained: bool
) -> list[str]:
    """Return the shortcuts to give up: none, or one if that is enough, else all, and `SHARED_FORWARD` as the last.

    A difference counts only if other rows show one too: a mixture of experts chooses those with the largest scores, and
    rounding may change the choice.
    """
    by_loss = bool(getattr(head, "fused", False))

    def differs(draw: int, *names: str) -> bool:
        chosen = _choose(examples, draw)
        with head.without_shortcuts(*names):
            collator = collator_of(not head.padding_free)
            batch = _make_batch(head, collator, examples, chosen)
            ours = _compute_outcome(head, batch, by_loss=by_loss, trained=trained)
        with head.reference_mode():
            batch = _make_batch(head, collator_of(True), examples, chosen)
            plain = _compute_outcome(head, batch, by_loss=by_loss, trained=trained)
        return not _are_near(ours, plain)

    if not all(differs(draw) for draw in range(2)):
        return []
    for name in head.shortcuts:
        if not differs(0, name):
            return [name]
    return [*head.shortcuts, *([SHARED_FORWARD] if differs(0, *head.shortcuts) else [])]


def _choose(examples: Examples, draw: int) -> NDArray[np.int64]:
    """Return ids of examples from the longest to the shortest; another `draw` gives other ids."""
    count = min(len(examples), _SAMPLE_EXAMPLES)
    sample = np.unique(np.linspace(0, len(examples) - 1, count).astype(np.int64))
    order = sample[np.argsort(-(examples.stop[sample] - examples.start[sample]), kind="stable")]
    ranks = np.linspace(draw, len(order) - 1 - draw, _ROWS).clip(0, len(order) - 1).astype(np.int64)
    chosen: NDArray[np.int64] = order[np.unique(ranks)]
    return chosen


def _make_batch(head: Head, collator: Collator, examples: Examples, chosen: NDArray[np.int64]) -> MicroBatch:
    """Return the rows of these examples, each cut to a length for which there is time and memory."""
    batch = collator([examples[int(i)] for i in chosen], chosen, 0)
    on_cpu = next(head.model.parameters()).device.type == "cpu"
    work = 12 * sum(parameter.numel() for parameter in head.model.parameters())  # forward and backward, twice
    tokens = (_FLOPS_ON_CPU if on_cpu else _FLOPS) / work
    longest = int(max(_SHORTEST_TOKENS, min(tokens / _ROWS, _LOGITS_PER_ROW / vocabulary_size(head.model)))) | 1
    return _cut(batch, longest, padded=collator.padded, multiple=collator.multiple)


def _cut(batch: MicroBatch, longest: int, *, padded: bool, multiple: int) -> MicroBatch:
    """Keep the first tokens of each row, and its last one: `longest` in all at most."""
    lengths = torch.tensor(batch.packing.lengths)
    last_T = torch.zeros_like(batch.input_ids_T, dtype=torch.bool)
    last_T[lengths.cumsum(0) - 1] = True
    kept_T = (batch.packing.position_T < longest - 1) | last_T
    new_T, kept_N = kept_T.cumsum(0) - 1, kept_T[batch.target_index_N]
    return replace(
        batch,
        input_ids_T=batch.input_ids_T[kept_T],
        packing=pack(lengths.clamp(max=longest).tolist(), grouped=not padded, multiple=multiple),
        target_index_N=new_T[batch.target_index_N[kept_N]],
        target_ids_N=batch.target_ids_N[kept_N],
        type_ids_T=None if batch.type_ids_T is None else batch.type_ids_T[kept_T],
    )


def _compute_outcome(head: Head, batch: MicroBatch, *, by_loss: bool, trained: bool) -> list[Tensor]:
    """Return losses or logits of the targets, then the gradients of a sum of them, summarized by `_sketch`."""
    parameters = [parameter for parameter in head.model.parameters() if parameter.requires_grad and trained]
    batch = batch.to(next(head.model.parameters()).device)
    with evaluation_mode(head), torch.set_grad_enabled(trained), _exact_products():
        if by_loss:
            values = target_losses(head, batch)
            total = values.sum()
        else:
            values = head.logits(batch.input_ids_T, batch.packing, batch.target_index_N, batch.type_ids_T).float()
            total = (values * _signs(values.numel(), values).view_as(values)).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True) if parameters else ()
    return [values.detach().flatten(), *(total.new_zeros(1) if x is None else _sketch(x) for x in gradients)]


def _sketch(gradient: Tensor) -> Tensor:
    """Return the gradient, or of a large one weighted sums over its rows and its columns."""
    if gradient.ndim < 2 or gradient.numel() <= _WHOLE_ELEMENTS:
        return gradient.flatten()
    rows = gradient.flatten(1)
    return torch.cat([_signs(len(rows), rows) @ rows, rows @ _signs(rows.shape[1], rows)])


def _signs(count: int, like: Tensor) -> Tensor:
    """Return weights of both signs. A plain sum would hide gradients that add up to zero, as those of logits do."""
    return torch.arange(1, count + 1, device=like.device, dtype=like.dtype).sin()


def _are_near(ours: list[Tensor], plain: list[Tensor]) -> bool:
    """Return whether the outcomes differ by rounding only. A tenth of the largest gradient counts for a tiny one."""
    largest = max((float(x.abs().max()) for x in plain[1:]), default=0.0)
    for number, (own, expected) in enumerate(zip(ours, plain, strict=True)):
        if own.shape != expected.shape:
            return False
        if len(own):
            scale = float(expected.abs().max())
            allowed = _GRADIENTS_TOLERANCE * (scale + 0.1 * largest) if number else _VALUES_TOLERANCE * scale
            if not float((own - expected).abs().max()) <= allowed and bool(expected.isfinite().all()):
                return False
    return True


@contextmanager
def _exact_products() -> Iterator[None]:
    """Multiply matrices in full float32, without TF32, for a moment."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
