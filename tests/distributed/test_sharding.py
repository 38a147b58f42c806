"""Sharded runs (FSDP2): their steps, checkpoints and results are those of a run that is not sharded."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForMaskedLM

import minilm.runs.session
from minilm import Config, Data, Run, Tokens
from minilm.config.serialization import to_dict
from minilm.distributed.launch import join_job, start
from minilm.distributed.sharding import read_sharding
from minilm.runs.checkpoint import Checkpoint, Progress
from minilm.runs.resume import check_settings
from minilm.runs.state_tensors import load_tensors
from tests.jobs import CONFIG, end_of, finish_all, in_folder, without_dropout, write_text
from tests.jobs import start as start_job
from tests.launch import read_log
from tests.laws.resume_everywhere import stopped_after

ACCELERATE = "accelerate.commands.launch --num_processes 2 --main_process_port 0"
STEPS = 6
# The gradient of step 5 is not finite, because of one process.
SPOILT = """
import os
import minilm.train
from tests.reference import ScaledLosses

spoils = int(os.environ.get("RANK", "0")) == min(1, int(os.environ.get("WORLD_SIZE", "1")) - 1)
step, seed_dropout, counted_losses = [0], minilm.train.seed_dropout, minilm.train.counted_losses

def note(seed, number, rank):
    step[0] = number
    seed_dropout(seed, number, rank)

def spoil(model, batch):
    return ScaledLosses(counted_losses(model, batch), float("nan") if step[0] == 4 and spoils else 1.0)

minilm.train.seed_dropout, minilm.train.counted_losses = note, spoil
"""
SHARDED = f"""{SPOILT}
from minilm.runs.checkpoint_saver import CheckpointSaver

def save(self, progress, real=CheckpointSaver.save):
    weights = self.network.state_dict().values()
    assert sum(w.to_local().numel() for w in weights) < 0.6 * sum(w.numel() for w in weights)
    real(self, progress)

CheckpointSaver.save = save
"""
# By kind: flags of the launcher, what they are as variables, what is planted, and what the run says of itself.
KINDS = {
    "FSDP2": (
        "--use_fsdp --fsdp_version 2",
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        SHARDED,
        "FSDP2: of 9,917 parameters, the main process holds 4,967",
    ),
}


# Each process writes a part of the checkpoint, whatever its size.
IN_PARTS = """
import minilm.runs.checkpoint_parts

minilm.runs.checkpoint_parts.PART_BYTES = 1
"""


def forked(kind: str) -> str:
    """What makes a forked run one of this kind."""
    return f"{KINDS[kind][2]}\nos.environ |= {KINDS[kind][1]}"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    return replace(
        without_dropout(CONFIG),
        data=Data(source=text, eval_fraction=0.1),
        tokens=Tokens(vocab_size=301),  # which two processes do not divide
        optim=replace(CONFIG.optim, ema=0.9),
        run=replace(CONFIG.run, max_steps=STEPS, save_every=STEPS // 2, eval_every=STEPS // 2),
    )


@pytest.fixture(scope="module")
def plain(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    place = tmp_path_factory.mktemp("plain")
    finish_all([(in_folder(config, place / "out"), 1)], place, SPOILT)
    return place / "out"


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Of sharding."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def sharded(config: Config, kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two processes, launched as a user does it."""
    place = tmp_path_factory.mktemp("sharded")
    flags, _, planted, message = KINDS[kind]
    command = [sys.executable, "-m", *ACCELERATE.split(), *flags.split()]
    job = start_job("accelerate", in_folder(config, place / "out"), place, planted=planted, command=command)
    try:
        assert job.gone(240), job.stderr.read_text()
        assert job.status() == 0, job.stderr.read_text()
        assert message in job.stderr.read_text()
    finally:
        job.kill()
    return place / "out"


def apart(ours: Path, theirs: Path) -> float:
    """The largest relative difference of a step's loss or gradient norm, or of an evaluation."""
    differences = []
    logs = ([line for part in read_log(folder) for line in part] for folder in (ours, theirs))
    for mine, other in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "eval_loss", "ema_eval_loss"):
            if mine.get(key) is None or other.get(key) is None:
                assert mine.get(key) == other.get(key)
            else:
                differences.append(abs(mine[key] / other[key] - 1))
    assert len(differences) == 2 * (STEPS - 1) + 4
    return max(differences)


@pytest.mark.scorecard(4)
def test_a_sharded_run_has_the_updates_of_one_process(kind, sharded, plain, figure) -> None:
    difference = apart(sharded, plain)
    figure(f"2 processes, {kind}: {difference:.0e}")
    assert 0 < difference <= 1e-5
    for part in (".", "ema"):
        ours, theirs = (AutoModelForMaskedLM.from_pretrained(folder / part).state_dict() for folder in (sharded, plain))
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


@pytest.mark.scorecard(3)
def test_a_checkpoint_can_be_resumed_sharded_or_not(kind, config, sharded, plain, tmp_path, figure) -> None:
    again, spread, joined = (
        stopped_after(STEPS // 2, reference, tmp_path / name)
        for name, reference in (("again", sharded), ("spread", plain), ("joined", sharded))
    )
    finish_all([(in_folder(config, folder, resume="latest"), 2) for folder in (again, spread)], tmp_path, forked(kind))
    finish_all([(in_folder(config, joined, resume="latest"), 1)], tmp_path, SPOILT)
    figure(f"from 1 to 2, {kind}: {apart(spread, plain):.0e}")
    figure(f"from 2, {kind}, to 1: {apart(joined, plain):.0e}")
    assert max(apart(spread, plain), apart(joined, plain)) <= 1e-5
    assert end_of(again) == end_of(sharded)


@pytest.mark.scorecard(3)
def test_a_checkpoint_in_parts_can_be_resumed_on_any_number_of_processes(
    kind, config, sharded, plain, tmp_path, figure
) -> None:
    whole = tmp_path / "parts"
    finish_all([(in_folder(config, whole), 2)], tmp_path, f"{forked(kind)}\n{IN_PARTS}")
    assert (whole / "model.safetensors").read_bytes() == (sharded / "model.safetensors").read_bytes()
    for step in (STEPS // 2, STEPS):
        ours, theirs = (folder / f"checkpoint-{step}" for folder in (whole, sharded))
        assert len(list(ours.glob("model-*-of-00002.safetensors"))) == 2
        for name in ("model.safetensors", "optimizer.safetensors"):
            tensors = load_tensors(theirs, name)
            assert tensors.keys() == load_tensors(ours, name).keys()
            assert all(torch.equal(tensor, tensors[key]) for key, tensor in load_tensors(ours, name).items())
    again, spread, joined = (
        stopped_after(STEPS // 2, whole, tmp_path / name) for name in ("again", "spread", "joined")
    )
    finish_all(
        [(in_folder(config, folder, resume="latest"), size) for folder, size in ((again, 2), (spread, 4))],
        tmp_path,
        forked(kind),
    )
    finish_all([(in_folder(config, joined, resume="latest"), 1)], tmp_path, SPOILT)
    figure(f"from 2 parts, {kind}, to 4: {apart(spread, plain):.0e}; to 1: {apart(joined, plain):.0e}")
    assert max(apart(spread, plain), apart(joined, plain)) <= 1e-5
    # The last checkpoint of this run has one part again.
    assert end_of(again) == end_of(sharded)


@pytest.mark.scorecard(20)
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "the launch asks for --fsdp_version 1, .*: pass --fsdp_version 2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "True"}, "pass --fsdp_offload_params false"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "pass --fsdp_activation_checkpointing false"),
    ],
)
def test_other_kinds_of_sharding_are_refused(environment: dict[str, str], message: str) -> None:
    assert read_sharding(environment) is None
    with pytest.raises(ValueError, match=message):
        read_sharding({"ACCELERATE_USE_FSDP": "true", **environment})


@pytest.mark.scorecard(20)
@pytest.mark.parametrize("begins", [start, join_job])
def test_deepspeed_is_refused(begins: Callable[[Run], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="does not support DeepSpeed: pass --use_fsdp --fsdp_version 2"):
        begins(Run())


def test_a_loop_of_ones_own_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm.runs.session, "start", lambda run: (SimpleNamespace(is_fsdp2=True), None))
    with (
        pytest.raises(ValueError, match="does not support sharding: launch it with --multi_gpu"),
        minilm.runs.session.begin(CONFIG, "mine", checkpoints=False),
    ):
        pass


# After each step both processes have the same weights, where each has them all.
SAME = """
import minilm.train
import os
import torch
import torch.distributed as dist
from accelerate import Accelerator

train_step, clip = minilm.train.train_step, Accelerator.clip_grad_norm_

def same(accelerator, model, *rest, **settings):
    result = train_step(accelerator, model, *rest, **settings)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(both, weights)
    assert torch.equal(*both)
    return result

if os.environ.get("ACCELERATE_USE_FSDP") is None:
    minilm.train.train_step = same
"""
# Sums in bf16 are numbers of bf16, and so are their halves, which are the means over two processes.
ROUND = f"""{SAME}
def clip_round(self, parameters, *rest):
    parameters = list(parameters)
    for grad in (parameter.grad for parameter in parameters if parameter.grad is not None):
        part = grad.to_local() if hasattr(grad, "to_local") else grad
        assert part.dtype == torch.float32 and torch.equal(part, part.bfloat16().float())
    return clip(self, parameters, *rest)

Accelerator.clip_grad_norm_ = clip_round
"""


def rounded(config: Config) -> Config:
    return replace(config, run=replace(config.run, reduce_dtype="bf16"))


def test_gradients_summed_in_bf16_are_those_of_fp32_but_for_rounding(config, tmp_path, figure) -> None:
    sharded = f"import os\nos.environ |= {{'ACCELERATE_USE_FSDP': 'true', 'FSDP_VERSION': '2'}}\n{ROUND}"
    config = replace(config, run=replace(config.run, max_steps=4, save_every=0, eval_every=4))
    for name, kind, planted in (
        ("fp32", config, SAME),
        ("bf16", rounded(config), ROUND),
        ("fsdp2", rounded(config), sharded),
    ):
        finish_all([(in_folder(kind, tmp_path / name), 2)], tmp_path, planted)
    expected = [line["loss"] for line in read_log(tmp_path / "fp32")[0]]
    for name in ("bf16", "fsdp2"):
        found = [line["loss"] for line in read_log(tmp_path / name)[0]]
        assert found[0] == pytest.approx(expected[0], rel=1e-6)  # before the first update
        difference = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
        figure(f"{name}: {difference:.0e}")
        assert 0 < difference < 1e-2


def test_a_resume_refuses_another_reduce_dtype(config, tmp_path) -> None:
    before = Checkpoint(folder=tmp_path, progress=Progress(), config=to_dict(config), inputs={}, scaler={})
    assert check_settings(before, config) == []
    with pytest.raises(ValueError, match=r'run\.reduce_dtype was "fp32", is "bf16"'):
        check_settings(before, rounded(config))
