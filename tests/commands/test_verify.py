"""`minilm verify`: the steps between two checkpoints, made again, give the same bits; a changed row or bit does not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilm import Config, Run
from minilm.commands.verify import StepWindow, choose_windows
from minilm.runs.model_card import write_verification
from minilm.train import train
from tests.checkpoints import facts
from tests.jobs import config_in, finish_all
from tests.own_objectives import build_config, write_rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run of six steps with dropout, whose text is beside it."""
    place = tmp_path_factory.mktemp("verify")
    config = config_in(place, steps=6, save_every=2)
    run = replace(config.run, eval_every=3, keep_last=9, output_dir=str(place / "out"))
    train(replace(config, run=run))
    return place / "out"


def copy(finished: Path, place: Path) -> Path:
    """Return a copy of a run that reads a copy of its text."""
    shutil.copytree(finished.parent, place, dirs_exist_ok=True)
    for path in (place / "out").rglob("*.json"):
        path.write_text(path.read_text().replace(str(finished.parent), str(place)))
    for path in (place / "out").glob("checkpoint-*"):
        update_manifest(path, "training.json")
    return place / "out"


def update_manifest(checkpoint: Path, *names: str) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest |= {name: facts(checkpoint / name) for name in names}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_each_window_is_equal_and_the_card_says_so_once(finished: Path, tmp_path: Path, run: Any) -> None:
    folder = copy(finished, tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "README.md"}
    card = (folder / "README.md").read_text()
    for _ in range(2):
        status, lines, _ = run("verify", str(folder), "--windows", "3")
        assert status is None
        assert lines == [
            f"steps {first} to {first + 1}: equal to the bit: weights, optimizer state and 2 losses"
            for first in (1, 3, 5)
        ]
    verified = (folder / "README.md").read_text()
    (line,) = [line for line in verified.splitlines() if line not in card.splitlines()]
    assert line.startswith("Verified: `minilm verify` made the steps 1 to 2, 3 to 4, 5 to 6 again, and got the same")
    assert verified.replace(f"{line}\n\n", "") == card
    machine = json.loads((folder / "run.json").read_text())
    assert machine["hardware"]["device"] in line
    assert f"torch {machine['versions']['torch']}" in line
    assert before == {path: path.read_bytes() for path in before}


def test_a_changed_row_is_told_also_where_no_step_uses_it(finished: Path, tmp_path: Path, run: Any) -> None:
    folder = copy(finished, tmp_path)
    (folder / "README.md").write_text(
        (folder / "README.md").read_text().replace("| setting", "Verified: `minilm verify` x\n\n| setting")
    )
    lines = (tmp_path / "text.txt").read_text().splitlines()
    (tmp_path / "text.txt").write_text("\n".join([*lines[:-1], lines[-1] + " fox"]))
    status, output, _ = run("verify", str(folder))
    assert status == 1
    assert len(output) == 3
    for line in output:
        assert "not equal: " in line
        assert "the training examples were {" in line or "the evaluation examples were {" in line
        assert "set them back" not in line
    assert "Verified" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("listed", [True, False])
def test_a_changed_bit_of_the_weights_is_told(listed: bool, finished: Path, tmp_path: Path, run: Any) -> None:
    folder = copy(finished, tmp_path)
    path = folder / "checkpoint-4" / "model.safetensors"
    weights = load_file(path)
    name = min(weights, key=lambda name: weights[name].size)
    weights[name] = np.array(weights[name])
    weights[name].view(np.uint32).flat[0] ^= 1
    save_file(weights, path, {"format": "pt"})
    if listed:
        update_manifest(folder / "checkpoint-4", "model.safetensors")
    status, output, _ = run("verify", str(folder))
    assert status == 1
    assert output[0].startswith("steps 1 to 2: equal to the bit")
    if listed:
        assert output[1] == "steps 3 to 4: not equal: the weights differ"
        assert output[2].startswith("steps 5 to 6: not equal: the weights differ; the optimizer state differs")
    else:
        assert all("model.safetensors is damaged" in line for line in output[1:])


def test_a_changed_loss_in_the_log_is_told(finished: Path, tmp_path: Path, run: Any) -> None:
    folder = copy(finished, tmp_path)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    line = next(line for line in lines if line["step"] == 3 and "eval_loss" in line)
    line["eval_loss"] += 1e-3
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, output, _ = run("verify", str(folder))
    assert status == 1
    assert [line.split(" was ")[0] for line in output[1:2]] == [
        "steps 3 to 4: not equal: eval_loss of the evaluation after step 3"
    ]
    assert all(": equal to the bit" in output[number] for number in (0, 2))


def test_another_library_is_named_with_the_largest_difference_of_the_losses(
    finished: Path, tmp_path: Path, run: Any
) -> None:
    folder = copy(finished, tmp_path)
    for path in folder.glob("checkpoint-*"):
        state = json.loads((path / "training.json").read_text())
        state["inputs"]["versions"]["torch"] = "2.0.0"
        (path / "training.json").write_text(json.dumps(state))
        update_manifest(path, "training.json")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    next(line for line in lines if line["step"] == 6 and "loss" in line)["loss"] += 0.25
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, output, _ = run("verify", str(folder))
    assert status == 1
    assert output[2].startswith("steps 5 to 6: not equal: loss of the step 6 was ")
    assert "; the losses differ by at most 0.25 nats, and the machine has changed: torch was 2.0.0, is " in output[2]


def test_half_a_line_that_a_kill_left_in_the_log_is_no_difference(finished: Path, tmp_path: Path, run: Any) -> None:
    folder = copy(finished, tmp_path)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    status, output, error = run("verify", str(folder), "--windows", "1")
    assert status is None, error
    assert output[0].endswith(": equal to the bit: weights, optimizer state and 2 losses")


def test_a_card_that_cannot_be_written_takes_no_result_away(
    finished: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(finished, tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("minilm.commands.verify.write_verification", refuse)
    status, output, error = run("verify", str(folder), "--windows", "1")
    assert status is None, error
    assert output[0].endswith(": equal to the bit: weights, optimizer state and 2 losses")
    assert error[-1] == f"the result is not in {folder / 'README.md'}, which cannot be written: Read-only file system"


def test_the_paragraph_replaces_only_an_earlier_one_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("Verified: by two readers.\n\n| setting | value |\n")
    write_verification(tmp_path, "`minilm verify` made the steps 1 to 2 again.")
    write_verification(tmp_path, "`minilm verify` made the steps 3 to 4 again.")
    text = (
        "Verified: by two readers.\n\nVerified: `minilm verify` made the steps 3 to 4 again.\n\n| setting | value |\n"
    )
    assert path.read_text() == text


def test_windows_lie_between_neighbouring_checkpoints(finished: Path, tmp_path: Path, run: Any) -> None:
    folder = copy(finished, tmp_path)
    assert choose_windows(folder, 9) == [StepWindow(start=start, stop=start + 2) for start in (0, 2, 4)]
    assert {tuple(choose_windows(folder, 1)) for _ in range(60)} == {(window,) for window in choose_windows(folder, 9)}
    shutil.rmtree(folder / "checkpoint-2")
    assert choose_windows(folder, 9) == [StepWindow(start=4, stop=6)]
    shutil.rmtree(folder / "checkpoint-4")
    status, _, error = run("verify", str(folder))
    assert status == 2
    assert error[-1].endswith("are at most run.save_every=2 steps apart: train with --run.keep-last 4")
    shutil.rmtree(folder / "checkpoint-6")
    status, _, error = run("verify", str(folder))
    assert status == 2
    assert error[-1].endswith("has no checkpoint: give the output folder of a run with run.save_every above 0")


# A loss that compares examples, and one of tokens. The other tests have language models.
RUNS = [("triplets", 1), ("names", 1), ("triplets", 2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Return the output folder of the run of an objective on so many processes."""
    place = tmp_path_factory.mktemp("verify-objectives")
    source = str(write_rows(place / "rows.jsonl"))

    def config(name: str, processes: int) -> Config:
        run = Run(max_steps=6, eval_every=3, save_every=2, keep_last=9, precision="fp32")
        return build_config(name, source, run=replace(run, output_dir=str(place / f"{name}-{processes}")))

    finish_all([(config(name, processes), processes) for name, processes in RUNS], place)
    return lambda *each: Path(config(*each).run.output_dir or "")


@pytest.mark.parametrize("name", ["triplets", "names"])
def test_runs_of_other_objectives_are_equal(name: str, runs: Callable[[str, int], Path], run: Any) -> None:
    status, lines, _ = run("verify", str(runs(name, 1)))
    assert status is None
    assert len(lines) == 3


def test_a_run_of_two_processes_is_repeated_on_two(runs: Callable[[str, int], Path], run: Any) -> None:
    status, lines, error = run("verify", str(runs("triplets", 2)))
    assert status is None, error
    assert len(lines) == 3
