"""New models with random weights."""

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import Model
from minilm.data.special_ids import PADDING_FIELDS, collect_special_ids, count_embedding_rows, find_unused_id
from minilm.models.model_config import read_fields, resolve_configuration, set_fields
from minilm.models.model_inputs import add_choice_axis


def build_model(model: Model, tokenizer: PreTrainedTokenizerBase, auto: Any) -> PreTrainedModel:
    """Return a new model of `model.type` and `model.config` with the special ids of the tokenizer, in float32.

    Its weights are random. Raises ValueError if the fields of `model.config` do not go together, and if the model
    needs a library that is missing.
    """
    default, size = resolve_configuration(model, auto), count_embedding_rows(tokenizer)
    known = default.to_dict() | default.get_text_config().to_dict()
    fields = {name: id for name, id in collect_special_ids(tokenizer).items() if name in known}
    generator = torch.get_rng_state()
    try:
        network = _build(model, {"vocab_size": size, **fields}, auto)
        if fields.get("pad_token_id", size) is None:
            _check_two_tokens(network)
    except ValueError:
        if fields.get("pad_token_id", size) is not None:
            raise
        # The tokenizer has no padding token, but this model needs its id, for example to count positions from it.
        # The model gets an id that texts do not hold. If there is no such id, its embedding gets another row.
        torch.set_rng_state(generator)
        padding = find_unused_id(tokenizer)
        fields |= {name: padding for name in PADDING_FIELDS if name in fields}
        network = _build(model, {"vocab_size": max(size, padding + 1), **fields}, auto)
    if network.can_generate() and network.generation_config is not None:
        network.generation_config.pad_token_id = tokenizer.pad_token_id
    return network


def _build(model: Model, fields: Mapping[str, Any], auto: Any) -> PreTrainedModel:
    """Return a new model with these fields. A field of `model.config` takes precedence."""
    try:
        own = read_fields(AutoConfig.for_model(model.type))
        config = AutoConfig.for_model(model.type, **{name: x for name, x in model.config.items() if name in own})
        set_fields(config, {name: value for name, value in model.config.items() if name not in own})
        for part in (config, config.get_text_config()):  # Gemma 3 has a text configuration inside its own
            for name, value in fields.items():
                if name not in model.config and name in part.to_dict() | part.attribute_map:
                    setattr(part, name, value)
        network: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    except ImportError as error:
        raise ValueError(f"model.type {model.type}: {' '.join(str(error).split())}") from error
    except (AssertionError, StrictDataclassError, ValueError, TypeError, RuntimeError) as error:
        # These are the errors of transformers for fields that do not go together.
        raise ValueError(f"model.config: {' '.join(str(error).split())}") from error
    return network


def _check_two_tokens(network: PreTrainedModel) -> None:
    """Raise ValueError if the model cannot read a row of two tokens with its configuration."""
    network.eval()
    try:
        with torch.no_grad():
            network(input_ids=add_choice_axis(network, torch.zeros(1, 2, dtype=torch.int64)))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"model.config: {' '.join(str(error).split())}") from error
    network.train()
