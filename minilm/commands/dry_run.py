"""`--dry-run`: the plan of a run, with its time and memory measured in a few steps. It writes no output folder."""

import logging
import math
import time
from dataclasses import dataclass, replace
from itertools import cycle, islice, zip_longest

import torch
from accelerate import Accelerator

from minilm.commands.charts import draw_text, format_number
from minilm.config import Config, Optim
from minilm.config.phases import describe_period, find_unused_phases, list_periods
from minilm.data.batch_plan import Plan, Step
from minilm.data.corpus import Examples, PreparedData
from minilm.data.micro_batch import Collator
from minilm.data.phased_batches import JoinedExamples, RunPlan, TokenRows
from minilm.distributed.flops import Cost, count_flops
from minilm.distributed.hardware import describe, peak_memory
from minilm.distributed.precision import device_peak
from minilm.distributed.sharding import distribute
from minilm.models.head import Head
from minilm.optim.averages import average_weights
from minilm.optim.optimizer import build_optimizer
from minilm.optim.schedule import count_warmup_steps, find_schedule_problems, learning_rate
from minilm.runs.session import Session, begin
from minilm.train import build_head, build_plan, load_steps, seed_dropout, train_step
from minilm.utils.quantities import format_duration

log = logging.getLogger("minilm")

# The probe ends when it has timed at least this many steps and this many seconds.
_FEWEST_STEPS, _FEWEST_SECONDS = 3, 3.0
_MOST_STEPS = 1000
# The probe begins with the step that has the largest micro-batch, among this many first steps.
_SEARCHED_STEPS = 50
# Columns of the plot of the learning rate. With its margin it fits into a terminal of 80.
_PLOT_COLUMNS = 60


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The cost of a few steps."""

    steps: int
    seconds: float
    flops: float
    """Model FLOPs of all processes."""
    memory: int
    """Peak memory of the process, bytes."""
    moments: int
    """Size of the optimizer's state, bytes; of the whole state if it is sharded."""


def dry_run(config: Config, name: str, *, own_loop: bool = False) -> None:
    """Print the plan of the run that `train(config, name)` would start. Reads data and fills the cache, as a run does.

    own_loop: True if the recipe does not train with `minilm.train.train`. Only its data and steps are then known.

    Raises ValueError as `train` does, and if a step does not fit into the memory of a GPU.
    """
    if config.run.resume is not None:
        raise ValueError("--dry-run plans a run from its start: leave run.resume out")
    with begin(config, name) as run:
        config, stream = run.config, run.prepared.stream
        # The first documents of a stream stand for all of them.
        run = replace(run, prepared=run.prepared.without_stream)
        batch, prepared = config.batch, run.prepared
        rows = batch.max_length if batch.layout == "packed" else None
        plan = Plan(
            prepared.train.lengths, examples=batch.examples, micro_tokens=1, row_tokens=rows, seed=config.run.seed
        )
        lines = [("output", f"{run.folder} (a dry run writes nothing to it)"), ("data", _data(prepared, plan))]
        if stream is not None:
            text = f"windows of {stream.tokens:,} tokens; all figures here are those of its first documents"
            lines.append(("stream", text))
        if prepared.labels is not None:
            lines += [("labels", line.removeprefix("labels").lstrip(": ")) for line in prepared.labels.summary]
        if own_loop:
            lines.append(("steps", f"{config.run.count_steps(plan.steps_per_epoch):,} of {batch.examples} {plan.unit}"))
            lines.append(("time", "unknown, as are model and memory, because this recipe has its own loop"))
        else:
            lines += _planned(run)
        if run.accelerator.is_main_process:
            for subject, text in lines:
                print(f"{subject:<9} {text}".replace("\n", f"\n{'':10}"), flush=True)


def _data(prepared: PreparedData, plan: Plan) -> str:
    train, held = prepared.train.identity(), prepared.eval.identity()
    return (
        f"{plan.describe_size(train['tokens'])}; to evaluate: {held['examples']:,} examples, {held['tokens']:,} tokens"
    )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run would do, need and take, by a probe of a few steps."""

    head: Head
    config: Config
    """The settings, with a number in place of `batch.micro_tokens=auto`."""
    cost: Cost
    plan: RunPlan
    steps: int
    probe: Probe
    work: "list[Work]"
    """The work of each period."""
    evaluations: int
    evaluation_flops: float
    """Model FLOPs of an evaluation."""

    @property
    def rate(self) -> float:
        """Seconds of a FLOP."""
        return self.probe.seconds / self.probe.flops

    @property
    def training_seconds(self) -> float:
        """Seconds of all steps."""
        return sum(each.flops for each in self.work) * self.rate

    @property
    def seconds(self) -> float:
        """Seconds of all steps and evaluations, without the start and without saving."""
        return self.training_seconds + self.evaluations * self.evaluation_flops * self.rate


def estimate(run: Session) -> Estimate:
    """Build the model, and run a few steps to measure the memory and the time of the whole run."""
    accelerator, prepared = run.accelerator, run.prepared
    head, run = build_head(run)
    config = run.config
    cost = count_flops(head, config.batch.max_length)
    plan, collator, _ = build_plan(run, head)
    total = config.run.count_steps(plan.steps_per_epoch)
    log.info("running steps to measure the memory and the time …")
    examples = JoinedExamples(prepared)
    probe = _probe(config, accelerator, head, plan, collator, examples, cost, total, run.precision.name)
    return Estimate(
        head=head,
        config=config,
        cost=cost,
        plan=plan,
        steps=total,
        probe=probe,
        work=_measure_periods(run, plan, collator, cost, total),
        evaluations=math.ceil(total / (config.run.eval_every or plan.steps_per_epoch)),
        # The forward pass alone is a third of a step.
        evaluation_flops=_flops(cost, prepared.eval, collator.rate(0.0)) / 3,
    )


def _planned(run: Session) -> list[tuple[str, str]]:
    """Return lines on model, steps, FLOPs, memory and time."""
    accelerator, planned = run.accelerator, estimate(run)
    head, config, plan, probe, work, total = (
        planned.head,
        planned.config,
        planned.plan,
        planned.probe,
        planned.work,
        planned.steps,
    )
    trained = [p for p in head.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in head.parameters())
    state = weights + sum(p.numel() * p.element_size() for p in trained) + probe.moments
    flops, tokens = sum(each.flops for each in work), sum(each.tokens for each in work)
    peak = device_peak(accelerator.device, run.precision.name).flops * accelerator.num_processes
    hardware = describe(accelerator.device)
    training, evaluation = planned.training_seconds, planned.evaluation_flops * planned.rate
    return [
        (
            "model",
            f"{type(head.model).__name__}: {sum(p.numel() for p in head.model.parameters()) / 1e6:.2f} M parameters, "
            f"{sum(p.numel() for p in trained) / 1e6:.2f} M of them trained; {head.summary}",
        ),
        (
            "hardware",
            f"{accelerator.num_processes} process(es) on {hardware['device']}, {hardware['threads_per_process']} "
            f"thread(s) each, {run.precision.name}: {run.precision.reason}",
        ),
        (
            "steps",
            f"{total:,} of {plan.examples} {plan.unit}: {plan.epochs_after(total):.2f} epochs, "
            f"{tokens:,.0f} tokens, {plan.padding_share():.1%} padding",
        ),
        *(("phase", each.text) for each in work if config.run.phases),
        *(("phase", f"WARNING: {line}") for line in find_unused_phases(config)),
        ("rate", plot_rate(config.optim, total)),
        ("FLOPs", f"{flops:.3g}, {flops / tokens:.3g} a token"),
        (
            "memory",
            f"{probe.memory / 1e9:.2f} GB a process after {probe.steps + 1} steps, {state / 1e9:.2f} GB of it "
            "weights, gradients and moments",
        ),
        (
            "time",
            f"{format_duration(planned.seconds)}: training {format_duration(training)} "
            f"({tokens / training:,.0f} tokens/s, MFU {1 / planned.rate / peak:.0%}, by {probe.steps} steps), "
            f"evaluations {planned.evaluations} x {format_duration(evaluation)}; start and saving not counted",
        ),
    ]


def plot_rate(optim: Optim, total: int) -> str:
    """Return lines on the learning rate: the first, highest and last rate, a plot, and a warning for a short run."""
    columns = min(total, _PLOT_COLUMNS)
    steps = [column * (total - 1) // max(1, columns - 1) for column in range(columns)]
    points = [(step, learning_rate(optim, step, total)) for step in steps]
    # Every schedule has its highest rate at the end of the warm-up.
    top = min(max(1, count_warmup_steps(optim, total)), total) - 1
    first, high, last = (learning_rate(optim, step, total) for step in (0, top, total - 1))
    summary = (
        f"{optim.schedule}: {format_number(first)} at step 0, {format_number(high)} at step {top:,}, "
        f"{format_number(last)} at step {total - 1:,}"
    )
    problems = [f"WARNING: {line}" for line in find_schedule_problems(optim, total)]
    return "\n".join([summary, *draw_text(points, high), *problems])


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the steps of a period need."""

    flops: float
    """Model FLOPs of all processes."""
    tokens: float
    text: str
    """A line for the user."""


def _measure_periods(run: Session, plan: RunPlan, collator: Collator, cost: Cost, total: int) -> list[Work]:
    """Return the work of each period of the run."""
    work = []
    for period, steps, examples in zip(
        list_periods(run.config), _split_steps(run.config, total), run.prepared.train_by_period, strict=True
    ):
        epochs = plan.epochs_after(steps.stop) - plan.epochs_after(steps.start)
        flops = epochs * _flops(cost, examples, collator.rate((steps.start + steps.stop) / 2 / total))
        tokens = epochs * int(examples.lengths.sum())
        text = f"from step {steps.start:,}: {describe_period(period)}; {epochs:.2f} epochs, {tokens:,.0f} tokens"
        work.append(Work(flops=flops, tokens=tokens, text=text))
    return work


def _flops(cost: Cost, examples: Examples, rate: float) -> float:
    """Return the model FLOPs of training on all examples once."""
    tokens, squares = int(examples.lengths.sum()), int(examples.square_lengths.sum())
    return cost.step(Step(epoch=0, micro_batches=[], tokens=tokens, square_lengths=squares, padded_tokens=0), rate)


def _probe(
    config: Config,
    accelerator: Accelerator,
    head: Head,
    plan: RunPlan,
    collator: Collator,
    examples: TokenRows,
    cost: Cost,
    total: int,
    precision: str,
) -> Probe:
    """Take steps from the whole run, from all periods in turn, and time them. The time of the first does not count."""
    new_optimizer = build_optimizer(head, config.optim, precision)
    average_weights(new_optimizer, config.optim.ema)
    model, optimizer = distribute(accelerator, head, new_optimizer)
    periods = _split_steps(config, total)
    steps = _choose_steps(plan, periods)
    model.train()
    count, seconds, flops, mark = 0, 0.0, 0.0, 0.0
    try:
        for index in islice(cycle(steps), _MOST_STEPS):
            (item,) = load_steps(plan, examples, collator, accelerator, range(index, total, total), 0)
            step, micro_batches = item
            seed_dropout(config.run.seed, index, accelerator.process_index)
            lr = learning_rate(config.optim, index, total)
            result = train_step(
                accelerator, model, optimizer, micro_batches, lr=lr, max_grad_norm=config.optim.max_grad_norm
            )
            float(result.loss)  # waits for the device
            now = time.perf_counter()
            if mark:
                count, seconds = count + 1, seconds + now - mark
                flops += cost.step(step, collator.rate(index / total))
            mark = now
            enough = torch.tensor(
                count >= max(_FEWEST_STEPS, len(periods)) and seconds >= _FEWEST_SECONDS, device=accelerator.device
            )
            if accelerator.gather(enough.view(1)).any():  # all processes stop after the same step
                break
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"a step does not fit into the memory of the GPU: lower batch.micro_tokens, now {config.batch.micro_tokens}"
        ) from error
    memory = peak_memory(accelerator.device)
    tensors = [
        value for slots in optimizer.state.values() for value in slots.values() if isinstance(value, torch.Tensor)
    ]
    moments = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    model, optimizer = accelerator.free_memory(model, optimizer)
    return Probe(steps=count, seconds=seconds, flops=flops, memory=memory, moments=moments)


def _split_steps(config: Config, total: int) -> list[range]:
    """Return the steps of each period of a run."""
    starts = [period.start for period in list_periods(config)]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], total], strict=True)]


def _choose_steps(plan: RunPlan, periods: list[range]) -> list[int]:
    """Return steps at equal distances from each period, in turn.

    The first one is the step with the largest micro-batch among the first `_SEARCHED_STEPS` of each period.
    """
    searched = [index for steps in periods for index in steps[:_SEARCHED_STEPS]]
    first = max(searched, key=plan.largest_micro_batch_tokens)
    chosen = []
    for steps in periods:
        stride = max(1, len(steps) // 100)
        chosen.append(range(first + stride if first in steps else steps.start, steps.stop, stride))
    return [first, *(index for turn in zip_longest(*chosen) for index in turn if index is not None)]
