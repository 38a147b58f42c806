"""The plan of batches: which examples make up each step, and how a step is cut into micro-batches. numpy only.

A step is a random global batch, which does not depend on the number of processes. Its micro-batches are the same
examples sorted by length. The gradient is a sum over the step's targets, so the cut changes padding, never the update.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
# The best cut of a step takes milliseconds up to this number: examples squared times micro-batches.
_EXACT_WORK = 2**20


@dataclass(frozen=True, kw_only=True)
class Step:
    """One global batch. `micro_batches[rank][i]` are the ids of the examples in the i-th forward of process `rank`."""

    epoch: int
    micro_batches: list[list[Ids]]
    tokens: int
    """Tokens of the step over all processes, without padding."""
    square_lengths: int
    """Sum of the squared lengths, for counting attention's FLOPs."""
    padded_tokens: int
    """Tokens of the step over all processes, with padding."""

    @property
    def examples(self) -> Ids:
        """The ids of all examples of the step, ascending."""
        return np.sort(np.concatenate([ids for parts in self.micro_batches for ids in parts]))


class Plan:
    """All steps of a run, as a pure function of (lengths, seed, step). Any step takes equally long to look up.

    lengths: int64[N], tokens of each example. examples: size of a step. micro_tokens: most tokens of a micro-batch,
    with padding. processes: how many share a step. group: sort the examples of each `step`, or of each `epoch`, by
    length. padded: the model needs padding; lengths are then rounded up to `multiple`. row_tokens: a step takes rows in
    place of single examples, and a row holds examples of up to so many tokens together.
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
    ) -> None:
        if examples < processes:
            raise ValueError(f"batch.examples={examples} is less than the {processes} processes that share a step")
        self.lengths = lengths
        self.examples = examples
        self.micro_tokens = micro_tokens
        self.processes = processes
        self.seed = seed
        self.group = group
        self.padded = padded
        self.multiple = multiple
        self._rows = None if row_tokens is None else fill_rows(lengths, row_tokens, seed)
        self._weights = lengths if self._rows is None else np.array([lengths[row].sum() for row in self._rows])
        self.steps_per_epoch = math.ceil(len(self._weights) / examples)
        self.rows = None if self._rows is None else len(self._rows)
        """How many rows the examples fill where a step takes rows, else None."""
        self._latest: tuple[int, Ids, Ids] | None = None  # of the last epoch that was looked up

    def step(self, index: int) -> Step:
        """Return step `index` of the run, counted from 0 over all epochs. The last step of an epoch may be smaller."""
        epoch, at = divmod(index, self.steps_per_epoch)
        order, steps = self._epoch_order(epoch)
        at = int(steps[at])
        ids = order[at * self.examples : (at + 1) * self.examples]
        if self._rows is not None:
            ids = np.concatenate([self._rows[row] for row in ids])
        lengths = self.lengths[ids]
        micro_batches = cut_into_micro_batches(
            ids, lengths, self.micro_tokens, self.processes, padded=self.padded, multiple=self.multiple
        )
        return Step(
            epoch=epoch,
            micro_batches=micro_batches,
            tokens=int(lengths.sum()),
            square_lengths=int((lengths * lengths).sum()),
            padded_tokens=sum(self._padded_tokens(part) for parts in micro_batches for part in parts),
        )

    def describe_size(self, tokens: int) -> str:
        """Return a phrase with the number of examples and `tokens`, and of rows where a step takes rows."""
        rows = "" if self.rows is None else f"{self.rows:,} rows of "
        return f"{rows}{len(self.lengths):,} examples, {tokens:,} tokens"

    @property
    def unit(self) -> str:
        """The unit of `examples`: "rows" where a step takes rows, else "examples"."""
        return "examples" if self.rows is None else "rows"

    def padding_share(self, steps: int = 20) -> float:
        """Return the share of padding among the tokens of the first `steps` steps."""
        first = [self.step(index) for index in range(min(steps, self.steps_per_epoch))]
        return 1 - sum(step.tokens for step in first) / sum(step.padded_tokens for step in first)

    def largest_micro_batch_tokens(self, step: Step) -> int:
        """Return the tokens of the step's largest micro-batch, with padding."""
        return max(self._padded_tokens(ids) for parts in step.micro_batches for ids in parts)

    def _padded_tokens(self, ids: Ids) -> int:
        """Return the tokens of a micro-batch, with padding. An empty one holds a single padding token."""
        if not self.padded:
            return max(1, int(self.lengths[ids].sum()))
        return max(1, len(ids)) * _round_up(int(self.lengths[ids].max(initial=1)), self.multiple)

    def _epoch_order(self, epoch: int) -> tuple[Ids, Ids]:
        """Return the order in which steps take the epoch's examples or rows, and the order of the steps."""
        if self._latest is not None and self._latest[0] == epoch:
            return self._latest[1:]
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self._weights))
        steps = np.arange(self.steps_per_epoch)
        if self.group == "epoch":
            order = order[np.argsort(self._weights[order], kind="stable")]
            steps = rng.permutation(self.steps_per_epoch)
        self._latest = (epoch, order, steps)
        return order, steps


def fill_rows(lengths: Ids, row_tokens: int, seed: int) -> list[Ids]:
    """Return rows of example ids: in an order drawn by `seed`, each row takes the next examples while they fit.

    An example of more than `row_tokens` tokens is a row by itself.
    """
    order = np.random.default_rng((seed, 2**32)).permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    stops, begin = [0], 0
    while stops[-1] < len(order):
        stop = int(np.searchsorted(ends, begin + row_tokens, side="right"))
        stops.append(max(stop, stops[-1] + 1))
        begin = int(ends[stops[-1] - 1])
    return np.split(order, stops[1:-1])


def cut_into_micro_batches(
    ids: Ids, lengths: Ids, micro_tokens: int, processes: int = 1, *, padded: bool = False, multiple: int = 1
) -> list[list[Ids]]:
    """Cut `ids` into `processes x k` micro-batches sorted by length, longest first; returns `[process][k]` arrays.

    k is the smallest number that the search finds for which no micro-batch holds more than `micro_tokens` tokens (a
    longer example is a micro-batch by itself). Without padding the micro-batches are balanced in tokens. With padding,
    the cut of the sorted examples with the least padding is taken. Where processes wait for each other, only cuts whose
    largest micro-batch is as small as possible count. Every process gets k micro-batches. A micro-batch is empty only
    when there are fewer examples than micro-batches.
    """
    order = np.argsort(-lengths, kind="stable")
    ids = ids[order]
    if not padded:
        parts = [ids[part] for part in _deal(lengths[order].tolist(), micro_tokens, processes)]
        return [parts[rank::processes] for rank in range(processes)]
    widths = [_round_up(int(length), multiple) for length in lengths[order]]
    count = processes * math.ceil(len(_greedy(widths, micro_tokens)) / processes)
    exact = len(widths) ** 2 * count <= _EXACT_WORK
    capacity = micro_tokens if exact and processes == 1 else _least_capacity(widths, micro_tokens, count)
    if exact:
        stops = _least_padding(np.array(widths), capacity, min(count, len(widths)))
    else:
        stops = _split_to(_greedy(widths, capacity), widths, count)
    parts = [ids[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
    parts += [ids[:0]] * (count - len(parts))
    rounds = [parts[at : at + processes] for at in range(0, count, processes)]
    # Parts come longest first; every other round is dealt in reverse, so that no process always gets the larger one.
    rounds = [part[::-1] if number % 2 else part for number, part in enumerate(rounds)]
    return [[part[rank] for part in rounds] for rank in range(processes)]


def deal_micro_batches(
    lengths: Ids, micro_tokens: int, processes: int, *, padded: bool = False, multiple: int = 1
) -> list[list[Ids]]:
    """Cut all examples into micro-batches as for one process, and deal these out; return `[process][k]` arrays of ids.

    Every process gets k micro-batches, of which the last may be empty.
    """
    (parts,) = cut_into_micro_batches(np.arange(len(lengths)), lengths, micro_tokens, padded=padded, multiple=multiple)
    parts += [np.arange(0)] * (-len(parts) % processes)
    return [parts[rank::processes] for rank in range(processes)]


def _deal(sizes: list[int], micro_tokens: int, processes: int) -> list[list[int]]:
    """Give each size, longest first, to the part that has the least so far (Graham 1969); return indices by part."""
    # At most j sizes of more than micro_tokens / (j + 1) fit into a part.
    crowds = [sum(size * (j + 1) > micro_tokens for size in sizes) / j for j in range(1, 8)]
    least = max(sum(min(size, micro_tokens) for size in sizes) / micro_tokens, *crowds)
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


def _least_capacity(widths: list[int], micro_tokens: int, count: int) -> int:
    """Return the smallest capacity that needs at most `count` parts; a width above micro_tokens is a part by itself."""
    low, high = max((width for width in widths if width <= micro_tokens), default=1), micro_tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_greedy(widths, middle)) <= count else (middle + 1, high)
    return low


def _least_padding(widths: Ids, capacity: int, count: int) -> list[int]:
    """Return where each of `count` parts stops so that padding is least, by dynamic programming over the stops."""
    at = np.arange(len(widths) + 1)
    size = at - at[:-1, None]  # [start, stop]
    cost = np.where((size == 1) | ((size > 1) & (size * widths[:, None] <= capacity)), size * widths[:, None], np.inf)
    best = np.where(at == 0, 0.0, np.inf)  # fewest padded tokens of the parts so far, by the stop of the last one
    starts = []
    for _ in range(count):
        total = best[:-1, None] + cost
        starts.append(total.argmin(axis=0))
        best = total.min(axis=0)
    stops = [len(widths)]
    for start in reversed(starts[1:]):
        stops.append(int(start[stops[-1]]))
    return stops[::-1]


def _greedy(widths: list[int], capacity: int) -> list[int]:
    """Return where each part stops if every part takes as many examples as fit; `widths` is descending."""
    stops, at = [], 0
    while at < len(widths):
        at = min(len(widths), at + max(1, capacity // widths[at]))
        stops.append(at)
    return stops


def _split_to(stops: list[int], widths: list[int], count: int) -> list[int]:
    """Halve the largest parts until there are `count`, or every part is a single example."""
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
    return -(-number // multiple) * multiple
