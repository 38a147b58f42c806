"""What a model is asked before it is trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def sees_padding(model: PreTrainedModel, probe: Callable[[], Tensor], padding: int) -> bool:
    """Whether other embeddings of the id `padding` change the logits of `probe`, a forward of padded rows.

    However little: what ConvBERT's convolutions carry from there is next to nothing before training, and MobileBERT's
    tokens see their right neighbour's embedding, which for padding begins as zeros and is trained.
    """
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return False

    def disturb(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        noise_H = torch.linspace(-1, 1, output.shape[-1], device=output.device, dtype=output.dtype)
        is_padding: Tensor = inputs[0] == padding
        is_padding[..., 0] = False  # no row begins with padding, and T5's decoder begins with the same token
        return torch.where(is_padding[..., None], output + noise_H, output)

    weight = getattr(embedding, "weight", None)
    tied = [each for each in model.modules() if isinstance(each, nn.Embedding) and each.weight is weight]
    before = probe()
    handles = [each.register_forward_hook(disturb) for each in tied]
    after = probe()
    for handle in handles:
        handle.remove()
    return not bool((after - before).abs().max() <= 1e-6 * before.abs().max())


@contextmanager
def training_whole(model: nn.Module) -> Iterator[None]:
    """In training mode, but with all layers where LayerDrop (Fan et al. 2020) leaves some out, for a moment."""
    training = model.training
    dropping: list[Any] = [module for module in model.modules() if getattr(module, "layerdrop", 0)]
    rates = [module.layerdrop for module in dropping]
    for module in dropping:
        module.layerdrop = 0.0
    model.train()
    try:
        yield
    finally:
        model.train(training)
        for module, rate in zip(dropping, rates, strict=True):
            module.layerdrop = rate
