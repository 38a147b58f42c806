"""A configuration as JSON, the form that it has in `run.json` and in checkpoints."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from minilm.config import Config, MaskedLM, ObjectiveSettings, Phase
from minilm.config.objective_class import find_builtin_classes, find_class, name_class
from minilm.utils.validation import check, suggest_name


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as JSON types: the class of the objective as a name, and phases as on a command line.

    `from_dict` reads it.
    """
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    tree["objective"] |= name_class(type(config.objective))
    tree["run"]["phases"] = [str(phase) for phase in config.run.phases]
    return tree


def default_settings(objective: type[ObjectiveSettings]) -> dict[str, Any]:
    """Return the defaults of all settings as `to_dict` does. Settings of the objective without a default are left out.

    objective: the class of the objective's settings.
    """
    tree = to_dict(Config())
    fields = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(objective)
    }
    given = {name: value for name, value in fields.items() if value is not dataclasses.MISSING}
    tree["objective"] = json.loads(json.dumps(given)) | name_class(objective)
    return tree


def flatten_settings(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the result of `to_dict` as one dictionary with the keys `group.name`."""
    return {f"{group}.{name}": value for group, values in tree.items() for name, value in values.items()}


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value from JSON has the type of a field. The constructor checks the choices of a Literal."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple and isinstance(value, list | tuple):
        parts = parts[:1] * len(value) if parts[-1] is ... else parts
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is dict and isinstance(value, dict):
        return all(_fits(name, parts[0]) and _fits(inner, parts[1]) for name, inner in value.items())
    if origin is list and isinstance(value, list):
        return all(_fits(inner, parts[0]) for inner in value)
    if kind is Phase:
        return isinstance(value, str)
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return origin is Literal or (origin is None and isinstance(value, kind))


def from_dict(tree: dict[str, Any]) -> Config:
    """Return the configuration that `to_dict` wrote. A group or field that is missing has its default.

    Raise ValueError for an unknown group or field, and for a value that does not have the type of its field.
    """
    groups = typing.get_type_hints(Config)
    check(isinstance(tree, dict), "a configuration must be an object that holds groups of settings")
    for name in set(tree) - set(groups):
        raise ValueError(f"unknown group of settings {suggest_name(name, list(groups))}")
    built = {}
    for name, kind in groups.items():
        given = tree.get(name, {})
        check(isinstance(given, dict), f"the group {name} must be an object that holds settings, not {given!r}")
        values = dict(given)
        if kind is ObjectiveSettings:
            kind = _take_class(values)
        known = [f.name for f in dataclasses.fields(kind)]
        for unknown in set(values) - set(known):
            raise ValueError(f"unknown setting {name}.{suggest_name(unknown, known)}")
        for setting, value in values.items():
            wanted = typing.get_type_hints(kind)[setting]
            check(
                _fits(value, wanted), f"{name}.{setting} must be {getattr(wanted, '__name__', wanted)}, not {value!r}"
            )
        if name == "run" and "phases" in values:
            values["phases"] = map(Phase.parse, values["phases"])
        built[name] = kind(**{k: tuple(v) if isinstance(v, list | map) else v for k, v in values.items()})
    return Config(**built)


def _take_class(values: dict[str, Any]) -> type[ObjectiveSettings]:
    """Remove the class from the settings of an objective, and return it."""
    name, defined_in = str(values.pop("name", MaskedLM.__name__)), values.pop("defined_in", None)
    check(defined_in is None or isinstance(defined_in, dict), "objective.defined_in must hold a module and a file")
    kind = find_class(name, defined_in)
    if kind is None:
        raise ValueError(f"unknown objective.name {suggest_name(name, list(find_builtin_classes()))}")
    return kind


def read_run_config(path: str) -> Config:
    """Return the configuration in the `run.json` of a run, for another run.

    `run.output_dir`, `run.overwrite`, `run.resume` and `run.push_to_hub` are not set, because the output folder and the
    repository belong to the run that wrote the file. Raise ValueError if the file cannot be read.
    """
    try:
        return _read_config(Path(path), Path(path).parent)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--from-run {path}: not a readable run.json ({error})") from error


def read_checkpoint_config(folder: Path) -> Config:
    """Return the configuration of the run that wrote a checkpoint, for another run, as `read_run_config` does."""
    try:
        return _read_config(folder / "training.json", folder.parent)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder}: the settings of its run cannot be read ({error})") from error


def _read_config(path: Path, run_folder: Path) -> Config:
    """Return the configuration in a JSON file of a run, without what belongs to that run alone."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    check(isinstance(tree, dict) and "config" in tree, "it has no config")
    _refuse_own_code(run_folder, tree["config"])
    config = from_dict(tree["config"])
    run = dataclasses.replace(config.run, output_dir=None, overwrite=False, resume=None, push_to_hub=None)
    return dataclasses.replace(config, run=run)


def _refuse_own_code(folder: Path, tree: Any) -> None:
    """Raise ValueError if a run's objective is defined in its own folder, as in a folder that somebody else wrote."""
    objective = tree.get("objective") if isinstance(tree, dict) else None
    defined_in = objective.get("defined_in") if isinstance(objective, dict) else None
    if isinstance(defined_in, dict) and Path(str(defined_in.get("file"))).is_relative_to(folder.absolute()):
        raise ValueError(
            f"its objective is defined in {defined_in.get('file')}, inside the run's own folder, from which minilm "
            "runs no code: move the file out of it"
        )
