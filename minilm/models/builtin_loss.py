"""Check that a model's own loss is the cross entropy that minilm trains on, without other terms.

Mixtures of experts add a loss of their routers if their configuration says so (Fedus et al. 2021, section 2.2). That
loss is a product of two means over all tokens of a batch. Summed over micro-batches, it differs from the same loss of
the whole step. So the size of the micro-batches would change the update.
"""

import logging
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from minilm.models.embeddings import vocabulary_size
from minilm.models.temporary_changes import evaluation_mode
from minilm.utils.progress import quiet_transformers

log = logging.getLogger("minilm")

_ROW_TOKENS = 8  # tokens of the row for which both losses are computed
# Fields of a configuration that add a term to the cross entropy, each with the value that adds nothing.
_NEUTRAL_VALUES = {
    "output_router_logits": False,  # mixtures of experts: a loss that spreads the tokens over all experts
    "z_loss_coefficient": 0.0,  # Bamba: a loss that keeps the denominator of the softmax small
    "eps": 0.0,  # ProphetNet: label smoothing, for which minilm has --objective.label-smoothing
}


def check_builtin_loss(network: PreTrainedModel, *, trained: bool = True) -> None:
    """Compare the loss that the model computes for a row with the cross entropy of its logits.

    If they differ, raise a ValueError that names the field of the configuration that causes the difference. If the
    model is not `trained`, or no known field is the cause, log a warning instead.
    """
    own, entropy = _compute_losses(network)
    if own is None or entropy is None or _are_near(own, entropy):
        return
    kind = type(network).__name__
    for field, neutral in _NEUTRAL_VALUES.items():
        holders = [each for each in (network, network.config, network.config.get_text_config()) if hasattr(each, field)]
        values = [getattr(each, field) for each in holders]
        for each in holders:
            setattr(each, field, neutral)
        without, _ = _compute_losses(network)
        for each, value in zip(holders, values, strict=True):
            setattr(each, field, value)
        if without is not None and not _are_near(without, own):
            reason = f"model.config.{field} {values[0]} adds a term to the loss of {kind}"
            if not trained:
                log.warning(f"{reason}; the evaluation measures the cross entropy alone")
                return
            raise ValueError(
                f"{reason}, and minilm trains on the cross entropy alone: pass "
                f"--model.config.{field.replace('_', '-')} {neutral} to leave the term out"
            )
    log.warning(
        f"{kind} computes a loss of {own:.4g} for a test row, whose cross entropy is {entropy:.4g}; minilm uses the "
        "cross entropy"
    )


def _compute_losses(network: PreTrainedModel) -> tuple[float | None, float | None]:
    """Return the loss that the model computes for a row, and the cross entropy of its logits.

    This is the cross entropy of a masked LM or of a causal LM, whichever is nearer to the loss. Both results are None
    if the model cannot compute its loss for a row of ids.
    """
    ids_1xL = torch.arange(1, 1 + _ROW_TOKENS, device=network.device)[None] % vocabulary_size(network)
    try:
        with evaluation_mode(network), quiet_transformers():
            output: Any = network(input_ids=ids_1xL, labels=ids_1xL)
            logits_LxV, ids_L = output.logits.float()[0, :_ROW_TOKENS], ids_1xL[0]
            # A masked LM predicts the token itself, a causal one the next token.
            entropies = [F.cross_entropy(logits_LxV, ids_L), F.cross_entropy(logits_LxV[:-1], ids_L[1:])]
            own = float(output.loss)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None, None
    return own, min((float(entropy) for entropy in entropies), key=lambda entropy: abs(entropy - own))


def _are_near(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-5 * abs(other)
