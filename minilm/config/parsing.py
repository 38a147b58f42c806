"""Read a configuration from the command line or from `run.json`, and write it as JSON.

Like `minilm.config`, this file imports neither torch nor transformers.
"""

import ast
import contextlib
import dataclasses
import io
import json
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from minilm.config import Config, Data, MaskedLM, Run, Value
from minilm.config.foreign_flags import refuse_foreign_flags
from minilm.utils.local_files import is_text
from minilm.utils.signals import first_to_tell
from minilm.utils.validation import check, closest


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain JSON types, with the class of the objective as a name. See `from_dict`."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    tree["objective"]["name"] = type(config.objective).__name__
    return tree


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that `to_dict` returns by group as one dictionary with keys `group.name`."""
    return {f"{group}.{name}": value for group, values in tree.items() for name, value in values.items()}


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value from JSON has a field's type. Each group itself checks the choices of a Literal."""
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
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return origin is Literal or (origin is None and isinstance(value, kind))


def from_dict(tree: dict[str, Any]) -> Config:
    """Return the configuration that `to_dict` wrote.

    Raise ValueError for an unknown group or field, and for a value that has not the field's type.
    """
    groups = typing.get_type_hints(Config)
    check(isinstance(tree, dict), "a configuration must be an object with groups of settings")
    for name in set(tree) - set(groups):
        raise ValueError(f"unknown group of settings {closest(name, list(groups))}")
    built = {}
    for name, kind in groups.items():
        given = tree.get(name, {})
        check(isinstance(given, dict), f"the group {name} must be an object with settings, not {given!r}")
        values = dict(given)
        if choices := {choice.__name__: choice for choice in typing.get_args(kind)}:
            chosen = values.pop("name", MaskedLM.__name__)
            check(str(chosen) in choices, f"unknown {name}.name {closest(str(chosen), list(choices))}")
            kind = choices[str(chosen)]
        known = [f.name for f in dataclasses.fields(kind)]
        for unknown in set(values) - set(known):
            raise ValueError(f"unknown setting {name}.{closest(unknown, known)}")
        for setting, value in values.items():
            wanted = typing.get_type_hints(kind)[setting]
            check(
                _fits(value, wanted), f"{name}.{setting} must be {getattr(wanted, '__name__', wanted)}, not {value!r}"
            )
        built[name] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    return Config(**built)


def read_run(path: str) -> Config:
    """Return the configuration in a run's `run.json`, without the output folder and repository, which that run owns."""
    try:
        run = json.loads(Path(path).read_text(encoding="utf-8"))
        check(isinstance(run, dict) and "config" in run, "it holds no config")
        config = from_dict(run["config"])
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--from-run {path}: not a readable run.json ({error})") from error
    return dataclasses.replace(
        config, run=dataclasses.replace(config.run, output_dir=None, resume=None, push_to_hub=None)
    )


def _has_flag(words: Sequence[str], flag: str) -> bool:
    """Return whether `flag` is among the words, as `FLAG` or `FLAG=VALUE`."""
    return any(word.split("=")[0] == flag for word in words)


def _split_flag(words: Sequence[str], flag: str) -> list[str]:
    """Return the words with `FLAG=VALUE` as two words."""
    return [part for word in words for part in (word.split("=", 1) if word.startswith(f"{flag}=") else [word])]


def take_seeds(arguments: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return the numbers after `--seeds`, and the other words. Raise ValueError if the numbers are not valid seeds."""
    words = _split_flag(arguments, "--seeds")
    if "--seeds" not in words:
        return [], words
    at = words.index("--seeds")
    end = next((n for n, word in enumerate(words) if n > at and word.startswith("--")), len(words))
    seeds, rest = words[at + 1 : end], words[:at] + words[end:]
    check(bool(seeds), "--seeds needs numbers: --seeds 0 1 2")
    for flag, instead in (
        ("--run.seed", "leave it out"),
        ("--run.resume", "pass --run.seed to resume the run of one seed"),
    ):
        check(not _has_flag(rest, flag), f"--seeds and {flag} exclude each other: {instead}")
    for word in seeds:
        check(word.removeprefix("-").isdecimal(), f"--seeds takes whole numbers, not {word!r}")
    numbers = list(map(int, seeds))
    for seed in numbers:
        # The constructor refuses a number that is not a valid seed.
        Run(seed=seed)
        check(numbers.count(seed) == 1, f"--seeds has {seed} twice: leave one out")
    return numbers, rest


def parse(default: Config, description: str = "", arguments: Sequence[str] | None = None) -> Config:
    """Return `default` with the flags of the command line applied. A bad flag ends the process with status 2.

    `--from-run FILE` replaces the defaults by the settings of an earlier run (its run.json).
    """
    # tyro imports slowly, and only a command line needs it.
    import tyro

    rest = _split_flag(sys.argv[1:] if arguments is None else arguments, "--from-run")
    if "--from-run" in rest:
        at = rest.index("--from-run")
        check(at + 1 < len(rest), "--from-run needs the path of a run.json")
        default = read_run(rest[at + 1])
        del rest[at : at + 2]
    if _has_flag(rest, "--data.source"):
        # The columns and splits of the default source do not fit another source.
        kept = Data(document=default.data.document, eval_fraction=default.data.eval_fraction)
        default = dataclasses.replace(default, data=kept)
    refuse_foreign_flags(rest, default)
    document_is_default = not _has_flag(rest, "--data.document")
    default, rest = _take_fields(default, rest)
    description += (
        "\n\n--data.source sets the other --data flags (except --data.document and --data.eval-fraction) back to their "
        "defaults. "
        "--from-run FILE repeats the run that wrote this run.json. --dry-run runs a few steps, prints what the whole "
        "run would do, need and take, and writes nothing to the output folder. --seeds 0 1 2 trains once per seed, "
        "each into seed-<n> of the output folder, and writes the mean and deviation of the figures to seeds.json "
        "there. --debug shows tracebacks."
    )
    messages = io.StringIO()
    options = (tyro.conf.AvoidSubcommands,)
    try:
        with contextlib.redirect_stderr(messages):
            config: Config = tyro.cli(Config, default=default, args=rest, config=options, description=description)
    except SystemExit:
        # A job prints one message, and not one from each process.
        if messages.getvalue() and first_to_tell():
            sys.stderr.write(messages.getvalue())
        raise
    return _reset_document(config) if document_is_default else config


def _reset_document(config: Config) -> Config:
    """Return the configuration without the recipe's `data.document` if no source is plain text."""
    data = config.data
    if data.document == Data.document:
        return config
    sources = [source for source in (*data.sources, data.eval_source) if source not in (None, "pydocs")]
    if any(map(is_text, sources)):
        return config
    return dataclasses.replace(config, data=dataclasses.replace(data, document=Data.document))


def _take_fields(default: Config, words: Sequence[str]) -> tuple[Config, list[str]]:
    """Return `default` with the fields of `--model.config.FIELD VALUE` that it does not have yet, and the other words.

    tyro itself reads the flag of a field that `default` has, since it knows the type of the field.
    """
    start = "--model.config."
    fields: dict[str, Value] = {}
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, *values = word.removeprefix(start).split("=", 1)
        field = name.replace("-", "_")
        if not word.startswith(start) or field in default.model.config:
            rest.append(word)
            continue
        while queue and not queue[0].startswith("--"):
            values.append(queue.pop(0))
        check(bool(values), f"{start}{name} needs a value")
        fields[field] = _parse_literal(values[0]) if len(values) == 1 else values
    model = dataclasses.replace(default.model, config={**default.model.config, **fields})
    return dataclasses.replace(default, model=model), rest


def _parse_literal(word: str) -> Any:
    """Return the number or truth value that a word stands for, or else the word."""
    with contextlib.suppress(ValueError, SyntaxError):
        if isinstance(value := ast.literal_eval(word), bool | int | float):
            return value
    return word


def parse_data(arguments: Sequence[str]) -> Data | None:
    """Return the settings of the `--data.…` flags, or None without such flags."""
    import tyro

    @dataclasses.dataclass
    class _Flags:
        data: Data

    if not arguments:
        return None
    data = tyro.cli(_Flags, args=arguments, default=_Flags(Data()), prog="minilm evaluate DIR").data
    if not _has_flag(arguments, "--data.source"):
        raise ValueError("give --data.source too, or no --data flag, which repeats the evaluation of the run")
    return data
