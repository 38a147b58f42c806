"""A configuration from the command line and from `run.json`, and as JSON.

Like `minilm.config` it imports neither torch nor transformers.
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

from minilm.checks import check, closest
from minilm.config import Config, Data, MaskedLM, Run, Value
from minilm.foreign_flags import refuse_foreign_flags
from minilm.signals import first_to_tell


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON types, the objective by the name of its class; `from_dict` is its inverse."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    tree["objective"]["name"] = type(config.objective).__name__
    return tree


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """What `to_dict` gives, by `group.name`."""
    return {f"{group}.{name}": value for group, values in tree.items() for name, value in values.items()}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is of a field's type; the choices of a Literal are checked with its group."""
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
    """The configuration that `to_dict` wrote; a group or field that does not exist raises ValueError.

    So does a value of another type than the field's.
    """
    groups = typing.get_type_hints(Config)
    check(isinstance(tree, dict), "a configuration is groups of settings by name")
    for name in set(tree) - set(groups):
        raise ValueError(f"unknown group of settings {closest(name, list(groups))}")
    built = {}
    for name, kind in groups.items():
        given = tree.get(name, {})
        check(isinstance(given, dict), f"the group {name} must be settings by name, not {given!r}")
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
    """The configuration stored in a run's `run.json`, without its output folder and repository, which are taken."""
    try:
        run = json.loads(Path(path).read_text(encoding="utf-8"))
        check(isinstance(run, dict) and "config" in run, "it holds no config")
        config = from_dict(run["config"])
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--from-run {path}: not a readable run.json ({error})") from error
    return dataclasses.replace(
        config, run=dataclasses.replace(config.run, output_dir=None, resume=None, push_to_hub=None)
    )


def _split(words: Sequence[str], flag: str) -> list[str]:
    """The words, with that of `FLAG=VALUE` made two."""
    return [part for word in words for part in (word.split("=", 1) if word.startswith(f"{flag}=") else [word])]


def take_seeds(arguments: Sequence[str]) -> tuple[list[int], list[str]]:
    """The numbers after `--seeds`, and the other words of a command line. ValueError for what is no list of seeds."""
    words = _split(arguments, "--seeds")
    if "--seeds" not in words:
        return [], words
    at = words.index("--seeds")
    end = next((n for n, word in enumerate(words) if n > at and word.startswith("--")), len(words))
    seeds, rest = words[at + 1 : end], words[:at] + words[end:]
    check(bool(seeds), "--seeds needs numbers: --seeds 0 1 2")
    for flag, instead in (("--run.seed", "leave it out"), ("--run.resume", "go on with one seed by --run.seed")):
        given = any(word.split("=")[0] == flag for word in rest)
        check(not given, f"--seeds and {flag} exclude each other: {instead}")
    for word in seeds:
        check(word.removeprefix("-").isdecimal(), f"--seeds takes whole numbers, not {word!r}")
    numbers = list(map(int, seeds))
    for seed in numbers:
        Run(seed=seed)  # refuses what is no seed
        check(numbers.count(seed) == 1, f"--seeds has {seed} twice: leave one out")
    return numbers, rest


def parse(default: Config, description: str = "", arguments: Sequence[str] | None = None) -> Config:
    """`default` with the flags of the command line applied; a bad flag ends the process with status 2.

    `--from-run FILE` takes the settings of an earlier run (its run.json) in place of the defaults.
    """
    import tyro  # imports slowly, and only a command line needs it

    rest = _split(sys.argv[1:] if arguments is None else arguments, "--from-run")
    if "--from-run" in rest:
        at = rest.index("--from-run")
        check(at + 1 < len(rest), "--from-run needs the path of a run.json")
        default = read_run(rest[at + 1])
        del rest[at : at + 2]
    if any(word.split("=")[0] == "--data.source" for word in rest):
        # Columns and slices of another source mean nothing here.
        kept = Data(document=default.data.document, eval_fraction=default.data.eval_fraction)
        default = dataclasses.replace(default, data=kept)
    refuse_foreign_flags(rest, default)
    inherited = not any(word.split("=")[0] == "--data.document" for word in rest)
    default, rest = _take_fields(default, rest)
    description += (
        "\n\n--data.source sets the other --data flags (except --data.document and --data.eval-fraction) back to their "
        "defaults. "
        "--from-run FILE repeats the run that wrote this run.json. --dry-run says what the run would be, need and "
        "take, after a few steps of it, and writes nothing to its output folder. --seeds 0 1 2 trains once per seed, "
        "each into seed-<n> of the output folder, and writes mean and deviation of the figures to seeds.json there. "
        "--debug shows tracebacks."
    )
    plain, said = (tyro.conf.AvoidSubcommands,), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config: Config = tyro.cli(Config, default=default, args=rest, config=plain, description=description)
    except SystemExit:
        if said.getvalue() and first_to_tell():  # one message for a job, not one from each process
            sys.stderr.write(said.getvalue())
        raise
    return _without_document(config) if inherited else config


def _without_document(config: Config) -> Config:
    """The configuration without a recipe's own `data.document` where no source is plain text."""
    data = config.data
    if data.document == Data.document:
        return config
    from minilm.sources import is_text  # imports the datasets library, for which no other command line waits

    sources = [source for source in (*data.sources, data.eval_source) if source not in (None, "pydocs")]
    if any(map(is_text, sources)):
        return config
    return dataclasses.replace(config, data=dataclasses.replace(data, document=Data.document))


def _take_fields(default: Config, words: Sequence[str]) -> tuple[Config, list[str]]:
    """`default` with each `--model.config.FIELD VALUE` of a field that it does not have yet, and the other words.

    A flag of tyro's takes a field that is there, whose type it then knows.
    """
    start, taken, rest = "--model.config.", dict[str, Value](), list[str]()
    left = list(words)
    while left:
        word, given = left.pop(0), list[str]()
        name, *after = word.removeprefix(start).split("=", 1)
        field = name.replace("-", "_")
        if not word.startswith(start) or field in default.model.config:
            rest.append(word)
            continue
        while left and not left[0].startswith("--"):
            given.append(left.pop(0))
        values = [*after, *given]
        check(bool(values), f"{start}{name} needs a value")
        taken[field] = _literal(values[0]) if len(values) == 1 else values
    model = dataclasses.replace(default.model, config={**default.model.config, **taken})
    return dataclasses.replace(default, model=model), rest


def _literal(word: str) -> Any:
    """The number or truth value that a word stands for, or else the word."""
    with contextlib.suppress(ValueError, SyntaxError):
        if isinstance(value := ast.literal_eval(word), bool | int | float):
            return value
    return word


def parse_data(arguments: Sequence[str]) -> Data | None:
    """The `--data.…` flags of the command line, or None where there are none."""
    import tyro

    @dataclasses.dataclass
    class _Flags:
        data: Data

    if not arguments:
        return None
    data = tyro.cli(_Flags, args=arguments, default=_Flags(Data()), prog="minilm evaluate DIR").data
    if not any(word.split("=")[0] == "--data.source" for word in arguments):
        raise ValueError("give --data.source too: without any --data flag, a run's own evaluation is done again")
    return data
