"""Phases: settings that change at given steps of a run. `list_periods` says which settings each step has."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minilm.config.objective_settings import MaskedLM
from minilm.config.step_counts import count_steps
from minilm.utils.validation import check, suggest_name

if TYPE_CHECKING:
    from minilm.config.settings import Config


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Settings that change at a step of the run. Settings that a phase does not name stay as they were before it."""

    start: float
    """Where the phase begins: after this share of all steps if below 1, else after this number of steps."""
    max_length: int | None = None
    """batch.max_length from there on."""
    examples: int | None = None
    """batch.examples from there on."""
    mask_rate: float | None = None
    """objective.rate from there on, for masked LM. It stays constant, so that objective.final_rate has no effect."""
    weights: tuple[float, ...] = ()
    """data.weights from there on. They cannot change in a stream of several windows."""

    def __post_init__(self) -> None:
        check(
            0 <= self.start < 1 or self.start % 1 == 0 <= self.start,
            f"a phase's start must be a share below 1 or a whole number of steps, not {self.start}",
        )
        check(self._count_changes() > 0, f"the phase {str(self)!r} changes no setting: add one, such as max-length=512")

    def _count_changes(self) -> int:
        return sum(
            getattr(self, field.name) != field.default for field in dataclasses.fields(self) if field.name != "start"
        )

    @classmethod
    def parse(cls, text: str) -> "Phase":
        """Return the phase that `str` writes, such as "start=0.9 max-length=512 weights=1,2".

        Raise ValueError for a setting or value that cannot be read.
        """
        names = [field.name.replace("_", "-") for field in dataclasses.fields(cls)]
        values: dict[str, Any] = {}
        for word in text.split():
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            check(
                bool(equals and value), f"the phase {text!r} is not a list of NAME=VALUE, such as start=0.9 examples=64"
            )
            check(name in names, f"the phase {text!r} has the unknown setting {suggest_name(name, names)}")
            check(name not in values, f"the phase {text!r} has {name} twice: leave one of them out")
            try:
                values[name] = _READERS[name](value)
            except ValueError:
                raise ValueError(f"the phase {text!r}: {name} takes {_KINDS[name]}, not {value!r}") from None
        check("start" in values, f"the phase {text!r} has no start: add start=0.9, a share of the steps, or start=9000")
        return cls(**{name.replace("-", "_"): value for name, value in values.items()})

    def __str__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return " ".join(
            f"{name.replace('_', '-')}={','.join(map(_write, value)) if isinstance(value, tuple) else _write(value)}"
            for name, value in given.items()
            if value not in (None, ())
        )

    def apply(self, config: "Config") -> "Config":
        """Return the configuration with the settings of the phase. Raise ValueError for values that it cannot have."""
        try:
            return self._apply(config)
        except ValueError as error:
            raise ValueError(f"the phase {str(self)!r}: {error}") from error

    def _apply(self, config: "Config") -> "Config":
        batch, data, objective = config.batch, config.data, config.objective
        if self.max_length is not None:
            batch = dataclasses.replace(batch, max_length=self.max_length)
        if self.examples is not None:
            batch = dataclasses.replace(batch, examples=self.examples)
        if self.weights:
            data = dataclasses.replace(data, weights=self.weights)
        if self.mask_rate is not None:
            if not isinstance(objective, MaskedLM):
                raise ValueError("mask-rate is a setting of masked LM, which this objective is not: leave it out")
            objective = dataclasses.replace(objective, rate=self.mask_rate, final_rate=None, rate_decay=1.0)
        return dataclasses.replace(config, batch=batch, data=data, objective=objective)


def _write(number: float) -> str:
    return str(int(number) if number % 1 == 0 else number)


_READERS: dict[str, Any] = {
    "start": float,
    "max-length": int,
    "examples": int,
    "mask-rate": float,
    "weights": lambda value: tuple(map(float, value.split(","))),
}
_KINDS = {
    "start": "a number",
    "max-length": "a whole number",
    "examples": "a whole number",
    "mask-rate": "a number",
    "weights": "numbers with commas between them",
}


@dataclass(frozen=True, kw_only=True)
class Period:
    """Consecutive steps of a run with the same settings."""

    start: int
    """The first of these steps, counted from 0."""
    config: "Config"
    """The settings of these steps, without phases."""


def list_periods(config: "Config") -> list[Period]:
    """Return the periods of a run in their order. The first begins at step 0. A run without phases is one period.

    Raise ValueError for phases that do not fit the configuration.
    """
    phases = config.run.phases
    check(
        not phases or config.run.max_steps is not None,
        "run.phases needs run.max_steps, since the steps of an epoch may change: set it",
    )
    total = config.run.max_steps or 0
    now = dataclasses.replace(config, run=dataclasses.replace(config.run, phases=()))
    config_from, last = {0: now}, 0
    for phase in phases:
        start, now = count_steps(phase.start, total), phase.apply(now)
        check(
            start >= last, f"the phase {str(phase)!r} begins before the phase in front of it: give them in their order"
        )
        config_from[start], last = now, start
    periods = list[Period]()
    for start, now in config_from.items():
        if start == 0 or (start < total and now != periods[-1].config):
            periods.append(Period(start=start, config=now))
    return periods


def drop_weights(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """Return the phases without their weights, and without those that change nothing else."""
    kept = [phase for phase in phases if not (phase.weights and phase._count_changes() == 1)]
    return tuple(dataclasses.replace(phase, weights=()) for phase in kept)


def find_longest(config: "Config") -> int:
    """Return the largest `batch.max_length` of the run."""
    return max(config.batch.max_length, *(period.config.batch.max_length for period in list_periods(config)))


def find_unused_phases(config: "Config") -> list[str]:
    """Return a sentence for each phase that the run is too short for."""
    total = config.run.max_steps or 0
    return [
        f"the phase {str(phase)!r} would begin after {count_steps(phase.start, total):,} steps and the run has "
        f"{total:,}: it has no effect"
        for phase in config.run.phases
        if count_steps(phase.start, total) >= total
    ]


def describe_period(period: Period) -> str:
    """Return what phases can change, for one line of the log."""
    config = period.config
    rate = f", mask rate {config.objective.rate:g}" if isinstance(config.objective, MaskedLM) else ""
    weights = (
        f", data.weights {' '.join(f'{weight:g}' for weight in config.data.weights)}" if config.data.weights else ""
    )
    return f"batch.max_length {config.batch.max_length}, batch.examples {config.batch.examples}{rate}{weights}"
