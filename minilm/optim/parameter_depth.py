"""The depth of each parameter of a model, counted in blocks from the end of a forward pass."""

from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from minilm.models.layers import find_module_lists
from minilm.optim.forward_probe import run_short_row

# A block: the path of its list's parent, the length of that list, and the block's number in it. XLM has a list of
# attentions and a list of feed-forward parts. Modules with the same number belong to one block.
_Block = tuple[str, int, int]


def parameter_depths(network: PreTrainedModel) -> dict[nn.Parameter, int]:
    """Return the depth of each parameter that a block holds or a forward uses.

    A block is a member of a `ModuleList` that is not inside another block, and the blocks of one list are a stack. With
    n blocks in all, those of an encoder before those of a decoder, the last one has depth 1 and the first one depth n.
    A parameter inside a block has the block's depth; a parameter of several blocks has the first one's. The depth of
    any other parameter depends on where a forward first uses it:

    - Before any block, or before the first block of the stack with the same parent, the depth is n + 1. These are
      embeddings of tokens and positions, and tables that all layers share.
    - Between two blocks of a stack, the depth is that of the block before.
    - Between two stacks, the depth is that of the block after. The last norm of an encoder is an example.
    - After the last block, the depth is 0. These are norms, poolers and heads.

    Raises ValueError for a model that has no blocks, or that uses one of them several times.
    """
    name = type(network).__name__
    blocks = _blocks(network)
    try:
        uses = _Uses(network, blocks)
    except ValueError as error:
        raise ValueError(f"{name} cannot read a short row of ids ({error}): leave optim.layer_decay at 1") from error
    count = len(uses.order)
    if not count:
        raise ValueError(f"{name} has no list of layers: leave optim.layer_decay at 1")
    if uses.repeats:
        raise ValueError(f"{name} uses a layer several times, so it has no depth: leave optim.layer_decay at 1")
    place = {block: number for number, block in enumerate(uses.order)}
    owners: dict[nn.Parameter, int] = {}
    for module, block in (blocks | _find_parallel_layers(network, uses)).items():
        for parameter in module.parameters() if block in place else ():
            owners[parameter] = min(place[block], owners.get(parameter, count))
    begun_stacks = [{stack for stack, *_ in uses.order[: number + 1]} for number in range(count)]
    stacks = sorted({stack for stack, *_ in uses.order}, key=len)
    depths = {}
    for path, parameter in network.named_parameters():
        if parameter in owners:
            depths[parameter] = count - owners[parameter]
            continue
        if parameter not in uses.first:
            continue
        latest = uses.first[parameter]
        beside = next((stack for stack in reversed(stacks) if path.startswith(f"{stack}.")), None)
        if latest is None or (beside is not None and beside not in begun_stacks[place[latest]]):
            depths[parameter] = count + 1
            continue
        number = place[latest]
        ends = number == count - 1 or uses.order[number + 1][:2] != latest[:2]
        depths[parameter] = count - number - ends
    return depths


def _number(parent: str, modules: nn.ModuleList) -> dict[nn.Module, _Block]:
    """Return the block of each module of the list."""
    return {module: (parent, len(modules), number) for number, module in enumerate(modules)}


def _blocks(network: PreTrainedModel) -> dict[nn.Module, _Block]:
    """Return the block of each module of a stack. A list of single layers, such as projections, is not a stack."""
    blocks: dict[nn.Module, _Block] = {}
    for parent, modules in find_module_lists(network):
        if any(next(module.children(), None) is not None for module in modules):
            blocks |= _number(parent, modules)
    return blocks


def _find_parallel_layers(network: PreTrainedModel, uses: "_Uses") -> dict[nn.Module, _Block]:
    """Return the block of each single layer of a list whose i-th member is used in block i, as XLM's norms are."""
    layers: dict[nn.Module, _Block] = {}
    for parent, modules in find_module_lists(network):
        own = _number(parent, modules)
        if all(uses.first.get(p) == block for module, block in own.items() for p in module.parameters()):
            layers |= own
    return layers


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The blocks and the parameters that one short forward uses, in order."""

    def __init__(self, network: PreTrainedModel, blocks: dict[nn.Module, _Block]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.order: list[_Block] = []
        """The blocks in the order in which the forward begins them."""
        self.first: dict[nn.Parameter, _Block | None] = {}
        """For each parameter the last block begun before its first use; None if it is used before all blocks."""
        self.repeats = False
        """Whether the forward begins a block twice."""
        self._parameters = set(network.parameters())
        # Some models call `layer.forward`, which does not run hooks.
        self._owners = {p: block for module, block in reversed(blocks.items()) for p in module.parameters()}
        self._called = set[nn.Module]()
        with ExitStack() as stack:
            for module in blocks:
                stack.callback(module.register_forward_pre_hook(partial(self._call, blocks[module])).remove)
            stack.enter_context(self)
            run_short_row(network)

    def _call(self, block: _Block, module: nn.Module, inputs: object) -> None:
        self.repeats |= module in self._called or block in self.order[:-1]
        self._called.add(module)
        self._begin(block)

    def _begin(self, block: _Block) -> None:
        if block not in self.order:
            self.order.append(block)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In evaluation mode RWKV first divides its weights in place, which does not count as a use of them.
        written = args[0] if func._schema.is_mutable and args else None
        for leaf in tree_leaves((args, kwargs)):
            if (
                isinstance(leaf, nn.Parameter)
                and leaf is not written
                and leaf in self._parameters
                and leaf not in self.first
            ):
                if leaf in self._owners:
                    self._begin(self._owners[leaf])
                self.first[leaf] = self.order[-1] if self.order else None
        return func(*args, **(kwargs or {}))
