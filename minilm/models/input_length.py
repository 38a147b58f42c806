"""The longest row that a model can read, and how it numbers positions."""

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

# The fields of a configuration that may hold the number of positions.
_POSITION_FIELDS = ("max_position_embeddings", "max_target_positions", "max_seq_len")


def longest_input(model: PreTrainedModel) -> int | None:
    """Return the largest number of tokens in a row, or None if the model has no limit."""
    limits = [read_position_limit(model.config)]
    if (embedding := _find_position_embedding(model)) is not None:
        # ProphetNet predicts n-grams and so looks one position further.
        limits.append(embedding.weight.shape[0] - position_offset(model) - hasattr(model.config, "ngram"))
    return min((limit for limit in limits if limit is not None), default=None)


def read_position_limit(config: PretrainedConfig) -> int | None:
    """Return the number of positions in the configuration, or None if it has none."""
    limits = [getattr(config.get_text_config(), name, None) for name in _POSITION_FIELDS]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def position_offset(model: PreTrainedModel) -> int:
    """Return the position of a row's first token: `padding_idx + 1` for RoBERTa and its relatives, else 0."""
    embedding = _find_position_embedding(model)
    return 0 if embedding is None or embedding.padding_idx is None else embedding.padding_idx + 1


def check_position_limit(max_length: int, limit: int | None) -> None:
    """Raise ValueError if rows of `max_length` tokens are longer than `limit`."""
    if limit is not None and max_length > limit:
        raise ValueError(f"batch.max_length={max_length} is more than the model's {limit} positions: lower it")


def check_rotary_scaling(max_length: int, config: PretrainedConfig) -> None:
    """Raise ValueError if a long row would change the rotary embeddings of the other rows of its batch.

    The LongRoPE (Ding et al. 2024) of transformers switches all rows to other frequencies when one row is long.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *rope.values()):  # some models have one entry for each type of layer
        if isinstance(each, dict) and each.get("rope_type") == "longrope":
            usual = each["original_max_position_embeddings"]
            if max_length > usual:
                raise ValueError(
                    f"batch.max_length={max_length} is too large for this model: its rotary embeddings (longrope) "
                    f"change for all rows of a batch in which one row has more than {usual} tokens, so results would "
                    f"depend on the batch. Lower it to {usual}"
                )


def _find_position_embedding(model: PreTrainedModel) -> Any:
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "weight") and hasattr(module, "padding_idx"):
            return module
    return None
