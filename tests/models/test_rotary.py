"""The fast rotary function gives the results of transformers. Functions that compute something else stay."""

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minilm.models import rotary
from minilm.models.rotary import install_fast_rotary
from tests.reference import build


def modelling(kind: str) -> ModuleType:
    """Return the module of transformers that defines the models of this type."""
    return importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")


def drawn(dtype: torch.dtype, heads: tuple[int, int] = (4, 2)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries and keys of rows of nine tokens, as a layer makes them, and random factors for cos and sin."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 9, count, 8).to(dtype).transpose(1, 2).requires_grad_() for count in heads)
    return q, k, torch.randn(2, 9, 8), torch.randn(2, 9, 8)


def fast(kind: str) -> rotary.RotaryFunction:
    """Return the fast function for the models of this type."""
    plain = getattr(modelling(kind).apply_rotary_pos_emb, "plain", modelling(kind).apply_rotary_pos_emb)
    keeps_type = rotary._keeps_type(plain)
    assert keeps_type is not None
    return rotary._make_fast(plain, keeps_type)


def outcome(turn: rotary.RotaryFunction, *states: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, ...]:
    """Return both results, and both gradients of a weighted sum of them."""
    turned = turn(*states, unsqueeze_dim=unsqueeze_dim)
    torch.manual_seed(1)
    gradients = torch.autograd.grad(turned, states[:2], [torch.randn(x.shape).bfloat16().to(x.dtype) for x in turned])
    return *turned, *gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["modernbert", "llama", "qwen3", "olmo2", "gpt_neox", "phi3", "eurobert"])
def test_rotated_states_and_gradients_are_those_of_transformers(kind: str, dtype: torch.dtype) -> None:
    states, turn = drawn(dtype), fast(kind)
    expected, found = outcome(turn.plain, *states), outcome(turn, *states)
    assert type(found[0].grad_fn).__name__ == "_RotationBackward"
    for theirs, ours in zip(expected, found, strict=True):
        assert ours.dtype == theirs.dtype
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_queries_and_keys_of_one_product_are_rotated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, cos, sin = drawn(torch.float32)
    q, k, _ = (x.transpose(1, 2) for x in torch.randn(2, 9, 3, 4, 8).requires_grad_().unbind(2))
    turn, alone, seen = fast("modernbert"), rotary._rotate, list[torch.Size]()
    expected = outcome(turn, q.clone(), k.clone(), cos, sin)

    def noted(x: Tensor, *rest: Any) -> Tensor:
        seen.append(x.shape)
        return alone(x, *rest)

    monkeypatch.setattr(rotary, "_rotate", noted)
    assert all(map(torch.equal, outcome(turn, q, k, cos, sin), expected))
    assert seen == [(2, *q.shape), q.shape, k.shape]
    assert all(rotary._view_as_one(*pair) is None for pair in ((k, q), (q, k.clone()), (q, k[:, :2]), (q.clone(), k)))


def test_where_angles_are_trained_they_have_gradients() -> None:
    q, k, cos, sin = drawn(torch.float32)
    turn, angles = fast("llama"), (cos.requires_grad_(), sin.requires_grad_())

    def gradients(turn: rotary.RotaryFunction) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((x**2).sum() for x in turn(q, k, cos, 2 * sin)), (q, k, *angles))

    assert all(map(torch.equal, gradients(turn), gradients(turn.plain)))


def test_in_half_precision_gradients_are_no_further_from_the_exact_ones() -> None:
    states, turn = drawn(torch.bfloat16), fast("modernbert")
    doubles = [x.detach().double().requires_grad_() for x in states]
    exact = outcome(fast("llama").plain, *doubles)

    def off(found: tuple[Tensor, ...]) -> float:
        pairs = zip(found, exact, strict=True)
        return max(float((x.double() - y).detach().norm() / y.detach().norm()) for x, y in pairs)

    assert off(outcome(turn, *states)) <= 1.01 * off(outcome(turn.plain, *states)) < 0.01


def test_heads_may_come_after_positions() -> None:
    q, k, cos, sin = drawn(torch.float32)
    turn, states = fast("llama"), (q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for theirs, ours in zip(
        outcome(turn.plain, *states, unsqueeze_dim=2), outcome(turn, *states, unsqueeze_dim=2), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_what_is_not_the_usual_turn_is_the_model_s_own() -> None:
    q, k, cos, sin = drawn(torch.float32)
    turn = fast("gpt_neox")
    with torch.no_grad():
        assert all(map(torch.equal, turn(q, k, cos, sin), turn.plain(q, k, cos, sin)))
    part = cos[..., :4], sin[..., :4]  # only half of a head is turned
    half = cos.bfloat16(), sin.bfloat16()
    for factors in (part, half):
        found = turn(q, k, *factors)
        assert type(found[0].grad_fn).__name__ != "_RotationBackward"
        assert all(map(torch.equal, found, turn.plain(q, k, *factors)))
    with pytest.raises(RuntimeError):  # a cosine for a position that is not there
        fast("llama")(q, k, *(torch.randn(2, 10, 8) for _ in "cs"))


@pytest.mark.parametrize("kind", ["cohere", "glm", "gptj", "ernie4_5", "gemma3n", "gpt_oss", "qwen4_exp"])
def test_another_turn_is_left_alone(kind: str) -> None:
    module = modelling(kind)
    before = module.apply_rotary_pos_emb
    install_fast_rotary(type("Layer", (nn.Module,), {"__module__": module.__name__})())
    assert module.apply_rotary_pos_emb is before
    assert not hasattr(before, "plain")


def test_a_model_s_gradients_are_unchanged(tokenizer, monkeypatch) -> None:
    model = build(tokenizer, "modernbert")
    module = modelling("modernbert")
    plain = getattr(module.apply_rotary_pos_emb, "plain", module.apply_rotary_pos_emb)
    ids = torch.randint(5, 300, (3, 20))
    found = []
    for swap in (False, True):
        monkeypatch.setattr(module, "apply_rotary_pos_emb", plain)
        if swap:
            install_fast_rotary(model)
            install_fast_rotary(model)  # twice is once
            assert module.apply_rotary_pos_emb.plain is plain
        loss = model(input_ids=ids, labels=ids).loss
        found.append([loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
