"""Evaluate a trained model, on other documents or on those of its run."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from minilm.config import (
    Batch,
    CausalLM,
    Classification,
    Config,
    Data,
    MaskedLM,
    Model,
    MultipleChoice,
    QuestionAnswering,
    SentenceEmbedding,
    TokenClassification,
)
from minilm.config.serialization import read_run_config
from minilm.data.label_ids import quote_names
from minilm.data.labels import PROBLEM_TYPES, check_model_labels
from minilm.data.sources import fingerprint_sources
from minilm.distributed.launch import finish, start
from minilm.models.inference_embedding import find_pooling
from minilm.models.input_length import longest_input
from minilm.models.model_config import load_configuration, read_model_labels
from minilm.objectives.evaluator import EvaluationResult
from minilm.objectives.factory import build_network, build_objective, has_new_labels, prepare_data
from minilm.runs.auto_micro_tokens import micro_tokens_of
from minilm.runs.checkpoint import is_checkpoint
from minilm.runs.ledger import ExampleTable, build_table
from minilm.runs.verify_head import verify_head

log = logging.getLogger("minilm")

# Maximum length of an example in tokens for a model without a run.json, unless the model has fewer positions.
_MAX_LENGTH = 512
_OBJECTIVES: dict[Any, type] = {
    AutoModelForMaskedLM: MaskedLM,
    AutoModelForCausalLM: CausalLM,
    AutoModelForSequenceClassification: Classification,
    AutoModelForQuestionAnswering: QuestionAnswering,
    AutoModelForMultipleChoice: MultipleChoice,
    AutoModelForTokenClassification: TokenClassification,
    AutoModel: SentenceEmbedding,
}
_PROBLEMS = {problem_type: problem for problem, problem_type in PROBLEM_TYPES.items()}


def evaluate(name: str | Path, data: Data | None = None) -> dict[str, float]:
    """Return the figures of a model, given by folder or hub id, on all documents of `data`.

    The model's run.json gives the settings: the objective, the length of examples, the precision. Without a run.json
    the objective follows from the model's class, examples have at most 512 tokens, and all other settings are the
    defaults of `minilm.config`. Labels keep the numbers that the model was trained with. Without `data`, the function
    repeats the evaluation of the run, and warns of each file that has changed since. Raise ValueError if `data` and
    run.json are both missing, and for labels that the model was not trained with.
    """
    evaluation, _ = _evaluate(str(name), data)
    figures = evaluation.figures()
    if data is not None:
        # This figure needs the tokens of the training documents.
        figures.pop("unigram_bits_per_byte", None)
    return figures


def evaluate_examples(name: str | Path, data: Data | None = None) -> ExampleTable:
    """Return what the evaluation of `evaluate` knows of each example.

    Raise ValueError as `evaluate` does, and if the examples have no losses of their own.
    """
    _, table = _evaluate(str(name), data)
    if table is None:
        raise ValueError(f"{name}: its evaluation examples have one loss together, and none of their own")
    return table


def _evaluate(name: str, data: Data | None) -> tuple[EvaluationResult, ExampleTable | None]:
    config = _build_config(name, data)
    objective = build_objective(config.objective)
    accelerator, _ = start(config.run)
    try:
        prepared = prepare_data(config)
        if data is None:
            _warn_of_changes(_run_file(name), config.data)
        if prepared.labels is not None:
            check_model_labels(prepared.labels, read_model_labels(name))
            for line in prepared.labels.summary:
                if line.startswith("WARNING"):
                    log.warning(line)
        elif has_new_labels(config, prepared):
            ours, theirs = (
                [*names.values()] for names in (prepared.fields["id2label"], load_configuration(name).id2label)
            )
            raise ValueError(
                f"the data have the labels {quote_names(ours)}, but the model was trained for {quote_names(theirs)}: "
                "evaluate it on documents with its own labels"
            )
        head = objective.head(build_network(config, prepared, trained=False).to(accelerator.device), prepared)
        verify_head(config, head, prepared, trained=False)
        multiple = 1 if accelerator.device.type == "cpu" else 8
        evaluator = objective.evaluator(
            prepared, micro_tokens_of(config), padded=not head.padding_free, multiple=multiple
        )
        evaluation = evaluator(accelerator, accelerator.prepare_model(head, evaluation_mode=True))
    finally:
        finish(accelerator)
    has_losses = "loss" in evaluation.per_example
    return evaluation, build_table(config, prepared, evaluation.per_example) if has_losses else None


def _run_file(name: str) -> Path:
    folder = Path(name)
    return (folder.absolute().parent if is_checkpoint(folder) else folder) / "run.json"


def _warn_of_changes(run: Path, data: Data) -> None:
    """Warn of each evaluation file whose content differs from the record in `run`; older runs have no record."""
    recorded = json.loads(run.read_text(encoding="utf-8")).get("sources", {})
    current = fingerprint_sources(Data(source=data.eval_source or data.source))
    for source in recorded.keys() & current.keys():
        before, now = (_by_file(source, facts[source]) for facts in (recorded, current))
        # The hash is another one if the source has grown beyond the size up to which files are hashed as a whole.
        for file in before.keys() & now.keys():
            if before[file].keys() != now[file].keys():
                before[file], now[file] = ({"bytes": facts[file].get("bytes")} for facts in (before, now))
        # Files that were only renamed do not change a figure.
        if [*before.values()] == [*now.values()]:
            continue
        for file in sorted(before.keys() | now.keys()):
            if before.get(file) != now.get(file):
                change = "is new" if file not in before else "is gone" if file not in now else "has changed"
                log.warning(f"{file} {change} since the run: the figures may differ from the run's")


def _by_file(source: str, facts: Any) -> dict[str, dict[str, Any]]:
    """Return by file name what `fingerprint_sources` records about the content of a source, without times.

    A hub dataset has a single entry, under the name of the source.
    """
    files = facts if isinstance(facts, list) else [{"file": source, **facts}]
    return {file["file"]: {k: v for k, v in file.items() if k not in ("file", "modified_ns")} for file in files}


def _build_config(name: str, data: Data | None) -> Config:
    """Return the configuration that evaluates the model, from its run.json or else from its class."""
    run = _run_file(name)
    if run.is_file():
        config = read_run_config(str(run))
    elif data is None:
        raise ValueError(f"{name} has no run.json that names evaluation documents: give --data.source")
    else:
        objective = infer_objective(name)
        length = _find_length(name, build_objective(objective).auto)
        config = Config(objective=objective, batch=Batch(max_length=length))
    if isinstance(config.objective, Classification):
        config = replace(config, objective=replace(config.objective, problem=_find_problem(name)))
    # An evaluation has the settings of the configuration itself.
    config = replace(config, run=replace(config.run, phases=()))
    model = Model(name=name)
    if data is not None:
        if len(data.sources) > 1 or data.streaming:
            raise ValueError("data.source: evaluate reads one source at a time, and does not stream it")
        config = replace(config, data=replace(data, eval_source=data.sources[0], eval_split=data.split))
    # The model's own tokenizer already has the words that --tokens.extend added.
    return replace(config, model=model, tokens=replace(config.tokens, name=None, extend=0))


def _find_length(name: str, auto: Any) -> int:
    """Return the maximum length of an example for a model without a run.json."""
    config = load_configuration(name)
    # On the meta device a model has shapes but no weights.
    with torch.device("meta"):
        network = auto.from_config(config)
    return min(_MAX_LENGTH, longest_input(network) or _MAX_LENGTH)


def _find_problem(name: str) -> Any:
    """Return the problem that a classifier was trained for.

    Like transformers, treat a classifier with one output and without a `problem_type` as a regression.
    """
    config = load_configuration(name)
    if config.problem_type is None and config.num_labels == 1:
        return "regression"
    return _PROBLEMS.get(config.problem_type, "single-label")


def infer_objective(name: str) -> Any:
    """Return the objective of a model's class, with default settings. Raise ValueError for a class without one."""
    config = load_configuration(name)
    for auto, settings in _OBJECTIVES.items():
        classes = auto._model_mapping.get(type(config), ())
        names = {kind.__name__ for kind in (classes if isinstance(classes, tuple) else (classes,))}
        if names & set(config.architectures or ()):
            return SentenceEmbedding(pooling=find_pooling(name)) if settings is SentenceEmbedding else settings()
    raise ValueError(f"{name}: minilm evaluates no model of the class {config.architectures} without its run.json")
