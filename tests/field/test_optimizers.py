"""Checkpoints of other optimizers: a run resumes with the optimizer that wrote its checkpoint, and with no other."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minilm.runs.checkpoint import Progress, read_checkpoint
from minilm.runs.checkpoint_saver import CheckpointSaver
from minilm.runs.resume import restore_state
from tests.jobs import CONFIG
from tests.reference import build


@pytest.fixture
def saved(tokenizer: Any, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Save a checkpoint of a few steps of an optimizer, and return its folder and the network."""

    def save(make: Callable[..., torch.optim.Optimizer], steps: int = 2) -> tuple[Path, Any]:
        network = build(tokenizer)
        optimizer = make(network.parameters())
        for _ in range(steps):
            network(input_ids=torch.tensor([[5, 6, 7]])).logits.square().mean().backward()
            optimizer.step()
        saver = CheckpointSaver(tmp_path, network, optimizer, tokenizer, CONFIG, {}, main=True)
        saver.save(Progress(step=steps))
        saver.wait()
        return tmp_path / f"checkpoint-{steps}", network

    return save


class Hidden(torch.optim.Optimizer):
    """SGD with momentum that keeps its state in an attribute in place of `state`."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.buffers: dict[Any, Any] = {}

    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.buffers[parameter] = 0.9 * self.buffers.get(parameter, 0) + parameter.grad
            parameter.data -= 0.1 * self.buffers[parameter]


class Counting(torch.optim.Optimizer):
    """SGD that counts its steps in a plain number, as some optimizers do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[parameter]["count"] = self.state[parameter].get("count", 0) + 1
            parameter.data -= 0.1 / self.state[parameter]["count"] * parameter.grad


ADAMW, SGD = torch.optim.AdamW, torch.optim.SGD
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: ADAMW(parameters, fused=True),
    "Adam": torch.optim.Adam,
    "AdamW with amsgrad": lambda parameters: ADAMW(parameters, amsgrad=True),
    "SGD": lambda parameters: SGD(parameters, lr=0.1),
    "SGD with momentum": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
    "Counting": Counting,
}


@pytest.mark.parametrize("after", OPTIMIZERS)
@pytest.mark.parametrize("before", OPTIMIZERS)
def test_a_checkpoint_resumes_with_its_own_optimizer_alone(
    before: str, after: str, saved: Callable[..., tuple[Path, Any]]
) -> None:
    folder, network = saved(OPTIMIZERS[before])
    optimizer, checkpoint = OPTIMIZERS[after](network.parameters()), read_checkpoint(folder)
    if before != after:
        with pytest.raises(ValueError, match=f"its optimizer is {before}, and that of this run is {after}: ") as caught:
            restore_state(checkpoint, network, optimizer)
        assert "\n" not in str(caught.value)
        return
    restore_state(checkpoint, network, optimizer)
    if before == "Counting":
        assert {type(slots["count"]) for slots in optimizer.state.values()} == {int}
        assert {slots["count"] for slots in optimizer.state.values()} == {2}


def test_an_optimizer_that_hides_its_state_is_refused_by_name(saved: Callable[..., tuple[Path, Any]]) -> None:
    folder, network = saved(Hidden)
    with pytest.raises(ValueError, match="holds no state, so Hidden cannot be resumed from it"):
        restore_state(read_checkpoint(folder), network, Hidden(network.parameters()))


@pytest.mark.parametrize(
    ("before", "after", "works"),
    [("AdamW", "AdamW", True), ("AdamW", "SGD", False), ("SGD", "AdamW", False), ("SGD", "SGD", True)],
)
def test_a_checkpoint_without_the_name_of_its_optimizer_resumes_if_its_state_fits(
    before: str, after: str, works: bool, saved: Callable[..., tuple[Path, Any]]
) -> None:
    folder, network = saved(OPTIMIZERS[before])
    checkpoint = replace(read_checkpoint(folder), optimizer={})
    optimizer = OPTIMIZERS[after](network.parameters())
    with contextlib.nullcontext() if works else pytest.raises(ValueError, match=r"not the state of|holds no state"):
        restore_state(checkpoint, network, optimizer)
