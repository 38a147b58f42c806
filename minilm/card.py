"""The model card of a run."""

import json
from pathlib import Path
from typing import Any

from minilm.cache import publish
from minilm.config import Config
from minilm.energy import CPUS, GPUS
from minilm.objectives import objective_of
from minilm.settings import to_dict

_CARD = """---
library_name: transformers
pipeline_tag: {pipeline}
{base}tags:
- minilm
- {pipeline}
---

# {title}

A {kind} trained with minilm on `{source}`
({model}, {parameters:,} parameters).

```python
from transformers import pipeline

model = pipeline("{pipeline}", model="{title}")
```

## Results

| figure | value |
|---|---|
{rows}

{explained}

## Samples

{samples}

## Training

{device}, {processes} process(es), {precision}.{energy}

| setting | value |
|---|---|
{settings}
"""


def write_card(
    folder: Path,
    config: Config,
    facts: dict[str, Any],
    results: dict[str, float],
    samples: dict[str, str],
) -> None:
    """`README.md`, the model card: metadata that the hub reads, the figures, the settings, and samples."""
    rows = [
        f"| {name} | {value:,} |" if isinstance(value, int) else f"| {name} | {value:.5g} |"
        for name, value in results.items()
    ]
    settings = [
        f"| {group}.{name} | {json.dumps(value)} |"
        for group, values in to_dict(config).items()
        for name, value in values.items()
        if value not in (None, [], {})
    ]
    listed = [f"- {text} → {more}" for text, more in samples.items()]
    name = config.model.name
    base = f"base_model: {json.dumps(name)}\n" if name and not Path(name).exists() else ""  # the hub knows no folders
    objective = objective_of(config.objective)
    card = _CARD.format(
        base=base,
        title=folder.resolve().name,
        source="`, `".join(config.data.sources),
        rows="\n".join(rows),
        pipeline=objective.pipeline,
        kind=objective.title,
        explained=objective.explained,
        samples="\n".join(listed) or "None were asked for.",
        device=facts["hardware"]["device"],
        energy=_energy(results),
        settings="\n".join(settings),
        **{key: facts[key] for key in ("model", "parameters", "processes", "precision")},
    )
    publish(folder / "README.md", card)


def _energy(results: dict[str, float]) -> str:
    """A line with what was measured; nothing where that is not known."""
    if "energy_kwh" not in results:
        return ""
    measured = " and ".join(name for kind, name in ((GPUS, "GPUs"), (CPUS, "CPUs")) if kind in results)
    later = f", since step {results['energy_since_step']:,}" if "energy_since_step" in results else ""
    return f"\n\nEnergy: {results['energy_kwh']:.3g} kWh ({measured}{later})"
