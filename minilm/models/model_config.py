"""A model's configuration: that of a checkpoint or the default of a model type, changed by `model.config`.

In this package, `auto` is a class of transformers such as `AutoModelForMaskedLM`. It names the head that is wanted.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from minilm.config import Model
from minilm.utils.hub import explain_loading_errors
from minilm.utils.validation import suggest_name


def load_configuration(name: str) -> Any:
    """Return the configuration of the model in a folder or on the hub, without running code that comes with it.

    Raises ValueError if there is none.
    """
    with explain_loading_errors(name, f"model {name!r} cannot be loaded"):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def read_model_labels(name: str | None, head: str = "SequenceClassification") -> tuple[str, ...]:
    """Return the names of the labels, by id, of a checkpoint that has this head; () for any other model.

    name: a folder or a hub id; None for a new model. head: such as SequenceClassification.
    """
    if name is None:
        return ()
    config = load_configuration(name)
    has_head = any(str(kind).endswith(f"For{head}") for kind in config.architectures or ())
    # The pipelines of transformers name labels by id2label. label2id may be missing, or may contradict it.
    return tuple(str(config.id2label[index]) for index in sorted(config.id2label)) if has_head else ()


def resolve_configuration(model: Model, auto: Any) -> PretrainedConfig:
    """Return the configuration of the checkpoint `model.name`, or else the default one of `model.type`.

    It checks the fields of `model.config` and sets none. Raises ValueError if the type has no model with the head of
    `auto`, if the configuration lacks one of these fields, or if the head does not have labels that one of them names.
    """
    if model.name is None:
        try:
            config = AutoConfig.for_model(model.type)
        except ValueError:
            raise ValueError(f"model.type {suggest_name(model.type, _list_types(auto))}") from None
        if type(config) not in auto._model_mapping:
            raise ValueError(
                f"model.type {model.type} has no {head_name(auto)} head; these have: {', '.join(_list_types(auto))}"
            )
    else:
        config = load_configuration(model.name)
        if type(config) not in auto._model_mapping:
            raise ValueError(
                f"model {model.name!r} cannot be loaded: {config.model_type} has no {head_name(auto)} head"
            )
    fields = {**read_fields(config.get_text_config()), **read_fields(config)}
    for field in model.config:
        if field in ("id2label", "label2id") and head_name(auto) == "QuestionAnswering":
            raise ValueError(
                f"model.config.{field}: a model for question answering has no labels, but two outputs, for the start "
                "and the end of an answer; leave it out"
            )
        if field not in fields:
            raise ValueError(
                f"model.config: {model.name or model.type} has no field {suggest_name(field, list(fields))}"
            )
    return config


def read_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Return the configuration's fields, also by their other names: GPT-2 calls its hidden_size n_embd."""
    return {**config.to_dict(), **config.attribute_map}


def set_fields(config: PretrainedConfig, fields: Mapping[str, Any]) -> None:
    """Set each field in the configuration, or in its inner text configuration if only that one has the field."""
    for field, value in fields.items():
        inner = field not in read_fields(config) and field in read_fields(config.get_text_config())
        setattr(config.get_text_config() if inner else config, field, value)


def count_token_types(model: Model, auto: Any) -> int | None:
    """Return how many token types the model distinguishes: 1 for RoBERTa, 0 if it takes none, as DistilBERT.

    Returns None if the configuration does not say: GPT-2 looks types up among its words, and XLNet compares them.
    """
    config = resolve_configuration(model, auto)
    kinds = auto._model_mapping[type(config)]
    kind = kinds[0] if isinstance(kinds, tuple) else kinds
    if "token_type_ids" not in inspect.signature(kind.forward).parameters:
        return 0
    count: Any = model.config.get("type_vocab_size", getattr(config, "type_vocab_size", None))
    return None if count is None else int(count)


def head_name(auto: Any) -> str:
    """Return the name of the head, such as MaskedLM or CausalLM."""
    return str(auto.__name__).removeprefix("AutoModelFor")


def _list_types(auto: Any) -> list[str]:
    return sorted({config.model_type for config in auto._model_mapping})
