"""Runs with Muon: on two processes as on one, sharded as not, and resumed to the bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from minilm import Config, Data, Optim
from minilm.train import train
from tests.jobs import CONFIG, end_of, finish_all, in_folder, without_dropout, write_text
from tests.launch import read_log
from tests.laws.resume_everywhere import stopped_after

STEPS = 6
# The layers have 8 matrices of 16 x 16 and 4 of 16 x 24. Of two processes, each iterates half of them.
SHARED = """
import minilm.optim.muon
from minilm.optim.muon import orthogonalize

def count(X_BxMxN, iterations):
    assert len(X_BxMxN) == {16: 4, 24: 2}[X_BxMxN.shape[2]], X_BxMxN.shape
    return orthogonalize(X_BxMxN, iterations)

minilm.optim.muon.orthogonalize = count
"""
SHARDED = (
    SHARED
    + """
import os
import torch
from minilm.optim.muon import Muon
from torch.distributed.tensor import DTensor

os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

def step(self, real=Muon.step):
    assert all(isinstance(p, DTensor) for group in self.param_groups for p in group["params"])
    return real(self)

Muon.step = step
"""
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    return replace(
        without_dropout(CONFIG),
        data=Data(source=text, eval_fraction=0.1),
        optim=Optim(name="muon", lr=3e-3, weight_decay=0.1, max_grad_norm=0.5),
        run=replace(CONFIG.run, max_steps=STEPS, keep_last=STEPS),
    )


@pytest.fixture(scope="module")
def one(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one") / "out"
    train(in_folder(config, folder))
    return folder


def difference(ours: Path, theirs: Path) -> float:
    """The largest relative difference of a step's loss or gradient norm."""
    lines = list(zip(read_log(ours)[0], read_log(theirs)[0], strict=True))
    assert len(lines) == STEPS
    return max(abs(a[key] / b[key] - 1) for a, b in lines for key in ("loss", "grad_norm"))


@pytest.mark.scorecard(3)
@pytest.mark.parametrize("planted", [SHARED, SHARDED], ids=["DDP", "FSDP2"])
def test_two_processes_share_the_matrices_and_make_the_steps_of_one(
    planted: str, config: Config, one: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    finish_all([(in_folder(config, tmp_path / "out"), 2)], tmp_path, planted)
    apart = difference(tmp_path / "out", one)
    figure(f"Muon on 1 and 2 processes: {apart:.0e}")
    assert apart <= 1e-5
    stopped = stopped_after(2, tmp_path / "out", tmp_path / "stopped")
    finish_all([(in_folder(config, stopped, resume="latest"), 2)], tmp_path, planted)
    assert end_of(stopped) == end_of(tmp_path / "out")


@pytest.mark.scorecard(2)
@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_run_is_the_same_to_the_bit(step: int, config: Config, one: Path, tmp_path: Path) -> None:
    stopped = stopped_after(step, one, tmp_path / "stopped")
    train(in_folder(config, stopped, resume="latest"))
    assert end_of(stopped) == end_of(one)


def test_a_checkpoint_of_another_optimizer_is_refused(config: Config, one: Path, tmp_path: Path) -> None:
    stopped = stopped_after(4, one, tmp_path / "stopped")
    with pytest.raises(ValueError, match=r'optim\.name was "muon", is "adamw"'):
        train(in_folder(replace(config, optim=replace(config.optim, name="adamw")), stopped, resume="latest"))
