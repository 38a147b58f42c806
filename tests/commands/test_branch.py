"""`minilm branch`: a checkpoint of one run continues as another run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minilm import Config, Phase
from minilm.train import train
from tests.jobs import config_in, end_of, of_any_length
from tests.launch import ROOT


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The configuration of a finished run of six steps, whose rates do not depend on its length."""
    place = tmp_path_factory.mktemp("trunk")
    config = of_any_length(config_in(place, steps=6, save_every=2))
    # A branch of a run that replaced another one replaces nothing.
    config = replace(config, run=replace(config.run, keep_last=9, overwrite=True, output_dir=str(place / "out")))
    train(config)
    return config


def folder_of(config: Config) -> Path:
    return Path(str(config.run.output_dir))


def test_a_branch_has_the_settings_of_its_run_and_a_folder_beside_it(trunk: Config, tmp_path: Path) -> None:
    phase = "start=6 max-length=16 examples=4"
    words = ("--at", "4", "--run.max-steps", "9", "--optim.schedule", "wsd", "--optim.decay", "3")
    command = [sys.executable, "-m", "minilm.commands.main", "branch", str(folder_of(trunk)), *words]
    command += ["--run.phases", phase]
    # The order of sums depends on the number of threads.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"branching from {folder_of(trunk)}/checkpoint-4" in done.stderr
    whole = replace(
        trunk,
        optim=replace(trunk.optim, schedule="wsd", decay=3),
        run=replace(trunk.run, max_steps=9, output_dir=str(tmp_path / "whole"), phases=(Phase.parse(phase),)),
    )
    train(whole)
    tail = Path(f"{folder_of(trunk)}-from-4")
    assert end_of(tail) == end_of(tmp_path / "whole")
    ours, theirs = (json.loads((folder / "run.json").read_text())["config"] for folder in (tail, tmp_path / "whole"))
    for settings in (ours, theirs):
        settings["run"].update(output_dir=None, overwrite=False, resume=None)
    assert ours == theirs


def break_settings(folder: Path) -> None:
    (folder / "checkpoint-4" / "training.json").write_text("{")


def put_code_inside(folder: Path) -> None:
    path = folder / "checkpoint-4" / "training.json"
    state = json.loads(path.read_text())
    state["config"]["objective"] = {"name": "Mine", "defined_in": {"module": "mine", "file": str(folder / "mine.py")}}
    path.write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("words", "spoil", "says"),
    [
        (("--at", "5"), None, "error: OUT has no checkpoint of step 5; it has: 2, 4, 6"),
        (("--at", "4", "--run.resume", "x"), None, "error: minilm branch starts from the checkpoint of --at: leave"),
        (
            ("--at", "4", "--run.output-dir", "OUT"),
            None,
            "error: run.output_dir OUT is the folder of the run itself: give",
        ),
        (("--at", "4"), break_settings, "error: OUT/checkpoint-4: the settings of its run cannot be read (Expecting"),
        (
            ("--at", "4"),
            put_code_inside,
            "error: OUT/checkpoint-4: the settings of its run cannot be read (its objective",
        ),
        (("--at", "4", "--batch_size", "8"), None, "error: unknown flag --batch_size"),
    ],
    ids=[
        "no such step",
        "resume",
        "the same folder",
        "damaged settings",
        "code in the folder",
        "a flag of another program",
    ],
)
def test_a_branch_that_cannot_begin_is_refused_in_one_line(
    words: tuple[str, ...], spoil: Any, says: str, trunk: Config, tmp_path: Path, run: Any
) -> None:
    folder = tmp_path / "out"
    for step in (2, 4, 6):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        state = (folder_of(trunk) / f"checkpoint-{step}" / "training.json").read_text()
        (folder / f"checkpoint-{step}" / "training.json").write_text(state)
    if spoil is not None:
        spoil(folder)
    status, _, error = run("branch", str(folder), *(word.replace("OUT", str(folder)) for word in words))
    assert status == 2
    assert len(error) == 1
    assert error[0].replace(str(folder), "OUT").startswith(says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
