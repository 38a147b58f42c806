"""The padding id by which a decoder's classifier finds the last token of a row."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minilm.models.embeddings import vocabulary_size
from minilm.models.temporary_changes import evaluation_mode


def set_classifier_padding(model: PreTrainedModel, padding: int) -> None:
    """Set `pad_token_id` of a classifier that finds a row's last token by it, as GPT-2's does.

    The embedding already exists, so the change neither zeroes one of its rows nor shifts positions. The configuration
    of any other classifier stays as it is. If the id changes, `model.read_before_padding` lists the ids that move the
    last token when they end a row: the new padding id and the former one.
    """
    configs = (model.config, model.config.get_text_config())  # Gemma 3 reads the id from the second
    before = [getattr(config, "pad_token_id", None) for config in configs]
    end = getattr(configs[1], "eos_token_id", None)
    ends = end if isinstance(end, list) else [end]
    word = min({*range(8)} - {padding, *before, *ends})
    size = vocabulary_size(model)
    last = next((id for id in ends if id is not None and id < size and id not in (padding, *before)), word)
    whole = torch.tensor([[word, word, last]])
    padded, mask = torch.tensor([[word, word, last], [word, last, padding]]), torch.tensor([[1, 1, 1], [1, 1, 0]])

    def read(**inputs: Tensor) -> Tensor | None:
        try:
            with evaluation_mode(model):
                logits: Tensor = model(**inputs).logits
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return None
        return logits

    def set_and_read(ids: Sequence[int | None]) -> tuple[Tensor | None, Tensor | None]:
        for config, id in zip(configs, ids, strict=True):
            config.pad_token_id = id
        return read(input_ids=whole), read(input_ids=padded, attention_mask=mask)

    (whole_before, padded_before), (whole_after, padded_after) = set_and_read(before), set_and_read([padding] * 2)
    changes = padded_after is not None and (padded_before is None or not torch.equal(padded_before, padded_after))
    moves = whole_before is not None and whole_after is not None and not torch.equal(whole_before, whole_after)
    if not changes or moves:
        set_and_read(before)
    elif before[1] != padding:
        model.read_before_padding = [id for id in (padding, before[1]) if id is not None]  # type: ignore[assignment]
