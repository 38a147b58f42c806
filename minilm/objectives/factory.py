"""The objective, the data and the model that a configuration asks for."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from minilm.config import CausalLM, Classification, Config, MaskedLM
from minilm.data.corpus import PreparedData
from minilm.models.builtin_loss import check_builtin_loss
from minilm.models.loading import check_model, load_model
from minilm.models.lora import check_peft_installed
from minilm.objectives.causal_lm import CausalLMObjective
from minilm.objectives.classification import ClassificationObjective
from minilm.objectives.masked_lm import MaskedLMObjective
from minilm.objectives.objective import Objective
from minilm.utils.cache import explain_cache_errors

_OBJECTIVES: dict[type, Callable[[Any], Objective]] = {
    MaskedLM: MaskedLMObjective,
    CausalLM: CausalLMObjective,
    Classification: ClassificationObjective,
}


def build_objective(settings: MaskedLM | CausalLM | Classification) -> Objective:
    """Return the objective for `config.objective`."""
    return _OBJECTIVES[type(settings)](settings)


def prepare_data(config: Config) -> PreparedData:
    """Return the tokenizer and the examples of a run, from the cache if it has them.

    Raises ValueError for a model or data that the run cannot use. The model is checked first, since that is fast.
    """
    objective = build_objective(config.objective)
    check_peft_installed(config.model)
    check_model(config.model, max_length=config.batch.max_length, auto=objective.auto)
    with explain_cache_errors():
        return objective.prepare(config)


def build_network(config: Config, prepared: PreparedData, *, trained: bool = True) -> PreTrainedModel:
    """Return the model of a run, loaded from a checkpoint or new.

    Raises ValueError if it cannot be built, or if its own loss has a term that minilm would not train.

    trained: False for an evaluation. Such a term then only causes a warning.
    """
    network = load_model(
        config.model,
        prepared.tokenizer,
        max_length=config.batch.max_length,
        seed=config.run.seed,
        auto=build_objective(config.objective).auto,
        fields=prepared.fields,
        added=config.tokens.extend,
        new_labels=prepared.labels is not None and not prepared.labels.same_as_checkpoint,
    )
    if prepared.labels is None:
        check_builtin_loss(network, trained=trained)
    return network
