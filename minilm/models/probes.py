"""Changes to a model for the moment of a trial (`minilm.models.trials`), which show what new weights would hide."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_NOISE = 0.02  # the usual standard deviation of new matrices: large enough that rounding hides nothing
_FAR = 1 << 20  # more than the tokens of any batch


@contextmanager
def disturbed_padding(model: nn.Module, embedding: nn.Module, padding: int) -> Iterator[None]:
    """Change what `embedding`, and each one of the same weight, gives for the id `padding`, for a moment."""

    def disturb(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        noise_H = torch.linspace(-1, 1, output.shape[-1], device=output.device, dtype=output.dtype)
        is_padding: Tensor = inputs[0] == padding
        is_padding[..., 0] = False  # no row begins with padding, and T5's decoder begins with the same token
        return torch.where(is_padding[..., None], output + noise_H, output)

    weight = getattr(embedding, "weight", None)
    tied = [each for each in model.modules() if isinstance(each, nn.Embedding) and each.weight is weight]
    handles = [each.register_forward_hook(disturb) for each in tied]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def as_if_trained(model: nn.Module) -> Iterator[None]:
    """Add noise to each parameter whose elements are all the same, for a moment.

    Such a parameter has not been trained yet, and a zero or a small scale hides what depends on it: a layer that ends
    in a matrix of zeros changes no logit. Afterwards the parameter has its former value, to the bit.
    """
    generator = torch.Generator().manual_seed(0)
    constant: list[tuple[nn.Parameter, Tensor]] = []
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.is_floating_point() and _is_constant(parameter):
                constant.append((parameter, parameter.flatten()[0].clone()))
                noise = torch.randn(parameter.shape, generator=generator) * _NOISE
                parameter.add_(noise.to(parameter.device, parameter.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in constant:
                parameter.copy_(value)


def _is_constant(x: Tensor) -> bool:
    """Return whether all elements are the same; comparing two of them is enough for most parameters."""
    flat = x.detach().flatten()
    return bool(flat[0] == flat[-1]) and bool((flat == flat[0]).all())


class CountingFromFar(TorchFunctionMode):
    """A context in which `torch.arange` begins far from zero if its length is one of `sizes`.

    The logits of a model that counts the tokens of a whole batch then change, whatever it does with the numbers.
    """

    def __init__(self, sizes: Collection[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return result + _FAR if function is torch.arange and len(result) in self.sizes else result


@contextmanager
def training_whole(model: nn.Module) -> Iterator[None]:
    """Put the model into training mode, without LayerDrop (Fan et al. 2020), for a moment."""
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
