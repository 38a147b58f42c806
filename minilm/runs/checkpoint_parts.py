"""The parts of a large checkpoint: what they are called, and which tensors belong to which part.

Several processes write a large checkpoint together, each its own part. A part holds whole tensors, so that all parts
together are a model in the Hugging Face format, with the file names of that format:
`model-00001-of-00004.safetensors`. The state of the optimizer is divided in the same way.
"""

import re
from collections.abc import Collection, Mapping

from minilm.utils.validation import check

# A checkpoint of more bytes has several parts. A copy of this size fits into the memory of a process that trains.
PART_BYTES = 5_000_000_000
FIRST_UNIT = ""
"""The unit of tensors that belongs to the part of the main process."""


def name_part(name: str, part: int, parts: int) -> str:
    """Return the name of a part, counted from 0, of a file: the name of the file if it has one part only."""
    stem, _, suffix = name.rpartition(".")
    return name if parts == 1 else f"{stem}-{part + 1:05}-of-{parts:05}.{suffix}"


def find_parts(names: Collection[str], name: str) -> list[str]:
    """Return the names of all parts of the file `name` that are among the names of all files, in order."""
    if name in names:
        return [name]
    stem, _, suffix = name.rpartition(".")
    return sorted(other for other in names if re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}\.{suffix}", other))


def check_parts(names: Collection[str], name: str) -> None:
    """Raise ValueError if the file `name`, or one of its parts, is not among the names in a manifest."""
    found = find_parts(names, name)
    parts = int(found[-1].rpartition("-of-")[2][:5]) if found not in ([], [name]) else 1
    for one in (name_part(name, part, parts) for part in range(parts)):
        check(one in names, f"{one} is not in its manifest.json")


def count_parts(sizes: Mapping[str, int]) -> int:
    """Return the number of parts, if there are enough processes, from the bytes of each unit."""
    return min(len(sizes), -(-sum(sizes.values()) // PART_BYTES))


def assign_parts(sizes: Mapping[str, int], parts: int) -> dict[str, int]:
    """Return the part of each unit, such that the parts have about the same number of bytes, and none is empty.

    The largest comes first, and each goes to the part that is the smallest so far. A part is then never larger than the
    mean of the parts plus the largest unit. `FIRST_UNIT` is in part 0.

    sizes: the bytes of each unit. There are at least as many units as parts.
    """
    loads = [0] * parts
    result = {}
    for unit in sorted(sizes, key=lambda unit: (unit != FIRST_UNIT, -sizes[unit], unit)):
        part = loads.index(min(loads))
        result[unit] = part
        # A unit without bytes also fills an empty part.
        loads[part] += max(sizes[unit], 1)
    return result
