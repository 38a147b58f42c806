"""The plan of batches: which examples make up each step, and how a step is cut into micro-batches. It needs only numpy.

A step is a random global batch, which does not depend on the number of processes. The examples of a step are sorted by
length and cut into micro-batches. The gradient is a sum over the targets of the step. So the cut decides how much
padding there is, but it does not change the update.
"""

import heapq
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
"""Indices of examples, int64[E]."""
# The largest problem, in examples squared times micro-batches, for which to search for the cut with the least padding.
# The search then takes milliseconds.
_MOST_SEARCH_WORK = 2**20


@dataclass(frozen=True, kw_only=True)
class Step:
    """A global batch, cut into micro-batches."""

    epoch: int
    """The epoch of the examples, from 0."""
    micro_batches: list[list[Ids]]
    """`micro_batches[rank][i]` are the examples of the i-th forward pass of process `rank`."""
    tokens: int
    """Tokens of the step over all processes, without padding."""
    square_lengths: int
    """Sum of the squared lengths of the examples, for the FLOPs of attention."""
    padded_tokens: int
    """Tokens of the step over all processes, with padding."""

    @property
    def examples(self) -> Ids:
        """All examples of the step, in ascending order."""
        return np.sort(np.concatenate([ids for parts in self.micro_batches for ids in parts]))


class Plan:
    """All steps of a run, as a pure function of (lengths, seed, step). A late step is found as fast as an early one.

    lengths: int64[E], the tokens of each example.
    examples: the number of examples in a step, or the number of rows if `row_tokens` is set.
    micro_tokens: the most tokens of a micro-batch, with padding. A longer example is a micro-batch by itself.
    processes: the number of processes that share a step.
    seed: decides the order of the examples.
    group: "step" draws the examples of a step at random. "epoch" puts examples of similar length into the same step.
    padded: whether the model needs rectangular batches. Their width is then a multiple of `multiple`.
    row_tokens: if set, examples are first joined to rows of at most this many tokens, and a step takes whole rows.
    sizes: int64[E], the places that each example takes in a micro-batch. Default: its tokens.
    squares: int64[E], the work of attention on each example. Default: its tokens squared.
    readers: bool[P, E], which of the P processes can read which example. Default: all.
    first_epoch: the epoch of the first step.
    first_units: the examples or rows of this epoch, if it has begun before. Default: all of them.

    Raises ValueError if a step has fewer examples than there are processes.
    """

    def __init__(
        self,
        lengths: Ids,
        *,
        examples: int,
        micro_tokens: int,
        processes: int = 1,
        seed: int = 0,
        group: str = "step",
        padded: bool = False,
        multiple: int = 1,
        row_tokens: int | None = None,
        sizes: Ids | None = None,
        squares: Ids | None = None,
        readers: NDArray[np.bool_] | None = None,
        first_epoch: int = 0,
        first_units: Ids | None = None,
    ) -> None:
        if examples < processes:
            raise ValueError(
                f"batch.examples={examples} is less than the {processes} processes that share a step. Raise it, or "
                "start fewer processes."
            )
        self.lengths = lengths
        self.sizes = lengths if sizes is None else sizes
        self.squares = squares
        self.readers = readers
        self.examples = examples
        self.micro_tokens = micro_tokens
        self.processes = processes
        self.seed = seed
        self.group = group
        self.padded = padded
        self.multiple = multiple
        self.first_epoch = first_epoch
        self._rows = None if row_tokens is None else fill_rows(lengths, row_tokens, seed)
        self._unit_tokens = lengths if self._rows is None else np.array([lengths[row].sum() for row in self._rows])
        self.steps_per_epoch = math.ceil(len(self._unit_tokens) / examples)
        self._first_units = first_units
        self._first_steps = self.steps_per_epoch if first_units is None else math.ceil(len(first_units) / examples)
        self.rows = None if self._rows is None else len(self._rows)
        """The number of rows that the examples fill. None without `row_tokens`."""
        self._cached_order: tuple[int, Ids, Ids] | None = None
        """The last epoch that was looked up, and what `_epoch_order` returns for it."""

    def step(self, index: int) -> Step:
        """Return step `index`, counted from 0 over all epochs. One step of each epoch may be smaller."""
        epoch, _ = self._locate(index)
        ids = self.examples_of(index)
        lengths = self.lengths[ids]
        micro_batches = self._cut(ids)
        return Step(
            epoch=epoch,
            micro_batches=micro_batches,
            tokens=int(lengths.sum()),
            square_lengths=int((lengths * lengths if self.squares is None else self.squares[ids]).sum()),
            padded_tokens=sum(self._padded_tokens(part) for parts in micro_batches for part in parts),
        )

    def epoch_of(self, index: int) -> int:
        """Return the epoch of step `index`."""
        return self._locate(index)[0]

    def examples_of(self, index: int) -> Ids:
        """Return the examples of step `index`, which is faster than `step`."""
        epoch, at = self._locate(index)
        order, steps = self._epoch_order(epoch)
        ids = self._take(order, steps[at])
        return ids if self._rows is None else np.concatenate([self._rows[row] for row in ids])

    def continue_after(self, steps: int, *, same_examples: bool) -> tuple[int, Ids | None]:
        """Return the arguments `first_epoch` and `first_units` of a plan that follows the first `steps` steps.

        same_examples: whether the plan has the same examples. It then begins with those of the epoch that are left.
        Otherwise it begins with a new epoch.
        """
        epoch, at = self._locate(steps)
        if at == 0:
            return epoch, None
        if not same_examples:
            return epoch + 1, None
        order, places = self._epoch_order(epoch)
        return epoch, np.sort(np.concatenate([self._take(order, place) for place in places[at:]]))

    def describe_size(self, tokens: int) -> str:
        """Return a phrase with the number of examples and of `tokens`, and of rows if a step takes rows."""
        rows = "" if self.rows is None else f"{self.rows:,} rows of "
        return f"{rows}{len(self.lengths):,} examples, {tokens:,} tokens"

    @property
    def unit(self) -> str:
        """The unit of a step's size: "rows" if a step takes rows, else "examples"."""
        return "examples" if self.rows is None else "rows"

    def padding_share(self, steps: int = 20) -> float:
        """Return the share of the tokens that are padding, in the first `steps` steps of the first epoch."""
        first = [self.step(index) for index in range(min(steps, self._first_steps))]
        return 1 - sum(step.tokens for step in first) / sum(step.padded_tokens for step in first)

    def largest_micro_batch_tokens(self, index: int) -> int:
        """Return the number of tokens in the largest micro-batch of step `index`, with padding."""
        return max(self._padded_tokens(ids) for parts in self.step(index).micro_batches for ids in parts)

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the epoch of step `index`, and the number of the step in this epoch."""
        if index < self._first_steps:
            return self.first_epoch, index
        epoch, at = divmod(index - self._first_steps, self.steps_per_epoch)
        return self.first_epoch + 1 + epoch, at

    def _take(self, order: Ids, place: int) -> Ids:
        return order[place * self.examples : (place + 1) * self.examples]

    def _cut(self, ids: Ids) -> list[list[Ids]]:
        """Return the examples of a step as micro-batches `[process][i]`, which the process can read."""
        cut = partial(cut_into_micro_batches, padded=self.padded, multiple=self.multiple)
        if self.readers is None or self.readers[:, ids].all():
            return cut(ids, self.sizes[ids], self.micro_tokens, self.processes)
        shares = [ids[share] for share in _assign_to_readers(self.sizes[ids], self.readers[:, ids])]
        own = [cut(share, self.sizes[share], self.micro_tokens)[0] for share in shares]
        # All processes make the same number of forward passes, since they exchange sums and weights in them.
        count = max(map(len, own))
        return [[*parts, *[ids[:0]] * (count - len(parts))] for parts in own]

    def _padded_tokens(self, ids: Ids) -> int:
        """Return the number of tokens of a micro-batch, with padding. An empty one has a single padding token."""
        if not self.padded:
            return max(1, int(self.sizes[ids].sum()))
        return max(1, len(ids)) * _round_up(int(self.sizes[ids].max(initial=1)), self.multiple)

    def _epoch_order(self, epoch: int) -> tuple[Ids, Ids]:
        """Return the order in which the epoch's examples or rows fill steps, and the order of these steps."""
        if self._cached_order is not None and self._cached_order[0] == epoch:
            return self._cached_order[1:]
        rng = np.random.default_rng((self.seed, epoch))
        if epoch == self.first_epoch and self._first_units is not None:
            order = rng.permutation(self._first_units)
        else:
            order = rng.permutation(len(self._unit_tokens))
        steps = np.arange(math.ceil(len(order) / self.examples))
        if self.group == "epoch":
            order = order[np.argsort(self._unit_tokens[order], kind="stable")]
            steps = rng.permutation(len(steps))
        self._cached_order = (epoch, order, steps)
        return order, steps


def fill_rows(lengths: Ids, row_tokens: int, seed: int) -> list[Ids]:
    """Return the examples of each row. In a random order, each row takes the next examples as long as they fit.

    An example of more than `row_tokens` tokens is a row by itself. The order depends only on `seed`.
    """
    order = np.random.default_rng((seed, 2**32)).permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    stops, begin = [0], 0
    while stops[-1] < len(order):
        stop = int(np.searchsorted(ends, begin + row_tokens, side="right"))
        stops.append(max(stop, stops[-1] + 1))
        begin = int(ends[stops[-1] - 1])
    return np.split(order, stops[1:-1])


def _assign_to_readers(lengths: Ids, readers: NDArray[np.bool_]) -> list[Ids]:
    """Return the places in `lengths` of each process's examples, so that each example has a process that can read it.

    Each example goes to the process with the fewest tokens so far. The examples that the fewest processes can read come
    first, and the longest of them.

    readers: bool[P, E], which process can read which example.
    """
    assert readers.any(0).all()
    loads_P, process_E = np.zeros(len(readers)), np.zeros(len(lengths), np.int64)
    for at in np.lexsort((-lengths, readers.sum(0))).tolist():
        process_E[at] = np.where(readers[:, at], loads_P, np.inf).argmin()
        loads_P[process_E[at]] += lengths[at]
    return [np.flatnonzero(process_E == process) for process in range(len(readers))]


def cut_into_micro_batches(
    ids: Ids, lengths: Ids, micro_tokens: int, processes: int = 1, *, padded: bool = False, multiple: int = 1
) -> list[list[Ids]]:
    """Cut examples into micro-batches, and return them as `[process][i]`, the longest examples first.

    ids: int64[E], the examples.
    lengths: int64[E], their tokens.
    micro_tokens: the most tokens of a micro-batch, with padding. A longer example is a micro-batch by itself.
    padded: whether the model needs rectangular batches. Their width is then a multiple of `multiple`.

    Every process gets the same number of micro-batches, the smallest that the search finds. A micro-batch is empty only
    if there are fewer examples than micro-batches. Without padding, the micro-batches have nearly the same number of
    tokens. With padding, the examples are sorted by length and cut so that padding is least. If that search would take
    too long, a heuristic cuts them. Several processes wait for each other, so the cut first makes the largest of their
    micro-batches as small as possible.
    """
    order = np.argsort(-lengths, kind="stable")
    ids = ids[order]
    if not padded:
        parts = [ids[part] for part in _balance(lengths[order].tolist(), micro_tokens, processes)]
        return [parts[rank::processes] for rank in range(processes)]
    widths = [_round_up(int(length), multiple) for length in lengths[order]]
    count = processes * math.ceil(len(_fill_greedily(widths, micro_tokens)) / processes)
    exact = len(widths) ** 2 * count <= _MOST_SEARCH_WORK
    capacity = micro_tokens if exact and processes == 1 else _find_least_capacity(widths, micro_tokens, count)
    if exact:
        stops = _minimize_padding(np.array(widths), capacity, min(count, len(widths)))
    else:
        stops = _halve_largest(_fill_greedily(widths, capacity), widths, count)
    parts = [ids[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
    parts += [ids[:0]] * (count - len(parts))
    rounds = [parts[at : at + processes] for at in range(0, count, processes)]
    # The parts are sorted, the longest examples first. Every other round is dealt in reverse, so that no process always
    # gets the larger part.
    rounds = [part[::-1] if number % 2 else part for number, part in enumerate(rounds)]
    return [[part[rank] for part in rounds] for rank in range(processes)]


def deal_micro_batches(
    lengths: Ids, micro_tokens: int, processes: int, *, padded: bool = False, multiple: int = 1
) -> list[list[Ids]]:
    """Cut all examples into micro-batches as one process would, deal them out, and return them as `[process][i]`.

    So the micro-batches do not depend on the number of processes. Every process gets the same number of them, of which
    the last may be empty.
    """
    (parts,) = cut_into_micro_batches(np.arange(len(lengths)), lengths, micro_tokens, padded=padded, multiple=multiple)
    parts += [np.arange(0)] * (-len(parts) % processes)
    return [parts[rank::processes] for rank in range(processes)]


def _balance(sizes: list[int], micro_tokens: int, processes: int) -> list[list[int]]:
    """Give each size to the part with the smallest sum so far (Graham 1969), and return the indices of each part.

    sizes: in descending order.
    """
    # At most j sizes of more than micro_tokens / (j + 1) fit into a part. So there are at least so many parts.
    bounds = [sum(size * (j + 1) > micro_tokens for size in sizes) / j for j in range(1, 8)]
    least = max(sum(min(size, micro_tokens) for size in sizes) / micro_tokens, *bounds)
    count = processes * max(1, math.ceil(least / processes))
    while True:
        parts: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, part) for part in range(count)]
        for at, size in enumerate(sizes):
            load, part = loads[0]
            heapq.heapreplace(loads, (load + size, part))
            parts[part].append(at)
        if all(load <= micro_tokens or len(parts[part]) == 1 for load, part in loads):
            return parts
        count += processes * math.ceil(count / (50 * processes))


def _find_least_capacity(widths: list[int], micro_tokens: int, count: int) -> int:
    """Return the smallest capacity in tokens that needs at most `count` parts.

    A width above `micro_tokens` is a part by itself.
    """
    low, high = max((width for width in widths if width <= micro_tokens), default=1), micro_tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_fill_greedily(widths, middle)) <= count else (middle + 1, high)
    return low


def _minimize_padding(widths: Ids, capacity: int, count: int) -> list[int]:
    """Return where each of `count` parts stops so that padding is least, by dynamic programming over the stops.

    widths: in descending order. A part is as wide as its first example.
    """
    at = np.arange(len(widths) + 1)
    # The number of examples of the part [start, stop].
    size = at - at[:-1, None]
    cost = np.where((size == 1) | ((size > 1) & (size * widths[:, None] <= capacity)), size * widths[:, None], np.inf)
    # The fewest padded tokens of the parts so far, by the stop of the last of them.
    best = np.where(at == 0, 0.0, np.inf)
    starts = []
    for _ in range(count):
        total = best[:-1, None] + cost
        starts.append(total.argmin(axis=0))
        best = total.min(axis=0)
    stops = [len(widths)]
    for start in reversed(starts[1:]):
        stops.append(int(start[stops[-1]]))
    return stops[::-1]


def _fill_greedily(widths: list[int], capacity: int) -> list[int]:
    """Return where each part stops if every part takes as many examples as fit. `widths` is in descending order."""
    stops, at = [], 0
    while at < len(widths):
        at = min(len(widths), at + max(1, capacity // widths[at]))
        stops.append(at)
    return stops


def _halve_largest(stops: list[int], widths: list[int], count: int) -> list[int]:
    """Halve the largest part until there are `count` parts or every part is a single example. Return the stops."""
    while len(stops) < count:
        starts = [0, *stops[:-1]]
        costs = [
            (stop - start) * widths[start] if stop - start > 1 else 0 for start, stop in zip(starts, stops, strict=True)
        ]
        largest = int(np.argmax(costs))
        if costs[largest] == 0:
            break
        stops = sorted([*stops, (starts[largest] + stops[largest]) // 2])
    return stops


def _round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not less than `number`."""
    return -(-number // multiple) * multiple
