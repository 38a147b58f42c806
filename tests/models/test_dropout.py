"""Dropout drops the right share, has the right gradient, and draws its masks from torch's seed."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase
from transformers.activations import GELUActivation

from minilm.models.dropout import FastDropout, fast_dropout
from minilm.models.fast_modules import ContiguousGELU
from minilm.models.sparse_head import SparseHead
from tests.reference import build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_share_of_p_is_zero_and_the_rest_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(999, 1001, dtype=dtype)
    dropped = fast_dropout(x, p, training=True)
    assert dropped.dtype == dtype
    values = dropped.unique()
    torch.testing.assert_close(values, torch.tensor([0, 1 / (1 - p)], dtype=dtype), rtol=1e-3, atol=0)
    assert float((dropped == 0).float().mean()) == pytest.approx(p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5)


def test_elements_are_dropped_independently_of_their_neighbours() -> None:
    torch.manual_seed(0)
    x = fast_dropout(torch.ones(1000, 1000), 0.5, training=True) - 1
    for step in (1, 2, 3, 4, 8, 1000):
        assert abs(float((x.flatten()[step:] * x.flatten()[:-step]).mean())) < 4 / 1000
    assert abs(float(x.mean(0).std()) - 1000**-0.5) < 0.1 * 1000**-0.5
    assert abs(float(x.mean(1).std()) - 1000**-0.5) < 0.1 * 1000**-0.5


def test_the_gradient_is_that_of_what_is_left() -> None:
    x = torch.randn(7, 13, dtype=torch.float64, requires_grad=True)

    def dropped(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return fast_dropout(x, 0.3, training=True)

    assert torch.autograd.gradcheck(dropped, x)


def test_the_mask_follows_from_the_seed_of_torch_alone() -> None:
    x, masks = torch.ones(50, 50), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append([fast_dropout(x, 0.5, training=True) for _ in range(2)])
    assert torch.equal(masks[0][0], masks[1][0])
    assert torch.equal(masks[0][1], masks[1][1])
    assert not torch.equal(masks[0][0], masks[0][1])
    assert not torch.equal(masks[0][0], masks[2][0])


def test_what_is_computed_again_on_the_way_back_has_the_same_mask() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(20, 20), FastDropout(0.5), nn.Linear(20, 20))
    x = torch.randn(5, 20)
    gradients = []
    for forward in (layers, lambda x: checkpoint(layers, x, use_reentrant=False)):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(forward(x).square().sum(), [*layers.parameters()]))
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize(("p", "training"), [(0.5, False), (0.0, True)])
def test_without_dropout_nothing_is_done(p: float, training: bool) -> None:
    x = torch.randn(3, 4)
    assert fast_dropout(x, p, training=training) is x


def test_all_is_dropped_at_one() -> None:
    assert not fast_dropout(torch.ones(9), 1.0, training=True).any()


def test_a_head_has_it_and_the_model_is_saved_as_before(tokenizer: PreTrainedTokenizerBase) -> None:
    model = build(tokenizer, hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.25)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(nn.Dropout) > 0
    head = SparseHead(model.eval())
    swaps: dict[type, type] = {nn.Dropout: FastDropout, GELUActivation: ContiguousGELU}
    assert [type(module) for module in model.modules()] == [swaps.get(kind, kind) for kind in kinds]
    assert {module.p for module in head.modules() if isinstance(module, FastDropout)} == {0.25}
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
