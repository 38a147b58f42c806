"""Evaluate a model that is there: on data of one's own, or again as its run did."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from minilm.checkpoint import is_checkpoint
from minilm.classify import trained_labels
from minilm.config import Batch, CausalLM, Classification, Config, Data, MaskedLM, Model
from minilm.labels import check_known
from minilm.launch import finish, start
from minilm.micro import micro_tokens_of
from minilm.model import longest_input
from minilm.new_model import load_configuration
from minilm.objectives import build, objective_of, prepare
from minilm.settings import read_run
from minilm.sources import source_facts
from minilm.verify_head import verify_head

log = logging.getLogger("minilm")

_LENGTH = 512  # tokens of the longest example of a model whose run is not known, where its positions allow as many
_OBJECTIVES: dict[Any, type] = {
    AutoModelForMaskedLM: MaskedLM,
    AutoModelForCausalLM: CausalLM,
    AutoModelForSequenceClassification: Classification,
}
_PROBLEMS = {"multi_label_classification": "multi-label", "regression": "regression"}


def evaluate(name: str | Path, data: Data | None = None) -> dict[str, float]:
    """The figures of a model, a folder or hub id, on all documents of `data`.

    How it is evaluated (the objective, the length of examples, precision) is what its run.json says, or else what its
    class says, as many as 512 tokens and the defaults of `minilm.config`; what labels mean is what the model was
    trained for. Without `data` the run's own evaluation is done again, with a warning for each file that has changed
    since. Raises ValueError where neither is known, and for labels that the model does not know.
    """
    config = _config(str(name), data)
    objective = objective_of(config.objective)
    accelerator, _ = start(config.run)
    try:
        prepared = prepare(config)
        if data is None:
            _warn_of_changes(_run_file(str(name)), config.data)
        if prepared.labels is not None:
            check_known(prepared.labels, trained_labels(str(name)))
            for line in prepared.labels.summary:
                if line.startswith("WARNING"):
                    log.warning(line)
        head = objective.head(build(config, prepared, trained=False).to(accelerator.device), prepared)
        verify_head(config, head, prepared, trained=False)
        multiple = 1 if accelerator.device.type == "cpu" else 8
        evaluator = objective.evaluator(
            prepared, micro_tokens_of(config), padded=not head.padding_free, multiple=multiple
        )
        figures = evaluator(accelerator, accelerator.prepare_model(head, evaluation_mode=True)).figures()
    finally:
        finish(accelerator)
    if data is not None:
        figures.pop("unigram_bits_per_byte", None)  # of tokens that training saw, which are not at hand
    return figures


def _run_file(name: str) -> Path:
    folder = Path(name)
    return (folder.absolute().parent if is_checkpoint(folder) else folder) / "run.json"


def _warn_of_changes(run: Path, data: Data) -> None:
    """Warn of each file to evaluate on whose content is not what `run` tells; older runs tell nothing."""
    told = json.loads(run.read_text(encoding="utf-8")).get("sources", {})
    facts = source_facts(Data(source=data.eval_source or data.source))
    for source in told.keys() & facts.keys():
        before, now = (_by_file(source, of[source]) for of in (told, facts))
        if [*before.values()] == [*now.values()]:  # whatever the names of the files
            continue
        for file in sorted(before.keys() | now.keys()):
            if before.get(file) != now.get(file):
                what = "is new" if file not in before else "is gone" if file not in now else "has changed"
                log.warning(f"{file} {what} since the run: the figures may differ from the run's")


def _by_file(source: str, facts: Any) -> dict[str, dict[str, Any]]:
    """What `source_facts` tells of the content of a source, by file, without times; a revision by the source's name."""
    files = facts if isinstance(facts, list) else [{"file": source, **facts}]
    return {file["file"]: {k: v for k, v in file.items() if k not in ("file", "modified_ns")} for file in files}


def _config(name: str, data: Data | None) -> Config:
    run = _run_file(name)
    if run.is_file():
        config = read_run(str(run))
    elif data is None:
        raise ValueError(f"{name} has no run.json that says what to evaluate it on: give --data.source")
    else:
        objective = objective_for(name)
        length = _longest(name, objective_of(objective).auto)
        config = Config(objective=objective, batch=Batch(max_length=length))
    if isinstance(config.objective, Classification):
        config = replace(config, objective=replace(config.objective, problem=_problem(name)))
    model = Model(name=name)
    if data is not None:
        if len(data.sources) > 1 or data.streaming:
            raise ValueError("data.source: evaluate takes one source at a time, and no stream")
        config = replace(config, data=replace(data, eval_source=data.sources[0], eval_split=data.split))
    # The model's own tokenizer, which was extended already.
    return replace(config, model=model, tokens=replace(config.tokens, name=None, extend=0))


def _longest(name: str, auto: Any) -> int:
    config = load_configuration(name)
    with torch.device("meta"):  # without weights
        network = auto.from_config(config)
    return min(_LENGTH, longest_input(network) or _LENGTH)


def _problem(name: str) -> Any:
    """What a classifier was trained for; transformers, too, takes one output of which nothing is said for a number."""
    config = load_configuration(name)
    if config.problem_type is None and config.num_labels == 1:
        return "regression"
    return _PROBLEMS.get(config.problem_type, "single-label")


def objective_for(name: str) -> Any:
    """The objective that a model's class was trained by, with default settings. ValueError for another class."""
    config = load_configuration(name)
    for auto, settings in _OBJECTIVES.items():
        classes = auto._model_mapping.get(type(config), ())
        names = {kind.__name__ for kind in (classes if isinstance(classes, tuple) else (classes,))}
        if names & set(config.architectures or ()):
            return settings()
    raise ValueError(f"{name} is no masked LM, causal LM or sequence classifier, but {config.architectures}")
