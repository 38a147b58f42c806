"""The result of a run, for the program that started it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from minilm.utils.progress import quiet_transformers


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of a finished run."""

    folder: Path
    """The output folder."""
    figures: dict[str, float]
    """The figures of the last evaluation and the totals of the run, as in all_results.json."""
    model_class: Any
    """The class of transformers that loads the model."""

    @cached_property
    def model(self) -> PreTrainedModel:
        """The saved model in float32, on the CPU and in evaluation mode. It is loaded when it is first asked for."""
        with quiet_transformers():
            model: PreTrainedModel = self.model_class.from_pretrained(
                self.folder, dtype=torch.float32, trust_remote_code=False
            )
        model.eval()
        return model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The saved tokenizer."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        return tokenizer
