"""The kernels for short rows on a GPU, as Triton interprets them on a CPU; tests/test_gpu.py runs them for real."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from minilm.models import short_row_attention as short_rows

triton = pytest.importorskip("triton")

# A program that makes each check and prints what failed. It takes seconds to start, so all checks share one process.
INTERPRETED = """
import itertools
import json
import traceback
from functools import partial
from types import SimpleNamespace
import torch
import minilm.models.attention
from minilm.data.packing import pack
from minilm.models import short_row_attention as short_rows
from minilm.models.attention import packed_attention
from minilm.models.short_row_attention import attend_short_rows
from tests.reference import attended_rows

def compare_with_float64(near, causal):
    lengths = (128, 65, 64, 64, 33, 32, 20, 9, 1)
    generator = torch.Generator().manual_seed(0)
    query, key, value, gradient = (torch.randn(sum(lengths), 2, 16, generator=generator) for _ in range(4))
    query = query.transpose(0, 1).contiguous().transpose(0, 1)  # as some layers lay it out
    packing = pack(lengths)
    for kind, within in ((torch.float32, 1e-5), (torch.float16, 2e-3)):  # bf16 is more than the interpreter does
        states = [x.to(kind).requires_grad_() for x in (query, key, value)]
        exact = [x.detach().double().requires_grad_() for x in states]
        attended = attend_short_rows(*states, packing.position_T, packing.tiles_B1, near, causal, 0.3)
        expected = attended_rows(exact, lengths, near, causal, 0.3)
        ours = attended, *torch.autograd.grad(attended, states, gradient.to(kind))
        theirs = expected, *torch.autograd.grad(expected, exact, gradient.to(kind).double())
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == kind
            assert (a.double() - b).norm() < within * b.norm(), (kind, a, b)

def compare_with_groups_of_rows():
    minilm.models.attention.short_rows = short_rows
    packing, generator = pack((100, 28, 28, 60, 3)), torch.Generator().manual_seed(0)
    for causal, window, shared in itertools.product((False, True), (None, 7), (1, 2)):
        given = [torch.randn(1, heads, 219, 16, generator=generator) for heads in (4, 4 // shared, 4 // shared)]
        found = []
        for short in (True, False):
            minilm.models.attention._flash_attention_fits = lambda query, dropout: short
            states = [x.clone().requires_grad_() for x in given]
            layer = SimpleNamespace(is_causal=causal, num_key_value_groups=shared)
            attended, _ = packed_attention(layer, *states, None, packing=packing, sliding_window=window)
            found.append([attended, *torch.autograd.grad(attended.square().sum(), states)])
        for ours, of_groups in zip(*found, strict=True):
            torch.testing.assert_close(ours, of_groups, rtol=1e-4, atol=1e-5)

checks = {
    f"{order} {near}": partial(compare_with_float64, near, order == "causal")
    for order in ("both ways", "causal") for near in (128, 5)
}
checks["layer"] = compare_with_groups_of_rows
errors = {}
for name, check in checks.items():
    errors[name] = ""
    try:
        check()
    except Exception:
        errors[name] = traceback.format_exc()
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def errors() -> dict[str, str]:
    """What failed in each check of INTERPRETED; an empty text if nothing did."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("near", [128, 5])
@pytest.mark.parametrize("order", ["both ways", "causal"])
def test_rows_of_any_length_are_attended_as_in_float64(near: int, order: str, errors: dict[str, str]) -> None:
    assert errors[f"{order} {near}"] == ""


def test_a_layer_gets_what_groups_of_rows_give(errors: dict[str, str]) -> None:
    assert errors["layer"] == ""


@pytest.mark.parametrize("operator", ["attend_short_rows", "_gradients"])
def test_what_is_compiled_for_some_rows_is_for_any_number_of_them(operator: str) -> None:
    sizes, shapes = ShapeEnv(), {"position": (219,), "tiles": (4,)}
    mode = FakeTensorMode(shape_env=sizes)

    def fake(name: str, kind: torch.dtype) -> torch.Tensor:
        shape = shapes.get(name, (219, 4, 16))
        dynamic = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (len(shape) - 1)]
        return mode.from_tensor(
            torch.empty(shape, dtype=kind, device="meta"),
            source=ConstantSource(name),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic),
        )

    names = [*(["gradient"] if operator == "_gradients" else []), "query", "key", "value"]
    given = [fake(name, torch.bfloat16) for name in names]
    given += [fake("position", torch.int64), fake("tiles", torch.int32)]
    with mode:
        make_fx(lambda *states: getattr(short_rows, operator)(*states, 128, False, 0.3))(*given)
    assert sizes.guards == []


@pytest.mark.parametrize("kernel", [short_rows._forward, short_rows._backward])
def test_scores_are_in_float32_though_a_compiler_hands_over_the_scaling_in_float64(kernel: object) -> None:
    constants = {"CAUSAL": False, "WINDOW": False, "SIZE": 64, "ROOM": 128}
    kinds = {"position": "*i64", "tiles": "*i32", "scaling": "fp64", "near": "i32", "heads": "i32"}
    names: list[str] = kernel.arg_names  # type: ignore[attr-defined]
    signature = {
        name: "constexpr"
        if name in constants
        else kinds.get(name, "i32" if name.endswith(("_token", "_head")) else "*bf16")
        for name in names
    }
    source = triton.compiler.ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()})
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    assert "xf64>" not in triton.compile(source, target=target, options={"num_warps": 8}).asm["ttir"]
