"""Masked LM: predict tokens that are hidden in the input. `minilm.objectives.masking` chooses them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import MaskedLM
from minilm.data.corpus import Examples, PreparedData
from minilm.models.inference import check_masks, fill_mask
from minilm.models.sparse_head import SparseHead
from minilm.objectives.language_modeling import LanguageModelObjective
from minilm.objectives.masking import MaskedLMCollator
from minilm.utils.shell import format_command

# The seed of the evaluation's masks. Seeds of runs are smaller.
_EVAL_SEED = 2**63
# The check of fully masked rows ignores an event with a smaller probability.
_NEGLIGIBLE_PROBABILITY = 1e-12
# The settings of `MaskedLM` that are arguments of the collator for training.
_MASKING_SETTINGS = ("unit", "masked", "replaced")


@dataclass(frozen=True)
class MaskedLMObjective(LanguageModelObjective):
    """Masked LM (Devlin et al. 2019, section 3.1)."""

    settings: MaskedLM

    auto = AutoModelForMaskedLM
    causal = False
    title = "masked language model"

    @property
    def needs_word_starts(self) -> bool:
        return self.settings.unit != "token"

    @property
    def eval_targets(self) -> str:
        return f"{self.settings.eval_rate:.0%} of the tokens"

    def collator(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        seed: int | None,
        padded: bool,
        multiple: int,
    ) -> MaskedLMCollator:
        layout: dict[str, Any] = {"padded": padded, "multiple": multiple}
        if seed is None:
            return MaskedLMCollator(tokenizer, rate=self.settings.eval_rate, seed=_EVAL_SEED, **layout)
        settings = {name: getattr(self.settings, name) for name in _MASKING_SETTINGS}
        word_starts = examples.word_starts if self.needs_word_starts else None
        return MaskedLMCollator(
            tokenizer, rate=self.settings.rate_at, seed=seed, word_starts=word_starts, **settings, **layout
        )

    def head(self, network: PreTrainedModel, prepared: PreparedData) -> SparseHead:
        for examples in (*prepared.all_train, prepared.eval):
            self._check_fully_masked_rows(network, prepared.tokenizer, examples)
        return super().head(network, prepared)

    def _check_fully_masked_rows(
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples
    ) -> None:
        """Raise ValueError if a row may be masked completely and the model divides by the share that is not masked."""
        divides = any(getattr(module, "token_dropout", False) is True for module in network.modules())
        around = {*examples.prefix.tolist(), *examples.suffix.tolist()}
        if not divides or not len(examples) or around & {*tokenizer.all_special_ids}:
            return
        settings = self.settings
        shortest = int(examples.lengths.min())
        rate = max(settings.rate, settings.final_rate or 0.0, settings.eval_rate)
        # One word or span may be as long as the row.
        choices = 1 if self.needs_word_starts else shortest
        if rate**choices > _NEGLIGIBLE_PROBABILITY:
            raise ValueError(
                f"{type(network).__name__} divides by the share of a row's tokens that are not masked (token_dropout), "
                f"and the tokenizer adds no special token to a text, so all tokens of a row of {shortest} may be "
                "masked. Pass --model.config.token-dropout False, or use longer rows"
            )

    def check(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        check_masks(network, tokenizer, texts)

    def sample(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        predictions = fill_mask(network, tokenizer, [text], top_k=3)[0][0]
        return ", ".join(f"{each.token} ({each.probability:.0%})" for each in predictions)

    def command(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        return format_command("fill-mask", folder, f"… {tokenizer.mask_token} …")
