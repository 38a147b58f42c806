"""The models of transformers in a model, and a short forward that shows how they use their parameters."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.models.embeddings import vocabulary_size
from minilm.models.model_inputs import add_choice_axis
from minilm.models.temporary_changes import evaluation_mode


def find_networks(model: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield each model of transformers in `model` that is not inside another one."""
    if isinstance(model, PreTrainedModel):
        yield model
        return
    for child in model.children():
        yield from find_networks(child)


def run_short_row(network: PreTrainedModel) -> Any:
    """Return the output of a forward over one short row, without gradients.

    Raises ValueError, with the reason alone, if the network cannot read a row of ids.
    """
    takes = inspect.signature(network.forward).parameters
    try:
        with evaluation_mode(network):
            ids = add_choice_axis(network, _make_ids(network))
            return network(input_ids=ids, **({"use_cache": False} if "use_cache" in takes else {}))
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _make_ids(network: PreTrainedModel) -> Tensor:
    """Return one row of eight ids, 1 x 8, that ends as texts do and does not contain padding."""
    config = network.config.get_text_config()
    ends = getattr(config, "eos_token_id", None)
    end = ends[0] if isinstance(ends, list) else ends
    word = next(number for number in range(3, 6) if number not in (end, getattr(config, "pad_token_id", None)))
    last = word if end is None or end >= vocabulary_size(network) else end
    return torch.tensor([[*[word] * 7, last]], device=network.device)
