"""A head's shortcuts tried on a few rows of the run's own data, against the plain model.

The trials at construction (`minilm.head`) see random ids and short rows. Here losses and gradients of real rows are
compared, once and before the first step. What is wrong then is left out, with a warning that names it.
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

from minilm.batch import Collator, MicroBatch, target_nats
from minilm.config import Config
from minilm.head import SHARED, Head
from minilm.launch import together
from minilm.model import evaluating, vocabulary_size
from minilm.objectives import objective_of
from minilm.packing import pack
from minilm.tokens import Examples, Prepared

log = logging.getLogger("minilm")

_ROWS = 4
_FLOPS, _FLOPS_ON_CPU = 5e12, 5e10  # about what a second is enough for
_LOGITS = 2**25  # of a row: 128 MiB
_SHORTEST = 16  # tokens to which a row is cut at least
_VALUES, _GRADIENTS = 1e-4, 1e-2  # relative differences; rounding makes less than a tenth of these
_SAMPLE = 4096  # examples among which the rows are chosen
_SKETCHED = 2**16  # elements of a gradient that is not compared as a whole


def verify_head(config: Config, head: Head, prepared: Prepared, *, trained: bool = True) -> None:
    """Compare losses and gradients of some of the run's rows with the plain model's; give up what makes them differ.

    All processes come to the same decision, which depends on the weights as they are. Of a head that is not `trained`
    the rows are those of the evaluation, and gradients do not matter.
    """
    examples = prepared.train if trained else prepared.eval

    def collator_of(padded: bool) -> Collator:
        seed = config.run.seed if trained else None
        objective = objective_of(config.objective)
        return objective.collator(prepared.tokenizer, examples, seed=seed, padded=padded, multiple=1)

    wrong = together(lambda: _wrong_shortcuts(head, examples, collator_of, trained=trained))
    everyones = sorted({name for found in gather_object([wrong]) for name in found})
    if everyones:
        head.give_up(everyones)
        log.warning(
            f"on rows of this data {type(head.model).__name__} gives other losses or gradients than transformers by "
            f"minilm's shortcut {', '.join(everyones)}: left out, so that a step takes longer"
        )


def _wrong_shortcuts(
    head: Head, examples: Examples, collator_of: Callable[[bool], Collator], *, trained: bool
) -> list[str]:
    """The names of the shortcuts to give up: one if it is enough, or all, and in the end rows that share a forward.

    Experts are chosen by the largest of some numbers, so that rounding may choose another one. So a difference counts
    only where other rows show it too.
    """
    by_loss = bool(getattr(head, "fused", False))

    def differs(draw: int, *names: str) -> bool:
        chosen = _choose(examples, draw)
        with head.without(*names):
            collator = collator_of(not head.padding_free)
            ours = _outcome(head, _batch(head, collator, examples, chosen), by_loss=by_loss, trained=trained)
        with head.plain():
            batch = _batch(head, collator_of(True), examples, chosen)
            plain = _outcome(head, batch, by_loss=by_loss, trained=trained)
        return not _near(ours, plain)

    if not all(differs(draw) for draw in range(2)):
        return []
    for name in head.shortcuts:
        if not differs(0, name):
            return [name]
    return [*head.shortcuts, *([SHARED] if differs(0, *head.shortcuts) else [])]


def _choose(examples: Examples, draw: int) -> NDArray[np.int64]:
    """Ids of examples from the longest to the shortest; other ones with another `draw`."""
    sample = np.unique(np.linspace(0, len(examples) - 1, min(len(examples), _SAMPLE)).astype(np.int64))
    order = sample[np.argsort(-(examples.stop[sample] - examples.start[sample]), kind="stable")]
    ranks = np.linspace(draw, len(order) - 1 - draw, _ROWS).clip(0, len(order) - 1).astype(np.int64)
    chosen: NDArray[np.int64] = order[np.unique(ranks)]
    return chosen


def _batch(head: Head, collator: Collator, examples: Examples, chosen: NDArray[np.int64]) -> MicroBatch:
    """The rows of these examples, each cut to a length for which there is time and memory."""
    batch = collator([examples[int(i)] for i in chosen], chosen, 0)
    on_cpu = next(head.model.parameters()).device.type == "cpu"
    work = 12 * sum(parameter.numel() for parameter in head.model.parameters())  # forward and backward, twice
    tokens = (_FLOPS_ON_CPU if on_cpu else _FLOPS) / work
    longest = int(max(_SHORTEST, min(tokens / _ROWS, _LOGITS / vocabulary_size(head.model)))) | 1
    return _cut(batch, longest, padded=collator.padded, multiple=collator.multiple)


def _cut(batch: MicroBatch, longest: int, *, padded: bool, multiple: int) -> MicroBatch:
    """The first tokens of each row, and its last one."""
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


def _outcome(head: Head, batch: MicroBatch, *, by_loss: bool, trained: bool) -> list[Tensor]:
    """Losses or logits of the targets, and the gradients of a sum of them, large ones by sums over rows and columns."""
    parameters = [parameter for parameter in head.model.parameters() if parameter.requires_grad and trained]
    batch = batch.to(next(head.model.parameters()).device)
    with evaluating(head), torch.set_grad_enabled(trained), _exact_products():
        if by_loss:
            values = target_nats(head, batch)
            total = values.sum()
        else:
            values = head.logits(batch.input_ids_T, batch.packing, batch.target_index_N, batch.type_ids_T).float()
            total = (values * _signs(values.numel(), values).view_as(values)).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True) if parameters else ()
    return [values.detach().flatten(), *(total.new_zeros(1) if x is None else _sketch(x) for x in gradients)]


def _sketch(gradient: Tensor) -> Tensor:
    if gradient.ndim < 2 or gradient.numel() <= _SKETCHED:
        return gradient.flatten()
    rows = gradient.flatten(1)
    return torch.cat([_signs(len(rows), rows) @ rows, rows @ _signs(rows.shape[1], rows)])


def _signs(count: int, like: Tensor) -> Tensor:
    """Numbers of both signs, so that what adds up to zero by itself is seen too."""
    return torch.arange(1, count + 1, device=like.device, dtype=like.dtype).sin()


def _near(ours: list[Tensor], plain: list[Tensor]) -> bool:
    """Whether they are the same but for rounding; a gradient that is next to nothing is measured by the largest."""
    largest = max((float(x.abs().max()) for x in plain[1:]), default=0.0)
    for number, (own, expected) in enumerate(zip(ours, plain, strict=True)):
        if own.shape != expected.shape:
            return False
        if len(own):
            scale = float(expected.abs().max())
            allowed = _GRADIENTS * (scale + 0.1 * largest) if number else _VALUES * scale
            if not float((own - expected).abs().max()) <= allowed and bool(expected.isfinite().all()):
                return False
    return True


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products in all of float32, whatever the process has chosen, for a moment."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
