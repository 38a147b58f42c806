"""The layers of a model: lists of modules that a forward runs one after the other."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

# The first and the last module of a layer after its attention. Tokens do not mix from the one to the other.
AFTER_ATTENTION = (
    ("attention.output", "output"),  # BERT and its many relatives
    ("mlp_norm", "mlp"),  # ModernBERT
    ("sa_layer_norm", "output_layer_norm"),  # DistilBERT
    ("attention.LayerNorm", "output"),  # MPNet
)


def find_layers(model: PreTrainedModel) -> nn.ModuleList | tuple[()]:
    """Return the model's layers in order, or () if the model has no list of them."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return next((layers for _, layers in find_module_lists(model.base_model) if len(layers) == count), ())


def find_module_lists(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield each list of modules, after the path of its parent. Leave out lists inside the members of another list.

    If members of a list are lists themselves, yield these instead, each after its own path.
    """
    for name, child in module.named_children():
        inside = f"{path}.{name}" if path else name
        if not isinstance(child, nn.ModuleList):
            yield from find_module_lists(child, inside)
        elif inner := {n: member for n, member in enumerate(child) if isinstance(member, nn.ModuleList)}:
            # Funnel has a list of lists.
            yield from ((f"{inside}.{number}", member) for number, member in inner.items())
        else:
            yield path, child


def uses_gradient_checkpointing(model: nn.Module) -> bool:
    """Return whether backward computes layers again (gradient checkpointing)."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
