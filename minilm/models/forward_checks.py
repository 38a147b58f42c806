"""Checks of a model by one short forward, before any text is read."""

import torch
from transformers import PreTrainedModel

from minilm.models.embeddings import vocabulary_size
from minilm.models.model_inputs import add_choice_axis
from minilm.models.temporary_changes import evaluation_mode

_ROW_TOKENS = 5
_CAUSAL_TOLERANCE = 1e-4  # relative to the largest logit; rounding errors are smaller


def check_forward(model: PreTrainedModel) -> None:
    """Raise ValueError if the model cannot read a row: its configuration was enough to build it, but is not valid."""
    config = model.config.get_text_config()
    end, size = getattr(config, "eos_token_id", None), vocabulary_size(model)
    row = [min(5, size - 1)] * _ROW_TOKENS
    ends = [id for id in (end if isinstance(end, list) else [end]) if id is not None and id < size]
    # BART reads the class of a row at its end token, and this model has none to build a row with.
    # `minilm.models.compatibility` finds texts without an end token later.
    if not ends and model.config.is_encoder_decoder:
        return
    try:
        with evaluation_mode(model):
            model(input_ids=add_choice_axis(model, torch.tensor([[*row, ends[0] if ends else row[0]]])))
    except torch.OutOfMemoryError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{type(model).__name__} cannot read a row from its token ids alone ({' '.join(str(error).split())}): take "
            "another model"
        ) from error
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ZeroDivisionError) as error:
        if _reads_separated_texts(model):
            raise ValueError(
                f"{type(model).__name__} only reads rows with three separators, and minilm tries models on rows "
                "without any: take another model"
            ) from error
        raise ValueError(
            f"{type(model).__name__} cannot read a row of {len(row) + 1} tokens with this configuration "
            f"({' '.join(str(error).split())}): change its settings with --model.config.FIELD"
        ) from error


def _reads_separated_texts(model: PreTrainedModel) -> bool:
    """Return whether the model reads a row of two texts with separators, as Longformer does to find a question."""
    separator = getattr(model.config.get_text_config(), "sep_token_id", None)
    if not isinstance(separator, int) or not 0 < separator < vocabulary_size(model):
        return False
    row_1xL = torch.tensor([[0, separator, separator, 0, 0, separator]])
    try:
        with evaluation_mode(model):
            model(input_ids=add_choice_axis(model, row_1xL))
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError):
        return False
    return True


def check_causal(model: PreTrainedModel, advice: str = "") -> None:
    """Raise ValueError if the logits of a token depend on later tokens, as those of BERT do with a causal head.

    advice: the end of the message, which says what the user can do.
    """
    ids_2xL = torch.ones(2, 6, dtype=torch.int64, device=next(model.parameters()).device)
    ids_2xL[1, -1] = 2
    with evaluation_mode(model):
        logits_2xLxV = model(input_ids=ids_2xL).logits.float()
    first, second = logits_2xLxV[:, :-1]
    if (first - second).abs().max() > _CAUSAL_TOLERANCE * logits_2xLxV.abs().max():
        raise ValueError(
            f"{type(model).__name__} is not a causal LM: it sees the tokens after the one that it predicts{advice}"
        )
