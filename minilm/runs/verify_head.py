"""A comparison of a head with the plain model, without shortcuts, on a few rows of the run's own data.

The trials at the construction of a head (`minilm.models.shortcut_trials`) use random ids and short rows. `verify_head`
compares losses and gradients of real rows, once, before the first step. If a shortcut changes them, it turns the
shortcut off and logs a warning.

Axes: T tokens and N targets of the micro-batch.
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

# Rows in a comparison.
_ROWS = 4
# The rows are chosen from a sample of at most this many examples, so that the choice is fast.
_SAMPLE_EXAMPLES = 4096
# Floating-point operations in a comparison: about a second of work.
_GPU_FLOPS = 5e12
_CPU_FLOPS = 5e10
# 128 MiB of float32.
_MAX_LOGITS_PER_ROW = 2**25
# Rows are not cut to fewer tokens, whatever they cost.
_MIN_ROW_TOKENS = 16
# Relative differences that are allowed. On trained weights, rounding causes less than a hundredth of each.
_VALUES_TOLERANCE = 1e-4
_GRADIENTS_TOLERANCE = 1e-2
# A gradient of more elements is compared by sums over its rows and columns.
_MAX_WHOLE_ELEMENTS = 2**16


def verify_head(config: Config, head: Head, prepared: PreparedData, *, trained: bool = True) -> None:
    """Compare losses and gradients of a few rows with the plain model's, and turn off the shortcuts that change them.

    The result depends on the current weights. It is the same on all processes. If the head is not `trained`, the rows
    are evaluation examples, and gradients are not compared. If phases change the training examples, the rows come from
    those with the longest row.
    """
    examples = max(prepared.all_train, key=lambda part: part.longest_row) if trained else prepared.eval

    def build_collator(padded: bool) -> Collator:
        seed = config.run.seed if trained else None
        objective = build_objective(config.objective)
        return objective.collator(prepared.tokenizer, examples, seed=seed, padded=padded, multiple=1)

    with on_all_ranks():
        own_names = _find_wrong_shortcuts(head, examples, build_collator, trained=trained)
    names = sorted({name for part in gather_object([own_names]) for name in part})
    if names:
        head.drop_shortcuts(names)
        log.warning(
            f"on rows of this data, {type(head.model).__name__} gives other losses or gradients than transformers by "
            f"minilm's shortcut{'s' * (len(names) > 1)} {', '.join(names)}. minilm leaves "
            f"{'them' if len(names) > 1 else 'it'} out, so each step takes longer"
        )


def _find_wrong_shortcuts(
    head: Head, examples: Examples, build_collator: Callable[[bool], Collator], *, trained: bool
) -> list[str]:
    """Return the names of the shortcuts to turn off.

    There are none if the head is right on at least one of two draws of rows. A difference on one draw alone does not
    count, because a mixture of experts chooses the experts with the largest scores, and rounding may change the choice.
    Otherwise there is one shortcut, if turning it off is enough, or all of them, with `SHARED_FORWARD` if even that is
    not enough.
    """
    by_loss = bool(getattr(head, "fused", False))

    def differs(draw: int, *names: str) -> bool:
        chosen = _choose_examples(examples, draw)
        with head.without_shortcuts(*names):
            collator = build_collator(not head.padding_free)
            batch = _make_batch(head, collator, examples, chosen)
            ours = _compute_outcome(head, batch, by_loss=by_loss, trained=trained)
        with head.reference_mode():
            batch = _make_batch(head, build_collator(True), examples, chosen)
            plain = _compute_outcome(head, batch, by_loss=by_loss, trained=trained)
        return not _are_near(ours, plain)

    if not all(differs(draw) for draw in range(2)):
        return []
    for name in head.shortcuts:
        if not differs(0, name):
            return [name]
    return [*head.shortcuts, *([SHARED_FORWARD] if differs(0, *head.shortcuts) else [])]


def _choose_examples(examples: Examples, draw: int) -> NDArray[np.int64]:
    """Return the ids of at most `_ROWS` examples, from the longest to the shortest. Each `draw` gives different ids."""
    count = min(len(examples), _SAMPLE_EXAMPLES)
    sample = np.unique(np.linspace(0, len(examples) - 1, count).astype(np.int64))
    order = sample[np.argsort(-(examples.stop[sample] - examples.start[sample]), kind="stable")]
    ranks = np.linspace(draw, len(order) - 1 - draw, _ROWS).clip(0, len(order) - 1).astype(np.int64)
    chosen: NDArray[np.int64] = order[np.unique(ranks)]
    return chosen


def _make_batch(head: Head, collator: Collator, examples: Examples, chosen: NDArray[np.int64]) -> MicroBatch:
    """Return a micro-batch of these examples, with rows cut to the limits on time and memory above."""
    batch = collator([examples[int(i)] for i in chosen], chosen, 0)
    on_cpu = next(head.model.parameters()).device.type == "cpu"
    # A token takes 2 operations per parameter forward and 4 backward, with the head and with the plain model.
    flops_per_token = 12 * sum(parameter.numel() for parameter in head.model.parameters())
    affordable = (_CPU_FLOPS if on_cpu else _GPU_FLOPS) / flops_per_token / _ROWS
    longest = int(max(_MIN_ROW_TOKENS, min(affordable, _MAX_LOGITS_PER_ROW / vocabulary_size(head.model)))) | 1
    return _cut_rows(batch, longest, padded=collator.padded, multiple=collator.multiple)


def _cut_rows(batch: MicroBatch, longest: int, *, padded: bool, multiple: int) -> MicroBatch:
    """Return the batch with at most `longest` tokens in each row: its first ones and its last one."""
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
        # Other batches have a target for each example, of which none is lost.
        target_ids_N=batch.target_ids_N[kept_N] if len(batch.target_ids_N) == len(kept_N) else batch.target_ids_N,
        type_ids_T=None if batch.type_ids_T is None else batch.type_ids_T[kept_T],
    )


def _compute_outcome(head: Head, batch: MicroBatch, *, by_loss: bool, trained: bool) -> list[Tensor]:
    """Return the losses (`by_loss`) or the logits of the targets, followed by a sketch of each parameter's gradient.

    The gradients are those of a weighted sum of the losses or logits. There are none if the head is not `trained`.
    """
    parameters = [parameter for parameter in head.model.parameters() if parameter.requires_grad and trained]
    batch = batch.to(next(head.model.parameters()).device)
    with evaluation_mode(head), torch.set_grad_enabled(trained), _full_float32():
        if by_loss:
            values = target_losses(head, batch)
            total = values.sum()
        else:
            values = head.logits(batch.input_ids_T, batch.packing, batch.target_index_N, batch.type_ids_T).float()
            total = (values * _signed_weights(values.numel(), values).view_as(values)).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True) if parameters else ()
    return [values.detach().flatten(), *(total.new_zeros(1) if x is None else _sketch(x) for x in gradients)]


def _sketch(gradient: Tensor) -> Tensor:
    """Return the gradient, flat, or for a large matrix weighted sums over its rows and over its columns."""
    if gradient.ndim < 2 or gradient.numel() <= _MAX_WHOLE_ELEMENTS:
        return gradient.flatten()
    rows = gradient.flatten(1)
    return torch.cat([_signed_weights(len(rows), rows) @ rows, rows @ _signed_weights(rows.shape[1], rows)])


def _signed_weights(count: int, like: Tensor) -> Tensor:
    """Return `count` weights of both signs.

    A sum without weights would hide gradients that add up to zero, as those of logits do.
    """
    return torch.arange(1, count + 1, device=like.device, dtype=like.dtype).sin()


def _are_near(ours: list[Tensor], plain: list[Tensor]) -> bool:
    """Return whether the outcomes differ only by rounding.

    The tolerance of a gradient grows with a tenth of the largest gradient, since rounding may exceed a tiny gradient.
    """
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
def _full_float32() -> Iterator[None]:
    """Multiply matrices in full float32, without TF32, until the block ends."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
