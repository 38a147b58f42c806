"""`minilm replay`: the same run without some of its training documents, and what they contributed."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from minilm.commands.compare import Difference, compare_models
from minilm.config import Config
from minilm.config.command_line import parse_flags
from minilm.config.serialization import flatten_settings, read_run_config, to_dict
from minilm.data.corpus import PreparedData
from minilm.data.excluded_documents import find_first_use
from minilm.data.sources import pin_revisions
from minilm.data.text_decoding import open_text, strip_line_end
from minilm.objectives.factory import build_objective, prepare_run
from minilm.runs.checkpoint import find_complete_checkpoints
from minilm.runs.resume import read_precision
from minilm.runs.run_facts import RESULTS, read_revisions
from minilm.runs.session import plan_steps
from minilm.train import train
from minilm.utils.launch_variables import is_main_process, read_rank_and_size
from minilm.utils.number_ranges import format_ranges, parse_ranges

log = logging.getLogger("minilm")

# Settings that a replay may change, since no step depends on them.
_OWN = {"run.output_dir", "run.resume", "run.overwrite", "run.save_every", "run.keep_last", "batch.workers"}


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A run without some of its documents, before its first step."""

    config: Config
    first_step: int
    """The first step, from 1, that reads one of the documents."""
    start: int
    """The step of the checkpoint from which it begins; 0 for the beginning of the run."""
    still_seen: str
    """A sentence that names what still depends on the excluded documents."""


def replay_run(folder: Path, documents: str, arguments: Sequence[str]) -> tuple[list[Difference], str]:
    """Run again without the loss of some training documents.

    Return the differences in the figures, those of the replay minus those of the run, and `Replay.still_seen`. Every
    process of a job calls it. Only the main process gets differences. Raise ValueError if the run cannot be replayed.

    documents: their numbers, or a file of numbers or of exact texts, one a line. arguments: flags of a run.
    """
    if not (folder / RESULTS).is_file():
        raise ValueError(f"{folder} is not the folder of a finished run, with which a replay could be compared")
    # The numbers of the documents, and the steps that read them, are those of the commits that the run read.
    with pin_revisions(read_revisions(folder)):
        replay = plan_replay(folder, documents, arguments)
        log.info(
            f"step {replay.first_step:,} is the first that reads them; the replay begins after step {replay.start:,}"
        )
        output = train(replay.config).folder
    differences = compare_models(folder, output) if is_main_process(os.environ) else []
    return differences, replay.still_seen


def plan_replay(folder: Path, documents: str, arguments: Sequence[str]) -> Replay:
    """Return the replay of a finished run. Raise ValueError if there is none."""
    config = read_run_config(str(folder / "run.json"))
    config = replace(config, run=replace(config.run, precision=read_precision(folder) or config.run.precision))
    _check_processes(folder)
    numbers = read_documents(config, documents)
    if config.data.exclude_loss is not None:
        numbers |= {*chain.from_iterable(parse_ranges(config.data.exclude_loss))}
    config = _parse_own_flags(config, arguments)
    config = replace(config, data=replace(config.data, exclude_loss=format_ranges(numbers)))
    prepared = prepare_run(config)
    first = _find_first_use(config, prepared)
    named = folder if folder.name not in ("", "..") else folder.resolve()
    steps = [int(path.name.removeprefix("checkpoint-")) for path in find_complete_checkpoints(folder)]
    start = max((step for step in steps if step <= first), default=0)
    checkpoint = str(folder / f"checkpoint-{start}") if start else None
    run = replace(
        config.run,
        output_dir=config.run.output_dir or f"{named}-without",
        resume=config.run.resume or checkpoint,
    )
    return Replay(
        config=replace(config, run=run), first_step=first + 1, start=start, still_seen=_describe_seen(config, prepared)
    )


def _check_processes(folder: Path) -> None:
    """Raise ValueError if this job does not have as many processes as the run had."""
    processes = json.loads((folder / "run.json").read_text(encoding="utf-8"))["processes"]
    _, ours = read_rank_and_size(os.environ) or (0, 1)
    if ours != processes:
        raise ValueError(
            f"{folder} was trained on {processes} process(es), and the order of sums depends on that: start its "
            f"replay on as many: accelerate launch --multi_gpu --num_processes {processes} -m minilm.commands.main "
            "replay …"
        )


def _parse_own_flags(config: Config, arguments: Sequence[str]) -> Config:
    """Return the configuration with these flags. Raise ValueError for a flag that would change a step."""
    parsed = parse_flags(config, arguments=list(arguments))
    before, now = (flatten_settings(to_dict(each)) for each in (config, parsed))
    changed = [name for name in now if before.get(name) != now[name] and name not in _OWN]
    if changed:
        raise ValueError(f"{changed[0]}: a replay has the settings of its run; leave it out")
    return parsed


def read_documents(config: Config, documents: str) -> set[int]:
    """Return the numbers of the training documents that `documents` names.

    They are a list such as 3,17,40-45, or the path of a file with such a list or an exact text in each line. A text
    stands for all documents with this text. Raise ValueError that names the line of a text that no document has.
    """
    # Path.is_file raises OSError for a list that is longer than a name of a file may be.
    if not os.path.isfile(documents):
        try:
            return {*chain.from_iterable(parse_ranges(documents))}
        except ValueError as error:
            raise ValueError(f"--without: {error}, and no file has this name") from None
    with open_text(documents) as file:
        lines = [strip_line_end(line, "\n") for line in file]
    wanted = {line: number for number, line in enumerate(lines, start=1) if line.strip()}
    if not wanted:
        raise ValueError(f"--without: {documents} is empty: give a number or a text in each line")
    try:
        return {*chain.from_iterable(chain.from_iterable(map(parse_ranges, wanted)))}
    except ValueError:
        pass
    found: dict[str, set[int]] = {text: set() for text in wanted}
    for number, text in enumerate(build_objective(config.objective).training_texts(config)):
        if text in found:
            found[text].add(number)
    for text, numbers in found.items():
        if not numbers:
            raise ValueError(f"{documents}, line {wanted[text]}: no training document has this text")
    return set.union(*found.values())


def _find_first_use(config: Config, prepared: PreparedData) -> int:
    """Return the first step, from 0, that reads one of the documents. Raise ValueError if there is none."""
    plan = plan_steps(config, prepared, processes=1, padded=False, multiple=1)
    documents = parse_ranges(config.data.exclude_loss or "")
    use = find_first_use(plan, prepared, documents, range(config.run.count_steps(plan.steps_per_epoch)))
    if use is None:
        raise ValueError(f"no step of the run reads the documents {config.data.exclude_loss}")
    return use[0]


def _describe_seen(config: Config, prepared: PreparedData) -> str:
    """Return a sentence about what was derived from all training documents, also from those without a loss."""
    derived = []
    if (config.tokens.name or config.model.name) is None:
        derived.append("the tokenizer, which was trained on them")
    if config.tokens.extend:
        derived.append("the words that were added to the tokenizer")
    if prepared.labels is not None or prepared.fields:
        derived.append("the labels and other settings of the model that come from the data")
    if not derived:
        return "Nothing else was derived from the documents, such as a tokenizer or labels."
    return f"These have still seen the documents: {', and '.join(derived)}."
