"""The hardest evaluation examples of a run, from its ledger."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minilm.config.serialization import read_run_config
from minilm.objectives.factory import prepare_data
from minilm.runs.ledger import ExampleTable, find_evaluations, identify_examples, read_evaluation

log = logging.getLogger("minilm")

# An example is among the highest of an evaluation if its mean loss is among this share of all of them.
HIGHEST_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class HardExample:
    """An evaluation example with a high loss."""

    example: int
    """Its number among the evaluation examples, from 0."""
    document: int
    """The number of its document among the evaluation documents; that of the example if examples join documents."""
    loss: float
    """The mean loss of its targets in the last evaluation, in nats."""
    targets: int
    high: int
    """The number of evaluations in which it is among the tenth with the highest mean losses."""
    evaluations: int
    """The number of evaluations in the ledger."""
    text: str | None
    """The text as the tokenizer gives it back. None if the documents cannot be read again."""


def find_hard_examples(run: str | Path, count: int, *, always_high: bool = False) -> list[HardExample]:
    """Return the examples with the highest mean loss in the last evaluation of a run, at most `count`, highest first.

    always_high: only those that are among the highest tenth in each evaluation of the ledger.

    Raise ValueError for a folder without a ledger.
    """
    folder = Path(run)
    tables = [read_evaluation(path) for path in find_evaluations(folder)]
    if not tables:
        raise ValueError(
            f"{folder} has no ledger: it is not a run of this version, it had no evaluation yet, or run.ledger was off"
        )
    last = tables[-1]
    size = max(1, round(HIGHEST_SHARE * len(last)))
    high_E = np.zeros(len(last), np.int64)
    for table in tables:
        high_E[np.argsort(-table.mean_loss, kind="stable")[:size]] += 1
    order = np.argsort(-last.mean_loss, kind="stable")
    chosen = [int(i) for i in order if not always_high or high_E[i] == len(tables)][:count]
    texts = _read_texts(folder, last, chosen)
    return [
        HardExample(
            example=i,
            document=int(last.arrays["document"][i]) if "document" in last.arrays else i,
            loss=float(last.mean_loss[i]),
            targets=int(last.arrays["targets"][i]),
            high=int(high_E[i]),
            evaluations=len(tables),
            text=text,
        )
        for i, text in zip(chosen, texts, strict=True)
    ]


def _read_texts(folder: Path, table: ExampleTable, examples: Sequence[int]) -> list[str | None]:
    """Return the texts of some evaluation examples. Warn if they cannot be read, or are no longer those of the run."""
    try:
        config = read_run_config(str(folder / "run.json"))
        prepared = prepare_data(config)
        if identify_examples(config, prepared) != table.identity:
            raise ValueError("they have changed since the run")
    except (OSError, ValueError) as error:
        log.warning(f"the texts of the evaluation documents are not shown: {error}")
        return [None] * len(examples)
    return [str(prepared.tokenizer.decode(prepared.eval[i], skip_special_tokens=True)) for i in examples]
