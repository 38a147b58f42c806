"""The chunked loss of a linear head equals the loss of its logits, and never holds all of them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minilm.models import chunked_loss as losses
from minilm.models.chunked_loss import compilable_cross_entropy, eager_cross_entropy, linear_cross_entropy

N, H, V = 23, 12, 50


def inputs(kind: torch.dtype = torch.float32, targets: int = N, bias: bool = True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(targets)
    hidden, weight, offset = (
        torch.randn(*shape, generator=generator).to(kind).requires_grad_() for shape in ((targets, H), (V, H), (V,))
    )
    return [hidden, weight, offset if bias else None, torch.randint(0, V, (targets,), generator=generator)]


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), target, reduction="none")


def gradients(loss: Any, values: list[Any]) -> list[Tensor | None]:
    wanted = [x for x in values[:3] if x is not None and x.requires_grad]
    return list(torch.autograd.grad(3.5 * loss(*values).sum(), wanted))


@pytest.mark.parametrize(("at_a_time", "block"), [(1, 1), (7, 3), (7, 100), (23, 5), (100, 8), (100, 100)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_the_logits(
    at_a_time: int, block: int, bias: bool, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_BYTES_ON_CPU", at_a_time * V * kind.itemsize)
    monkeypatch.setattr(losses, "_BLOCK_ON_CPU", block * V)
    values, tolerance = inputs(bias=bias), 1e-6 if kind == torch.float32 else 2e-2
    with torch.autocast("cpu", dtype=kind, enabled=kind != torch.float32):
        torch.testing.assert_close(linear_cross_entropy(*values), plain(*values), rtol=tolerance, atol=tolerance)
        ours, expected = gradients(linear_cross_entropy, values), gradients(plain, values)
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("at_a_time", [7, 100])
@pytest.mark.parametrize("smoothing", [0.1, 0.7])
def test_smoothed_losses_and_gradients_are_torchs(
    smoothing: float, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_BYTES_ON_CPU", at_a_time * V * 4)
    monkeypatch.setattr(losses, "_BLOCK_ON_CPU", 3 * V)
    values = inputs()

    def ours(*values: Any) -> Tensor:
        return linear_cross_entropy(*values, smoothing)

    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="none", label_smoothing=smoothing)

    torch.testing.assert_close(ours(*values), theirs(*values), rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(ours, values), gradients(theirs, values), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_a_time", [7, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("softmax", [eager_cross_entropy, compilable_cross_entropy])
def test_the_z_loss_is_the_square_of_the_denominators_logarithm(
    softmax: losses.CrossEntropy, smoothing: float, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_BYTES_ON_CPU", at_a_time * V * 4)
    monkeypatch.setattr(losses, "_BLOCK_ON_CPU", 3 * V)
    values = inputs()

    def ours(*values: Any) -> Tensor:
        return linear_cross_entropy(*values, smoothing, softmax, z_loss=0.3)

    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        logits = F.linear(hidden, weight, bias)
        nats = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
        return nats + 0.3 * logits.exp().sum(-1).log() ** 2

    torch.testing.assert_close(ours(*values), theirs(*values), rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(ours, values), gradients(theirs, values), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1)])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same_one(frozen: tuple[int, ...]) -> None:
    values = inputs()
    for index in frozen:
        values[index].requires_grad_(False)
    for one, other in zip(gradients(linear_cross_entropy, values), gradients(plain, values), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [3, 100])
def test_rows_without_a_target_change_no_gradient(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_BLOCK_ON_CPU", block * V)
    hidden, *others = inputs()
    more = torch.cat([hidden, torch.ones(4, H)]).detach().requires_grad_()
    ours, expected = gradients(linear_cross_entropy, [more, *others]), gradients(plain, [hidden, *others])
    assert ours[0][N:].eq(0).all()
    for one, other in zip([ours[0][:N], *ours[1:]], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_no_target_at_all_has_a_gradient_of_zeros() -> None:
    values = inputs(targets=0)
    assert linear_cross_entropy(*values).shape == (0,)
    assert [float(x.abs().sum()) for x in gradients(linear_cross_entropy, values)] == [0, 0, 0]


def test_a_loss_that_is_not_a_sum_is_refused_instead_of_given_a_wrong_gradient() -> None:
    values = inputs()
    weighted = linear_cross_entropy(*values) * torch.arange(N)
    with pytest.raises(RuntimeError, match="only the sum of these losses has a gradient: compute other functions"):
        weighted.sum().backward()


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest result."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("training", [True, False])
def test_the_logits_are_never_all_in_memory(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_BYTES_ON_CPU", 4 * V * 4)
    values = inputs()
    with torch.set_grad_enabled(training), Largest() as largest:
        loss = linear_cross_entropy(*values).sum()
    if training:
        with largest:
            loss.backward()
    assert largest.elements <= max(V * H, 4 * V) < N * V
    with Largest() as largest:
        plain(*values)
    assert largest.elements == N * V


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_both_ways_to_the_softmax_are_one(kind: torch.dtype, z_loss: float, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(N, V + 14, generator=generator).to(kind)  # the last 14 are padding
    target = torch.randint(0, V, (N,), generator=generator)
    expected_nats, expected = eager_cross_entropy(logits.clone(), V, target, smoothing, z_loss, True)
    nats, error = compilable_cross_entropy(logits.clone(), V, target, smoothing, z_loss, True)
    torch.testing.assert_close(nats, expected_nats, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        error[:, :V], expected.to(kind), rtol=1e-2 if kind == torch.bfloat16 else 1e-5, atol=1e-6
    )
    assert error.dtype == kind
    assert not error[:, V:].any()
    assert eager_cross_entropy(logits, V, target, smoothing, z_loss, False)[1] is None
    assert compilable_cross_entropy(logits, V, target, smoothing, z_loss, False)[1] is None


@pytest.mark.parametrize("softmax", [eager_cross_entropy, compilable_cross_entropy])
@pytest.mark.parametrize("bias", [True, False])
def test_a_vocabulary_that_is_rounded_up_gives_the_same(
    bias: bool, softmax: losses.CrossEntropy, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = inputs(bias=bias)

    def ours(*values: Any) -> Tensor:
        return linear_cross_entropy(*values, 0.0, softmax)

    expected = plain(*values), gradients(plain, values)
    monkeypatch.setattr(losses, "_pad_vocabulary", lambda x: F.pad(x, (0, 0) * (x.ndim - 1) + (0, 14)))  # as on a GPU
    torch.testing.assert_close(ours(*values), expected[0], rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients(ours, values), expected[1], strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_an_evaluation_takes_no_gradients() -> None:
    wanted = []

    def softmax(*arguments: Any) -> tuple[Tensor, Tensor | None]:
        wanted.append(arguments[-1])
        return eager_cross_entropy(*arguments)

    hidden, weight, bias, target = inputs(bias=True)
    with torch.no_grad():
        found = linear_cross_entropy(hidden, weight, bias, target, cross_entropy=softmax)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, bias, target, cross_entropy=softmax), found)
    assert wanted == [False, True]
