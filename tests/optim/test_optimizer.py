"""The optimizer against torch's plain AdamW and its clipped gradients."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PerceiverConfig, PerceiverForMaskedLM

from minilm.config import Optim
from minilm.optim.optimizer import apply_update, build_optimizer, compute_layer_scales, is_fused

ADAMW, SGD = torch.optim.AdamW, torch.optim.SGD


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 9, bias=False))


def test_only_matrices_and_embeddings_decay():
    model = network()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model, Optim(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old * (0.95 if old.ndim == 2 else 1.0))


def test_frozen_parameters_are_left_out_and_no_other():
    model = network()
    model[1].requires_grad_(False)
    grouped = [p for group in build_optimizer(model, Optim()).param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == 4


def test_on_mps_whose_kernel_neither_clips_nor_skips_the_update_is_not_taken_for_a_fused_one():
    groups = [[{"fused": True, "params": [SimpleNamespace(device=torch.device(kind))]}] for kind in ("cpu", "mps")]
    assert [is_fused(SimpleNamespace(param_groups=group)) for group in groups] == [True, False]


def test_rates_by_layer_are_refused_for_a_model_that_uses_its_layers_several_times():
    size = {"num_latents": 4, "d_latents": 8, "d_model": 8, "num_self_attends_per_block": 1, "num_blocks": 2}
    model = PerceiverForMaskedLM(PerceiverConfig(**size))
    with pytest.raises(ValueError, match=r"uses a layer several times.*leave optim\.layer_decay at 1"):
        compute_layer_scales(model, 0.5)


def test_updates_are_those_of_plain_adamw():
    ours, theirs = network(), network()
    optim = Optim(lr=0.03, weight_decay=0.2, betas=(0.8, 0.95), eps=1e-5)
    vectors = [p for name, p in theirs.named_parameters() if name in ("1.bias", "2.weight", "2.bias")]
    matrices = [p for name, p in theirs.named_parameters() if name in ("0.weight", "1.weight", "3.weight")]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.03, betas=(0.8, 0.95), eps=1e-5, fused=False, foreach=False)
    optimizer = build_optimizer(ours, optim)
    ids_N = torch.arange(9)
    for _ in range(5):
        for model, chosen in ((ours, optimizer), (theirs, reference)):
            nn.functional.cross_entropy(model(ids_N), ids_N).backward()
            chosen.step()
            chosen.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [ADAMW, SGD])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("max_norm", [0.1, 1e9, math.inf])
@pytest.mark.parametrize("prepared", [True, False])
def test_the_update_is_that_of_a_gradient_clipped_by_torch(kind, fused, max_norm, prepared):
    accelerator, updated = Accelerator(cpu=True), []
    for ours in (True, False):
        model = network()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = kind(model.parameters(), lr=0.1, fused=fused, **({"eps": 0.1} if kind is ADAMW else {}))
        model(torch.arange(9)).square().sum().backward()
        if ours:
            optimizer = accelerator.prepare(optimizer) if prepared else optimizer
            norm = apply_update(accelerator, model, optimizer, max_norm)
        else:
            norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
        updated.append([norm, *(after - old for after, old in zip(model.parameters(), before, strict=True))])
    for ours, theirs in zip(*updated, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
