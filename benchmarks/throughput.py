"""Compare minilm with HF Trainer: real tokens per second, in turns in one run, with the difference of their losses.

    python benchmarks/throughput.py --quick

Each side runs in its own process with its usual settings, and only one side works at a time. Both compute in fp32, or
in bf16 where this machine is faster in it. A step has 32 examples of at most 128 tokens, and there is no dropout:

- masked-documents: masked LM, a RoBERTa with 6 layers, a width of 384 and a vocabulary of 16,384.
- masked-blocks: the same on full blocks, which need no padding.
- modernbert-documents: a ModernBERT of that size.
- main-job: recipes/mlm_pydocs.py, a small ModernBERT on 16 full blocks, with AdamW in place of Muon.
- causal-documents, causal-blocks: causal LM, a GPT-2 with 6 layers, a width of 384 and a vocabulary of 50,257. minilm
  takes at most 2,048 tokens in a forward pass.
- pair-classification: a BERT with 6 layers and a width of 384, on pairs of texts of about 55 tokens together, like
  those of MRPC. A pair is two pieces of docstrings, and the label says whether the second follows the first. Trainer
  pads with DataCollatorWithPadding.

In each workload Trainer runs with its defaults, and with the settings that make it faster:

- the defaults: random batches, padded to the longest row. For language models they take minilm's examples, already
  masked and padded, so that the losses can be compared.
- group_by_length: each step has examples of one length. The batches are biased, as those of minilm's `group=epoch` are.
- batch_rebalance: random batches, which Trainer sorts by length and cuts into 4 micro-batches of about equal cost.
- eager: transformers' plain attention, which is faster than its default in bf16 on CPUs. All but the first row have
  both attentions.
- sparse: `sparse_prediction`, the head of ModernBERT at the targets alone.

The columns at the end have the mean of the loss that each side reports for its steps, and a check of the gradient of
the first step in fp32, before clipping. "of exact" is its length as a multiple of the gradient of the mean loss over
the step's targets. "error" is the rest, as a share of that gradient. For a language model, the batches of `group=epoch`
are other ones, so that they are not checked. The last lines compare minilm with Trainer's defaults, with its fastest
setting that is unbiased, and with its fastest one of all.

`--quick` takes fewer rounds, no checks of gradients, one kind of attention for Trainer, and 16 examples per step (8 for
causal LM; twice as many in bf16). In a round each side takes one step, or several where lengths differ from step to
step. A ratio compares the tokens per second of one round. Results go to benchmarks/results, as JSON and as a plot
(`pip install -e ".[report]"`).
"""

import argparse
import json
import runpy
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import report
from comparison import Contender, Rounds, TurnResult, compare, run_minilm
from gradients import check_gradients
from hf_trainer import find_obstacle, run_trainer

from minilm.config import Batch, CausalLM, Classification, Config, Data, MaskedLM, Model, Optim, Tokens
from minilm.data.pydocs import load_pydocs

MASKED = Config(
    data=Data(source="pydocs"),
    tokens=Tokens(vocab_size=16384, overflow="truncate"),
    model=Model(
        type="roberta",
        config={
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
            "max_position_embeddings": 130,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
    objective=MaskedLM(rate=0.15),
    batch=Batch(examples=32, max_length=128),
    optim=Optim(lr=1e-4, warmup=0, schedule="linear", weight_decay=0.01, max_grad_norm=1.0),
)
MODERNBERT = replace(
    MASKED,
    model=Model(
        type="modernbert",
        config={
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "intermediate_size": 768,
            "max_position_embeddings": 128,
        },
    ),
)
_RECIPE: Config = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "mlm_pydocs.py"))["CONFIG"]
# The sides make the same updates, so both have AdamW.
PYDOCS = replace(_RECIPE, optim=replace(_RECIPE.optim, name="adamw"))
CAUSAL = replace(
    MASKED,
    model=Model(
        type="gpt2",
        config={
            "n_embd": 384,
            "n_layer": 6,
            "n_head": 6,
            "n_positions": 128,
            "vocab_size": 50257,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    objective=CausalLM(),
    batch=Batch(examples=32, max_length=128, micro_tokens=2048),
)
PAIRS = replace(
    MASKED,
    data=Data(source="pairs.jsonl", pair_column="pair"),  # `in_folder` writes this file
    tokens=Tokens(kind="wordpiece", vocab_size=16384),
    model=replace(MASKED.model, type="bert"),
    objective=Classification(),
)
DEFAULTS = "HF Trainer"
# Number of micro-batches of a step with batch_rebalance. On two cores, 2 and 8 are slower or as fast.
MICRO_BATCHES = 4
WORDS, SPREAD, LEAST = 21, 6, 8  # mean, standard deviation and least number of words in a text of a pair


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A configuration to compare on, and the number of rounds."""

    config: Config
    rounds: Rounds
    """Rounds of a full run."""
    quick: Rounds
    """Rounds of a quick run."""
    quick_examples: int = 16
    """Examples of a step of a quick run in fp32; in bf16 twice as many."""
    grouped: bool = True
    """Whether Trainer also runs with `group_by_length` and `batch_rebalance`, since the lengths differ."""
    sparse: bool = False
    """Whether Trainer's other settings have ModernBERT's `sparse_prediction`."""
    epoch: bool = False
    """Whether minilm also runs with `group=epoch`."""
    eager: bool = True
    """Whether `eager` attention makes Trainer much faster in bf16 on CPUs. A quick run then has no other attention."""

    def quickly(self, config: Config, precision: str) -> tuple[Config, Rounds]:
        """Return the configuration of a quick run, and its rounds."""
        examples, rounds = self.quick_examples, self.quick
        if precision != "fp32":  # there is time for more, and products are compiled for each new size
            block = min(2 * rounds.block, self.rounds.block)
            examples, rounds = 2 * examples, replace(rounds, warm_up=2 * rounds.warm_up, block=block)
        return with_examples(config, examples), rounds

    def attentions(self, precision: str, *, quick: bool) -> tuple[str, ...]:
        """Return the attentions of Trainer beside its default. A quick run has only the one that is usually faster."""
        if not quick:
            return "auto", "eager"
        return ("eager" if self.eager and precision != "fp32" else "auto",)

    def contenders(self, config: Config, attentions: Sequence[str] = ("auto", "eager")) -> list[Contender]:
        """Return Trainer with its defaults, with other settings, and minilm, all with this configuration."""
        found = [Contender(name=DEFAULTS, config=config, run=run_trainer)]
        for grouping in ("group_by_length", "batch_rebalance") if self.grouped else ("",):
            for attention in attentions:
                if grouping or self.sparse or attention != "auto":
                    found.append(rival(config, grouping, attention, sparse=self.sparse))
        found.append(Contender(name="minilm", config=config, run=run_minilm))
        if self.epoch:
            config = replace(config, batch=replace(config.batch, group="epoch"))
            found.append(Contender(name="minilm, group=epoch", config=config, run=run_minilm, biased=True))
        return found


def rival(config: Config, grouping: str, attention: str, *, sparse: bool = False) -> Contender:
    """Return Trainer with some settings. sparse: with ModernBERT's `sparse_prediction`."""
    words = [DEFAULTS, grouping, "" if attention == "auto" else attention, "sparse" * sparse]
    if sparse:
        fields = {**config.model.config, "sparse_prediction": True}
        config = replace(config, model=replace(config.model, config=fields))
    accumulation = MICRO_BATCHES if grouping == "batch_rebalance" else 1
    run = partial(run_trainer, grouping=grouping, attention=attention, accumulation=accumulation)
    name, biased = ", ".join(filter(None, words)), grouping == "group_by_length"
    return Contender(name=name, config=config, run=run, biased=biased, obstacle=find_obstacle(grouping))


def in_blocks(config: Config) -> Config:
    """Return the same configuration on full blocks."""
    return replace(config, batch=replace(config.batch, layout="blocks"))


WORKLOADS = {
    # With `group_by_length` or `group=epoch`, a step has one length and steps differ, so that a turn takes several.
    "masked-documents": Workload(
        config=MASKED, rounds=Rounds(count=7, block=6), quick=Rounds(count=3, warm_up=1, block=2), epoch=True
    ),
    "masked-blocks": Workload(
        config=in_blocks(MASKED), rounds=Rounds(count=11), quick=Rounds(count=2, warm_up=1), grouped=False
    ),
    "modernbert-documents": Workload(
        config=MODERNBERT, rounds=Rounds(count=5, block=4), quick=Rounds(count=3, warm_up=1, block=2), sparse=True
    ),
    "main-job": Workload(
        config=PYDOCS,
        rounds=Rounds(count=15, block=10),
        quick=Rounds(count=3, warm_up=1, block=10),
        grouped=False,
        sparse=True,
    ),
    "causal-documents": Workload(
        config=CAUSAL, rounds=Rounds(count=9), quick=Rounds(count=2, warm_up=1), quick_examples=8, eager=False
    ),
    "causal-blocks": Workload(
        config=in_blocks(CAUSAL),
        rounds=Rounds(count=9),
        quick=Rounds(count=2, warm_up=1),
        quick_examples=8,
        grouped=False,
        eager=False,
    ),
    "pair-classification": Workload(
        config=PAIRS, rounds=Rounds(count=9, block=4), quick=Rounds(count=3, warm_up=1, block=2)
    ),
}


def write_pairs(path: Path, texts: list[str]) -> None:
    """Write labelled pairs as JSON lines: two pieces of text, and whether the second follows the first."""
    rng = np.random.default_rng(0)
    documents = [text.split() for text in texts]
    with path.open("w", encoding="utf-8") as file:
        for words in documents:
            first, second = np.maximum(LEAST, rng.normal(WORDS, SPREAD, 2).astype(int))
            if len(words) < first + second:
                continue
            follows = bool(rng.integers(2))
            other = words if follows else documents[rng.integers(len(documents))]
            at = first if follows else rng.integers(max(1, len(other) - second))
            row = {"text": " ".join(words[:first]), "pair": " ".join(other[at : at + second])}
            file.write(json.dumps({**row, "label": "follows" if follows else "other"}) + "\n")


def with_examples(config: Config, examples: int) -> Config:
    """Return the same configuration with this many examples per step."""
    return replace(config, batch=replace(config.batch, examples=examples))


def in_folder(config: Config, folder: Path) -> Config:
    """Return the same configuration, with its pairs in this folder if it needs pairs."""
    if config.data.pair_column is None:
        return config
    path = folder / str(config.data.source)
    write_pairs(path, load_pydocs()[0])
    return replace(config, data=replace(config.data, source=str(path)))


def measure(
    name: str, contenders: list[Contender], rounds: Rounds, machine: report.Machine, *, checked: bool = False
) -> list[dict[str, Any]]:
    """Print the table of a comparison and return its rows. The first contender is the baseline: Trainer's defaults.

    checked: compare the gradients of the first step with the exact ones.

    A contender that cannot run has a line in the table, and no row.
    """
    unable = [side for side in contenders if side.obstacle]
    contenders = [side for side in contenders if not side.obstacle]
    taken = compare(contenders, machine.precision, rounds)
    same = next(at for at, contender in enumerate(contenders) if contender.run is run_minilm)
    apart = report.compute_loss_difference(taken[0], taken[same])
    checks = check_gradients(contenders) if checked else [None] * len(contenders)
    steps, examples = rounds.count * rounds.block, contenders[0].config.batch.examples
    print(f"\n{name}: {steps} steps of {examples}; losses of Trainer and minilm differ by at most {apart:.1e}")
    print(f"{report.COLUMNS}   loss   of exact    error")
    rivals, rows = fastest_rivals(contenders, taken), []
    for contender, turns, check in zip(contenders, taken, checks, strict=True):
        figures: dict[str, Any] = report.compute_figures(turns, taken[0], machine.peak)
        figures["loss"] = statistics.mean(loss for turn in turns for loss in turn.losses)
        print(f"{report.line(contender.name, figures)} {figures['loss']:6.2f}   {check or ''}")
        label, ours = f"{contender.name} ({name})", contender.run is run_minilm
        row: dict[str, Any] = {
            "workload": name,
            "name": contender.name,
            "label": label,
            "ours": ours,
            "examples": examples,
        }
        row |= {"biased": contender.biased, "gradient": check and asdict(check)}
        if ours:
            row["rivals"] = {
                title: {"name": contenders[at].name, **report.compute_ratios(turns, taken[at])}
                for title, at in rivals.items()
            }
        rows.append({**row, **figures, "loss_difference": apart})
    for side in unable:
        print(f"{side.name:<42} cannot run: {side.obstacle}")
    for row in rows:
        for title, ratios in row.get("rivals", {}).items():
            print(f"{row['name']} / {title} ({ratios['name']}): {report.spread(ratios)}")
    return rows


def fastest_rivals(contenders: list[Contender], taken: list[list[TurnResult]]) -> dict[str, int]:
    """Return the numbers of Trainer with its defaults, its fastest unbiased setting and its fastest biased setting."""
    speeds = [sum(turn.tokens for turn in turns) / sum(turn.seconds for turn in turns) for turns in taken]
    found = {"Trainer's defaults": 0}
    for title, biased in (("Trainer's fastest unbiased setting", False), ("Trainer's fastest biased setting", True)):
        rivals = [at for at, side in enumerate(contenders) if side.run is not run_minilm and side.biased == biased]
        if rivals:
            found[title] = max(rivals, key=speeds.__getitem__)
    return found


def drawing(rows: list[dict[str, Any]]) -> Callable[[Any], None]:
    """Return a function that draws bars of these rows."""
    return lambda figure: report.bars(figure.subplots(), rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="take fewer and smaller steps, and check no gradients")
    parser.add_argument("--workload", choices=[*WORKLOADS], help="run only this workload")
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="auto",
        help="precision of both sides (default: the faster one)",
    )
    options = parser.parse_args()
    machine, rows = report.describe_machine(options.precision), []
    with tempfile.TemporaryDirectory() as folder:
        for name in [options.workload] if options.workload else [*WORKLOADS]:
            workload = WORKLOADS[name]
            config, repeats = in_folder(workload.config, Path(folder)), workload.rounds
            if options.quick:
                config, repeats = workload.quickly(config, machine.precision)
            attentions = workload.attentions(machine.precision, quick=options.quick)
            rows += measure(name, workload.contenders(config, attentions), repeats, machine, checked=not options.quick)
    name = f"throughput-{options.workload}" if options.workload else "throughput"
    size = (8, 0.5 * len(rows) + 1.2)
    report.write(name, machine, {"rows": rows}, drawing(rows), size, quick=options.quick)


if __name__ == "__main__":
    main()
