"""What the processes of `minilm suite` do: prepare the data of a task, estimate its time, and train a run."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from minilm.commands.dry_run import estimate
from minilm.commands.job_pool import write_output_to
from minilm.commands.suite_runs import DATA, SuiteRun, is_stored, record_files
from minilm.data.batch_plan import Plan
from minilm.data.glue_files import store_task
from minilm.objectives.factory import prepare_run
from minilm.runs.checkpoint import remove_checkpoints
from minilm.runs.ledger import LEDGER
from minilm.runs.session import begin
from minilm.train import train
from minilm.utils.errors import TrainingStopped
from minilm.utils.log import show_log
from minilm.utils.progress import quiet_transformers

# A run that a signal ended has a status above this one.
_SIGNALLED = 128


@dataclass(frozen=True, kw_only=True)
class PreparedTask:
    """What a run of a task takes."""

    steps: int
    tokens: float
    """Tokens of all steps, about in proportion to the time."""
    seconds: float | None
    """The estimated time of a run, where it was asked for."""
    notes: list[str]
    """What the user should know about the data."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A task to prepare."""

    run: SuiteRun
    """One of its runs."""
    output: Path
    """The folder for the data: the output folder, or a temporary one."""
    measure: bool
    """Whether to estimate the time of a run by running a few steps."""


def prepare_task(job: Preparation) -> PreparedTask:
    """Store the task if the suite has to, encode it into the cache, and return what a run of it takes.

    Raise ValueError for data that cannot be read.
    """
    run, config, notes = job.run, job.run.config, list[str]()
    with _quiet(), _name_errors(run.task.name):
        if is_stored(run.task, run.files):
            folder = job.output / DATA / run.task.name
            if not folder.with_suffix(".json").is_file():
                notes = store_task(run.task, run.files, folder)
                record_files(run, job.output)
            config = replace(config, data=replace(config.data, source=str(folder)))
        if job.measure:
            # This folder is never made.
            place = str(job.output / run.task.name)
            with begin(replace(config, run=replace(config.run, output_dir=place)), "suite") as session:
                prepared = session.prepared
                seconds = estimate(session).seconds
        else:
            prepared, seconds = prepare_run(config), None
    batch = config.batch
    rows = batch.max_length if batch.layout == "packed" else None
    plan = Plan(prepared.train.lengths, examples=batch.examples, micro_tokens=1, row_tokens=rows)
    steps = config.run.count_steps(plan.steps_per_epoch)
    tokens = int(prepared.train.lengths.sum()) * steps / plan.steps_per_epoch
    return PreparedTask(steps=steps, tokens=tokens, seconds=seconds, notes=notes)


@contextmanager
def _name_errors(name: str) -> Iterator[None]:
    """Say in each ValueError of the block to which task or run it belongs."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Show no message and no bar, since several processes would write at the same time. Errors are raised."""
    with write_output_to(Path(os.devnull)), quiet_transformers():
        yield


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run to train."""

    run: SuiteRun
    keep_models: bool


def train_run(job: Training) -> str | None:
    """Train the run, or continue it from its newest checkpoint. Return None, or why it failed.

    Its messages go to a file beside its folder. Without `keep_models`, the figures, the log and the ledger remain, but
    not the weights.
    """
    run, settings = job.run, job.run.config.run
    if run.read_figures() is not None:
        # The suite was killed before it removed the checkpoints.
        clean_folder(run, keep_models=job.keep_models)
        return None
    if run.find_step():
        settings = replace(settings, resume="latest")
    elif (run.folder / "log.jsonl").is_file():
        # A run that ended before its first checkpoint starts again.
        settings = replace(settings, overwrite=True)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with write_output_to(run.folder.with_name(f"{run.folder.name}.log")), quiet_transformers():
        show_log()
        logging.getLogger("minilm").info(f"--- {run.name}")
        try:
            with _name_errors(run.name):
                train(replace(run.config, run=settings))
        except TrainingStopped as stopped:
            if stopped.status > _SIGNALLED:
                raise
            return str(stopped)
    clean_folder(run, keep_models=job.keep_models)
    return None


def clean_folder(run: SuiteRun, *, keep_models: bool) -> None:
    """Remove the weights of a finished run unless they shall stay, and then its checkpoints.

    As long as there is a checkpoint, the next call of the suite comes back to the folder.
    """
    if not keep_models:
        for path in run.folder.rglob("*.safetensors"):
            first = path.relative_to(run.folder).parts[0]
            if first != LEDGER and not first.startswith("checkpoint-"):
                path.unlink()
    remove_checkpoints(run.folder)
