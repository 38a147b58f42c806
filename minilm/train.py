"""The training loop: `train(config)` goes from documents to a saved model, and `train_step` makes one update.

The configuration, its seed, the data and the step number decide the update of a step. Micro-batches, processes and
loader workers only decide where and when the same sums are taken. They change an update by rounding only, and by the
random numbers of dropout.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from minilm.config import Config, ObjectiveSettings
from minilm.config.phases import list_periods
from minilm.data.batch_plan import Step
from minilm.data.excluded_documents import find_first_use
from minilm.data.memory import DocumentList
from minilm.data.micro_batch import CollateFunction, Collator, MicroBatch, counted_losses
from minilm.data.phased_batches import RunPlan, StepPlan, TokenRows
from minilm.distributed.flops import count_flops
from minilm.distributed.launch import lost_peer_as_error, on_all_ranks
from minilm.distributed.sharding import distribute
from minilm.models.compilation import compile_layers
from minilm.models.head import Head, freeze_unused
from minilm.objectives.averages_evaluation import AveragesEvaluator, format_all_figures
from minilm.objectives.distillation import add_teacher
from minilm.objectives.evaluator import Evaluator
from minilm.objectives.factory import build_network
from minilm.objectives.gradient_cache import couple_examples
from minilm.optim.averages import average_weights, averaged_weights
from minilm.optim.optimizer import apply_update, build_optimizer
from minilm.optim.schedule import learning_rate as scheduled_rate
from minilm.runs.auto_micro_tokens import micro_tokens_of, resolve_micro_tokens
from minilm.runs.best_checkpoint import BestEvaluation
from minilm.runs.checkpoint_saver import CheckpointSaver
from minilm.runs.early_stopping import StopRequest, any_process, stop_on_bad_gradients
from minilm.runs.energy import measure_energy
from minilm.runs.model_card import write_card
from minilm.runs.model_export import save_model
from minilm.runs.output_folder import AVERAGES, claim_output_dir
from minilm.runs.recorder import write_samples
from minilm.runs.resume import load_best_weights, resume
from minilm.runs.run_facts import write_results
from minilm.runs.run_inputs import collect_inputs
from minilm.runs.session import (
    Session,
    apply_arguments,
    begin,
    build_collator,
    plan_batches,
    start_recorder,
    train_rows,
)
from minilm.runs.state_tensors import gather_full_state
from minilm.runs.train_ledger import start_train_ledger
from minilm.runs.train_result import TrainResult
from minilm.runs.verify_head import verify_head
from minilm.utils.progress import quiet_transformers
from minilm.utils.signals import block_signals, ignore_signals_from_others

log = logging.getLogger("minilm")


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Figures of one update, as scalars on the device. Reading one waits for the update."""

    loss: Tensor
    """Mean loss of the step's targets over all processes, nats. It has label smoothing and the z-loss in it."""
    grad_norm: Tensor
    """Euclidean norm of the gradient before clipping."""
    target_losses: Sequence[Tensor]
    """Losses of the targets of each micro-batch of this process, nats."""


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    *,
    lr: float,
    max_grad_norm: float,
) -> StepResult:
    """Make one update from this process's share of a global batch.

    The gradient is that of the mean loss over the targets of all micro-batches and processes. The targets are counted
    before the first forward, so that every micro-batch contributes its sum divided by that number. The factor
    `num_processes` undoes the mean that DDP takes over processes.
    """
    device = accelerator.device
    micro_batches = couple_examples(accelerator, model, micro_batches)
    own_targets = float(sum(batch.target_count for batch in micro_batches))
    targets = accelerator.reduce(torch.full((), own_targets, device=device))
    scale = accelerator.num_processes / targets.clamp(min=1)
    loss = torch.zeros((), device=device)
    target_losses = list[Tensor]()
    # One autocast around all micro-batches casts each weight once.
    with accelerator.autocast():
        for number, batch in enumerate(micro_batches, start=1):
            # Gradients are exchanged once, in the backward of the last micro-batch.
            last = number == len(micro_batches)
            with nullcontext() if last else accelerator.no_sync(model):
                nats_N = counted_losses(model, batch.to(device))
                nats = nats_N.sum()
                with torch.autocast(device.type, enabled=False):
                    accelerator.backward(nats * scale)
            loss += nats.detach()
            target_losses.append(nats_N.detach())
    loss = accelerator.reduce(loss) / targets.clamp(min=1)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)
    grad_norm = apply_update(accelerator, model, optimizer, max_grad_norm or math.inf)
    optimizer.zero_grad()
    return StepResult(loss=loss, grad_norm=grad_norm, target_losses=target_losses)


def train(
    config: Config,
    name: str = "run",
    *,
    objective: ObjectiveSettings | None = None,
    documents: DocumentList | None = None,
    eval_documents: DocumentList | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    learning_rate: Callable[[int, int], float] | None = None,
    after_step: Callable[[int, dict[str, Any], PreTrainedModel], bool | None] | None = None,
) -> TrainResult:
    """Train as `config` says, save to its output folder, and return the model, its folder and its figures.

    name: names the default output folder, out/NAME.
    objective: takes the place of `config.objective`.
    documents: a list of strings, a list of dictionaries, or a `datasets.Dataset`, to read in place of `data.source`.
    eval_documents: the same for the evaluation. Default: `data.eval_fraction` of `documents`.
    optimizer: returns an optimizer for the trained parameters, in place of `config.optim`'s.
    learning_rate: returns the learning rate of a step, counted from 0, of a number of steps.
    after_step: called on each process after each step with the step, its figures and the model. It may look, evaluate,
        and end the run after this step by returning True. The figures are `loss` and `grad_norm`, tensors that make the
        program wait for the device when they are read, `lr`, and those of an evaluation after this step.

    Raises ValueError, before the first step where that is possible, with a message that says what to change;
    TrainingStopped where a signal or gradients that are not finite end the run, and where the run to resume is finished
    already; ConnectionError where another process is gone. A run that `after_step` or `run.patience` ends returns its
    result.
    """
    config, memory = apply_arguments(config, objective, documents, eval_documents)
    rate_of_step = learning_rate or partial(scheduled_rate, config.optim)
    # Begin: join the other processes, choose the output folder, refuse a resume that cannot work, prepare the data.
    with begin(config, name, memory=memory) as run:
        accelerator = run.accelerator
        main = accelerator.is_main_process
        prepared = run.prepared

        # Build: the model, the plan of the steps and the optimizer. A resumed run builds these as a new run does.
        # `network` is the model of transformers, `head` adds the loss, and `model` is the head in DDP or FSDP2. The
        # settings of `run` now have a number in place of batch.micro_tokens=auto.
        head, run = build_head(run)
        config = run.config
        network = head.model
        plan, collator, evaluator = build_plan(run, head)
        examples = train_rows(run, plan)
        total = config.run.count_steps(plan.steps_per_epoch)
        cost = count_flops(head, config.batch.max_length)
        own_functions = {"learning_rate": learning_rate is not None, "optimizer": optimizer is not None}
        inputs = collect_inputs(prepared, head, accelerator.num_processes, own_functions)
        if config.run.compile:
            compile_layers(head)
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        precision = run.precision.name
        new_optimizer = build_optimizer(head, config.optim, precision) if optimizer is None else optimizer(trained)
        average_weights(new_optimizer, config.optim.ema)
        model, optim = distribute(accelerator, head, new_optimizer)
        if config.optim.ema is not None:
            evaluator = AveragesEvaluator(evaluator=evaluator, optimizer=optim)

        # Resume: load the weights and moments of the checkpoint. A new run has no progress yet. After this block all
        # checks have passed, so the run may write to its output folder.
        with on_all_ranks():
            progress = resume(
                run.checkpoint,
                config,
                inputs,
                plan.steps_per_epoch,
                network,
                optim,
                precision,
                own_rate=learning_rate,
                first_use=partial(find_first_use, plan, prepared),
            )
            best = BestEvaluation(config.run, evaluator.names, progress)
            if main:
                keeps = config.optim.ema is not None
                claim_output_dir(run.folder, config.run, network, total, run.checkpoint, averages=keeps)
        recorder, facts = start_recorder(run, head, plan, total, progress)
        ledger = start_train_ledger(run.folder, config, accelerator, prepared, plan, progress.step)
        saver = CheckpointSaver(
            run.folder,
            network,
            optim,
            prepared.tokenizer,
            config,
            inputs,
            main=main,
            stream=prepared.stream,
            revisions=run.revisions,
        )

        # Loop: one update for each step. A resumed run that had already run out of patience makes no more steps.
        model.train()
        first = total if best.out_of_patience else progress.step
        steps = load_steps(plan, examples, collator, accelerator, range(first, total), config.batch.workers)
        eval_every = config.run.eval_every or plan.steps_per_epoch
        max_grad_norm = config.optim.max_grad_norm
        figures = early = None
        request = StopRequest(accelerator, saves=config.run.save_every > 0)
        with (
            request,
            closing(recorder),
            measure_energy(accelerator, progress.step) as energy,
            lost_peer_as_error(saver.resume_hint),
        ):
            for step, (global_batch, micro_batches) in enumerate(steps, start=first):
                seed_dropout(config.run.seed, step, accelerator.process_index)
                lr = rate_of_step(step, total)
                result = train_step(accelerator, model, optim, micro_batches, lr=lr, max_grad_norm=max_grad_norm)
                done = step + 1
                epoch = plan.epochs_after(done)
                recorder.record_step(
                    epoch=epoch,
                    lr=lr,
                    loss=result.loss,
                    grad_norm=result.grad_norm,
                    examples=global_batch.examples,
                    tokens=global_batch.tokens,
                    flops=cost.step(global_batch, collator.rate(step / total)),
                )

                if ledger is not None:
                    ledger.record(global_batch, micro_batches, result.target_losses)

                # Evaluate on the held-out examples. The figures after the last step are kept for the result.
                figures = None
                better = False
                if done == total or done % eval_every == 0:
                    recorder.flush()
                    evaluation = evaluator(accelerator, model)
                    figures = evaluation.figures()
                    better = best.update(figures, done)
                    text = format_all_figures(run.objective, figures)
                    recorder.record_evaluation(epoch, figures, text, evaluation.per_example)

                # The caller may look at the figures and the model, and end the run after this step.
                wants_stop = False
                if after_step is not None:
                    seen = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": lr, **(figures or {})}
                    wants_stop = any_process(accelerator, after_step(step, seen, network) is True)
                    model.train()

                # Save a checkpoint where one is due, and leave after the last step. All processes leave after the same
                # step: they have the same gradient norms, and they agree on the step after which a signal ends the run.
                early = stop_on_bad_gradients(recorder, plan, config.run) or request.agree_on_stop(done)
                last = done == total or best.out_of_patience or wants_stop or early is not None
                due = saver.due(done, last=last, better=better)
                if ledger is not None and (due or last):
                    ledger.flush()
                if due:
                    saver.save(recorder.current_progress(**best.state_after(done)))
                if last:
                    break
            saver.wait()

        # Save: evaluate the weights that are the result, and write the model, its card and all_results.json. A run that
        # a signal or bad gradients ended early saves no model; it leaves its last checkpoint.
        results = dict[str, float]()
        if early is None:
            if config.run.load_best and best.step != recorder.steps:
                # The main process writes the checkpoint that all of them read.
                accelerator.wait_for_everyone()
                with on_all_ranks():
                    load_best_weights(run.folder, best.step, network)
                figures = None
            if figures is None:
                figures = evaluator(accelerator, model).figures()
            results = recorder.record_results(figures | energy())
            weights = gather_full_state(network.state_dict(keep_vars=True), keep=main)
            averages = None
            if config.optim.ema is not None:
                with averaged_weights(model, optim):
                    averages = gather_full_state(network.state_dict(keep_vars=True), keep=main)
            if main:
                conclude(run, facts, results, network, weights, averages)
        run.history.end(early)
        model, optim = accelerator.free_memory(model, optim)
    if early is not None:
        raise early
    return TrainResult(folder=run.folder, figures=results, model_class=run.objective.auto)


def build_head(run: Session) -> tuple[Head, Session]:
    """Return the head with its model on this process's device, and the run with `batch.micro_tokens` resolved."""
    config, accelerator, prepared, objective = run.config, run.accelerator, run.prepared, run.objective
    log.info("building the model, and comparing its shortcuts with transformers …")
    with on_all_ranks():
        network = build_network(config, prepared)
        objective.check(network, prepared.tokenizer, config.run.samples)
        head = objective.head(network.to(accelerator.device), prepared)
        freeze_unused(head)
        add_teacher(head, config, objective, prepared)
    verify_head(config, head, prepared)
    first = partial(first_step, run, head)
    return head, replace(run, config=resolve_micro_tokens(config, accelerator, head, run.checkpoint, first))


def first_step(run: Session, head: Head, config: Config) -> list[MicroBatch]:
    """Return this process's micro-batches of a step with these settings: the first with the longest examples."""
    # Any documents do, so that a resumed run does not read the beginning of a stream again.
    run = replace(run, config=config, prepared=run.prepared.without_stream)
    plan, collator, _ = build_plan(run, head)
    longest = max(list_periods(config), key=lambda period: period.config.batch.max_length)
    steps = range(longest.start, config.run.count_steps(plan.steps_per_epoch))
    item: Item = next(iter(load_steps(plan, train_rows(run, plan), collator, run.accelerator, steps, 0)))
    return item[1]


def build_plan(run: Session, head: Head) -> tuple[RunPlan, Collator, Evaluator]:
    """Return the plan of the steps, the collator that makes their micro-batches, and the evaluator."""
    plan = plan_batches(run, head)
    layout: dict[str, Any] = {"padded": plan.padded, "multiple": plan.multiple}
    return plan, build_collator(run, plan), run.objective.evaluator(run.prepared, micro_tokens_of(run.config), **layout)


Item = tuple[Step, list[MicroBatch]]


class _Steps(Dataset[Item]):
    """A dataset whose item i is step i of `total` and this process's micro-batches of it."""

    def __init__(self, plan: StepPlan, examples: TokenRows, collator: CollateFunction, rank: int, total: int) -> None:
        self.plan, self.examples, self.collator, self.rank, self.total = plan, examples, collator, rank, total

    def __getitem__(self, index: int) -> Item:
        step = self.plan.step(index)
        share = index / self.total
        parts = step.micro_batches[self.rank]
        return step, [self.collator([self.examples[int(i)] for i in ids], ids, step.epoch, share) for ids in parts]


class _StepLoader(DataLoader[Item]):
    """A DataLoader whose workers start with STOP_SIGNALS blocked, so that only this process reacts to them."""

    def __iter__(self) -> Any:
        with block_signals():
            return super().__iter__()


def load_steps(
    plan: StepPlan, examples: TokenRows, collator: CollateFunction, accelerator: Accelerator, steps: range, workers: int
) -> DataLoader[Item]:
    """Return an iterable over `steps` that gives each `Step` and this process's micro-batches of it.

    `workers` processes prepare them. `steps` must stop at the end of the run, since a rate that changes over the run is
    a function of step / steps.stop.
    """
    dataset = _Steps(plan, examples, collator, accelerator.process_index, steps.stop)
    return _StepLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=_unchanged,  # the default would search the items for arrays to convert
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=ignore_signals_from_others,
    )


def _unchanged(item: Any) -> Any:
    return item


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators by (seed, step, rank), so that dropout does not depend on earlier steps."""
    number = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
    torch.default_generator.manual_seed(number)  # torch.manual_seed also records its caller
    if torch.accelerator.is_available():
        torch.get_device_module().manual_seed(number)


def conclude(
    run: Session,
    facts: dict[str, Any],
    results: dict[str, float],
    network: PreTrainedModel,
    weights: dict[str, Tensor],
    averages: dict[str, Tensor] | None = None,
) -> None:
    """Save the model, its card and the results, and log the saved model's output for each of `run.samples`.

    averages: weights to save in the folder `ema`. `write_results` comes last, since its file marks the run as finished.
    """
    config, folder, tokenizer, objective = run.config, run.folder, run.prepared.tokenizer, run.objective
    extra_files = objective.extra_files(network, config)
    run.uploads.extend(save_model(network, tokenizer, folder, weights, extra_files))
    if averages is not None:
        (folder / AVERAGES).mkdir(exist_ok=True)
        saved_files = save_model(network, tokenizer, folder / AVERAGES, averages, extra_files)
        run.uploads.extend(f"{AVERAGES}/{name}" for name in saved_files)
    samples = {}
    if config.run.samples:
        with quiet_transformers():
            saved = objective.auto.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        saved = saved.to(network.device).eval()
    for text in config.run.samples:
        samples[text] = objective.sample(saved, tokenizer, text)
        log.info(f"{text} -> {samples[text]}")
    write_samples(folder, int(results["steps"]), samples)
    write_card(folder, config, facts, results, samples)
    write_results(folder, results)
    log.info(f"saved to {folder}; try: {objective.command(folder, tokenizer)}")
