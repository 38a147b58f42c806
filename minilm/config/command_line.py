"""Read a configuration from the flags of a command line. This file imports neither torch nor transformers."""

import ast
import contextlib
import dataclasses
import io
import itertools
import sys
from collections.abc import Sequence
from typing import Any

from minilm.config import Config, ConfigValue, Data, Phase, Run
from minilm.config.foreign_flags import refuse_foreign_flags
from minilm.config.phases import drop_weights
from minilm.config.serialization import read_run_config
from minilm.utils.launch_variables import claim_error_report
from minilm.utils.local_files import is_plain_text
from minilm.utils.validation import check


def _has_flag(words: Sequence[str], flag: str) -> bool:
    """Return whether the words contain a flag, as `FLAG` or `FLAG=VALUE`."""
    return any(word.split("=")[0] == flag for word in words)


def _split_flag(words: Sequence[str], flag: str) -> list[str]:
    """Return the words, with `FLAG=VALUE` split into two words."""
    return [part for word in words for part in (word.split("=", 1) if word.startswith(f"{flag}=") else [word])]


def parse_seeds(arguments: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return the numbers after `--seeds` and the other words. Raise ValueError if the numbers are not valid seeds."""
    words = _split_flag(arguments, "--seeds")
    if "--seeds" not in words:
        return [], words
    at = words.index("--seeds")
    end = next((n for n, word in enumerate(words) if n > at and word.startswith("--")), len(words))
    seeds, rest = words[at + 1 : end], words[:at] + words[end:]
    check(bool(seeds), "--seeds needs numbers: --seeds 0 1 2")
    for flag, instead in (
        ("--run.seed", "leave --run.seed out"),
        ("--run.resume", "pass --run.seed in place of --seeds to resume the run of one seed"),
    ):
        check(not _has_flag(rest, flag), f"--seeds and {flag} exclude each other: {instead}")
    for word in seeds:
        check(word.removeprefix("-").isdecimal(), f"--seeds takes whole numbers, not {word!r}")
    numbers = list(map(int, seeds))
    for seed in numbers:
        # The constructor raises an error for a number that is not a valid seed.
        Run(seed=seed)
        check(numbers.count(seed) == 1, f"--seeds has {seed} twice: give each seed once")
    return numbers, rest


def parse_flags(default: Config, description: str = "", arguments: Sequence[str] | None = None) -> Config:
    """Return `default` with the changes that the flags of the command line make.

    `--from-run FILE` replaces the defaults by the settings of an earlier run, read from its run.json.

    arguments: the words of the command line. Default: those of this process.

    Raise ValueError for a flag of another program and for a wrong value. `--help` ends the process with status 0, and
    a flag or value that tyro cannot read ends it with status 2.
    """
    # tyro imports slowly, and only a command line needs it.
    import tyro

    rest = _split_flag(sys.argv[1:] if arguments is None else arguments, "--from-run")
    if "--from-run" in rest:
        at = rest.index("--from-run")
        check(at + 1 < len(rest), "--from-run needs the path of a run.json")
        default = read_run_config(rest[at + 1])
        del rest[at : at + 2]
    if _has_flag(rest, "--data.source"):
        # The columns, splits and weights of the default source do not fit another source.
        kept = Data(document=default.data.document, eval_fraction=default.data.eval_fraction)
        phases = drop_weights(default.run.phases)
        default = dataclasses.replace(default, data=kept, run=dataclasses.replace(default.run, phases=phases))
    refuse_foreign_flags(rest, default)
    document_is_default = not _has_flag(rest, "--data.document")
    default, rest = _take_fields(default, rest)
    _check_phases(rest)
    description += (
        "\n\n--data.source sets the other --data flags (except --data.document and --data.eval-fraction) back to their "
        "defaults. "
        "--from-run FILE repeats the run that wrote this run.json. --dry-run runs a few steps, prints what the whole "
        "run would do, need and take, and writes nothing to the output folder. --seeds 0 1 2 trains once per seed, "
        "each time into the folder seed-<n> of the output folder, and writes the mean and standard deviation of the "
        "figures to seeds.json there. --debug shows tracebacks."
    )
    messages = io.StringIO()
    options = (tyro.conf.AvoidSubcommands,)
    try:
        with contextlib.redirect_stderr(messages):
            config: Config = tyro.cli(
                Config,
                default=default,
                args=rest,
                config=options,
                description=description,
                registry=build_type_registry(),
            )
    except SystemExit:
        # One process prints the message for the whole job.
        if messages.getvalue() and claim_error_report():
            sys.stderr.write(messages.getvalue())
        raise
    return _reset_document(config) if document_is_default else config


def _check_phases(words: Sequence[str]) -> None:
    """Raise ValueError for a phase that cannot be read. tyro would not say why."""
    words = _split_flag(words, "--run.phases")
    if "--run.phases" in words:
        following = words[words.index("--run.phases") + 1 :]
        for word in itertools.takewhile(lambda word: not word.startswith("--"), following):
            Phase.parse(word)


def build_type_registry() -> Any:
    """Return what tyro needs to read and write the values of types that it does not know."""
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def read_phase(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[Phase] | None:
        if info.type is not Phase:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PHASE",
            instance_from_str=lambda words: Phase.parse(words[0]),
            is_instance=lambda value: isinstance(value, Phase),
            str_from_instance=lambda phase: [str(phase)],
        )

    return registry


def _reset_document(config: Config) -> Config:
    """Return the configuration with the default of `data.document` if no source is plain text.

    A recipe may set `data.document` for its own source, but it applies only to plain text.
    """
    data = config.data
    if data.document == Data.document:
        return config
    sources = [source for source in (*data.sources, data.eval_source) if source is not None]
    if any(map(is_plain_text, sources)):
        return config
    return dataclasses.replace(config, data=dataclasses.replace(data, document=Data.document))


def _take_fields(default: Config, words: Sequence[str]) -> tuple[Config, list[str]]:
    """Return `default` with the new fields that `--model.config.FIELD VALUE` adds, and the other words.

    Flags of fields that `default` already has are among the other words. tyro reads them, because it knows their types.
    """
    start = "--model.config."
    fields: dict[str, ConfigValue] = {}
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        check(
            word.split("=")[0] != "--model.config",
            "--model.config is not a flag by itself, since each field has its own: type --model.config.FIELD VALUE",
        )
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
    """Return the number or truth value that a word stands for, or the word itself if it is neither."""
    with contextlib.suppress(ValueError, SyntaxError):
        if isinstance(value := ast.literal_eval(word), bool | int | float):
            return value
    return word


def parse_data_flags(arguments: Sequence[str], program: str) -> Data | None:
    """Return the settings of the `--data.…` flags of a command, or None if there are none.

    Raise ValueError if `--data.source` is missing among them.
    """
    import tyro

    @dataclasses.dataclass
    class _Flags:
        data: Data

    if not arguments:
        return None
    data = tyro.cli(_Flags, args=arguments, default=_Flags(Data()), prog=program).data
    if not _has_flag(arguments, "--data.source"):
        raise ValueError("give --data.source too, or no --data flag at all for the evaluation of the run")
    return data
