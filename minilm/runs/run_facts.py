"""The facts of a run besides its steps: run.json, written before the first step, and all_results.json, at the end."""

import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from minilm.config import Config, Data
from minilm.config.phases import describe_period, find_unused_phases, list_periods
from minilm.data.corpus import Examples, PreparedData
from minilm.data.phased_batches import RunPlan
from minilm.data.sources import fingerprint_sources
from minilm.data.special_ids import count_embedding_rows
from minilm.distributed.hardware import describe
from minilm.distributed.precision import Peak, Precision
from minilm.models.head import Head
from minilm.optim.schedule import find_schedule_problems
from minilm.utils.atomic_files import write_atomically

log = logging.getLogger("minilm")

RESULTS = "all_results.json"  # exists once the run is finished


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that a result depends on."""
    return {name: version(name) for name in ("minilm", "torch", "transformers", "tokenizers", "datasets", "accelerate")}


def collect_run_facts(
    accelerator: Accelerator,
    head: Head,
    plan: RunPlan,
    prepared: PreparedData,
    total_steps: int,
    precision: Precision,
    peak: Peak,
) -> dict[str, Any]:
    """Return the facts of a run that are not in its configuration, as JSON types. They go to run.json and the card."""
    return {
        "model": type(head.model).__name__,
        "parameters": sum(parameter.numel() for parameter in head.model.parameters()),
        "head": head.summary,
        "vocabulary": len(prepared.tokenizer),
        "train": {
            **({} if plan.rows is None else {"rows": plan.rows}),
            **prepared.train.identity(),
            **({} if prepared.stream is None else {"window_tokens": prepared.stream.tokens}),
            "unknown": _unknown_share(prepared.train, prepared.tokenizer),
        },
        "eval": {**prepared.eval.identity(), "unknown": _unknown_share(prepared.eval, prepared.tokenizer)},
        "labels": prepared.labels.summary if prepared.labels is not None else (),
        "steps": total_steps,
        "padding_share": round(plan.padding_share(), 4),
        "processes": accelerator.num_processes,
        "precision": precision.name,
        "precision_reason": precision.reason,
        "peak": f"{peak.flops / 1e12:.3g} TFLOP/s a device, {peak.source}",
        "hardware": describe(accelerator.device),
    }


def _unknown_share(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the share of the tokens that are the unknown token, between 0 and 1."""
    # GPT-2 names an unknown token, which is also its end token, but never produces it for unknown text.
    if tokenizer.unk_token_id in (None, tokenizer.eos_token_id):
        return 0.0
    return float(examples.count_ids(count_embedding_rows(tokenizer))[tokenizer.unk_token_id] / len(examples.ids))


def write_run_json(folder: Path, settings: dict[str, Any], data: Data, facts: dict[str, Any]) -> None:
    """Write the settings and the facts of the run to `run.json`, which `--from-run` reads.

    settings: the configuration, in the form of `minilm.config.serialization.to_dict`. data: the sources to fingerprint.
    """
    # An earlier run in this folder may have left its results, or this run did before it was resumed.
    (folder / RESULTS).unlink(missing_ok=True)
    content = {
        "config": settings,
        **facts,
        "sources": fingerprint_sources(data),
        "versions": library_versions(),
    }
    write_atomically(folder / "run.json", json.dumps(content, indent=2) + "\n")


def read_revisions(folder: Path) -> dict[str, str]:
    """Return the commit that a run read of each source on the hub, as `run.json` records it.

    Raise ValueError if the file cannot be read.
    """
    path = folder / "run.json"
    try:
        sources = json.loads(path.read_text(encoding="utf-8")).get("sources", {})
        # A source of files has a list.
        return {source: content["revision"] for source, content in sources.items() if isinstance(content, dict)}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable run.json ({error})") from error


def log_run_facts(folder: Path, config: Config, facts: dict[str, Any]) -> None:
    """Log the facts of the run. Warn where the run is too short for its schedule."""
    for part in ("train", "eval"):
        unknown = f", {facts[part]['unknown']:.2%} of them unknown to the tokenizer" if facts[part]["unknown"] else ""
        rows = f"{facts[part]['rows']:,} rows of " if "rows" in facts[part] else ""
        window = facts[part].get("window_tokens")
        stream = f"a stream in windows of {window:,} tokens; the first of it: " if window else ""
        log.info(
            f"{part}: {stream}{rows}{facts[part]['examples']:,} examples, {facts[part]['tokens']:,} tokens{unknown}"
        )
    for line in facts["labels"]:
        log.log(logging.WARNING if line.startswith("WARNING") else logging.INFO, line)
    log.info(
        f"{facts['model']}: {facts['parameters'] / 1e6:.2f} M parameters, vocabulary {facts['vocabulary']:,}, "
        f"{facts['head']}"
    )
    hardware = facts["hardware"]
    log.info(
        f"{facts['processes']} process(es) on {hardware['device']}, {hardware['threads_per_process']} thread(s) each, "
        f"{facts['precision']}: {facts['precision_reason']}; peak for MFU {facts['peak']}"
    )
    log.info(f"output folder: {folder}")
    unit = "rows" if "rows" in facts["train"] else "examples"
    periods = list_periods(config)
    size = f"{periods[0].config.batch.examples} {unit}"
    log.info(f"{facts['steps']:,} steps of {size}, {facts['padding_share']:.1%} padding")
    for period in periods if config.run.phases else ():
        log.info(f"from step {period.start:,}: {describe_period(period)}")
    for problem in (*find_schedule_problems(config.optim, facts["steps"]), *find_unused_phases(config)):
        log.warning(problem)


def write_results(folder: Path, results: dict[str, float]) -> None:
    """Write `all_results.json`, whose presence marks the run as finished."""
    write_atomically(folder / RESULTS, json.dumps(results, indent=2) + "\n")
