"""The files of a checkpoint: each process writes those of its share, and the main process joins them."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilm.models.lora import has_adapter, merge_adapter, select_adapter_weights
from minilm.runs.checkpoint import ADAPTER, INDEX, MANIFEST, OPTIMIZER, STATE, WEIGHTS
from minilm.runs.checkpoint_parts import find_parts, name_part
from minilm.runs.model_export import save_tokenizer
from minilm.utils.atomic_files import hash_file, remove_path, replace_folder, sync_path
from minilm.utils.progress import quiet_transformers


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one process writes of a checkpoint."""

    part: int | None
    """Its part, counted from 0; None if it writes nothing."""
    parts: int
    """The number of parts of the checkpoint."""
    weights: dict[str, Tensor]
    """The whole tensors of this part, copied to the CPU."""
    moments: dict[str, Tensor]
    """Their state of the optimizer."""


@dataclass(frozen=True, kw_only=True)
class WrittenFiles:
    """The files that one process has written, or why it could not."""

    folder: Path = Path()
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The size and the hash of each file in the folder."""
    failure: str | None = None


def write_share(
    folder: Path, share: Share, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> WrittenFiles:
    """Write a share to a new `folder`, and return when it is on disk.

    The first part has the configuration and the tokenizer too.
    """
    remove_path(folder)
    folder.mkdir()
    whole = merge_adapter(network, share.weights)
    if share.part == 0:
        with quiet_transformers():
            # `resume` needs the parameter names of the model in memory. The original format may have others.
            network.save_pretrained(folder, state_dict=whole, save_original_format=False, max_shard_size=sys.maxsize)
            save_tokenizer(tokenizer, folder)
    else:
        # save_pretrained would write nothing, since it leaves all writing to the process of rank 0.
        save_file({name: x.contiguous() for name, x in whole.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    save_file(share.moments, folder / OPTIMIZER)
    if has_adapter(network):
        save_file(select_adapter_weights(network, share.weights), folder / ADAPTER)
    facts = {}
    for path in sorted(folder.iterdir()):
        name = name_part(path.name, share.part or 0, share.parts) if path.suffix == ".safetensors" else path.name
        os.rename(path, folder / name)
        facts[name] = hash_file(folder / name)
        # The main process may be on another host, and cannot do this for the writer.
        sync_path(folder / name)
    return WrittenFiles(folder=folder, facts=facts)


def complete_checkpoint(target: Path, written: Sequence[WrittenFiles], state: dict[str, Any]) -> None:
    """Move the files of all shares to `target`, with the `state` of the run, the index of parts and the manifest.

    `target` appears when all of it is on disk. Raises OSError if a share could not be written.
    """
    for failure in filter(None, (files.failure for files in written)):
        raise OSError(failure)
    with replace_folder(target) as temporary:
        manifest: dict[str, dict[str, Any]] = {}
        for files in written:
            for name in files.facts:
                os.rename(files.folder / name, temporary / name)
            manifest |= files.facts
        others = {STATE: state}
        if WEIGHTS not in manifest:
            others[INDEX] = _index_weights(temporary, find_parts(manifest, WEIGHTS))
        for name, content in others.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            manifest[name] = hash_file(temporary / name)
        manifest = dict(sorted(manifest.items()))
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _index_weights(folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Return the index by which transformers finds the part of each weight."""
    tensors = {part: load_file(folder / part) for part in parts}
    size = sum(tensor.nbytes for weights in tensors.values() for tensor in weights.values())
    names = {name: part for part, weights in tensors.items() for name in weights}
    return {"metadata": {"total_size": size}, "weight_map": names}
