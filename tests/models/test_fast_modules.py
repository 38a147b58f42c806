"""Fast modules give the results of the modules that they replace. No other module is replaced."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from minilm.models.dropout import FastDropout
from minilm.models.fast_modules import install_fast_modules


def outcome(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result, and the gradient of a weighted sum of it."""
    result, generator = module(x), torch.Generator().manual_seed(1)
    weights = torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype)
    return result, torch.autograd.grad(result, x, weights)[0]


def make_fast(name: str) -> nn.Module:
    model = nn.Sequential(ACT2FN[name])
    install_fast_modules(model)
    return model[0]


def drawn() -> Tensor:
    return torch.linspace(-9, 9, 10_001).bfloat16()


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_gelus_by_tanh_are_those_of_transformers_in_one_pass(name: str) -> None:
    x = drawn().float().requires_grad_()
    (expected, of_expected), (found, of_found) = outcome(ACT2FN[name], x), outcome(make_fast(name), x)
    assert type(found.grad_fn).__name__ == "GeluBackward0"
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(of_found, of_expected, rtol=1e-6, atol=1e-5)  # 1 + tanh(-4) has few digits left


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_in_half_precision_they_are_no_further_from_the_exact_ones(name: str) -> None:
    exact = outcome(ACT2FN[name], drawn().double().requires_grad_())
    theirs, ours = (outcome(module, drawn().requires_grad_()) for module in (ACT2FN[name], make_fast(name)))
    for a, b, right in zip(ours, theirs, exact, strict=True):
        assert (a.double() - right).norm() <= (b.double() - right).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gelu_of_half_a_tensor_is_that_of_a_copy(dtype: torch.dtype) -> None:
    whole = torch.linspace(-9, 9, 20_000).to(dtype).view(100, 200).requires_grad_()
    expected, of_expected = outcome(ACT2FN["gelu"], whole[:, 100:].contiguous())
    found, of_found = outcome(make_fast("gelu"), whole[:, 100:])
    assert torch.equal(found, expected)
    assert torch.equal(of_found, of_expected)
    plain, of_plain = outcome(ACT2FN["gelu"], whole[:, 100:])
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, plain, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(of_found, of_plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["gelu_python", "quick_gelu", "silu", "relu"])
def test_other_functions_stay(name: str) -> None:
    assert type(make_fast(name)) is type(ACT2FN[name])


def test_a_model_keeps_its_logits_and_the_names_of_its_weights() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16, initializer_range=0.3)
    plain = GPT2LMHeadModel(config).eval()
    fast = copy.deepcopy(plain)
    install_fast_modules(fast)
    ids = torch.randint(50, (3, 16))
    torch.testing.assert_close(fast(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    assert list(fast.state_dict()) == list(plain.state_dict())
    kinds = [type(module) for module in fast.modules()]
    assert kinds.count(nn.GELU) == 2
    assert kinds.count(FastDropout) == len([m for m in plain.modules() if type(m) is nn.Dropout]) > 0
    assert not fast.transformer.drop.training
