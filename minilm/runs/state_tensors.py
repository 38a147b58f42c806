"""The tensors of a checkpoint: they are divided into parts, gathered from the processes, and read again."""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from minilm.distributed.sharding import gather_whole
from minilm.models.lora import find_adapted_layer
from minilm.runs.checkpoint import MANIFEST
from minilm.runs.checkpoint_parts import FIRST_UNIT, find_parts


def find_units(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the unit of each weight, which goes to one part as a whole.

    It is the weight itself, except that all tied weights are the unit `FIRST_UNIT`, since only `save_pretrained` knows
    which of their names to store, and that the matrices of a layer with LoRA are one unit.
    """
    uses = Counter(map(id, weights.values()))
    return {name: FIRST_UNIT if uses[id(x)] > 1 else find_adapted_layer(name) for name, x in weights.items()}


def measure_units(
    units: Mapping[str, str], weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> dict[str, int]:
    """Return the bytes of each unit, with its state of the optimizer. Every process gets the same numbers.

    moments: the result of `collect_optimizer_state`.
    """
    sizes = dict.fromkeys(units.values(), 0)
    for name, tensor in {id(tensor): (name, tensor) for name, tensor in weights.items()}.values():
        sizes[units[name]] += tensor.numel() * tensor.element_size()
    for key, tensor in moments.items():
        sizes[units[key.partition("/")[2]]] += tensor.numel() * tensor.element_size()
    return sizes


def gather_tensors(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Return a whole copy on the CPU of each of the `tensors` that is in `names`.

    Every process calls it with the same `tensors`, since each may hold a shard of them, and with its own `names`. One
    tensor after the other is gathered, and processes that do not keep it free it at once. Tied weights are one tensor
    with two names, and so are their copies.
    """
    aliases: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        aliases.setdefault(id(tensor), []).append(name)
    copies: dict[str, Tensor] = {}
    for same in aliases.values():
        gathered = gather_whole(tensors[same[0]])
        kept = [name for name in same if name in names]
        if kept:
            copies |= dict.fromkeys(kept, gathered.detach().to("cpu", copy=True))
    return {name: copies[name] for name in tensors if name in copies}


def gather_full_state(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return a whole copy of each tensor on the CPU if `keep` is True, else an empty dictionary.

    Every process calls it, as `gather_tensors` says.
    """
    return gather_tensors(tensors, tensors if keep else ())


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors in the file `name` of a checkpoint, or in all parts of it.

    They are mapped into memory, so that a process reads from disk only what it uses. Raises OSError or SafetensorError
    if they cannot be read.
    """
    listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    parts = find_parts(listed, name) or [name]
    return {key: tensor for part in parts for key, tensor in load_file(folder / part).items()}
