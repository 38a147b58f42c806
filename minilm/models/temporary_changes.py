"""Temporary changes to a model. Each context manager here restores the model when its block ends."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# The usual standard deviation of new weight matrices. It is far above the rounding error.
_NOISE_STD = 0.02
_ARANGE_SHIFT = 1 << 20  # larger than the number of tokens of any batch


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run the model without dropout, without gradients and without torch.compile."""
    training = model.training
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        model.train(training)
        for module in model.modules():
            # RWKV divides its weights for an evaluation. This method multiplies them again.
            if callable(rescale := getattr(module, "_rescale_layers", None)):
                rescale()


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into training mode, but without LayerDrop (Fan et al. 2020), so that every layer runs."""
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


@contextmanager
def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Use this function instead of the module's forward."""
    # The attribute of the object hides the method of its class.
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def bypass(module: nn.Module) -> AbstractContextManager[None]:
    """Let the module return its input unchanged."""
    return replace_forward(module, lambda x: x)


@contextmanager
def perturb_padding(model: nn.Module, embedding: nn.Module, padding: int) -> Iterator[None]:
    """Add noise to the embedding of the id `padding`, also where another module shares the weight of `embedding`."""

    def perturb(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        noise_H = torch.linspace(-1, 1, output.shape[-1], device=output.device, dtype=output.dtype)
        is_padding: Tensor = inputs[0] == padding
        # No row begins with padding, but the decoder's input of T5 begins with the same id.
        is_padding[..., 0] = False
        return torch.where(is_padding[..., None], output + noise_H, output)

    weight = getattr(embedding, "weight", None)
    tied = [each for each in model.modules() if isinstance(each, nn.Embedding) and each.weight is weight]
    handles = [each.register_forward_hook(perturb) for each in tied]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def randomize_constant_parameters(model: nn.Module) -> Iterator[None]:
    """Add noise to each parameter whose elements are all equal.

    Such a parameter is untrained. A layer that ends in a matrix of zeros does not change the logits, so a test of the
    logits would not notice an error in that layer. Afterwards each parameter has its former value, to the bit.
    """
    generator = torch.Generator().manual_seed(0)
    constant: list[tuple[nn.Parameter, Tensor]] = []
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.is_floating_point() and _is_constant(parameter):
                constant.append((parameter, parameter.flatten()[0].clone()))
                noise = torch.randn(parameter.shape, generator=generator) * _NOISE_STD
                parameter.add_(noise.to(parameter.device, parameter.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in constant:
                parameter.copy_(value)


def _is_constant(x: Tensor) -> bool:
    """Return whether all elements are equal. For most parameters, comparing two elements is enough."""
    flat = x.detach().flatten()
    return bool(flat[0] == flat[-1]) and bool((flat == flat[0]).all())


class ShiftedArange(TorchFunctionMode):
    """A context in which `torch.arange` starts far from zero if its length is one of `sizes`.

    This changes the logits of a model that numbers the tokens of the whole batch.
    """

    def __init__(self, sizes: Collection[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return result + _ARANGE_SHIFT if function is torch.arange and len(result) in self.sizes else result
