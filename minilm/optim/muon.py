"""Muon: momentum whose matrices are made orthogonal before the update (Jordan et al. 2024).

Axes: B matrices of a batch, M rows, N columns.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from minilm.optim.weight_matrices import MatrixLayout

# The polynomial aX + b(XX')X + c(XX')²X, which moves the singular values of X towards 1 (Jordan et al. 2024).
_COEFFICIENTS = 3.4445, -4.7750, 2.0315
# The smallest norm by which a matrix is divided.
_EPSILON = 1e-7
# A process iterates about this many elements at a time, which bounds the memory of a step.
_CHUNK_ELEMENTS = 1 << 24


def orthogonalize(X_BxMxN: Tensor, iterations: int) -> Tensor:
    """Return matrices with the singular vectors of X_BxMxN, and singular values near 1 where they are not tiny.

    Newton-Schulz iteration of degree 5 (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").
    After 5 iterations the singular values are about 0.7 to 1.2. M must not be larger than N. The dtype is that of the
    products. A matrix of zeros remains one.
    """
    a, b, c = _COEFFICIENTS
    exact = torch.promote_types(X_BxMxN.dtype, torch.float32)
    norm_Bx1x1 = torch.linalg.vector_norm(X_BxMxN, dim=(1, 2), keepdim=True, dtype=exact)
    X_BxMxN = X_BxMxN / norm_Bx1x1.clamp(min=_EPSILON).to(X_BxMxN.dtype)
    for _ in range(iterations):
        gram_BxMxM = X_BxMxN @ X_BxMxN.mT
        factor_BxMxM = torch.baddbmm(gram_BxMxM, gram_BxMxM, gram_BxMxM, beta=b, alpha=c)
        X_BxMxN = torch.baddbmm(X_BxMxN, factor_BxMxM, X_BxMxN, beta=a)
    return X_BxMxN


class Muon(torch.optim.Optimizer):
    """Muon for matrices, and fused AdamW for all other parameters.

    The update of a matrix is its gradient's exponential average with Nesterov momentum, made orthogonal, times
    `scale` sqrt(max(rows, columns)). With a scale of 0.2 its elements are as large as AdamW's, so that AdamW's learning
    rates and weight decay fit (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2). Weight decay is
    decoupled.

    matrices: groups of parameters for Muon. The entry `layouts` of a group has a `MatrixLayout` for each parameter.
    others: groups for AdamW, with the entries of `torch.optim.AdamW`.
    momentum: decay rate of the average of gradients.
    iterations: number of iterations of `orthogonalize`.
    dtype: number type of its products.

    As with torch's fused optimizers, the attribute `grad_scale` divides the gradients, and nothing changes if the
    attribute `found_inf` is 1. Both are tensors, so that a step does not wait for the device. A step may overwrite the
    gradients. If torch.distributed runs several processes, all of them must call `step` with the same gradients. Each
    process then iterates its share of the matrices, and all receive the results.
    """

    # torch's GradScaler sets `grad_scale` and `found_inf` for optimizers with this attribute.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        iterations: int = 5,
        scale: float = 0.2,
        dtype: torch.dtype = torch.float32,
        **adamw: Any,
    ) -> None:
        # AdamW refuses an empty list of groups, but not an empty group.
        self._adamw = torch.optim.AdamW(others or [{"params": []}], lr=lr, fused=True, **adamw)
        # The groups are shared. `fused` means that `step` clips and skips by itself.
        super().__init__([*matrices, *self._adamw.param_groups], {"lr": lr, "weight_decay": 0.0, "fused": True})
        self.momentum, self.iterations, self.scale, self.dtype = momentum, iterations, scale, dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient. Return what `closure` returns, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_matrices()
        # Loading a state replaces the groups and the state.
        self._adamw.param_groups = [group for group in self.param_groups if "layouts" not in group]
        self._adamw.state = self.state
        for name in ("grad_scale", "found_inf"):
            setattr(self._adamw, name, getattr(self, name, None))
        self._adamw.step()
        return loss

    def _update_matrices(self) -> None:
        """Make the step of Muon."""
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        for chunk in self._chunks(_CHUNK_ELEMENTS * world):
            finite = self._average_gradients([parameter for _, parameter, _ in chunk])
            batches: dict[tuple[int, int], list[_Matrix]] = {}
            targets = []
            for group, parameter, layout in chunk:
                lr = group["lr"]
                get_local(parameter).mul_(1 - lr * group["weight_decay"] * (1.0 if finite is None else finite))
                # Each process adds the whole update to a tensor of zeros, and its shard of that to its shard.
                sharded = isinstance(parameter, DTensor)
                target = torch.zeros(parameter.shape, device=parameter.device) if sharded else parameter
                targets.append((parameter, target))
                update = _whole(self._direction(parameter), parameter)
                for source, part in zip(layout.split(update), layout.split(target), strict=True):
                    matrix = _Matrix(source, part, lr * self.scale)
                    batches.setdefault(matrix.shape, []).append(matrix)
            for batch in batches.values():
                self._update_batch(batch, finite, world)
            for parameter, target in targets:
                if isinstance(parameter, DTensor):
                    get_local(parameter).add_(_shard(target, parameter))

    def _chunks(self, elements: int) -> Iterator[list[tuple[dict[str, Any], nn.Parameter, MatrixLayout]]]:
        """Yield the parameters with a gradient, each with its group and layout, in lists of about so many elements."""
        chunk: list[tuple[dict[str, Any], nn.Parameter, MatrixLayout]] = []
        size = 0
        for group in self.param_groups:
            for parameter, layout in zip(group["params"], group.get("layouts", ()), strict="layouts" in group):
                if parameter.grad is None:
                    continue
                if chunk and size + parameter.numel() > elements:
                    yield chunk
                    chunk, size = [], 0
                chunk.append((group, parameter, layout))
                size += parameter.numel()
        if chunk:
            yield chunk

    def _average_gradients(self, parameters: list[nn.Parameter]) -> Tensor | None:
        """Clip the gradients and add them to their averages. Nothing changes if `found_inf` is 1.

        Return 1 - `found_inf`, or None without `found_inf`.
        """
        gradients = [get_local(parameter.grad) for parameter in parameters]
        averages = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            averages.append(get_local(state["momentum_buffer"]))
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if grad_scale is not None:
            torch._foreach_div_(gradients, grad_scale)
        if found_inf is None:
            torch._foreach_lerp_(averages, gradients, 1 - self.momentum)
            return None
        finite: Tensor = 1 - found_inf
        for gradient, average in zip(gradients, averages, strict=True):
            # A gradient of zeros with a weight of zero leaves the average as it is.
            gradient.nan_to_num_(0.0, 0.0, 0.0).mul_(finite)
            average.lerp_(gradient, finite * (1 - self.momentum))
        return finite

    def _direction(self, parameter: nn.Parameter) -> Tensor:
        """Return this process's shard of the average of the gradients with Nesterov momentum."""
        average = get_local(self.state[parameter]["momentum_buffer"])
        return get_local(parameter.grad).lerp(average, self.momentum).to(self.dtype)

    def _update_batch(self, batch: list["_Matrix"], finite: Tensor | None, world: int) -> None:
        """Make the matrices of one shape orthogonal, and subtract them from the parameters."""
        X_BxMxN = torch.cat([matrix.read() for matrix in batch])
        X_BxMxN = self._orthogonalize_shared(X_BxMxN, world) if world > 1 else orthogonalize(X_BxMxN, self.iterations)
        if finite is not None:
            X_BxMxN *= finite
        for matrix, X_bxMxN in zip(batch, torch.split(X_BxMxN, [matrix.count for matrix in batch]), strict=True):
            matrix.subtract(X_bxMxN)

    def _orthogonalize_shared(self, X_BxMxN: Tensor, world: int) -> Tensor:
        """Return `orthogonalize(X_BxMxN)`, of which each process computes an equal share."""
        share = math.ceil(len(X_BxMxN) / world)
        own = X_BxMxN[dist.get_rank() * share :][:share]
        result = X_BxMxN.new_zeros(world * share, *X_BxMxN.shape[1:])
        padded = X_BxMxN.new_zeros(share, *X_BxMxN.shape[1:])
        padded[: len(own)] = orthogonalize(own, self.iterations) if len(own) else own
        # gloo does not know all dtypes, but bytes.
        dist.all_gather_into_tensor(result.view(torch.uint8), padded.view(torch.uint8))
        return result[: len(X_BxMxN)]


class _Matrix:
    """A matrix of a parameter, or a batch of them: a part of its update, and the same part of its target."""

    def __init__(self, source: Tensor, target: Tensor, lr: float) -> None:
        # Both have the shape (…, groups, size, inputs).
        self._source, self._target = source, target
        rows, columns = source.shape[-3] * source.shape[-2], source.shape[-1]
        self._tall = rows > columns
        self.shape = min(rows, columns), max(rows, columns)
        self.count = source.numel() // (rows * columns)
        """Number of matrices: 1, or the number of experts."""
        self._factor = lr * math.sqrt(max(rows, columns))

    def read(self) -> Tensor:
        """Return the matrices with at most as many rows as columns, count x M x N."""
        whole = self._source.flatten(-3, -2).reshape(self.count, -1, self._source.shape[-1])
        return whole.mT if self._tall else whole

    def subtract(self, X_bxMxN: Tensor) -> None:
        """Subtract the matrices, times the learning rate, from the target."""
        update = X_bxMxN.mT if self._tall else X_bxMxN
        self._target.sub_(update.reshape(self._target.shape), alpha=self._factor)


def get_local(tensor: Any) -> Tensor:
    """Return this process's shard of the tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(shard: Tensor, parameter: Tensor) -> Tensor:
    """Return the whole tensor of which `shard` is the part that belongs to this process's shard of `parameter`."""
    if not isinstance(parameter, DTensor):
        return shard
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=shape, stride=stride).full_tensor()


def _shard(tensor: Tensor, parameter: DTensor) -> Tensor:
    """Return the part of `tensor` that belongs to this process's shard of `parameter`. Nothing is sent."""
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
