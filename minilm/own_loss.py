"""The loss that a model computes itself, where it is more than the cross entropy that minilm trains on.

Mixtures of experts add a loss of their routers if the configuration says so (Fedus et al. 2021, section 2.2). It is a
product of two means over all tokens of a batch, so that the sum over a step's micro-batches is another number than the
loss of the step: minilm would break its promise that the cut into micro-batches does not matter.
"""

import logging
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from minilm.hub import quiet_transformers
from minilm.model import evaluating, vocabulary_size

log = logging.getLogger("minilm")

_TOKENS = 8  # of the row on which both losses are computed
# Fields of configurations that ask for more than the cross entropy, and the value that asks for none.
_ASKS = {
    "output_router_logits": False,  # mixtures of experts: experts that have as many tokens each
    "z_loss_coefficient": 0.0,  # Bamba: a small denominator of the softmax
    "eps": 0.0,  # ProphetNet: smooth labels, which --objective.label-smoothing gives too
}


def check_own_loss(network: PreTrainedModel, *, trained: bool = True) -> None:
    """Compare the model's own loss of a row with the cross entropy of its logits.

    Raises ValueError where the two differ by a field of the configuration, which it names; a warning says so where the
    model is not `trained`, or where no field is known to matter.
    """
    own, entropy = _losses(network)
    if own is None or entropy is None or _near(own, entropy):
        return
    kind = type(network).__name__
    for field, none in _ASKS.items():
        holders = [each for each in (network, network.config, network.config.get_text_config()) if hasattr(each, field)]
        asked = [getattr(each, field) for each in holders]
        for each in holders:
            setattr(each, field, none)
        without, _ = _losses(network)
        for each, value in zip(holders, asked, strict=True):
            setattr(each, field, value)
        if without is not None and not _near(without, own):
            found = f"model.config.{field} {asked[0]} adds to the loss of {kind}"
            if not trained:
                log.warning(f"{found}; what is evaluated is the cross entropy alone")
                return
            raise ValueError(
                f"{found} what minilm leaves out, since it depends on how a step is cut into micro-batches: "
                f"--model.config.{field.replace('_', '-')} {none} trains on the cross entropy alone"
            )
    log.warning(f"{kind} has a loss of its own ({own:.4g} in a trial); minilm takes the cross entropy ({entropy:.4g})")


def _losses(network: PreTrainedModel) -> tuple[float | None, float | None]:
    """The model's own loss of a row, and the cross entropy that is nearest to it; None where it gives no loss."""
    ids_1xL = torch.arange(1, 1 + _TOKENS, device=network.device)[None] % vocabulary_size(network)
    try:
        with evaluating(network), quiet_transformers():
            output: Any = network(input_ids=ids_1xL, labels=ids_1xL)
            logits_LxV, ids_L = output.logits.float()[0, :_TOKENS], ids_1xL[0]
            # Of the token itself, as of a masked LM, or of the next one.
            entropies = [F.cross_entropy(logits_LxV, ids_L), F.cross_entropy(logits_LxV[:-1], ids_L[1:])]
            own = float(output.loss)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None, None
    return own, min((float(entropy) for entropy in entropies), key=lambda entropy: abs(entropy - own))


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-5 * abs(other)
