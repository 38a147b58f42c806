"""Causal LM: predict each token of a row from the tokens before it.

Axes: T tokens of the micro-batch, N targets of the micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import CausalLM
from minilm.data.corpus import Examples
from minilm.data.micro_batch import MicroBatch, concatenate_rows
from minilm.data.special_ids import mark_used_ids
from minilm.models.forward_checks import check_causal
from minilm.models.inference import check_prompts, generate
from minilm.objectives.language_modeling import LanguageModelObjective
from minilm.utils.shell import format_command


class CausalLMCollator:
    """A collator that joins rows of token ids. Each token except a row's first is the target of the token before it.

    padded, multiple: as in `minilm.data.batch_plan.Plan`.
    """

    target_offset = 1

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, padded: bool, multiple: int) -> None:
        self.can_be_target = mark_used_ids(tokenizer)
        self.padded, self.multiple = padded, multiple

    def rate(self, progress: float = 0.0) -> float:
        """Return 1 as the share of the tokens that are targets. Only the first token of each row is not a target."""
        return 1.0

    def __call__(
        self, rows: Sequence[NDArray[np.int64]], examples: NDArray[np.int64], epoch: int, progress: float = 0.0
    ) -> MicroBatch:
        """Return a micro-batch of the rows. Ignores `examples`, `epoch` and `progress`."""
        ids_T, packing = concatenate_rows(rows, padded=self.padded, multiple=self.multiple)
        last_R = np.cumsum([len(row) for row in rows] or [1]) - 1
        index_N = np.delete(np.arange(len(ids_T)), last_R)
        return MicroBatch(
            input_ids_T=torch.from_numpy(ids_T),
            packing=packing,
            target_index_N=torch.from_numpy(index_N),
            target_ids_N=torch.from_numpy(ids_T[index_N + 1]),
        )


@dataclass(frozen=True)
class CausalLMObjective(LanguageModelObjective):
    """Causal LM (Radford et al. 2019)."""

    settings: CausalLM

    auto = AutoModelForCausalLM
    causal = True
    title = "causal language model"

    @property
    def eval_targets(self) -> str:
        return "every token but the first"

    def collator(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        seed: int | None,
        padded: bool,
        multiple: int,
    ) -> CausalLMCollator:
        return CausalLMCollator(tokenizer, padded=padded, multiple=multiple)

    def check(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        check_causal(network, "; where the model can be made one, pass --model.config.is-decoder True")
        check_prompts(network, tokenizer, texts)

    def sample(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        return generate(network, tokenizer, [text])[0].removeprefix(text)

    def command(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        return format_command("generate", folder, "…")
