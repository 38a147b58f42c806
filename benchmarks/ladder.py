"""Measure what each optimisation of minilm brings, switched on one after the other from a plain loop.

    python benchmarks/ladder.py

The job is a masked LM on documents of different lengths. The model is the RoBERTa of throughput.py (6 layers, width
384, vocabulary 16,384). A step has 64 documents of at most 128 tokens (1,024 documents on a GPU). Each rung runs
`train_step` in its own process, and the rungs take turns, one step each. A rung has all optimisations of the rungs
above it in the table:

- plain: four random micro-batches, padded to their longest row; the head and the loss at every token; torch's AdamW
  with its defaults.
- sorted micro-batches: the same step is cut by length into micro-batches that hold no more tokens than those.
- head at the targets; last layer at the targets (the part after its attention); loss in parts (the logits of a batch
  are never in memory all at once).
- packing: no padding, and attention inside each document.
- attention in bins: documents of at most 128 tokens share bins. On CPUs, plain matrix products compute their attention
  in place of the fused kernel.
- fused AdamW, which also clips the gradient. On CPUs: freed memory kept by the process, then memory in huge pages. In
  fp32: few of oneDNN's kernels kept.
- group=epoch: each step has documents of similar length. These are other steps, so their losses do not compare.

The first ratio compares a rung with the plain loop in the same round, and the gain compares it with the rung above.
Further tables compare minilm without and with an optimisation that this model does not use:

- on CPUs, dropout 0.1 with torch's masks and with minilm's own, whose losses differ by chance;
- on CPUs, GELU of half of a product and of a copy of that half, in the model of recipes/mlm_pydocs.py;
- rotary embeddings by transformers' code and by minilm's, in the same model;
- GPT-2's GELU step by step, as in transformers, and as one operation, in the causal LM of throughput.py on full blocks;
- attention with a window (128 tokens, in two of three layers) on whole rows and in chunks, in a ModernBERT as large as
  the RoBERTa, on full blocks of 1,024 tokens.

Results go to benchmarks/results, as JSON and as a plot (`pip install -e ".[report]"`).
"""

import argparse
import os
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import report
import torch
from comparison import Contender, Parts, Rounds, Task, TurnResult, build_parts, compare, serve_turns
from hf_trainer import pad_labels
from throughput import CAUSAL, MASKED, PYDOCS, in_blocks
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import GELUActivation, NewGELUActivation

import minilm.data.packing
import minilm.distributed.hardware
import minilm.distributed.launch
import minilm.models.attention
import minilm.models.fast_modules
from minilm.config import Config, Model
from minilm.data.batch_plan import Plan, Step
from minilm.data.corpus import PreparedData
from minilm.data.micro_batch import MicroBatch
from minilm.data.packing import Packing
from minilm.data.phased_batches import RunPlan
from minilm.models.head import Head
from minilm.models.sparse_head import SparseHead
from minilm.optim.optimizer import build_optimizer

PLAIN = "plain: random, padded, full head"
SORTED = "sorted micro-batches"
SPARSE = "head at the targets"
SHORT = "last layer at the targets"
FUSED_LOSS = "loss in parts"
PACKED = "packing"
BINS = "attention in bins"
FUSED = "fused AdamW"
MEMORY = "freed memory kept"
HUGE = "memory in huge pages"
KERNELS = "few kernels kept"
EPOCH = "group=epoch"
RUNGS = (PLAIN, SORTED, SPARSE, SHORT, FUSED_LOSS, PACKED, BINS, FUSED, MEMORY, HUGE, KERNELS, EPOCH)
ON_CPUS, IN_FP32 = (BINS, MEMORY, HUGE, KERNELS), (KERNELS,)
TORCH_MASKS, OWN_MASKS = "dropout by torch's masks", "dropout by minilm's masks"
TORCH_ROTARY, OWN_ROTARY = "rotary by transformers", "rotary by minilm"
HALF_GELU, COPIED_GELU = "GELU of a half", "GELU of a copy of it"
LONG_GELU, OWN_GELU = "GELU written out", "GELU in one pass"
WHOLE, CHUNKS = "window on whole rows", "window in chunks"
APART = {EPOCH: "other steps", OWN_MASKS: "other masks"}
# At this learning rate, the rounding of bf16 stays small for some hundred steps.
SMALL = replace(PYDOCS, optim=replace(PYDOCS.optim, lr=1e-4))
PARTS = 4  # micro-batches of the plain loop's step


class PlainHead(Head):
    """A head that computes all logits, on padded rows."""

    @property
    def summary(self) -> str:
        return "full head"

    def forward(
        self,
        input_ids_T: Tensor,
        packing: Packing,
        target_index_N: Tensor,
        targets: Tensor | None = None,
        type_ids_T: Tensor | None = None,
        coupling_NxD: Tensor | None = None,
    ) -> Tensor:
        """Return -log p at each position of the padded batch, float32[R L], nats. A position without a target has 0."""
        assert targets is not None
        logits_RxLxV = self.model(**self._make_inputs(input_ids_T, packing, type_ids_T)).logits
        batch = MicroBatch(
            input_ids_T=input_ids_T, packing=packing, target_index_N=target_index_N, target_ids_N=targets
        )
        return F.cross_entropy(logits_RxLxV.flatten(0, 1).float(), pad_labels(batch).flatten(), reduction="none")

    def logits(
        self, input_ids_T: Tensor, packing: Packing, target_index_N: Tensor, type_ids_T: Tensor | None = None
    ) -> Tensor:
        """Return the logits of the targets, [N, V]."""
        place_T = packing.groups[0].place_T
        logits_RxLxV: Tensor = self.model(**self._make_inputs(input_ids_T, packing, type_ids_T)).logits
        return logits_RxLxV.flatten(0, 1)[target_index_N if place_T is None else place_T[target_index_N]]


class PartialHead(SparseHead):
    """minilm's head with the shortcuts of some rungs. `model.attention` switches packing."""

    def __init__(self, model: PreTrainedModel, rungs: tuple[str, ...]) -> None:
        self.rungs = rungs
        super().__init__(model)

    def _try_short(self, expected_NxV: Tensor) -> None:
        if SHORT in self.rungs:
            super()._try_short(expected_NxV)

    def _try_fused(self, expected_NxV: Tensor) -> None:
        if FUSED_LOSS in self.rungs:
            super()._try_fused(expected_NxV)


class RandomPlan(Plan):
    """The steps of `plan`, cut at random into micro-batches with equal numbers of examples."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(
            plan.lengths,
            examples=plan.examples,
            micro_tokens=plan.micro_tokens,
            seed=plan.seed,
            padded=plan.padded,
            multiple=plan.multiple,
        )

    def step(self, index: int) -> Step:
        """Step `index`, with the same examples."""
        step = super().step(index)
        examples = np.random.default_rng((self.seed, index)).permutation(step.examples)
        parts = np.array_split(examples, PARTS)
        return replace(step, micro_batches=[parts], padded_tokens=sum(self._padded_tokens(part) for part in parts))


def head_of(rungs: tuple[str, ...], network: PreTrainedModel, prepared: PreparedData) -> Head:
    """Return the head of these rungs."""
    return PartialHead(network, rungs) if SPARSE in rungs else PlainHead(network)


def parts_of(config: Config, rungs: tuple[str, ...]) -> Parts:
    """Return the parts of a run with the optimisations of these rungs, which are the first of `RUNGS`."""
    if PACKED not in rungs:
        config = replace(config, model=replace(config.model, attention="sdpa"))
    if EPOCH in rungs:
        config = replace(config, batch=replace(config.batch, group="epoch"))
    # On a GPU this is not a rung.
    if BINS not in rungs and not torch.cuda.is_available():
        minilm.data.packing.SHORT_ROW_TOKENS = 0
        setattr(minilm.models.attention, "_products_are_faster", lambda group, query: False)  # noqa: B010 - mypy refuses an assignment to a name that is not exported
    if MEMORY not in rungs:
        # With any such variable, minilm leaves the memory to the C library.
        os.environ.setdefault("MALLOC_ARENA_MAX", "8")
    if HUGE not in rungs:
        setattr(minilm.distributed.hardware, "_memory_is_rationed", lambda: True)  # noqa: B010
    if KERNELS not in rungs:
        setattr(minilm.distributed.launch, "keep_few_kernels", lambda precision: None)  # noqa: B010
    parts = build_parts(config, partial(head_of, rungs))
    if SORTED not in rungs:
        (only,) = parts.plan.parts
        parts = replace(parts, plan=RunPlan([replace(only, plan=RandomPlan(only.plan))]))
    if FUSED not in rungs:
        groups = build_optimizer(parts.model, config.optim).param_groups
        groups = [{key: group[key] for key in ("params", "weight_decay", "scale")} for group in groups]
        plain = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, eps=config.optim.eps)
        parts = replace(parts, optimizer=parts.accelerator.prepare(plain))
    return parts


def run_rung(task: Task, rungs: tuple[str, ...]) -> None:
    """Run minilm with the optimisations of these rungs."""
    parts = parts_of(task.config, rungs)
    # The MFU of the first rungs uses the FLOPs that minilm counts.
    serve_turns(task, parts if FUSED_LOSS in rungs else replace(parts, work=None))


def without(task: Task, name: str) -> None:
    """Run minilm without the optimisation that `name` names."""
    # mypy refuses an assignment to these names, because the modules do not export them.
    if name == TORCH_MASKS:
        del minilm.models.fast_modules.FAST_MODULES[nn.Dropout]
        setattr(minilm.models.attention, "fast_dropout", F.dropout)  # noqa: B010
    if name == TORCH_ROTARY:
        setattr(minilm.models.fast_modules, "install_fast_rotary", lambda model: None)  # noqa: B010
    if name == HALF_GELU:
        del minilm.models.fast_modules.FAST_MODULES[GELUActivation]
    if name == LONG_GELU:
        del minilm.models.fast_modules.FAST_MODULES[NewGELUActivation]
    if name == WHOLE:
        setattr(minilm.models.attention, "chunk_size", lambda window, group: None)  # noqa: B010
    serve_turns(task, build_parts(task.config))


def with_dropout(config: Config) -> Config:
    """Return the same configuration with a dropout of 0.1."""
    fields = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return replace(config, model=replace(config.model, config={**config.model.config, **fields}))


def with_window(config: Config) -> Config:
    """Return a ModernBERT of the same size on full blocks of 1,024 tokens, with at most as many tokens per step."""
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    fields = {name: config.model.config[name] for name in sizes}
    fields |= {"intermediate_size": 576, "local_attention": 128}
    batch, length = config.batch, 1024
    examples = max(1, batch.examples * batch.max_length // length)
    batch = replace(batch, layout="blocks", max_length=length, examples=examples)
    return replace(config, model=Model(type="modernbert", config=fields), batch=batch)


def pair_of(names: tuple[str, str], config: Config) -> list[Contender]:
    """Return minilm without an optimisation and with it."""
    return [Contender(name=name, config=config, run=partial(without, name=name)) for name in names]


def contenders_of(config: Config, rungs: tuple[str, ...]) -> list[Contender]:
    """Return a contender for each rung, from the first to the last."""
    return [
        Contender(name=name, config=config, run=partial(run_rung, rungs=rungs[: number + 1]))
        for number, name in enumerate(rungs)
    ]


def rows_of(rungs: tuple[str, ...], taken: list[list[TurnResult]], machine: report.Machine) -> list[dict[str, Any]]:
    """Print the table and return its rows."""
    print(f"\n{report.COLUMNS}   gain of the rung      loss apart by")
    rows = []
    for number, (name, turns) in enumerate(zip(rungs, taken, strict=True)):
        figures, gain = (
            report.compute_figures(turns, taken[0], machine.peak),
            report.compute_ratios(turns, taken[max(0, number - 1)]),
        )
        apart = None if name in APART else report.compute_loss_difference(turns, taken[0])
        cell = APART[name] if apart is None else f"{apart:.1e}"
        print(f"{report.line(name, figures)}   {report.spread(gain):<20}  {cell}")
        label = name if number == 0 else f"+ {name}"
        rows.append(
            {"name": name, "label": label, "ours": number > 0, **figures, "gain": gain, "loss_difference": apart}
        )
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="take 3 rounds in place of 9")
    options = parser.parse_args()
    machine = report.describe_machine()
    cuda = machine.device.type == "cuda"
    examples = 1024 if cuda else 64
    batch = replace(MASKED.batch, examples=examples, micro_tokens=examples // PARTS * MASKED.batch.max_length)
    left_out = (ON_CPUS if cuda else ()) + (IN_FP32 if machine.precision != "fp32" else ())
    rungs = tuple(name for name in RUNGS if name not in left_out)
    rounds = Rounds(count=3, warm_up=1) if options.quick else Rounds(count=9)
    config = replace(MASKED, batch=batch)
    rows = rows_of(rungs, compare(contenders_of(config, rungs), machine.precision, rounds), machine)
    pairs = {
        (TORCH_ROTARY, OWN_ROTARY): SMALL,
        (LONG_GELU, OWN_GELU): in_blocks(CAUSAL),
        (WHOLE, CHUNKS): with_window(config),
    }
    if not cuda:
        pairs = {(TORCH_MASKS, OWN_MASKS): with_dropout(config), (HALF_GELU, COPIED_GELU): SMALL, **pairs}
    for names, own in pairs.items():
        # The steps of a small model are short, and the first ones after another process's turn are slow.
        turns = replace(rounds, block=20) if own is SMALL else rounds
        rows += rows_of(names, compare(pair_of(names, own), machine.precision, turns), machine)

    def draw(figure: Any) -> None:
        report.bars(figure.subplots(), rows)

    report.write("ladder", machine, {"rows": rows}, draw, (8, 7), quick=options.quick)


if __name__ == "__main__":
    main()
