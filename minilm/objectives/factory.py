"""The objective, the data and the model that a configuration asks for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from minilm.config import Config, ObjectiveSettings
from minilm.config.phases import Period, find_longest, list_periods
from minilm.data.corpus import PreparedData
from minilm.data.excluded_documents import check_excluded_documents
from minilm.data.memory import MemoryDocuments
from minilm.data.tokenizer import store_tokenizer
from minilm.models.builtin_loss import check_builtin_loss
from minilm.models.loading import check_model, load_model
from minilm.models.lora import check_peft_installed
from minilm.models.model_config import load_configuration
from minilm.objectives.objective import Objective
from minilm.utils.cache import explain_cache_errors

# For each class of minilm's settings, the module and the class that implement it. A module is imported when it is used.
_IMPLEMENTATIONS = {
    "MaskedLM": ("masked_lm", "MaskedLMObjective"),
    "CausalLM": ("causal_lm", "CausalLMObjective"),
    "Classification": ("classification", "ClassificationObjective"),
    "SupervisedFineTuning": ("supervised_finetuning", "SupervisedFineTuningObjective"),
    "SentenceEmbedding": ("sentence_embedding", "SentenceEmbeddingObjective"),
    "QuestionAnswering": ("question_answering", "QuestionAnsweringObjective"),
    "MultipleChoice": ("multiple_choice", "MultipleChoiceObjective"),
    "TokenClassification": ("token_classification", "TokenClassificationObjective"),
}


def build_objective(settings: ObjectiveSettings) -> Objective:
    """Return the objective for `config.objective`, which is one itself if it is the user's."""
    if isinstance(settings, Objective):
        _check_fields(type(settings))
        return settings
    module, name = _IMPLEMENTATIONS[type(settings).__name__]
    objective: Objective = getattr(import_module(f"minilm.objectives.{module}"), name)(settings)
    return objective


def _check_fields(kind: type) -> None:
    """Raise ValueError if a class has annotated fields but is not a dataclass, so that Python ignores them."""
    for base in kind.__mro__[: kind.__mro__.index(Objective)]:
        own = [name for name, note in vars(base).get("__annotations__", {}).items() if "ClassVar" not in str(note)]
        if own and "__dataclass_fields__" not in vars(base):
            raise ValueError(
                f"the class {base.__name__} has the field {own[0]} but is not a dataclass: write "
                "@dataclass(frozen=True, kw_only=True) above it"
            )


def prepare_data(config: Config, memory: MemoryDocuments | None = None) -> PreparedData:
    """Return the tokenizer and the examples of a run, from the cache if it has them.

    memory: documents from Python, to read in place of `data.source`.

    Raises ValueError for a model or data that the run cannot use. The model is checked first, since that is fast.
    """
    objective = build_objective(config.objective)
    check_peft_installed(config.model)
    check_model(config.model, max_length=config.batch.max_length, auto=objective.auto)
    with explain_cache_errors():
        prepared = objective.prepare(config, memory)
    check_excluded_documents(config, prepared)
    return prepared


def prepare_run(config: Config, memory: MemoryDocuments | None = None) -> PreparedData:
    """Return the same as `prepare_data`, with the training examples of each period of the run.

    All periods have the tokenizer, the labels and the evaluation examples of the configuration itself. Raises
    ValueError also for a period that the model or the data do not fit.
    """
    if not config.run.phases:
        return prepare_data(config, memory)
    periods, auto = list_periods(config), build_objective(config.objective).auto
    for period in periods:
        with _name_period(period, config):
            check_model(config.model, max_length=period.config.batch.max_length, auto=auto)
    prepared = prepare_data(config, memory)
    tokens = replace(config.tokens, name=store_tokenizer(prepared.tokenizer), extend=0)
    found = {_data_settings(config): prepared.train}
    for period in periods:
        if _data_settings(period.config) in found:
            continue
        with _name_period(period, config):
            other = prepare_data(replace(period.config, tokens=tokens), memory)
            if other.fields != prepared.fields:
                raise ValueError("the training documents have other labels than before: give other weights")
        found[_data_settings(period.config)] = other.train
    return replace(prepared, periods=tuple(found[_data_settings(period.config)] for period in periods))


@contextmanager
def _name_period(period: Period, config: Config) -> Iterator[None]:
    """Say in each ValueError of the block to which steps it belongs, if a phase changed what `config` says."""
    try:
        yield
    except ValueError as error:
        if _data_settings(period.config) == _data_settings(config):
            raise
        raise ValueError(f"run.phases, from step {period.start:,} on: {error}") from error


def _data_settings(config: Config) -> tuple[object, ...]:
    """Return the settings that decide the training examples, of those that may change during a run."""
    return config.batch.max_length, config.data.weights


def build_network(config: Config, prepared: PreparedData, *, trained: bool = True) -> PreTrainedModel:
    """Return the model of a run, loaded from a checkpoint or new.

    Raises ValueError if it cannot be built, or if its own loss has a term that minilm would not train.

    trained: False for an evaluation. Such a term then only causes a warning.
    """
    objective = build_objective(config.objective)
    network = load_model(
        config.model,
        prepared.tokenizer,
        max_length=find_longest(config),
        seed=config.run.seed,
        auto=objective.auto,
        fields=prepared.fields,
        added=config.tokens.extend + prepared.added_tokens,
        new_labels=has_new_labels(config, prepared),
    )
    if objective.auto in (AutoModelForMaskedLM, AutoModelForCausalLM):
        check_builtin_loss(network, trained=trained)
    return network


def has_new_labels(config: Config, prepared: PreparedData) -> bool:
    """Return whether the data have labels that are not those of the checkpoint, in the order of their ids.

    If so, the parameters that depend on the labels start at random.
    """
    if prepared.labels is not None:
        return not prepared.labels.same_as_checkpoint
    if "id2label" not in prepared.fields or config.model.name is None:
        return False
    own = load_configuration(config.model.name).id2label or {}
    before, now = ({int(id): str(label) for id, label in names.items()} for names in (own, prepared.fields["id2label"]))
    return before != now
