"""The beginning and the end of a run, as one process sees them. The loop, its forks and `--dry-run` share them.

`begin` joins the job, chooses the output folder and prepares the data; at the end of its block the process leaves the
job. `start_recording` and `save_networks` are for loops without evaluation and checkpoints, such as
`recipes/fork_electra.py`. `minilm/train.py` shows a loop with both, and calls `plan_batches` and `start_recorder`
itself.
"""

import logging
import math
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from minilm.config import Config, ObjectiveSettings
from minilm.config.phases import list_periods
from minilm.config.serialization import flatten_settings, to_dict
from minilm.data.batch_plan import Plan
from minilm.data.corpus import Examples, PreparedData
from minilm.data.excluded_documents import ExcludingCollator
from minilm.data.memory import DocumentList, MemoryDocuments
from minilm.data.micro_batch import Collator
from minilm.data.phased_batches import CollatorPart, JoinedExamples, PlanPart, RunCollator, RunPlan, TokenRows
from minilm.data.sources import fetch_revisions, pin_revisions
from minilm.data.stream_batches import StreamCollator, StreamPlan, StreamRows, WindowReader
from minilm.data.stream_pieces import find_readers
from minilm.data.stream_windows import StreamWindows
from minilm.data.window_index import restore_index
from minilm.distributed.hardware import advise_threads, usable_processors
from minilm.distributed.launch import (
    broadcast_from_main,
    finish,
    local_main_process_first,
    lost_peer_as_error,
    on_all_ranks,
    restore_on_error,
    start,
)
from minilm.distributed.piece_exchange import exchange_pieces
from minilm.distributed.precision import Precision, device_peak
from minilm.models.compatibility import check_compatibility, check_window
from minilm.models.head import Head
from minilm.models.sparse_head import SparseHead
from minilm.objectives.factory import build_objective, prepare_run
from minilm.objectives.objective import Objective
from minilm.runs.auto_micro_tokens import micro_tokens_of
from minilm.runs.checkpoint import Checkpoint, Progress
from minilm.runs.hub_upload import upload_run
from minilm.runs.ledger import start_ledger
from minilm.runs.model_export import save_model
from minilm.runs.output_folder import choose_output_dir, claim_output_dir
from minilm.runs.recorder import Recorder
from minilm.runs.resume import check_best_checkpoint, check_settings
from minilm.runs.run_facts import collect_run_facts, log_run_facts, write_results, write_run_json
from minilm.runs.run_history import RunHistory
from minilm.runs.trackers import start_trackers
from minilm.runs.train_result import TrainResult
from minilm.runs.verify_head import verify_head
from minilm.utils.cache import explain_cache_errors
from minilm.utils.folder_lock import unlock_at_end
from minilm.utils.log import show_log_by_default
from minilm.utils.number_ranges import parse_ranges
from minilm.utils.processor_load import ProcessorLoad

log = logging.getLogger("minilm")


@dataclass(frozen=True, kw_only=True)
class Session:
    """A run that has begun, on this process."""

    config: Config
    """The settings, with the output folder in `run.output_dir`."""
    accelerator: Accelerator
    precision: Precision
    folder: Path
    """The output folder. `begin` writes nothing to it except its lock."""
    checkpoint: Checkpoint | None
    """The checkpoint to resume from."""
    prepared: PreparedData
    """The tokenizer and the examples."""
    revisions: Mapping[str, str] = field(default_factory=dict)
    """The commit that the run reads of each source that is a dataset on the hub."""
    load: ProcessorLoad = field(default_factory=ProcessorLoad)
    """The load by other programs since the data are prepared."""
    uploads: list[str] = field(default_factory=list)
    """The files of the output folder to push to the hub at the end, where `run.push_to_hub` asks for it."""
    history: RunHistory = field(default_factory=RunHistory)
    """Writes the start and the end of the run to its output folder."""

    @cached_property
    def objective(self) -> Objective:
        """What the model is trained for, as `config.objective` says."""
        return build_objective(self.config.objective)


def apply_arguments(
    config: Config,
    objective: ObjectiveSettings | None,
    documents: DocumentList | None,
    eval_documents: DocumentList | None,
) -> tuple[Config, MemoryDocuments | None]:
    """Return the configuration with the arguments of `minilm.train.train` in it, and the documents from Python.

    Raises ValueError for documents that cannot be read.
    """
    if objective is not None:
        config = replace(config, objective=objective)
    if documents is None:
        if eval_documents is not None:
            raise ValueError("eval_documents needs documents: pass both, or set data.eval_source")
        return config, None
    memory = MemoryDocuments(documents, eval_documents)
    return replace(config, data=memory.update_settings(config.data)), memory


@contextmanager
def begin(
    config: Config, name: str, *, memory: MemoryDocuments | None = None, checkpoints: bool = True
) -> Iterator[Session]:
    """Begin a run: join the job, choose the output folder (by default out/NAME), and prepare the data.

    Before it reads any data, it refuses a resume that cannot work. At the end of the block the process leaves the job,
    and the main process pushes `Session.uploads` to the hub. After an error, the process has the state that it had
    before, so that another run can follow. Delete the models that `accelerator.prepare` or `distribute` returned before
    the block ends (`minilm.distributed.launch.finish` says why).

    memory: documents from Python, to read in place of `data.source`.
    checkpoints: False for a loop that writes no checkpoints and does not shard. Raises ValueError for wrong settings,
    data or launches; ConnectionError where another process is gone.
    """
    if not checkpoints and config.run.resume is not None:
        raise ValueError("this recipe writes no checkpoints, so it cannot resume: leave run.resume out")
    if not checkpoints and config.optim.ema is not None:
        raise ValueError("the loop of this recipe keeps no average of the weights: leave optim.ema out")
    if not checkpoints and config.data.exclude_loss is not None:
        raise ValueError("the loop of this recipe counts all targets: leave data.exclude_loss out")
    if not checkpoints and config.run.phases:
        raise ValueError("the loop of this recipe has no phases: leave run.phases out")
    show_log_by_default()
    with lost_peer_as_error(), restore_on_error(), unlock_at_end():
        accelerator, precision = start(config.run)
        if not checkpoints and accelerator.is_fsdp2:
            raise ValueError("the loop of this recipe does not support sharding: launch it with --multi_gpu")
        main = accelerator.is_main_process
        folder, checkpoint = broadcast_from_main(lambda: choose_output_dir(config.run, name))
        config = replace(config, run=replace(config.run, output_dir=str(folder)))
        with on_all_ranks():
            check_settings(checkpoint, config)
            if main:
                check_best_checkpoint(checkpoint, config.run)
        log.info(f"reading {'the documents' if memory is not None else ', '.join(config.data.sources)} …")
        # All processes read the commits that the main process finds, or those that the run of the checkpoint read.
        revisions = broadcast_from_main(lambda: _find_revisions(config, checkpoint))
        with pin_revisions(revisions):
            prepared = local_main_process_first(accelerator, lambda: _prepare(config, memory, checkpoint))
        _check_hosts(config, prepared)
        prepared = exchange_pieces(prepared)
        session = Session(
            config=_limit_tokens(config, prepared),
            accelerator=accelerator,
            precision=precision,
            folder=folder,
            checkpoint=checkpoint,
            prepared=prepared,
            revisions=revisions,
        )
        try:
            yield session
        except BaseException as error:
            session.history.end(error)
            raise
        session.history.end()
        finish(accelerator)
        # The other processes have left, so that none waits for the upload.
        if main and session.uploads and config.run.push_to_hub is not None:
            upload_run(config.run.push_to_hub, folder, session.uploads)


def _find_revisions(config: Config, checkpoint: Checkpoint | None) -> dict[str, str]:
    """Return the commit to read of each source that is a dataset on the hub."""
    with pin_revisions({} if checkpoint is None else checkpoint.revisions):
        return fetch_revisions(config.data)


def _prepare(config: Config, memory: MemoryDocuments | None, checkpoint: Checkpoint | None) -> PreparedData:
    """Return the data of a run, which finds the windows of a stream where the run of the checkpoint found them."""
    if checkpoint is not None:
        with explain_cache_errors():
            restore_index(checkpoint.windows)
    return prepare_run(config, memory)


def _check_hosts(config: Config, prepared: PreparedData) -> None:
    """Raise ValueError if this process reads other streams than the main process, as on a host with other files."""
    if prepared.train.pieces is None and not config.data.streaming:
        return
    own = [prepared.train.fingerprint, prepared.eval.fingerprint]
    main = broadcast_from_main(lambda: own)
    with on_all_ranks():
        if own != main:
            raise ValueError(
                f"host {socket.gethostname()}: its documents or its tokenizer are not those of the main process: give "
                "each host the same files, with their times of change if they have over 1 GB (cp --preserve=timestamps)"
            )


def _limit_tokens(config: Config, prepared: PreparedData) -> Config:
    """Return the configuration with the `run.max_steps` that `data.max_tokens` asks for."""
    batch, tokens, examples = config.batch, config.data.max_tokens, prepared.train
    if tokens is None:
        return config
    rows = batch.max_length if batch.layout == "packed" else None
    plan = Plan(examples.lengths, examples=batch.examples, micro_tokens=1, seed=config.run.seed, row_tokens=rows)
    # Before the first step, so that the schedule and the phases know the number of steps.
    total = int(examples.lengths.sum())
    # A step may have more tokens than the first documents of a stream. The steps of a window are counted, as if all of
    # it were like them.
    window = total if prepared.stream is None else prepared.stream.tokens
    window_steps = math.ceil((plan.rows or len(examples)) * window / (total * batch.examples))
    steps = math.ceil(tokens * window_steps / window)
    return replace(config, run=replace(config.run, max_steps=min(steps, config.run.max_steps or steps)))


def plan_batches(run: Session, head: Head) -> RunPlan:
    """Return the plan of the steps, with padding where the head needs it.

    Raise ValueError for `data.exclude_loss` where the loss compares examples, so that no target has a part of its own.
    """
    if run.config.data.exclude_loss is not None and head.coupled_rows:
        raise ValueError(
            "data.exclude_loss: the loss compares the examples of a step, so that the part of a document in it cannot "
            "be told; leave it out"
        )
    layout: dict[str, Any] = {
        "processes": run.accelerator.num_processes,
        "padded": not head.padding_free,
        # Padded lengths divisible by 8 are faster on GPUs.
        "multiple": 1 if run.accelerator.device.type == "cpu" else 8,
    }
    if run.prepared.stream is not None:
        check = partial(check_window, run.prepared.tokenizer, type(head.model).__name__, head.misread_ids)
        return _plan_stream(run, run.prepared.stream, partial(_make_plan, run.config, **layout), check)
    return plan_steps(run.config, run.prepared, **layout)


def plan_steps(config: Config, prepared: PreparedData, *, processes: int, padded: bool, multiple: int) -> RunPlan:
    """Return the plan of the steps. Which examples a step reads depends on `config` and `prepared` alone."""
    joined = JoinedExamples(prepared)
    parts, before = list[PlanPart](), prepared.train
    for period, examples in zip(list_periods(config), prepared.train_by_period, strict=True):
        same_examples = examples is before
        if parts and same_examples and period.config.batch.examples == parts[-1].plan.examples:
            continue
        first_epoch, first_units = 0, None
        if parts:
            done = period.start - parts[-1].start
            first_epoch, first_units = parts[-1].plan.continue_after(done, same_examples=same_examples)
        plan = _make_plan(
            period.config,
            examples,
            first_epoch,
            first_units,
            processes=processes,
            padded=padded,
            multiple=multiple,
        )
        parts.append(PlanPart(start=period.start, plan=plan, first_number=joined.first_number(examples)))
        before = examples
    return RunPlan(parts)


def _plan_stream(
    run: Session,
    windows: StreamWindows,
    make_plan: Callable[..., Plan],
    check: Callable[[int, Examples], None],
) -> StreamPlan:
    """Return the plan of the steps of a stream. Its phases change no setting of a plan."""
    steps, holders_PxN = run.config.run.max_steps, run.prepared.holders_PxN
    assert steps is not None

    def plan_window(examples: Examples, number: int) -> Plan:
        readers = None if holders_PxN is None else find_readers(examples, holders_PxN)
        return make_plan(examples, number, readers=readers)

    return StreamPlan(make_plan(run.prepared.train, 0), WindowReader(windows, plan_window, check, steps), steps)


def _make_plan(
    config: Config,
    examples: Examples,
    first_epoch: int,
    first_units: NDArray[np.int64] | None = None,
    readers: NDArray[np.bool_] | None = None,
    *,
    processes: int,
    padded: bool,
    multiple: int,
) -> Plan:
    """Return the plan of examples, from an epoch on, of which `first_units` are left. readers: as in `Plan`."""
    batch = config.batch
    return Plan(
        examples.lengths,
        sizes=examples.padded_lengths if padded else None,
        squares=None if examples.rows is None else examples.square_lengths,
        examples=batch.examples,
        micro_tokens=micro_tokens_of(config),
        processes=processes,
        seed=config.run.seed,
        group=batch.group,
        padded=padded,
        multiple=multiple,
        row_tokens=batch.max_length if batch.layout == "packed" else None,
        first_epoch=first_epoch,
        first_units=first_units,
        readers=readers,
    )


def train_rows(run: Session, plan: RunPlan) -> TokenRows:
    """Return the training examples by the numbers that the plan gives them."""
    return StreamRows(plan.reader) if isinstance(plan, StreamPlan) else JoinedExamples(run.prepared)


def build_collator(run: Session, plan: RunPlan) -> Collator:
    """Return the collator that makes the micro-batches of the plan."""
    prepared, joined = run.prepared, JoinedExamples(run.prepared)
    starts = [joined.first_number(examples) for examples in prepared.train_by_period]
    total = run.config.run.count_steps(plan.steps_per_epoch)
    make = partial(_make_collator, run.config, prepared.tokenizer, total, plan.padded, plan.multiple)
    collator = make(prepared.train_by_period, starts)
    if isinstance(plan, StreamPlan):
        return StreamCollator(plan.reader, collator, partial(_collate_window, make, len(starts)))
    return collator


def _collate_window(make: Callable[..., RunCollator], periods: int, examples: Examples) -> RunCollator:
    return make([examples] * periods, [0] * periods)


def _make_collator(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    total: int,
    padded: bool,
    multiple: int,
    by_period: Sequence[Examples],
    first_numbers: Sequence[int],
) -> RunCollator:
    """Return the collator of the examples of each period, whose numbers begin at `first_numbers`."""
    parts = []
    for period, examples, first_number in zip(list_periods(config), by_period, first_numbers, strict=True):
        collator: Collator = build_objective(period.config.objective).collator(
            tokenizer, examples, seed=config.run.seed, padded=padded, multiple=multiple
        )
        if config.data.exclude_loss is not None:
            collator = ExcludingCollator(collator, examples, parse_ranges(config.data.exclude_loss))
        parts.append(CollatorPart(start=period.start / total, collator=collator, first_number=first_number))
    return RunCollator(parts)


def start_recorder(
    run: Session, head: Head, plan: RunPlan, total: int, progress: Progress
) -> tuple[Recorder, dict[str, Any]]:
    """Write and log the facts of the run, start its trackers, and return its recorder and the facts.

    Every process calls it after the main process has claimed `run.folder`. The facts are those of `collect_run_facts`.

    total: the number of steps.
    """
    config, accelerator, main = run.config, run.accelerator, run.accelerator.is_main_process
    peak = device_peak(accelerator.device, run.precision.name)
    facts = collect_run_facts(accelerator, head, plan, run.prepared, total, run.precision, peak)
    if main:
        settings = to_dict(config)
        with pin_revisions(run.revisions):
            write_run_json(run.folder, settings, config.data, facts)
        run.history.start(run.folder, progress.step, settings)
        log_run_facts(run.folder, config, facts)
        if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
            advice = advise_threads(run.load.others(), torch.get_num_threads(), usable_processors())
            if advice is not None:
                log.warning(advice)
        start_trackers(accelerator, config.run.trackers, flatten_settings(settings), run.folder, progress.step)
    recorder = Recorder(
        run.folder,
        accelerator.log,
        total_steps=total,
        peak_flops=peak.flops * accelerator.num_processes,
        progress=progress,
        enabled=main,
        ledger=start_ledger(run.folder, config, run.prepared, progress.step) if main else None,
    )
    return recorder, facts


def start_recording(run: Session, head: Head) -> tuple[RunPlan, int, Recorder]:
    """Check the model, claim the output folder, and write and log the facts of the run.

    Returns the plan, the number of steps and the recorder.
    """
    if run.prepared.stream is not None:
        raise ValueError(
            "the loop of this recipe reads no stream of several windows: raise data.window_tokens, or leave "
            "data.streaming out"
        )
    check_compatibility(head, run.prepared)
    if isinstance(head, SparseHead):
        verify_head(run.config, head, run.prepared)
    with on_all_ranks():
        plan = plan_batches(run, head)
        total = run.config.run.count_steps(plan.steps_per_epoch)
        if run.accelerator.is_main_process:
            claim_output_dir(run.folder, run.config.run, head.model)
    recorder, _ = start_recorder(run, head, plan, total, Progress())
    return plan, total, recorder


def save_networks(run: Session, recorder: Recorder, networks: dict[str, Any]) -> TrainResult:
    """Save models of transformers and the totals of the run, and return the result of the run.

    networks: the models by their subfolder of the output folder; "." is the folder itself.
    """
    results = recorder.record_results({})
    if run.accelerator.is_main_process:
        for part, network in networks.items():
            (run.folder / part).mkdir(exist_ok=True)
            saved = save_model(network, run.prepared.tokenizer, run.folder / part)
            run.uploads.extend(str(Path(part, name)) for name in saved)
        write_results(run.folder, results)
    run.accelerator.free_memory()
    return TrainResult(folder=run.folder, figures=results, model_class=type(networks["."]))
