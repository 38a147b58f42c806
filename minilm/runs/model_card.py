"""The model card of a run."""

import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from minilm.config import Config, Data
from minilm.config.serialization import to_dict
from minilm.data.glue import apply_glue_task
from minilm.objectives.factory import build_objective
from minilm.runs.energy import CPU_ENERGY, GPU_ENERGY
from minilm.utils.atomic_files import write_atomically
from minilm.utils.local_files import SPECIAL_SOURCES, find_local_files, is_local_path

_CARD = """---
{metadata}
---

# {title}

A {kind} trained with minilm on `{source}`
({model}, {parameters:,} parameters).

```python
{usage}
```

## Results

| figure | value |
|---|---|
{rows}

{card_text}

## Samples

{samples}

## Training

{device}, {processes} process(es), {precision}.{energy}

| setting | value |
|---|---|
{settings}
"""


# The table of the settings, above which the paragraph about a verification stands.
_SETTINGS_TABLE = "| setting | value |"
_BLANK = "\n\n"
_VERIFIED = "Verified: "
_VERIFICATION = re.compile(rf"^{_VERIFIED}`minilm verify` .*\n\n", re.MULTILINE)
# The hub's names for the figures of an evaluation.
_METRICS = {
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "mse": "mse",
}
_FIGURES = ("eval_loss", "bits_per_byte", *_METRICS)


def write_card(
    folder: Path,
    config: Config,
    facts: dict[str, Any],
    results: dict[str, float],
    samples: dict[str, str],
) -> None:
    """Write `README.md`, the model card: metadata for the hub, figures, settings and samples."""
    rows = [
        f"| {name} | {value:,} |" if isinstance(value, int) else f"| {name} | {value:.5g} |"
        for name, value in results.items()
    ]
    settings = [
        f"| {group}.{name} | {json.dumps(value)} |"
        for group, values in to_dict(config).items()
        for name, value in values.items()
        if value not in (None, [], {}) and name != "defined_in"
    ]
    listed = [f"- {text} → {more}" for text, more in samples.items()]
    objective, title = build_objective(config.objective), folder.resolve().name
    card = _CARD.format(
        metadata=build_metadata(config, title, results).to_yaml(),
        title=title,
        source="`, `".join(config.data.sources),
        rows="\n".join(rows),
        usage=objective.usage(config.run.push_to_hub or title),
        kind=objective.title,
        card_text=objective.card_text,
        samples="\n".join(listed) or "None were asked for.",
        device=facts["hardware"]["device"],
        energy=_energy(results),
        settings="\n".join(settings),
        **{key: facts[key] for key in ("model", "parameters", "processes", "precision")},
    )
    write_atomically(folder / "README.md", card)


def write_verification(folder: Path, text: str | None) -> None:
    """Write a paragraph about the verification of the run into its model card, in place of an earlier one.

    text: the paragraph, or None to remove it. A run that is not finished has no card yet, and nothing is written.
    """
    path = folder / "README.md"
    if not path.is_file():
        return
    before = path.read_text(encoding="utf-8")
    card = _VERIFICATION.sub("", before)
    if text is not None:
        above, table, below = card.rpartition(_SETTINGS_TABLE)
        # The user may have removed the table.
        card = f"{above or below.rstrip() + _BLANK}{_VERIFIED}{text}{_BLANK}{table}{below if table else ''}"
    if card != before:
        write_atomically(path, card)


def _energy(results: dict[str, float]) -> str:
    """Return a paragraph with the measured energy, or nothing where it was not measured."""
    if "energy_kwh" not in results:
        return ""
    measured = " and ".join(name for kind, name in ((GPU_ENERGY, "GPUs"), (CPU_ENERGY, "CPUs")) if kind in results)
    later = f", since step {results['energy_since_step']:,}" if "energy_since_step" in results else ""
    return f"\n\nEnergy: {results['energy_kwh']:.3g} kWh ({measured}{later})"


def build_metadata(config: Config, name: str, results: dict[str, float]) -> ModelCardData:
    """Return the part of a model card that the hub reads: the model's origin, and the figures of the last evaluation.

    It does not name local files and folders.
    """
    objective, base = build_objective(config.objective), config.model.name
    pipeline = objective.pipeline
    # Where an evaluation has several parts, the name of a figure ends with the name of its part.
    kinds = {
        figure: next((kind for kind in _FIGURES if figure == kind or figure.startswith(f"{kind}_")), None)
        for figure, value in results.items()
        if math.isfinite(value)
    }
    where = _evaluated_on(config.data)
    evaluations = [
        EvalResult(
            task_type=pipeline,
            metric_type=_METRICS.get(kind, kind),
            metric_name=figure,
            metric_value=results[figure],
            **where,
        )
        for figure, kind in kinds.items()
        if kind is not None
    ]
    return ModelCardData(
        library_name=objective.library,
        pipeline_tag=pipeline,
        license=config.run.license,
        base_model=base if base is not None and not is_local_path(base) else None,
        tags=["minilm", pipeline],
        datasets=_on_hub(config.data.sources) or None,
        metrics=list(dict.fromkeys(_METRICS[kind] for kind in kinds.values() if kind in _METRICS)) or None,
        model_name=name if evaluations else None,
        eval_results=evaluations or None,
    )


def _on_hub(sources: tuple[str, ...]) -> list[str]:
    """Return the sources that are datasets on the hub."""

    def local(source: str) -> bool:
        try:
            return source in SPECIAL_SOURCES or is_local_path(source) or bool(find_local_files(source))
        except ValueError:  # files that are gone by now
            return True

    return [source for source in dict.fromkeys(sources) if not local(source)]


def _evaluated_on(data: Data) -> dict[str, Any]:
    """Return the fields of an `EvalResult` that name its dataset."""
    data = apply_glue_task(data)
    sources = (data.eval_source,) if data.eval_source is not None else data.sources
    if len(sources) > 1 or not _on_hub(sources):
        return {"dataset_type": "unknown", "dataset_name": "held-out documents"}
    name, split = sources[0], data.eval_split or ("train" if data.eval_source is not None else None)
    return {"dataset_type": name, "dataset_name": name, "dataset_config": data.config, "dataset_split": split}
