"""The parameters of a classifier's head that depend on its labels: find them and initialize them again."""

from copy import deepcopy
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel


def find_label_parameters(config: PretrainedConfig, auto: Any) -> set[str]:
    """Return the names of the parameters whose shape depends on the number of labels.

    auto: the class of transformers that builds the model, such as AutoModelForSequenceClassification.
    """
    count = len(config.id2label or {})
    shapes = []
    for labels in (count, count + 1):
        changed = deepcopy(config)
        changed.num_labels = labels
        # On the meta device a model has shapes but no weights.
        with torch.device("meta"):
            model = auto.from_config(changed)
        shapes.append({name: parameter.shape for name, parameter in model.named_parameters()})
    return {name for name, shape in shapes[0].items() if shape != shapes[1][name]}


def reinitialize_parameters(model: PreTrainedModel, names: set[str]) -> None:
    """Draw these parameters again, as transformers draws parameters that a checkpoint lacks."""
    if not names:
        return
    # transformers skips modules and parameters that are marked as initialized.
    for name in names:
        model.get_parameter(name)._is_hf_initialized = False  # type: ignore[attr-defined]
        path = name.split(".")
        for depth in range(len(path)):
            model.get_submodule(".".join(path[:depth]))._is_hf_initialized = False  # type: ignore[assignment]
    model.initialize_weights()
