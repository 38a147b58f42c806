"""Find the parameters of a classifier's head that depend on its labels, and draw them again."""

from copy import deepcopy
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel


def find_label_parameters(config: PretrainedConfig, auto: Any) -> set[str]:
    """Return the names of the parameters whose shape depends on the number of labels."""
    count = len(config.id2label or {})
    shapes = []
    for labels in (count, count + 1):
        changed = deepcopy(config)
        changed.num_labels = labels
        # On the meta device a model has shapes but no weights.
        with torch.device("meta"):
            network = auto.from_config(changed)
        shapes.append({name: parameter.shape for name, parameter in network.named_parameters()})
    return {name for name, shape in shapes[0].items() if shape != shapes[1][name]}


def start_anew(network: PreTrainedModel, names: set[str]) -> None:
    """Draw these parameters again, as transformers draws parameters that a checkpoint lacks."""
    if not names:
        return
    # transformers skips modules and parameters that are marked as initialized.
    for name in names:
        network.get_parameter(name)._is_hf_initialized = False  # type: ignore[attr-defined]
        path = name.split(".")
        for depth in range(len(path)):
            network.get_submodule(".".join(path[:depth]))._is_hf_initialized = False  # type: ignore[assignment]
    network.initialize_weights()
