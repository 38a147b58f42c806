"""Merge models: the mean of the weights of several checkpoints or runs, as a new model.

The checkpoints of one run are often better together than alone (LAWA, Kaddour 2022), and so are models that were
fine-tuned from the same checkpoint (model soups, Wortsman et al. 2022).
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minilm.commands.export import check_model_folder, check_new_folder, copy_other_files
from minilm.runs.checkpoint import WEIGHTS
from minilm.utils.atomic_files import replace_folder, sync_path

# Files with the tokens of a tokenizer.
_TOKENS = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "*.model")
# Fields of config.json that say who wrote the file.
_ORIGIN = ("transformers_version", "_name_or_path")


def merge_models(sources: Sequence[str | Path], output: str | Path, shares: Sequence[float] | None = None) -> Path:
    """Write the weighted mean of the models in `sources` to the folder `output`, and return `output`.

    The means are computed in float64 and rounded once. The configuration and the tokenizer are those of the last
    model. `output` appears only when all of it is on disk. shares: the weight of each model; equal by default.

    Raises ValueError for a folder without a complete model, for models with other weights, another configuration or
    another tokenizer than the last one, and if `output` is not empty.
    """
    folders, target = [Path(source).expanduser() for source in sources], Path(output).expanduser()
    if len(folders) < 2:
        raise ValueError("minilm merge takes the mean of several models: give two folders or more")
    if shares is not None and len(shares) != len(folders):
        raise ValueError(f"--weights has {len(shares)} numbers for {len(folders)} models: give one for each")
    shares = [1.0] * len(folders) if shares is None else shares
    if not sum(shares) > 0:
        raise ValueError("--weights has no number above 0")
    check_new_folder(target)
    for folder in folders:
        check_model_folder(folder)
    for folder in folders[:-1]:
        _check_alike(folder, folders[-1])
    target.parent.mkdir(parents=True, exist_ok=True)
    with replace_folder(target) as temporary:
        merged = _average(folders, [share / sum(shares) for share in shares])
        save_file(merged, temporary / WEIGHTS, metadata={"format": "pt"})
        sync_path(temporary / WEIGHTS)
        copy_other_files(folders[-1], temporary)
    return target


def _check_alike(folder: Path, last: Path) -> None:
    """Raise ValueError if the models have other configurations or tokenizers."""
    ours, theirs = (_read_config(path) for path in (folder, last))
    if different := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        raise ValueError(f"{folder} and {last} are other models: config.json differs in {', '.join(different[:5])}")
    for name in sorted({path.name for each in (folder, last) for kind in _TOKENS for path in each.glob(kind)}):
        one, other = (path / name for path in (folder, last))
        if not (one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()):
            raise ValueError(f"{folder} and {last} have different tokenizers: {name} is not the same in both")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder}/config.json is not JSON: copy the model's folder again") from error
    return {name: value for name, value in config.items() if name not in _ORIGIN}


def _average(folders: Sequence[Path], shares: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of each weight. The shares sum to 1."""
    with ExitStack() as stack:
        models: list[dict[str, Any]] = []
        for folder in folders:
            weights: dict[str, Any] = {}
            for path in sorted(path for kind in (WEIGHTS, "model-*-of-*.safetensors") for path in folder.glob(kind)):
                try:
                    part = stack.enter_context(safe_open(path, "pt"))
                except SafetensorError as error:
                    raise ValueError(f"{path} cannot be read: {error}") from error
                weights |= dict.fromkeys(part.keys(), part)
            models.append(weights)
        for folder, model in zip(folders, models, strict=True):
            if different := sorted(model.keys() ^ models[-1].keys()):
                raise ValueError(f"{folder} and {folders[-1]} do not have the same weights: {', '.join(different[:3])}")
        merged = {}
        for name in models[-1]:
            tensors = [model[name].get_tensor(name) for model in models]
            if len({(tensor.shape, tensor.dtype) for tensor in tensors}) > 1:
                raise ValueError(f"the weight {name} has another shape or type in another model")
            if all(torch.equal(tensor, tensors[0]) for tensor in tensors):
                merged[name] = tensors[0]
                continue
            if not tensors[0].is_floating_point():
                raise ValueError(f"the weight {name} holds whole numbers that differ, so it has no mean")
            mean = torch.zeros(tensors[0].shape, dtype=torch.float64)
            for share, tensor in zip(shares, tensors, strict=True):
                mean += share * tensor.double()
            merged[name] = mean.to(tensors[0].dtype)
        return merged
