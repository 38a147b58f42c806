"""Muon against torch's own, in float32, and against a singular value decomposition."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import minilm.optim.muon
from minilm.config import Optim
from minilm.optim.muon import Muon, orthogonalize
from minilm.optim.optimizer import apply_update, build_optimizer, is_fused
from minilm.optim.weight_matrices import MatrixLayout

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture
def in_float32() -> Iterator[None]:
    """torch's Muon casts to bfloat16 before its iteration. Here that cast does nothing."""
    with patch.object(torch.Tensor, "bfloat16", lambda tensor: tensor.clone()):
        yield


def single(parameter: nn.Parameter) -> MatrixLayout:
    return MatrixLayout(transposed=False, groups=1, sizes=(parameter.shape[-2],))


def muon(parameters: list[nn.Parameter], layouts: list[MatrixLayout] | None = None, **options: Any) -> Muon:
    """Muon for these matrices alone."""
    group = {"params": parameters, "layouts": layouts or [single(p) for p in parameters], "weight_decay": 0.1}
    return Muon([group], [], lr=0.03, **options)


def torch_muon(parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon(parameters, lr=0.03, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", **options)


def draw(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def step(optimizer: torch.optim.Optimizer, gradients: dict[nn.Parameter, Tensor]) -> None:
    for parameter, gradient in gradients.items():
        parameter.grad = gradient.clone()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("rows", "columns", "iterations"), [(5, 5, 5), (3, 8, 5), (4, 7, 1), (4, 7, 3)])
def test_the_iteration_applies_its_polynomial_to_the_singular_values(rows, columns, iterations):
    X_BxMxN = torch.randn(2, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, values, V = torch.linalg.svd(X_BxMxN, full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True)
    for _ in range(iterations):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonalize(X_BxMxN, iterations), U @ torch.diag_embed(values) @ V)
    if iterations == 5:
        assert float(values.min()) > 0.6
        assert float(values.max()) < 1.25


def test_a_gradient_of_zeros_gives_no_update_and_no_nan():
    parameter = draw(3, 4)
    before = parameter.detach().clone()
    step(muon([parameter]), {parameter: torch.zeros(3, 4)})
    torch.testing.assert_close(parameter.detach(), before * (1 - 0.03 * 0.1))


@pytest.mark.parametrize("momentum", [0.95, 0.5, 0.0])
@pytest.mark.parametrize("iterations", [5, 2])
@pytest.mark.parametrize("elements", [1 << 24, 30, 10])
def test_updates_are_those_of_torch_in_float32(momentum, iterations, elements, in_float32, monkeypatch):
    monkeypatch.setattr(minilm.optim.muon, "_CHUNK_ELEMENTS", elements)
    shapes = [(6, 4), (4, 6), (5, 5), (4, 6), (2, 9)]
    ours, theirs = ([draw(*shape, seed=seed) for seed, shape in enumerate(shapes)] for _ in range(2))
    optimizer = muon(ours, momentum=momentum, iterations=iterations)
    reference = torch_muon(theirs, momentum=momentum, ns_steps=iterations)
    for number in range(5):
        gradients = [draw(*shape, seed=100 * number + seed).detach() for seed, shape in enumerate(shapes)]
        step(optimizer, dict(zip(ours, gradients, strict=True)))
        step(reference, dict(zip(theirs, gradients, strict=True)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(optimizer.state[a]["momentum_buffer"], reference.state[b]["momentum_buffer"])


def test_in_bfloat16_updates_are_those_of_torch():
    ours, exact, theirs = (draw(12, 20) for _ in range(3))
    gradient = draw(12, 20, seed=1).detach()
    optimizer = muon([ours], dtype=torch.bfloat16)
    step(optimizer, {ours: gradient})
    step(muon([exact]), {exact: gradient})
    step(torch_muon([theirs]), {theirs: gradient})
    assert ours.dtype == optimizer.state[ours]["momentum_buffer"].dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, exact, rtol=1e-4, atol=1e-5)


def expected_parts(parameter: Tensor, layout: MatrixLayout) -> list[Tensor]:
    """The matrices of a parameter, computed without the layout's own views."""
    rows = parameter.T if layout.transposed else parameter
    size = sum(layout.sizes)
    ends = [sum(layout.sizes[:number]) for number in range(len(layout.sizes) + 1)]
    return [rows[[row for row in range(len(rows)) if start <= row % size < end]] for start, end in pairwise(ends)]


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((12, 5), MatrixLayout(transposed=False, groups=1, sizes=(4, 4, 4))),
        ((5, 12), MatrixLayout(transposed=True, groups=1, sizes=(4, 4, 4))),
        ((12, 5), MatrixLayout(transposed=False, groups=1, sizes=(8, 2, 2))),
        ((12, 5), MatrixLayout(transposed=False, groups=2, sizes=(2, 2, 2))),
        ((5, 12), MatrixLayout(transposed=True, groups=6, sizes=(1, 1))),
    ],
)
def test_each_matrix_of_a_fused_parameter_has_its_own_update(shape, layout, in_float32):
    fused = draw(*shape)
    apart = [nn.Parameter(part.clone()) for part in expected_parts(fused.detach(), layout)]
    optimizer, reference = muon([fused], [layout]), torch_muon(apart)
    for number in range(3):
        gradient = draw(*shape, seed=1 + number).detach()
        step(optimizer, {fused: gradient})
        step(reference, dict(zip(apart, expected_parts(gradient, layout), strict=True)))
    for ours, theirs in zip(expected_parts(fused, layout), apart, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_of_experts_has_an_update_for_each(transposed, in_float32):
    layout = MatrixLayout(transposed=transposed, groups=1, sizes=(2, 3))
    shape = (3, 4, 5) if transposed else (3, 5, 4)
    stack, gradient = draw(*shape), draw(*shape, seed=1).detach()
    apart = [nn.Parameter(part.clone()) for expert in stack.detach() for part in expected_parts(expert, layout)]
    step(muon([stack], [layout]), {stack: gradient})
    gradients = [part for expert in gradient for part in expected_parts(expert, layout)]
    step(torch_muon(apart), dict(zip(apart, gradients, strict=True)))
    ours = [part for expert in stack for part in expected_parts(expert, layout)]
    for a, b in zip(ours, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def bert(**fields: Any) -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**(SIZES | {"vocab_size": 50} | fields)))


IDS = torch.arange(5, 37).view(2, 16)


def backward(model: nn.Module) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()


def test_in_a_model_the_matrices_get_the_update_of_muon_and_the_rest_that_of_adamw(in_float32):
    plain = Optim(lr=0.02, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    ours, theirs = bert().eval(), bert().eval()
    inside = [p for name, p in theirs.named_parameters() if "encoder.layer" in name and p.ndim == 2]
    assert len(inside) == 12
    adamw = build_optimizer(theirs, plain)
    for group in adamw.param_groups:
        group["params"] = [p for p in group["params"] if not any(p is other for other in inside)]
    reference = torch.optim.Muon(inside, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    optimizer = build_optimizer(ours, replace(plain, name="muon", muon_momentum=0.9))
    accelerator = Accelerator(cpu=True)
    for number in range(3):
        for model in (ours, theirs):
            backward(model)
        if number == 0:
            gradients = [p.grad for p in ours.parameters() if p.grad is not None]
            assert float(nn.utils.get_total_norm(gradients)) > 0.5
        norm = apply_update(accelerator, ours, optimizer, 0.5)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs.parameters(), 0.5))
        adamw.step()
        reference.step()
        for model in (ours, theirs):
            model.zero_grad()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6, msg=name)


def test_the_size_of_an_update_is_the_scale_times_the_rate():
    parameter, gradient = draw(40, 60), draw(40, 60, seed=1).detach()
    before = parameter.detach().clone()
    group = {"params": [parameter], "layouts": [single(parameter)]}
    step(Muon([group], [], lr=0.01, scale=0.3), {parameter: gradient})
    size = float((parameter.detach() - before).square().mean().sqrt())
    # The iteration ends at singular values of 0.7 to 1.2. At 1, the mean square of the elements is 1 / columns.
    assert size == pytest.approx(0.01 * 0.3, rel=0.2)


def test_layer_decay_and_frozen_and_tied_parameters():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=50, n_positions=32))
    model.transformer.h[1].requires_grad_(False)
    optimizer = build_optimizer(model, Optim(name="muon", lr=0.1, layer_decay=0.5, weight_decay=0.0))
    scales = {p: group["scale"] for group in optimizer.param_groups for p in group["params"]}
    assert set(scales) == {p for p in model.parameters() if p.requires_grad}
    matrices = [p for group in optimizer.param_groups if "layouts" in group for p in group["params"]]
    names = {name for name, p in model.named_parameters() if any(p is other for other in matrices)}
    ends = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == {f"transformer.h.{layer}.{end}.weight" for layer in (0, 2) for end in ends}
    blocks = model.transformer.h
    assert [scales[blocks[layer].mlp.c_fc.weight] for layer in (0, 2)] == [0.125, 0.5]
    assert scales[model.transformer.wte.weight] == 0.0625
    assert model.lm_head.weight is model.transformer.wte.weight
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["scale"]
    before = copy.deepcopy(model.state_dict())
    backward(model)
    optimizer.step()
    sizes = [
        float((blocks[i].mlp.c_fc.weight.detach() - before[f"transformer.h.{i}.mlp.c_fc.weight"]).norm())
        for i in (0, 2)
    ]
    assert sizes[0] == pytest.approx(sizes[1] / 4, rel=0.1)
    assert torch.equal(blocks[1].mlp.c_fc.weight, before["transformer.h.1.mlp.c_fc.weight"])


def test_a_model_without_trained_matrices_is_refused():
    model = bert()
    model.bert.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^optim\.name muon trains .* trains none: take optim\.name adamw$"):
        build_optimizer(model, Optim(name="muon"))


def test_what_it_trains_is_said(caplog):
    with caplog.at_level("INFO", logger="minilm"):
        model = bert()
        build_optimizer(model, Optim(name="muon"))
    total = sum(p.numel() for p in model.parameters())
    matrices = 2 * (4 * 16 * 16 + 2 * 16 * 24)
    assert caplog.messages == [
        f"Muon trains 12 matrices of {matrices:,} parameters, and AdamW the other {total - matrices:,}"
    ]


def test_the_precision_of_the_run_is_that_of_the_iteration():
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp16", torch.float32)):
        optimizer = build_optimizer(bert(), Optim(name="muon"), precision)
        assert isinstance(optimizer, Muon)
        assert optimizer.dtype == dtype


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    moments = {f"{number} {slot}": value.clone() for number, own in state.items() for slot, value in own.items()}
    return {**{name: p.detach().clone() for name, p in model.named_parameters()}, **moments}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_norm", [1.0, math.inf])
def test_a_step_without_a_finite_gradient_changes_nothing(bad, max_norm):
    model = bert()
    optimizer, accelerator = build_optimizer(model, Optim(name="muon")), Accelerator(cpu=True)
    assert is_fused(optimizer)

    def take_step(spoil: float | None) -> dict[str, Tensor]:
        backward(model)
        if spoil is not None:
            model.bert.encoder.layer[1].output.dense.weight.grad[3, 4] = spoil
        apply_update(accelerator, model, optimizer, max_norm)
        optimizer.zero_grad()
        return snapshot(model, optimizer)

    before, after = take_step(None), take_step(bad)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(bool(tensor.isfinite().all()) for tensor in take_step(None).values())
    assert not all(torch.equal(before[name], tensor) for name, tensor in take_step(None).items())


def test_the_first_step_may_be_the_one_without_a_finite_gradient():
    model = bert()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, Optim(name="muon"))
    backward(model)
    model.bert.encoder.layer[0].output.dense.weight.grad.fill_(math.nan)
    apply_update(Accelerator(cpu=True), model, optimizer, 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class NoWaiting(TorchDispatchMode):
    """A context in which nothing on the device may be read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero), func
        return func(*args, **(kwargs or {}))


def test_a_step_does_not_wait_for_the_device():
    model = bert()
    optimizer, accelerator = build_optimizer(model, Optim(name="muon")), Accelerator(cpu=True)
    for _ in range(2):
        backward(model)
        with NoWaiting():
            apply_update(accelerator, model, optimizer, 1.0)
    with pytest.raises(AssertionError), NoWaiting():
        float(torch.ones(()) + 1)


def test_torchs_scaler_of_fp16_unscales_and_skips():
    ours, theirs = bert().eval(), bert().eval()
    optimizer, plain = (build_optimizer(model, Optim(name="muon")) for model in (ours, theirs))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for bad in (False, True, False):
        before = snapshot(ours, optimizer)
        loss = ours(input_ids=IDS, labels=IDS).loss
        scaler.scale(loss).backward()
        if bad:
            ours.bert.encoder.layer[0].output.dense.weight.grad[0, 0] = math.inf
        else:
            backward(theirs)
            plain.step()
        with NoWaiting():
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        plain.zero_grad()
        if bad:
            after = snapshot(ours, optimizer)
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert scaler.get_scale() == 32.0
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_loaded_state_continues_to_the_bit():
    models = [bert().eval() for _ in range(2)]
    first, second = (build_optimizer(model, Optim(name="muon", lr=0.01)) for model in models)
    for _ in range(2):
        backward(models[0])
        first.step()
        first.zero_grad()
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in zip(models, (first, second), strict=True):
        for _ in range(2):
            backward(model)
            optimizer.step()
            optimizer.zero_grad()
    ours, theirs = (snapshot(model, optimizer) for model, optimizer in zip(models, (first, second), strict=True))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_closure_is_called_with_gradients():
    model = bert()
    optimizer = build_optimizer(model, Optim(name="muon"))

    def closure() -> Tensor:
        loss: Tensor = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return loss

    before = snapshot(model, optimizer)
    assert float(optimizer.step(closure).detach()) > 0
    assert not torch.equal(
        snapshot(model, optimizer)["bert.embeddings.word_embeddings.weight"],
        before["bert.embeddings.word_embeddings.weight"],
    )
