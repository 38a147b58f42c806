"""The arguments of a model's forward for a batch of rows: packed, padded, or rows of equal length.

Axes: T tokens of a batch, R rows, L padded length.
"""

import inspect
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from minilm.data.packing import Packing
from minilm.models.input_length import position_offset
from minilm.models.matmul_shapes import count_padding_rows

# Arguments with a value for each token.
_TOKEN_ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def is_for_multiple_choice(model: PreTrainedModel) -> bool:
    """Return whether the model takes R questions x C choices x L tokens and gives R x C logits."""
    return type(model).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values()


def add_choice_axis(model: PreTrainedModel, ids_RxL: Tensor) -> Tensor:
    """Return the token ids of rows in the shape that the model takes: R x 1 x L if it is for multiple choice."""
    return ids_RxL[:, None] if is_for_multiple_choice(model) else ids_RxL


class ModelInputs:
    """Makes the arguments of a model's forward. `padding` is the id that fills padded places.

    A batch is given by its token ids `input_ids_T`, its `packing`, and its token types or None. A model for multiple
    choice takes each row as a question with one choice, R x 1 x L.
    """

    def __init__(self, model: PreTrainedModel, padding: int) -> None:
        parameters = inspect.signature(model.forward).parameters
        self.needs_mask = False
        """Whether the model, if it gets no mask, takes each token with the id of padding for padding."""
        self.options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        """Arguments that are the same for all batches."""
        self._padding = padding
        self._model_name = type(model).__name__
        self._takes_positions = "position_ids" in parameters
        self._offset = position_offset(model)
        self._has_choices = is_for_multiple_choice(model)

    def packed(self, input_ids_T: Tensor, packing: Packing, type_ids_T: Tensor | None) -> dict[str, Any]:
        """Return the arguments for rows that follow each other without padding, as one row of the model.

        `minilm.models.attention` keeps the rows apart. Further tokens may follow the last row
        (`minilm.models.matmul_shapes`). Each of them attends only to itself.
        """
        more = count_padding_rows(len(input_ids_T), input_ids_T.device)
        # packed_attention ignores the mask. transformers passes a mask of four axes on unchanged.
        mask = torch.empty(1, 1, 1, 1, device=input_ids_T.device)
        ids_T = F.pad(input_ids_T, (0, more), value=self._padding)
        inputs = {"input_ids": ids_T[None], "attention_mask": mask, "packing": packing, **self.options}
        if self._takes_positions:
            position_T = self._count_positions(input_ids_T, packing)
            inputs["position_ids"] = F.pad(position_T, (0, more), value=self._offset)[None]
        if type_ids_T is not None:
            inputs["token_type_ids"] = F.pad(type_ids_T, (0, more))[None]
        return self._add_choice(inputs)

    def padded(self, input_ids_T: Tensor, packing: Packing, type_ids_T: Tensor | None) -> dict[str, Any]:
        """Return the arguments for rows that are padded to the length of the longest one."""
        (group,) = packing.groups
        if group.owner_RL is not None:
            raise ValueError(
                f"{self._model_name} takes padded rows, and this batch was made for a model without padding: "
                "give the collator the plan's `padded` and `multiple`"
            )
        ids_RxL = group.pad(input_ids_T)
        inputs = {"input_ids": ids_RxL, "attention_mask": self._full_mask(ids_RxL), **self.options}
        if type_ids_T is not None:
            inputs["token_type_ids"] = group.pad(type_ids_T)
        if group.place_T is not None:
            real_RxL = group.token_mask(input_ids_T.device)
            inputs["input_ids"] = inputs["input_ids"].masked_fill(~real_RxL, self._padding)
            inputs["attention_mask"] = real_RxL.long()
            if type_ids_T is not None:
                inputs["token_type_ids"] = inputs["token_type_ids"].masked_fill(~real_RxL, 0)
        return self._add_choice(inputs)

    def equal_lengths(
        self, input_ids_T: Tensor, packing: Packing, type_ids_T: Tensor | None, *, single_rows: bool
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the length and the arguments of each run of consecutive rows of equal length.

        With `single_rows`, each row is a run of its own.
        """
        at = 0
        runs = [(length, [length]) for length in packing.lengths] if single_rows else groupby(packing.lengths)
        for length, rows in runs:
            tokens = slice(at, at := at + length * len(list(rows)))
            ids_RxL = input_ids_T[tokens].view(-1, length)
            inputs = {"input_ids": ids_RxL, "attention_mask": self._full_mask(ids_RxL), **self.options}
            if type_ids_T is not None:
                inputs["token_type_ids"] = type_ids_T[tokens].view(-1, length)
            yield length, self._add_choice(inputs)

    def single_row(self, ids_1xL: Tensor, mask_1xL: Tensor | None) -> dict[str, Any]:
        """Return the arguments for one row with this mask, or without one."""
        return self._add_choice({"input_ids": ids_1xL, "attention_mask": mask_1xL, **self.options})

    def _add_choice(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments with an axis for choices if the model needs one."""
        if not self._has_choices:
            return inputs
        return {name: x[:, None] if name in _TOKEN_ARGUMENTS and x is not None else x for name, x in inputs.items()}

    def _count_positions(self, input_ids_T: Tensor, packing: Packing) -> Tensor:
        """Return each token's position as the model counts it: RoBERTa does not count tokens with the id of padding."""
        if not self._offset:
            return packing.position_T
        real_T = (input_ids_T != self._offset - 1).long()
        count_T = real_T.cumsum(0)
        # The count of tokens before the token's row.
        before_T = ((count_T - real_T) * (packing.position_T == 0)).cummax(0).values
        return (count_T - before_T) * real_T + self._offset - 1

    def _full_mask(self, ids_RxL: Tensor) -> Tensor | None:
        """Return a mask for rows without padding, or None if the model does not need one."""
        return torch.ones_like(ids_RxL) if self.needs_mask else None
