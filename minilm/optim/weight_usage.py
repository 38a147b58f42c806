"""How a forward uses the outputs of weight matrices: together, or in parts that go different ways.

Axes: O output features of a matrix, I its inputs.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_aten = torch.ops.aten

# Products of two matrices, or of two batches of them, with the position of the left one among the arguments.
_PRODUCTS = {_aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.baddbmm: 1, _aten.linear: 0, _aten._grouped_mm: 0}
# Operations that use all elements of a tensor together, or write them elsewhere.
_USES = {
    *(_aten.topk, _aten.sort, _aten.max, _aten.convolution, _aten.im2col, _aten.linalg_solve_triangular),
    *(_aten.copy_, _aten.index_put, _aten.index_put_, _aten.index_add, _aten.index_add_),
    *(_aten._fft_r2c, _aten._fft_c2c, _aten._fft_c2r, _aten.avg_pool2d),
    *(_aten.scatter, _aten.scatter_, _aten.scatter_add, _aten.scatter_add_, _aten.scatter_reduce),
    *(_aten._scaled_dot_product_flash_attention, _aten._scaled_dot_product_flash_attention_for_cpu),
    *(_aten._scaled_dot_product_efficient_attention, _aten._scaled_dot_product_cudnn_attention),
}
# Operations that combine elements along some dimensions, with the position of those among the arguments.
_REDUCTIONS = {
    **dict.fromkeys((_aten.mean, _aten.sum, _aten.amax, _aten.amin, _aten.var, _aten.logsumexp), 1),
    **dict.fromkeys((_aten.cumsum, _aten._softmax, _aten._log_softmax), 1),
    _aten.linalg_vector_norm: 2,
}
# Operations that normalise the last dimensions. Their second argument is the shape of those.
_NORMS = {_aten.native_layer_norm, _aten._fused_rms_norm}
# Operations whose result has elements of their first argument in other places.
_MOVES = {_aten.index, _aten.index_select, _aten.gather, _aten.repeat, _aten.roll, _aten.flip}
_RESHAPES = {_aten.view, _aten._unsafe_view, _aten._reshape_alias}
# Operations whose first result has the elements of their argument in the same places, as pointwise ones have.
_COPIES = {_aten.clone, _aten._to_copy, _aten.lift_fresh, _aten.native_dropout, _aten.log_sigmoid_forward}
# Pointwise operations that are linear in their tensors.
_SUMS = {_aten.add, _aten.add_, _aten.sub, _aten.sub_, _aten.where}
# Operations that read only the shape of a tensor.
_SHAPES = {
    *(_aten.new_empty, _aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.new_empty_strided),
    *(_aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.rand_like),
}


class WeightUsage:
    """What is known about the use of a weight of shape (…, O, I) or (…, I, O)."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.problem = ""
        """Why the weight is not a matrix of a linear map, or why its parts are not known; empty if they are."""
        self.transposed: bool | None = None
        """Whether the weight has the shape (…, I, O); None before its first use."""
        self.part_O = torch.zeros(0, dtype=torch.int64)
        """For each output the number of the first output in the same part, as far as the forward has gone."""
        self._used_O = torch.zeros(0, dtype=torch.bool)

    def multiply(self, outputs: Tensor, inputs: Tensor, *, transposed: bool) -> None:
        """Record a product whose right operand has these outputs and inputs of the weight at each place, (…, K, N)."""
        if self.transposed is None:
            self.transposed = transposed
            self.part_O = torch.arange(self.weight.shape[-1 if transposed else -2])
            self._used_O = torch.zeros_like(self.part_O, dtype=torch.bool)
        # Each place of the N is an output of its own, and the K are all inputs, each once.
        outputs_N, inputs_K = outputs[..., 0, :].sort().values, inputs[..., 0].sort().values
        width = self.weight.shape[-2 if self.transposed else -1]
        if (
            self.transposed != transposed
            or not (_is_constant(outputs) and _is_constant(inputs.mT))
            or not bool((outputs_N.diff() > 0).all())
            or inputs_K.shape[-1] != width
            or not bool((inputs_K == torch.arange(width)).all())
        ):
            self.problem = "its inputs are used apart from each other"

    @property
    def complete(self) -> bool:
        """Whether all outputs are known to be one part."""
        return self._all_used and len(_unique(self.part_O)) == 1

    @property
    def _all_used(self) -> bool:
        """Whether each part has an output that is used."""
        return bool(torch.isin(self.part_O, self.part_O[self._used_O]).all())

    def join(self, outputs: Tensor) -> None:
        """Record that these outputs are used together. Numbers below 0 do not count."""
        used = _unique(outputs)
        used = used[used >= 0]
        if len(used):
            self._used_O[used] = True
            parts = _unique(self.part_O[used])
            self.part_O[torch.isin(self.part_O, parts)] = parts.min()

    def pair(self, ours: Tensor, others: Tensor) -> None:
        """Record that each of our outputs is used together with the other one in the same place."""
        pairs = _unique_pairs(ours, others)
        while True:
            parts_2xN = self.part_O[pairs]
            low, high = parts_2xN.amin(0), parts_2xN.amax(0)
            if bool((low == high).all()):
                return
            renamed = torch.arange(len(self.part_O)).scatter_reduce_(0, high, low, "amin")
            self.part_O = renamed[self.part_O]

    def separate(self, ours: Tensor, others: Tensor) -> bool:
        """Return whether some output of ours is in another part than the other one in the same place."""
        first_N, second_N = self.part_O[_unique_pairs(ours, others)]
        return bool((first_N != second_N).any())

    def find_pattern(self) -> tuple[int, tuple[int, ...]]:
        """Return the number of groups and the outputs of each part in a group. Sets `problem` if there are none."""
        if not self.problem and self.transposed is None:
            self.problem = "a short forward does not use it"
        elif not self.problem and not self._all_used:
            self.problem = "a short forward does not use all of it"
        if self.problem:
            return 0, ()
        firsts, counts = torch.unique_consecutive(self.part_O, return_counts=True)
        parts = len(_unique(firsts))
        groups = len(firsts) // parts
        repeats = len(firsts) == groups * parts and bool(
            (firsts.view(groups, parts) == firsts[:parts]).all()
            and (counts.view(groups, parts) == counts[:parts]).all()
        )
        if not repeats:
            self.problem = "its parts do not follow each other in a regular order"
            return 0, ()
        return groups, tuple(counts[:parts].tolist())


class WeightUsageTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that follows the outputs of weights through a forward, and records them in `usages`.

    Each tensor made from outputs of a weight has an index beside it: an integer tensor of its shape with the number of
    the output that each element comes from, or -1. Views and copies carry the index on, sums join outputs that are
    added, and a product, softmax or attention joins all outputs that it takes in one argument. A product of an
    activation with another part of the same outputs, as in a gated MLP, joins nothing. Any operation that is not known
    here is recorded as a problem, so that parts are never guessed.
    """

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.usages = {weight: WeightUsage(weight) for weight in weights}
        # Weights and views of them, each with the row and the column of the weight for each element.
        self._weights: dict[Tensor, tuple[WeightUsage, Tensor, Tensor]] = {}
        for weight, usage in self.usages.items():
            rows, columns = (torch.arange(size) for size in weight.shape[-2:])
            self._weights[weight] = (usage, rows[:, None].expand(weight.shape), columns.expand(weight.shape))
        # Tensors made from outputs, each with an index for each weight that it comes from.
        self._features: dict[Tensor, dict[WeightUsage, Tensor]] = {}

    def finish(self, output: object) -> None:
        """Count what the forward returns as used."""
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._use(leaf)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        weights = [tensor for tensor in tensors if tensor in self._weights]
        features = [tensor for tensor in tensors if tensor in self._features]
        if weights:
            self._follow_weights(func, args, kwargs, result, weights)
        if features:
            self._follow_features(func, args, kwargs, result, features)
        return result

    def _follow_weights(self, func: Any, args: Any, kwargs: Any, result: Any, weights: list[Tensor]) -> None:
        operation, first = func.overloadpacket, weights[0]
        if func._schema.is_mutable and args[0] is first:
            return  # RWKV divides its weights in place before an evaluation
        usage, rows, columns = self._weights[first]
        if operation in _COPIES or _is_view(func):
            if operation not in _COPIES:
                rows, columns = (_apply(func, args, kwargs, result, index) for index in (rows, columns))
            for view, *index in zip(_list(result), _list(rows), _list(columns), strict=True):
                self._weights[view] = (usage, index[0], index[1])
            return
        for weight in weights:
            usage, rows, columns = self._weights[weight]
            start = _PRODUCTS.get(operation)
            operands = () if start is None else args[start : start + 2]
            side = [number for number, operand in enumerate(operands) if operand is weight]
            if len(side) != 1:
                usage.problem = f"it is used by {operation}"
                continue
            on_left = side == [0]
            if on_left or operation is _aten.linear:
                rows, columns = rows.mT, columns.mT
            # Both are now (…, K, N), as the right operand of a product is.
            transposed = not _is_constant(rows)
            outputs, inputs = (columns, rows) if transposed else (rows, columns)
            usage.multiply(outputs, inputs, transposed=transposed)
            carried = outputs[..., :1, :]
            if operation is _aten._grouped_mm and carried.ndim > result.ndim:
                carried = carried[0]
            self._carry(result, usage, carried.mT if on_left else carried)

    def _follow_features(self, func: Any, args: Any, kwargs: Any, result: Any, features: list[Tensor]) -> None:
        operation = func.overloadpacket
        if operation in _SHAPES:
            return
        results = _list(result)
        if operation is _aten.convolution and _is_depthwise(args, result):
            for usage, index in self._features.get(args[0], {}).items():
                # The kernel moves along the last dimensions, and keeps the channels of dimension 1 apart.
                first = index.flatten(2)[..., :1]
                usage.pair(index.flatten(2), first.expand(index.flatten(2).shape))
                self._carry(result, usage, first.reshape(*first.shape[:2], *[1] * (index.ndim - 2)))
        elif operation in _PRODUCTS or operation in _USES:
            for tensor in features:
                self._use(tensor)
        elif operation in (_aten.cat, _aten.stack):
            for usage in {usage for tensor in features for usage in self._features[tensor]}:
                parts = [self._features.get(t, {}).get(usage, torch.full(t.shape, -1)) for t in args[0]]
                self._carry(result, usage, func(parts, *args[1:], **kwargs))
        elif operation is _aten.glu:
            for usage, index in self._features[args[0]].items():
                for half in index.chunk(2, args[1] if len(args) > 1 else -1):
                    usage.join(half)
        elif operation in _REDUCTIONS or operation in _NORMS:
            for usage, index in self._features[args[0]].items():
                self._reduce(usage, index, operation, args, results[0])
        elif operation is _aten.constant_pad_nd:
            for usage, index in self._features[args[0]].items():
                self._carry(result, usage, func(index, args[1], -1))
        elif operation is _aten.view_as_complex:
            for usage, index in self._features[args[0]].items():
                usage.pair(*index.unbind(-1))
                self._carry(result, usage, index[..., 0])
        elif operation is _aten.view_as_real:
            for usage, index in self._features[args[0]].items():
                self._carry(result, usage, index[..., None])
        elif operation in _MOVES or _is_view(func):
            for usage, index in self._features.get(args[0], {}).items():
                for tensor, own in zip(results, _list(_apply(func, args, kwargs, result, index)), strict=True):
                    self._carry(tensor, usage, own)
            for tensor in features:
                if tensor is not args[0]:
                    self._use(tensor)
        elif operation in _COPIES or torch.Tag.pointwise in func.tags:
            self._combine(results[0], features, is_sum=operation in _SUMS)
        else:
            for tensor in features:
                for usage in self._features[tensor]:
                    usage.problem = f"its outputs are used by {operation}"

    def _combine(self, result: Tensor, features: list[Tensor], *, is_sum: bool) -> None:
        """Follow a pointwise operation on these tensors and perhaps others."""
        for usage in {usage for tensor in features for usage in self._features[tensor]}:
            indices = [self._features[tensor][usage] for tensor in features if usage in self._features[tensor]]
            first, *others = [index.expand(result.shape) for index in indices]
            if is_sum:
                for other in others:
                    usage.pair(first, other)
            elif any(usage.separate(first, other) for other in others):
                for index in indices:
                    usage.join(index)
                continue
            self._carry(result, usage, first)

    def _reduce(self, usage: WeightUsage, index: Tensor, operation: Any, args: Any, result: Tensor) -> None:
        """Follow an operation that combines elements along some dimensions."""
        if operation in _NORMS:
            dims = list(range(-len(args[1]), 0))
        else:
            position = _REDUCTIONS[operation]
            given = args[position] if len(args) > position else None
            dims = [given] if isinstance(given, int) else list(given or range(index.ndim))
        first = index
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        usage.pair(index, first.expand(index.shape))
        self._carry(result, usage, index if result.shape == index.shape else first.reshape(result.shape))

    def _carry(self, tensor: Tensor, usage: WeightUsage, index: Tensor) -> None:
        """Note that the elements of `tensor` come from these outputs."""
        if not usage.problem and not usage.complete:
            self._features.setdefault(tensor, {})[usage] = index.expand(tensor.shape)

    def _use(self, tensor: Tensor) -> None:
        """Note that all outputs in the tensor are used together."""
        for usage, index in self._features.get(tensor, {}).items():
            usage.join(index)


def _is_view(func: Any) -> bool:
    """Return whether the result is a view of the first argument, or a reshaped copy of it."""
    returns = func._schema.returns
    alias = returns[0].alias_info if returns else None
    return func.overloadpacket in _RESHAPES or (alias is not None and not alias.is_write)


def _is_depthwise(args: Any, result: Tensor) -> bool:
    """Return whether a convolution with these arguments has one kernel for each channel."""
    return bool(args[0].shape[1] == result.shape[1] == args[8])


def _apply(func: Any, args: Any, kwargs: Any, result: Any, index: Tensor) -> Any:
    """Return what a view or a move makes of the index of its first argument."""
    if func.overloadpacket in _RESHAPES:
        return index.reshape(result.shape)
    if func.overloadpacket is _aten.as_strided:
        index = torch.empty_strided(index.shape, args[0].stride(), dtype=index.dtype).copy_(index)
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.cpu(), (args[1:], kwargs))
    return func(index, *args, **kwargs)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_constant(index: Tensor) -> bool:
    """Return whether all rows of a matrix, or of each matrix of a batch, are equal."""
    return bool((index == index[..., :1, :]).all())


def _compact(*indices: Tensor) -> Iterator[Tensor]:
    """Yield tensors of one shape without the dimensions along which all of them repeat."""
    for dim in range(indices[0].ndim):
        if all(index.stride(dim) == 0 for index in indices):
            indices = tuple(index.narrow(dim, 0, min(1, index.shape[dim])) for index in indices)
    yield from indices


def _unique(index: Tensor) -> Tensor:
    (compact,) = _compact(index)
    unique: Tensor = torch.unique(compact)
    return unique


def _unique_pairs(ours: Tensor, others: Tensor) -> Tensor:
    """Return the different pairs of numbers in the same place, 2 x N. Those with a number below 0 do not count."""
    pairs_2xN = torch.stack([index.flatten() for index in _compact(ours, others)])
    unique_2xN: Tensor = torch.unique(pairs_2xN, dim=1)
    return unique_2xN[:, (unique_2xN >= 0).all(0)]
