"""Low-rank adaptation (LoRA, Hu et al. 2021): W becomes W + alpha / rank B A, and only B and A are trained.

Layers of peft replace linear layers, so that the model remains a model of transformers. A saved model holds W with the
update added. The names and shapes of its parameters are those of a model without an adapter.

Axes: R rank, I inputs of a layer, O its outputs.
"""

import fnmatch
import importlib.util
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from minilm.config import Model
from minilm.utils.validation import check, suggest_name

log = logging.getLogger("minilm")

_PREFIX = "base_model.model."  # the names in an adapter's file begin with this
# The names that peft has for tasks, by the name of the head. It has none for a masked LM and for multiple choice.
_TASKS = {
    "AutoModel": "FEATURE_EXTRACTION",
    "CausalLM": "CAUSAL_LM",
    "QuestionAnswering": "QUESTION_ANS",
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
}
# These heads are small and belong to the data. They are trained as a whole.
_TASK_HEADS = ("MultipleChoice", "QuestionAnswering", "SequenceClassification", "TokenClassification")


def check_peft_installed(model: Model) -> None:
    """Raise ValueError if the run uses LoRA and peft is not installed."""
    installed = not model.lora_rank or importlib.util.find_spec("peft") is not None
    check(installed, "model.lora_rank needs peft, which is not installed: pip install 'peft>=0.21'")


def add_lora(network: PreTrainedModel, model: Model, random: Sequence[str], head: str) -> None:
    """Add low-rank updates to the linear layers that `model.lora_targets` names, and freeze all other parameters.

    random: the names of parameters that start at random. A model with a head for a task, such as a classifier, trains
    the modules that hold them, and its head, as a whole.
    head: the name of the head, such as SequenceClassification.

    A starts at random and B at zero (section 4.1 of the paper). Raises ValueError for a pattern that matches no linear
    layer, and for a model without such a head that has random parameters, because they would stay random.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if random and head not in _TASK_HEADS:
        raise ValueError(
            f"model.lora_rank: {model.name} comes without {random[0]}, which would stay random under LoRA: train all "
            "weights of the model first"
        )
    whole = _head_modules(network, random) if head in _TASK_HEADS else []
    linear = _linear_layers(network, whole)
    targets = _choose_targets(network, linear, model.lora_targets)
    lora = LoraConfig(
        r=model.lora_rank,
        lora_alpha=model.lora_alpha,  # type: ignore[arg-type]
        target_modules=targets,
        fan_in_fan_out=isinstance(linear[targets[0]], Conv1D),  # otherwise peft warns
        base_model_name_or_path=model.name,
    )
    inject_adapter_in_model(lora, network)
    assert sorted(_adapted_layers(network)) == sorted(targets)
    for name in whole:
        network.get_submodule(name).requires_grad_(True)
    # These fields describe the saved adapter. If they were set before, peft would copy the modules for training.
    lora.modules_to_save, lora.task_type, lora.inference_mode = whole or None, _TASKS.get(head), True
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    log.info(f"LoRA: {trained:,} parameters are trained, in {len(targets)} layers{' and the head' if whole else ''}")


def _head_modules(network: PreTrainedModel, random: Sequence[str]) -> list[str]:
    """Return the modules to train as a whole: those outside the base model, and random ones inside it."""
    base = network.base_model
    outside = [] if base is network else [name for name, part in network.named_children() if part is not base]
    outside = [name for name in outside if any(True for _ in network.get_submodule(name).parameters())]
    inside = {name.rpartition(".")[0] for name in random if not _is_within(name, outside)}
    return outside + sorted(inside)


def _is_within(name: str, modules: Sequence[str]) -> bool:
    """Return whether this is the name of one of the modules or of one of their parts."""
    return f"{name}.".startswith(tuple(f"{module}." for module in modules))


def _linear_layers(network: PreTrainedModel, whole: Sequence[str]) -> dict[str, nn.Module]:
    """Return the linear layers whose update can be merged. The output embedding is left out, as it runs separately."""
    uses = Counter(map(id, network.state_dict(keep_vars=True).values()))
    return {
        name: module
        for name, module in network.named_modules()
        if type(module) in (nn.Linear, Conv1D)
        and uses[id(module.weight)] == 1
        and module is not network.get_output_embeddings()
        and not _is_within(name, whole)
    }


def _choose_targets(network: PreTrainedModel, linear: Mapping[str, nn.Module], patterns: Sequence[str]) -> list[str]:
    """Return the names of the layers that match a pattern.

    Without patterns, return peft's choice for this type of model, or else the layers of attention.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

    def match(pattern: str) -> list[str]:
        return fnmatch.filter(linear, pattern) + fnmatch.filter(linear, f"*.{pattern}")

    for pattern in patterns:
        if not match(pattern):
            ends = {name.rpartition(".")[2] for name in linear}
            raise ValueError(f"model.lora_targets matches no linear layer: {suggest_name(pattern, sorted(ends))}")
    kind = network.config.get_text_config().model_type
    names = {name for pattern in patterns or USUAL.get(kind, ()) for name in match(pattern)}
    if not names:
        names = {name for name in linear if "attn" in name or "attention" in name}
    if not names:
        raise ValueError(f"{type(network).__name__} has no usual layers for LoRA: name some with model.lora_targets")
    return sorted(names)


def _adapted_layers(network: nn.Module) -> dict[str, Any]:
    """Return the layers with an update, by the name of the linear layer that each of them replaced."""
    return {name: module for name, module in network.named_modules() if hasattr(module, "base_layer")}


def has_adapter(network: nn.Module) -> bool:
    """Return whether the network has an adapter, which LoRA trains."""
    return bool(_adapted_layers(network))


def _update_names(network: nn.Module) -> list[str]:
    """Return the names of all matrices A and B in the network's state dict."""
    return [f"{name}.lora_{part}.default.weight" for name in _adapted_layers(network) for part in "AB"]


def find_adapted_layer(name: str) -> str:
    """Return the layer of a weight that belongs to an adapted layer (W, A or B), and any other name unchanged."""
    return re.split(r"\.(?:base_layer|lora_[AB])\.", name)[0]


def _name_in_file(name: str) -> str:
    """Return the name that a parameter of the network has in an adapter's file."""
    return _PREFIX + name.replace(".default.weight", ".weight")


def merge_adapter(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a model without an adapter, with W + alpha / rank B A for each W with an update.

    weights: a state dict of the network, or a part of one that holds a layer's W, A and B together. Neither the network
    nor `weights` changes. If the network has no adapter, the result equals `weights`.
    """
    updates = set(_update_names(network))
    plain = {name.replace(".base_layer.", "."): x for name, x in weights.items() if name not in updates}
    for name, layer in _adapted_layers(network).items():
        if f"{name}.weight" not in plain:
            continue
        down_RxI, up_OxR = (weights[f"{name}.lora_{part}.default.weight"] for part in "AB")
        update_OxI = layer.scaling["default"] * (up_OxR @ down_RxI)
        plain[f"{name}.weight"] = plain[f"{name}.weight"] + (update_OxI.T if layer.fan_in_fan_out else update_OxI)
    return plain


def select_adapter_weights(network: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of a state dict that belongs in an adapter's file, by peft's names.

    These are all A and B, and the head of a classifier and the like.
    """
    lora: Any = network.peft_config["default"]
    updates, whole = set(_update_names(network)), lora.modules_to_save or ()
    return {_name_in_file(name): x for name, x in weights.items() if name in updates or _is_within(name, whole)}


def unmerge_adapter(
    network: PreTrainedModel, plain: Mapping[str, Tensor], adapter: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the state dict, to the bit, from which `plain` was merged and `adapter` was selected.

    Each W with an update comes from `own`, the network's state dict as it was loaded, because subtracting the update
    from `plain` would round W. Raises ValueError if the W in `own` are not those that were merged.
    """
    layers = _adapted_layers(network)
    same_layers = adapter.keys() == select_adapter_weights(network, own).keys()
    check(same_layers, "the adapter of the checkpoint has other layers than model.lora_targets names")
    renamed = {f"{name}.{leaf}": f"{name}.base_layer.{leaf}" for name in layers for leaf in ("weight", "bias")}
    weights = {renamed.get(name, name): tensor for name, tensor in plain.items()}
    weights |= {f"{name}.base_layer.weight": own[f"{name}.base_layer.weight"] for name in layers}
    weights |= {name: adapter[_name_in_file(name)] for name in _update_names(network)}
    again = merge_adapter(network, weights)
    for name in (f"{name}.weight" for name in layers):
        same = name in plain and torch.allclose(again[name], plain[name], rtol=1e-4, atol=1e-6)
        check(same, f"model.name is no longer the model that the run began with: {name} has changed")
    return weights


def save_adapter(network: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Save the adapter for `peft.PeftModel.from_pretrained(base, folder)`."""
    lora: Any = network.peft_config["default"]
    lora.save_pretrained(folder)
    save_file(select_adapter_weights(network, weights), folder / "adapter_model.safetensors", metadata={"format": "pt"})
