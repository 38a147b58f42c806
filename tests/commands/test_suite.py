"""`minilm suite`: a killed one goes on to the same figures, a finished one changes nothing, and its table is right."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import PreTrainedTokenizerBase

from minilm.commands import suite, suite_jobs
from minilm.commands.job_pool import JobPool
from minilm.commands.suite_runs import SuiteRun, list_runs, parse_tasks
from minilm.commands.suite_table import format_latex, format_markdown, summarise
from minilm.config.serialization import read_run_config, to_dict
from minilm.data.glue import TASKS
from minilm.train import train
from minilm.utils.errors import TrainingStopped
from tests.checkpoints import network
from tests.glue_layout import write_task
from tests.launch import ROOT

Runner = Callable[..., tuple[object, list[str], list[str]]]

TASK_NAMES = ("mrpc", "stsb")
FLAGS = (
    *("--run.max-steps", "300", "--run.save-every", "9999", "--run.eval-every", "300", "--run.precision", "fp32"),
    *("--batch.examples", "4", "--batch.max-length", "32"),
)
LIMIT_SECONDS = 600
LEFT_BY_KILL = ("model.safetensors", "checkpoint-20/manifest.json", "checkpoint-20/model.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder with a checkpoint in `model`, and tasks in the layout of GLUE's downloads in `raw`."""
    place = tmp_path_factory.mktemp("suite")
    network(tokenizer).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    for name in TASK_NAMES:
        write_task(place / "raw", name)
    return place


def words_of(place: Path, output: Path, *flags: str) -> list[str]:
    words = ["suite", str(place / "model"), "--tasks", *TASK_NAMES, "--data", str(place / "raw")]
    return [*words, "--rates", "1e-3", "--seeds", "7", "--output", str(output), *FLAGS, *flags]


def count_steps(output: Path) -> int:
    """Return the number of steps that all runs have logged."""
    return sum(path.read_bytes().count(b'"loss"') for path in output.glob("*/*/*/log.jsonl"))


@dataclass
class Call:
    """A call of `minilm suite` in its own process."""

    process: subprocess.Popen[str]
    output: Path
    log: Path

    @classmethod
    def start(cls, place: Path, output: Path, name: str) -> "Call":
        command = [sys.executable, "-m", "minilm.commands.main", *words_of(place, output, "--jobs", "2")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (place / name).open("w") as file:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT, env=environment
            )
        return cls(process, output, place / name)

    def wait_for_steps(self, steps: int) -> None:
        """Wait until the runs have logged so many steps in all."""
        end = time.monotonic() + LIMIT_SECONDS
        while count_steps(self.output) < steps and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        if count_steps(self.output) < steps or self.process.poll() is not None:
            self.process.kill()
            pytest.fail(f"no {steps} steps in {LIMIT_SECONDS} s: {self.log.read_text()}")

    def end(self) -> tuple[str, int, list[str]]:
        """Wait for the end, and return the output, the status and the lines of the log."""
        output, _ = self.process.communicate()
        return output, self.process.returncode, self.log.read_text().splitlines()


@dataclass
class Finished:
    """A suite that was interrupted, killed, and continued to its end."""

    output: Path
    interrupted: tuple[str, int, list[str]]
    saved: list[str]
    """The checkpoints after the interrupt. Without a signal, a run saves one after its last step alone."""
    finished_before_kill: int
    surviving: list[psutil.Process]
    """The processes that lived on after the kill."""
    last: tuple[str, int, list[str]]


@pytest.fixture(scope="module")
def finished(place: Path) -> Finished:
    output = place / "finished"
    call = Call.start(place, output, "first")
    call.wait_for_steps(1)
    call.process.send_signal(signal.SIGINT)
    interrupted = call.end()
    saved = [path.parent.name for path in output.glob("*/*/*/checkpoint-*/manifest.json")]

    call = Call.start(place, output, "second")
    call.wait_for_steps(count_steps(output) + 1)
    children = psutil.Process(call.process.pid).children(recursive=True)
    call.process.kill()
    call.end()
    _, surviving = psutil.wait_procs(children, timeout=60)
    done = len(list(output.glob("*/*/*/all_results.json")))
    last = Call.start(place, output, "third").end()
    return Finished(output, interrupted, saved, done, surviving, last)


def test_ctrl_c_lets_the_runs_save_and_says_how_to_go_on(finished: Finished) -> None:
    output, status, log = finished.interrupted
    assert (output, status) == ("", 128 + signal.SIGINT)
    # Python may warn of a semaphore that an interrupted process has left.
    log = [line for line in log if "resource_tracker" not in line]
    assert log[-2:] == ["the runs save their checkpoints; the same command continues the suite", "interrupted"]
    assert finished.saved
    assert "checkpoint-300" not in finished.saved


def test_a_kill_ends_all_processes_and_the_same_command_goes_on(finished: Finished) -> None:
    assert finished.surviving == []
    assert finished.finished_before_kill < 2
    output, status, log = finished.last
    assert status == 0, log
    assert output == (finished.output / "table.md").read_text()
    ends = [line.split("]")[0] for line in log if " left" in line]
    assert ends == [f"[{number}/2" for number in range(finished.finished_before_kill + 1, 3)]


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the time of change and the content of each file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_further_call_prints_the_same_table_and_changes_no_file(finished: Finished, place: Path, run: Runner) -> None:
    before = contents(finished.output)
    status, output, error = run(*words_of(place, finished.output))
    assert (status, error) == (None, [])
    assert output == finished.last[0].splitlines()
    assert contents(finished.output) == before
    assert {"suite.json", "table.md", "table.tex", "mrpc/lr-0.001/seed-7/all_results.json"} < before.keys()
    assert not [name for name in before if "checkpoint" in name or name.endswith("model.safetensors")]
    _, output, _ = run(*words_of(place, finished.output, "--dry-run"))
    assert [line.split()[-1] for line in output[:2]] == ["finished"] * 2
    assert contents(finished.output) == before


def test_each_run_has_the_figures_of_the_run_that_its_run_json_describes(finished: Finished, tmp_path: Path) -> None:
    folders = sorted(path.parent for path in finished.output.glob("*/*/*/run.json"))
    assert len(folders) == 2
    for folder in folders:
        config = read_run_config(str(folder / "run.json"))
        assert folder == finished.output / folder.parts[-3] / f"lr-{config.optim.lr:g}" / f"seed-{config.run.seed}"
        alone = replace(config.run, output_dir=str(tmp_path / folder.parent.name / folder.parts[-3]), save_every=0)
        figures = train(replace(config, run=alone)).figures
        before = json.loads((folder / "all_results.json").read_text())
        names = TASKS[folder.parts[-3]].figures
        assert [before[name] for name in ("eval_loss", *names)] == [figures[name] for name in ("eval_loss", *names)]


def test_a_dry_run_lists_the_runs_and_writes_nothing(
    place: Path, tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "_open_pool", lambda suite, runs: Calls(1, 1))
    status, lines, _ = run(*words_of(place, tmp_path / "out", "--dry-run"), "--tasks", "stsb", "--seeds", "0", "1")
    assert status is None
    assert [line.split()[:5] for line in lines[:2]] == [["stsb", "lr", "0.001", "seed", seed] for seed in ("0", "1")]
    assert all("300 steps, " in line for line in lines[:2])
    assert lines[2] == f"2 of 2 runs to do in {tmp_path / 'out'}, 1 side by side"
    assert not (tmp_path / "out").exists()


REFUSED = {
    "an unknown task": ("--tasks mrpc colaa", "--tasks: unknown task 'colaa': did you mean 'cola'?"),
    "a task without folder": ("--tasks mrpc qqp", "raw has no folder QQP"),
    "a flag of the suite": ("--optim.lr 1e-3", "minilm suite takes no --optim.lr: pass --rates"),
    "an old name of it": ("--run.output_dir x", "minilm suite takes no --run.output_dir: pass --output"),
    "a flag of the data": ("--data.source x", "minilm suite takes no --data.source: the tasks decide it"),
    "a rate twice": ("--rates 1e-3 0.001", "--rates has 0.001 twice"),
    "a seed twice": ("--seeds 1 1", "--seeds has 1 twice"),
    "a wrong value": ("--batch.examples 0", "batch.examples must be at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line_before_any_work(case: str, place: Path, tmp_path: Path, run: Runner) -> None:
    flags, message = REFUSED[case]
    status, _, error = run(*words_of(place, tmp_path / "out"), *flags.split())
    assert status == 2
    # tyro puts a wrong value into a box.
    assert message in " ".join(error)
    assert len(error) == 1 or case == "a wrong value"
    assert not (tmp_path / "out").exists()


def test_other_settings_and_changed_files_are_refused(
    finished: Finished, place: Path, tmp_path: Path, run: Runner
) -> None:
    status, _, (line,) = run(*words_of(place, finished.output), "--run.max-steps", "4")
    assert (status, "run.max_steps was 300, is 4" in line) == (2, True)
    path = place / "raw" / "MRPC" / "dev.tsv"
    before = path.read_bytes()
    try:
        path.write_bytes(before.replace(b"plain", b"other"))
        status, _, (line,) = run(*words_of(place, finished.output))
    finally:
        path.write_bytes(before)
    assert (status, f"{path} has changed since {finished.output} was begun" in line) == (2, True)


def test_a_setting_that_an_older_version_did_not_have_is_no_other_setting(tmp_path: Path) -> None:
    (own,) = list_runs("model", parse_tasks(["cola"]), [], [1e-5], [0], tmp_path, [])
    settings = to_dict(own.config)
    del settings["optim"]["muon_scale"]
    own.folder.mkdir(parents=True)
    (own.folder / "run.json").write_text(json.dumps({"config": settings}))
    own.check_settings()
    other = replace(own, config=replace(own.config, optim=replace(own.config.optim, muon_scale=0.3)))
    with pytest.raises(ValueError, match=r"optim\.muon_scale was 0\.2, is 0\.3"):
        other.check_settings()


def test_a_missing_file_of_a_task_is_refused(place: Path, tmp_path: Path, run: Runner) -> None:
    (write_task(tmp_path / "raw", "rte") / "dev.tsv").unlink()
    status, _, (line,) = run(*words_of(place, tmp_path / "out"), "--tasks", "rte", "--data", str(tmp_path / "raw"))
    assert (status, "RTE has no dev.tsv" in line) == (2, True)


class Calls(JobPool):
    """Makes the calls in this process."""

    def call(self, function: Any, arguments: Any) -> Iterator[Any]:
        for argument in arguments:
            yield argument, function(argument)


def test_a_bad_row_of_one_task_ends_the_suite_before_any_run(
    place: Path, tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "_open_pool", lambda suite, runs: Calls(1, 1))
    write_task(tmp_path / "raw", "mrpc")
    with (write_task(tmp_path / "raw", "rte") / "dev.tsv").open("a") as file:
        file.write("7\tonly this\n")
    words = [*words_of(place, tmp_path / "out"), "--tasks", "mrpc", "rte", "--data", str(tmp_path / "raw")]
    status, _, error = run(*words)
    assert (status, error[-1].endswith("dev.tsv, line 8: 2 fields where 4 are expected; download the file again")) == (
        2,
        True,
    )
    assert not list((tmp_path / "out").glob("*/*/seed*"))


def test_a_failed_run_is_left_out_and_tried_again_by_the_next_call(
    place: Path, tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []

    def train_or_fail(config: Any) -> None:
        rates.append(config.optim.lr)
        if config.optim.lr == 1e-2 and len(rates) < 3:
            raise TrainingStopped("no finite gradient in 10 steps in a row", 1)
        folder = Path(str(config.run.output_dir))
        folder.mkdir(parents=True)
        (folder / "all_results.json").write_text(json.dumps({"pearson": 0.5, "spearman": 0.25}))

    monkeypatch.setattr(suite, "_open_pool", lambda suite, runs: Calls(1, 1))
    monkeypatch.setattr(suite_jobs, "train", train_or_fail)
    words = [*words_of(place, tmp_path / "out"), "--tasks", "stsb", "--rates", "1e-3", "1e-2"]
    status, output, error = run(*words)
    assert (status, error[-1]) == (
        1,
        "stopped: 1 of 2 runs failed and are not in the table, such as stsb lr 0.01 seed 7: no finite gradient in 10 "
        "steps in a row",
    )
    assert "| 50.0 / 25.0 |" in output[2]
    # The same command tries the failed run again, and no other. It removes what a kill left of a finished run.
    left = [tmp_path / "out" / "stsb" / "lr-0.001" / "seed-7" / name for name in LEFT_BY_KILL]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    assert run(*words)[0] is None
    assert rates == [1e-3, 1e-2, 1e-2]
    assert not [path for path in left if path.exists()]


def figures_in(folder: Path, name: str, figures: dict[float, list[dict[str, float]]]) -> list[SuiteRun]:
    """Return runs of a task with these figures of each rate, a dictionary for each seed."""
    seeds = range(max(map(len, figures.values())))
    runs = list_runs("model", parse_tasks([name]), [], [*figures], [*seeds], folder, [])
    for own in runs:
        values = figures[own.config.optim.lr]
        if own.config.run.seed < len(values):
            own.folder.mkdir(parents=True)
            (own.folder / "all_results.json").write_text(json.dumps(values[own.config.run.seed]))
    return runs


def test_the_best_rate_has_the_highest_median_and_the_average_leaves_wnli_out(tmp_path: Path) -> None:
    runs = figures_in(
        tmp_path,
        "mrpc",
        {
            # The highest mean and the highest single score, but not the highest median.
            1e-5: [{"accuracy": a, "f1": a} for a in (0.5, 0.6, 1.0)],
            2e-5: [{"accuracy": a, "f1": a + 0.1} for a in (0.4, 0.62, 0.62)],
            3e-5: [{"accuracy": a, "f1": a} for a in (0.9, math.nan, math.nan)],
        },
    )
    runs += figures_in(tmp_path, "cola", {1e-5: [{"matthews": 0.25}]})
    runs += figures_in(tmp_path, "wnli", {1e-5: [{"accuracy": 0.99}]})
    both = {"accuracy_validation_matched": 0.75, "accuracy_validation_mismatched": 0.5}
    runs += figures_in(tmp_path, "mnli", {1e-5: [both]})
    summary = summarise("model", runs)
    mrpc = summary["tasks"]["mrpc"]
    assert (mrpc["rate"], mrpc["seeds"]) == (2e-5, [0, 1, 2])
    assert mrpc["figures"]["accuracy"] == {"median": 0.62, "lowest": 0.4, "highest": 0.62}
    assert mrpc["rates"]["3e-05"] == {
        "score": None,
        "runs": {str(seed): {"accuracy": value, "f1": value} for seed, value in enumerate((0.9, None, None))},
    }
    scores = {"mrpc": 0.67, "cola": 0.25, "mnli": 0.625}
    average = summary["averages"]["GLUE"]
    assert average["tasks"] == [*scores]
    assert average["score"] == pytest.approx(sum(scores.values()) / 3)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary

    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in format_markdown(summary).splitlines()]
    assert table[2] == ["MRPC", "accuracy / F1", "62.0 / 72.0", "40.0 to 62.0 / 50.0 to 72.0", "2e-05", "3"]
    assert table[5][:3] == ["MNLI", "accuracy m / mm", "75.0 / 50.0"]
    assert table[6][:3] == ["GLUE average without WNLI", "3 tasks", "51.5"]
    latex = format_latex(summary).splitlines()
    assert "MRPC & accuracy / F1 & 62.0 / 72.0 & 40.0 to 62.0 / 50.0 to 72.0 & 2e-05 & 3 \\\\" in latex


def test_names_of_benchmarks_stand_for_their_tasks_and_each_task_counts_once() -> None:
    assert [task.name for task in parse_tasks(["rte", "glue", "copa"])] == [
        *("rte", "cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "wnli", "copa"),
    ]
    assert [task.name for task in parse_tasks(["superglue"])] == ["boolq", "cb", "copa", "superglue-rte", "wic"]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_of_the_hub_has_its_columns_and_splits(name: str, tmp_path: Path) -> None:
    (only,) = list_runs("model", parse_tasks([name]), [], [1e-5], [3], tmp_path, ["--run.epochs", "7"])
    data, task = only.config.data, TASKS[name]
    assert (only.config.run.epochs, only.config.run.seed, only.config.optim.lr) == (7, 3, 1e-5)
    assert only.config.batch.max_length == (256 if name == "boolq" else 128)
    assert data.eval_split == ("validation_matched+validation_mismatched" if name == "mnli" else "validation")
    if name in ("copa", "wic"):
        assert data.source == str(tmp_path / "data" / name)
    else:
        assert (data.source, data.config) == (
            f"{'nyu-mll/glue' if task.benchmark == 'GLUE' else 'aps/super_glue'}",
            task.config,
        )
        assert (data.column, data.pair_column) == task.columns


def test_a_pool_passes_results_and_errors_on() -> None:
    with JobPool(2, 1) as pool:
        results = dict(pool.call(os.path.basename, ["a/b", "c/d", "e/f"]))
        assert results == {"a/b": "b", "c/d": "d", "e/f": "f"}
        with pytest.raises(ValueError, match=r"\Ainvalid literal for int\(\) with base 10: 'x'\Z"):
            list(pool.call(int, ["x"]))
        with pytest.raises(RuntimeError, match="TypeError: object of type 'int' has no len"):
            list(pool.call(len, [3]))  # type: ignore[list-item]


def test_a_killed_process_of_a_pool_is_reported() -> None:
    with JobPool(1, 1) as pool, pytest.raises(OSError, match="ended by SIGKILL: perhaps the memory was full"):
        list(pool.call(signal.raise_signal, [signal.SIGKILL]))
