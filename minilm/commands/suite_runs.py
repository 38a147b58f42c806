"""The runs of `minilm suite`: a run for each task, learning rate and seed. This file does not import torch."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minilm.config import Batch, Classification, Config, Data, Model, MultipleChoice, Optim, Run
from minilm.config.command_line import parse_flags
from minilm.config.serialization import default_settings, flatten_settings, to_dict
from minilm.data.glue import HUB_IDS, TASKS, Task, TaskFiles, find_task_files
from minilm.utils.atomic_files import hash_file, write_atomically
from minilm.utils.validation import check, suggest_name

DATA = "data"
"""The subfolder of the output folder for the tasks as datasets."""

# As recipes/classify.py.
_DEFAULT = Config(batch=Batch(examples=32, max_length=128), optim=Optim(lr=2e-5, warmup=0.06), run=Run(epochs=3.0))
# The passages of these tasks are longer.
_MAX_LENGTHS = {"boolq": 256}
# The flags that the suite sets itself, or that make no sense for many runs, and what to pass in their place.
_OWN_FLAGS = {
    "--data": "the tasks decide it; pass --data and --tasks",
    "--model.name": "pass the model as the first argument",
    "--objective": "the tasks decide it",
    "--optim.lr": "pass --rates",
    "--run.seed": "pass --seeds",
    "--run.output-dir": "pass --output",
    "--run.resume": "the same command continues the runs",
    "--run.overwrite": "pass another --output",
    "--run.push-to-hub": "a suite does not upload its runs",
    "--from-run": "pass the flags themselves",
    "--seeds": "pass it once",
}
# Settings that may differ between the calls of a suite, because they do not change a result.
_MAY_CHANGE = (
    *("run.output_dir", "run.resume", "run.overwrite", "run.trackers", "run.timeout", "run.save_every"),
    *("batch.micro_tokens", "batch.workers"),
)


@dataclass(frozen=True, kw_only=True)
class SuiteRun:
    """A run of the suite."""

    task: Task
    config: Config
    """Its settings. `run.output_dir` is its folder."""
    files: TaskFiles | None
    """The files of the original download; None if the task comes from the hub."""

    @property
    def folder(self) -> Path:
        """The output folder of the run."""
        return Path(str(self.config.run.output_dir))

    @property
    def name(self) -> str:
        """What messages call the run."""
        return f"{self.task.name} lr {self.config.optim.lr:g} seed {self.config.run.seed}"

    def read_figures(self) -> dict[str, float] | None:
        """Return the figures of the task at the end of the run, or None if the run is not finished.

        Raise ValueError if the file that holds them is damaged.
        """
        path = self.folder / "all_results.json"
        if not path.is_file():
            return None
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            return {name: float(results[name]) for name in self.task.figures}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: cannot be read; remove the folder to repeat the run") from error

    def is_done(self) -> bool:
        """Return whether the run is finished and its checkpoints are removed."""
        return self.read_figures() is not None and self.find_step() == 0

    def find_step(self) -> int:
        """Return the step of the newest checkpoint, 0 if there is none."""
        numbers = [
            path.parent.name.removeprefix("checkpoint-") for path in self.folder.glob("checkpoint-*/manifest.json")
        ]
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    def check_settings(self) -> None:
        """Raise ValueError if the folder holds a run with other settings."""
        path = self.folder / "run.json"
        if not path.is_file():
            return
        try:
            before = flatten_settings(json.loads(path.read_text(encoding="utf-8"))["config"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: cannot be read; remove the folder to repeat the run") from error
        # A run of an older version lacks newer settings. It behaved as their defaults do.
        before = flatten_settings(default_settings(type(self.config.objective))) | before
        now = flatten_settings(to_dict(self.config))
        # The output folder, which may be moved, holds the data.
        ignored = (*_MAY_CHANGE, "data.source") if self.files is not None else _MAY_CHANGE
        for name in sorted(before.keys() | now.keys()):
            if name not in ignored and before.get(name) != now.get(name):
                raise ValueError(
                    f"{self.folder} holds a run with other settings: {name} was {json.dumps(before.get(name))}, is "
                    f"{json.dumps(now.get(name))}; pass the same, or another --output"
                )


def parse_tasks(names: Sequence[str]) -> list[Task]:
    """Return the tasks of these names, where `glue` and `superglue` stand for all tasks of a benchmark."""
    tasks: dict[str, Task] = {}
    for name in names:
        group = {each.name: each for each in TASKS.values() if each.benchmark.lower() == name}
        if not group and name not in TASKS:
            raise ValueError(f"--tasks: unknown task {suggest_name(name, [*TASKS, 'glue', 'superglue'])}")
        tasks |= group or {name: TASKS[name]}
    return list(tasks.values())


def list_runs(
    model: str,
    tasks: Sequence[Task],
    folders: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    output: Path,
    flags: Sequence[str],
) -> list[SuiteRun]:
    """Return the runs of the suite: for each task all rates, and for each rate all seeds.

    folders: where the folders of the tasks are. Without one, the tasks come from the hub.
    flags: flags of a recipe, for all runs.

    Raise ValueError for a flag that the suite sets itself, and for a task without files.
    """
    _refuse_own_flags(flags)
    for setting, values in (("--rates", [f"{rate:g}" for rate in rates]), ("--seeds", [*map(str, seeds)])):
        twice = [value for value in values if values.count(value) > 1]
        check(not twice, f"{setting} has {twice[0] if twice else ''} twice: give each value once")
    for rate in rates:
        Optim(lr=rate)
    for seed in seeds:
        Run(seed=seed)
    runs = []
    for task in tasks:
        files = find_task_files(task, folders) if folders else None
        default = replace(
            _DEFAULT,
            data=_describe_data(task, files, output),
            model=Model(name=model),
            objective=_choose_objective(task),
            batch=replace(_DEFAULT.batch, max_length=_MAX_LENGTHS.get(task.name, _DEFAULT.batch.max_length)),
        )
        config = parse_flags(default, arguments=flags) if flags else default
        for rate in rates:
            for seed in seeds:
                folder = output / task.name / f"lr-{rate:g}" / f"seed-{seed}"
                own = replace(
                    config,
                    optim=replace(config.optim, lr=rate),
                    run=replace(config.run, seed=seed, output_dir=str(folder)),
                )
                runs.append(SuiteRun(task=task, config=own, files=files))
    return runs


def _choose_objective(task: Task) -> Classification | MultipleChoice:
    """Return the objective of a task. It states the problem, since labels such as 0 and 1 could also be numbers."""
    if task.name == "copa":
        return MultipleChoice(choices=("choice1", "choice2"))
    return Classification(problem="regression" if task.name == "stsb" else "single-label")


def _refuse_own_flags(flags: Sequence[str]) -> None:
    for word in flags:
        name = word.split("=")[0].replace("_", "-")
        for flag, instead in _OWN_FLAGS.items():
            if name == flag or name.startswith(f"{flag}."):
                raise ValueError(f"minilm suite takes no {word.split('=')[0]}: {instead}")


def is_stored(task: Task, files: TaskFiles | None) -> bool:
    """Return whether the suite reads the task from its own folder `data`, and not from the hub."""
    return files is not None or task.name in ("copa", "wic")


def _describe_data(task: Task, files: TaskFiles | None, output: Path) -> Data:
    """Return the settings of the data of a task."""
    splits = "+".join(task.eval_splits)
    source = Data(source=HUB_IDS[task.benchmark], config=task.config, eval_split=splits)
    if is_stored(task, files):
        source = Data(source=str(output / DATA / task.name), eval_split=splits)
    # The objective of COPA knows its columns.
    return source if task.name == "copa" else replace(source, column=task.columns[0], pair_column=task.columns[1])


def check_files(runs: Sequence[SuiteRun], output: Path) -> None:
    """Raise ValueError if a file of a task has changed since an earlier call of the suite read it."""
    for task, files in {run.task.name: run.files for run in runs}.items():
        record = output / DATA / f"{task}.json"
        if files is None or not record.is_file():
            continue
        before: Any = None
        with suppress(ValueError):
            before = json.loads(record.read_text(encoding="utf-8"))
        for path in files.paths:
            if not isinstance(before, dict) or before.get(path.name) != hash_file(path):
                raise ValueError(f"{path} has changed since {output} was begun: pass another --output")


def record_files(run: SuiteRun, output: Path) -> None:
    """Write which files of a task the suite has read, which are none for a task from the hub."""
    files = () if run.files is None else run.files.paths
    content = {path.name: hash_file(path) for path in files}
    write_atomically(output / DATA / f"{run.task.name}.json", json.dumps(content, indent=2) + "\n")
