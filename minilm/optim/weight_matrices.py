"""The weight matrices inside the layers, and the matrices of which each of them is made up."""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.models.layers import find_module_lists
from minilm.optim.forward_probe import find_networks, run_short_row
from minilm.optim.weight_usage import WeightUsageTracer

# A message names this many kinds of parameters.
_MOST_NAMES = 6


@dataclass(frozen=True, kw_only=True)
class MatrixLayout:
    """The matrices in a parameter of shape (…, O, I) or (…, I, O), with I inputs and O outputs in all.

    Many models compute several projections with one parameter: query, key and value, or the gate and the input of a
    gated MLP. Some store them one after the other, others head by head.
    """

    transposed: bool
    """Whether the inputs come first: (…, I, O), as in GPT-2."""
    groups: int
    """The outputs are a sequence of this many groups with the same parts, such as one for each head."""
    sizes: tuple[int, ...]
    """The number of outputs of each part in a group. A matrix has the outputs of one part in all groups."""

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return a view for each matrix of a tensor that has the parameter's shape: (…, groups, size, I)."""
        rows = tensor.mT if self.transposed else tensor
        groups = rows.unflatten(-2, (self.groups, sum(self.sizes)))  # type: ignore[no-untyped-call]
        return list(torch.split(groups, list(self.sizes), dim=-2))


def find_matrices(model: nn.Module, exclude: Collection[nn.Parameter]) -> tuple[dict[nn.Parameter, MatrixLayout], str]:
    """Return the layouts of the trained weight matrices inside the layers, and a message on those that stay unknown.

    A short forward shows the layouts (`minilm.optim.weight_usage`). A parameter counts if the forward uses it only in
    matrix products, always with all its inputs, and if its outputs are used in regular parts. Vectors do not count.

    exclude: parameters that are not weights, such as biases that happen to have two dimensions.

    Raises ValueError if the model cannot read a short row of ids.
    """
    layouts: dict[nn.Parameter, MatrixLayout] = {}
    unknown: Counter[str] = Counter()
    for network in find_networks(model):
        names = _find_candidates(network, exclude)
        if not names:
            continue
        flow = WeightUsageTracer(names)
        try:
            with flow:
                output = run_short_row(network.base_model)  # type: ignore[arg-type]
        except ValueError as error:
            name = type(network).__name__
            raise ValueError(f"{name} cannot read a short row of ids ({error}): take optim.name adamw") from error
        flow.finish(output)
        for parameter, usage in flow.usages.items():
            groups, sizes = usage.find_pattern()
            if not usage.problem and groups * min(sizes) == 1:
                usage.problem = "some of its parts are vectors"
            if usage.problem:
                kind = re.sub(r"\.\d+(?=\.)", ".*", names[parameter])
                unknown[f"{kind} ({usage.problem})"] += 1
            else:
                layouts[parameter] = MatrixLayout(transposed=bool(usage.transposed), groups=groups, sizes=sizes)
    kinds = [f"{count} x {kind}" for kind, count in unknown.items()]
    more = [f"{len(kinds) - _MOST_NAMES} more kinds"] if len(kinds) > _MOST_NAMES else []
    return layouts, ", ".join(kinds[:_MOST_NAMES] + more)


def _find_candidates(network: PreTrainedModel, exclude: Collection[nn.Parameter]) -> dict[nn.Parameter, str]:
    """Return the names of the trained parameters inside layers that have at least two rows and two columns."""
    inside = {
        parameter
        for _, modules in find_module_lists(network.base_model)
        for module in modules
        # A list of single layers, such as projections of the embeddings, is not a list of layers.
        if next(module.children(), None) is not None
        for parameter in module.parameters()
    }
    return {
        parameter: name
        for name, parameter in network.named_parameters()
        if parameter in inside and parameter.requires_grad and parameter not in exclude
        if parameter.ndim >= 2 and min(parameter.shape[-2:]) > 1
    }
