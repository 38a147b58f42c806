"""Distillation: a teacher for the head of any objective whose outputs are logits."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from minilm.config import Config, Model
from minilm.data.corpus import PreparedData
from minilm.data.packing import Packing
from minilm.models.head import Head
from minilm.models.loading import load_model
from minilm.models.teacher import Teacher
from minilm.objectives.example_batches import arrange_outputs
from minilm.objectives.objective import Objective
from minilm.utils.hub import explain_loading_errors


def add_teacher(head: Head, config: Config, objective: Objective, prepared: PreparedData) -> None:
    """Give the head the teacher `objective.teacher`, if there is one, on the device of its model.

    Raises ValueError for a teacher that cannot be loaded, or that has other tokens or other labels than the model.
    """
    settings = config.objective
    if settings.teacher is None:
        return
    if objective.outputs in ("mean", "first", "last"):
        raise ValueError("objective.teacher: the objective has no logits to compare with a teacher's; leave it out")
    _check_tokens(settings.teacher, prepared)
    network = load_model(
        Model(name=settings.teacher),
        prepared.tokenizer,
        max_length=max(examples.longest_row for examples in prepared.all_train),
        seed=config.run.seed,
        auto=objective.auto,
    )
    network.to(head.model.device)  # type: ignore[arg-type]
    _check_labels(settings.teacher, network.config.id2label, prepared)
    own = objective.head(network, prepared)
    # Both models read the same micro-batches, with or without padding.
    for one, other in ((head, own), (own, head)):
        if one.padding_free and not other.padding_free:
            one.drop_shortcuts(["padding_free"])

    def compare(outputs: Tensor, expected: Tensor, targets: Tensor, packing: Packing) -> Tensor:
        ours, theirs = (
            arrange_outputs(each, objective.outputs, packing.lengths, packing.rows_per_example)
            for each in (outputs, expected)
        )
        return objective.compare_with_teacher(ours, theirs, targets, settings.teacher_temperature)

    head.teacher = Teacher(own, compare, weight=settings.teacher_weight)


def _check_tokens(name: str, prepared: PreparedData) -> None:
    """Raise ValueError if the teacher's tokenizer has other tokens than the model's."""
    with explain_loading_errors(name, f"objective.teacher {name!r}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    ours, theirs = prepared.tokenizer.get_vocab(), tokenizer.get_vocab()
    if ours != theirs:
        different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise ValueError(
            f"objective.teacher {name!r} has other tokens than the model ({len(different):,} differ, such as "
            f"{different[0]!r}), so their logits cannot be compared: take --tokens.name {name}, or another teacher"
        )


def _check_labels(name: str, id2label: Mapping[Any, str] | None, prepared: PreparedData) -> None:
    """Raise ValueError if the teacher has other labels than the data."""
    wanted = prepared.fields.get("id2label")
    own = {int(id): str(label) for id, label in (id2label or {}).items()}
    if wanted is not None and own != {int(id): str(label) for id, label in wanted.items()}:
        raise ValueError(
            f"objective.teacher {name!r} has the labels {', '.join(own.values())}, and the data "
            f"{', '.join(map(str, wanted.values()))}: take a teacher that was trained for the same labels in this order"
        )
