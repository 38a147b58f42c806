"""New models: the configuration of a type, and a model of it with random weights."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import Model
from minilm.data.special_ids import PADDING_FIELDS, collect_special_ids, count_embedding_rows, find_unused_id
from minilm.utils.hub import explain_loading_errors
from minilm.utils.validation import suggest_name


def load_configuration(name: str) -> Any:
    """That of a model, a folder or hub id. ValueError where there is none; code that comes with it is not run."""
    with explain_loading_errors(name, f"model {name!r} cannot be loaded"):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def configuration_of(model: Model, auto: Any) -> PretrainedConfig:
    """The configuration of `model.name`, or of `model.type` by default, with the head and the fields."""
    if model.name is None:
        try:
            config = AutoConfig.for_model(model.type)
        except ValueError:
            raise ValueError(f"model.type {suggest_name(model.type, _types(auto))}") from None
        if type(config) not in auto._model_mapping:
            raise ValueError(
                f"model.type {model.type} has no {head_name(auto)} head; these have: {', '.join(_types(auto))}"
            )
    else:
        config = load_configuration(model.name)
        if type(config) not in auto._model_mapping:
            raise ValueError(
                f"model {model.name!r} cannot be loaded: {config.model_type} has no {head_name(auto)} head"
            )
    known = {**_fields_of(config.get_text_config()), **_fields_of(config)}
    for field in model.config:
        if field not in known:
            raise ValueError(
                f"model.config: {model.name or model.type} has no field {suggest_name(field, list(known))}"
            )
    return config


def _fields_of(config: PretrainedConfig) -> dict[str, Any]:
    return {**config.to_dict(), **config.attribute_map}


def change_configuration(config: PretrainedConfig, fields: Mapping[str, Any]) -> None:
    """Set each field where it is: in the configuration, or in that of the text model inside."""
    for field, value in fields.items():
        inner = field not in _fields_of(config) and field in _fields_of(config.get_text_config())
        setattr(config.get_text_config() if inner else config, field, value)


def count_token_types(model: Model, auto: Any) -> int | None:
    """How many token types the model tells apart: 1 of RoBERTa, 0 where it takes none, as DistilBERT.

    None where its configuration does not count them: GPT-2 looks them up among its words, XLNet compares them.
    """
    config = configuration_of(model, auto)
    kinds = auto._model_mapping[type(config)]
    kind = kinds[0] if isinstance(kinds, tuple) else kinds
    if "token_type_ids" not in inspect.signature(kind.forward).parameters:
        return 0
    count: Any = model.config.get("type_vocab_size", getattr(config, "type_vocab_size", None))
    return None if count is None else int(count)


def build_model(model: Model, tokenizer: PreTrainedTokenizerBase, auto: Any) -> PreTrainedModel:
    """A model of `model.type` and `model.config`, with random weights and the special ids of the tokenizer."""
    default, size = configuration_of(model, auto), count_embedding_rows(tokenizer)
    known = default.to_dict() | default.get_text_config().to_dict()
    fields = {name: id for name, id in collect_special_ids(tokenizer).items() if name in known}
    generator = torch.get_rng_state()
    try:
        network = _from_fields(model, {"vocab_size": size, **fields}, auto)
        if fields.get("pad_token_id", size) is None:
            _read_two_tokens(network)
    except ValueError:
        if fields.get("pad_token_id", size) is not None:
            raise
        # The model cannot do without an id for padding, as those that count positions from it: it gets one that no text
        # holds, if need be of a row more.
        torch.set_rng_state(generator)
        padding = find_unused_id(tokenizer)
        fields |= {name: padding for name in PADDING_FIELDS if name in fields}
        network = _from_fields(model, {"vocab_size": max(size, padding + 1), **fields}, auto)
    if network.can_generate() and network.generation_config is not None:
        network.generation_config.pad_token_id = tokenizer.pad_token_id
    return network


def _from_fields(model: Model, fields: Mapping[str, Any], auto: Any) -> PreTrainedModel:
    """A new model with these fields, but for those that `model.config` gives itself."""
    try:
        own = _fields_of(AutoConfig.for_model(model.type))
        config = AutoConfig.for_model(model.type, **{name: x for name, x in model.config.items() if name in own})
        change_configuration(config, {name: value for name, value in model.config.items() if name not in own})
        for part in (config, config.get_text_config()):  # Gemma 3 has one inside its own
            for name, value in fields.items():
                if name not in model.config and name in part.to_dict() | part.attribute_map:
                    setattr(part, name, value)
        network: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    except (AssertionError, StrictDataclassError, ValueError, TypeError, RuntimeError) as error:
        # Settings that do not go together.
        raise ValueError(f"model.config: {' '.join(str(error).split())}") from error
    return network


def _read_two_tokens(network: PreTrainedModel) -> None:
    """Raise ValueError where the model, as it is configured, cannot."""
    network.eval()
    try:
        with torch.no_grad():
            network(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"model.config: {' '.join(str(error).split())}") from error
    network.train()


def _types(auto: Any) -> list[str]:
    return sorted({config.model_type for config in auto._model_mapping})


def head_name(auto: Any) -> str:
    """MaskedLM, CausalLM, …"""
    return str(auto.__name__).removeprefix("AutoModelFor")
