"""What masked and causal LM have in common: documents to examples, the head at the targets, loss and perplexity."""

import logging
import math
from collections.abc import Callable
from typing import Any

from datasets import concatenate_datasets
from transformers import PreTrainedModel

from minilm.agreement import check_agreement
from minilm.batch import LanguageCollator
from minilm.config import Config
from minilm.data import load_documents
from minilm.evaluate import LanguageEvaluator, unigram_nats
from minilm.head import SparseHead
from minilm.special_ids import id_count
from minilm.stream import Stream, chained, stream_documents
from minilm.tokens import Prepared, encode, load_tokenizer
from minilm.vocabulary import Documents

log = logging.getLogger("minilm")


def _documents(config: Config) -> tuple[Documents, Documents]:
    """Training and evaluation documents, the latter from all parts that are to be evaluated."""
    if not config.data.streaming:
        train, parts = load_documents(config.data, config.run.seed)
        return train, concatenate_datasets([*parts.values()])
    stream, streams = stream_documents(config.data)
    return stream, chained([*streams.values()])


def _needed(config: Config, train: Documents) -> tuple[int | None, int | None]:
    """The training and evaluation examples after which no more is read of a hub's stream; None where all is read.

    That is so of several sources: how much of a run each makes up, with its weight, is known once it is read.
    """
    if not isinstance(train, Stream) or not train.remote or config.run.max_steps is None:
        return None, None
    if len(config.data.sources) > 1:
        log.warning(
            "data.source: of several all is read, whatever run.max_steps needs; --data.split train[:5000] cuts each"
        )
        return None, None
    needed, share = config.run.max_steps * config.batch.examples, config.data.eval_fraction
    if config.data.eval_source or config.data.eval_split:
        return needed, None
    return needed, math.ceil(needed * share / (1 - share))  # as many as are then held out


def _first(documents: Documents, count: int | None) -> Documents:
    return documents.first(count) if isinstance(documents, Stream) and count else documents


class LanguageModel:
    """The part of an objective (`minilm.objectives.Objective`) that every language model shares."""

    settings: Any
    """Those of the objective in `minilm.config`."""
    causal: bool
    """Special tokens begin and end each document, and not each example."""
    predicted: str
    """What evaluation predicts."""
    collator: Callable[..., LanguageCollator]
    words = False
    """Training asks where words begin."""

    def prepare(self, config: Config) -> Prepared:
        """The tokenizer, and the training and evaluation examples, from the cache where it has them."""
        if config.data.pair_column is not None:
            raise ValueError("data.pair_column: a language model reads one text; leave it out")
        train, held_out = _documents(config)
        needed = _needed(config, train)
        tokenizer = load_tokenizer(config.tokens, config.model.name, _first(train, needed[0]), causal=self.causal)
        joined = config.batch.layout != "documents"  # how many documents an example takes is not known
        train_examples, eval_examples = (
            encode(
                documents if joined else _first(documents, count),
                tokenizer,
                max_length=config.batch.max_length,
                layout=config.batch.layout,
                overflow=config.tokens.overflow,
                causal=self.causal,
                words=self.words and part == "training",
                text_bytes=part == "evaluation",
                name=f"{part} documents",
                enough=count * config.batch.max_length if joined and count else None,
            )
            for part, documents, count in (("training", train, needed[0]), ("evaluation", held_out, needed[1]))
        )
        return Prepared(tokenizer=tokenizer, train=train_examples, eval=eval_examples)

    def head(self, network: PreTrainedModel, prepared: Prepared) -> SparseHead:
        """The network with its head at the targets alone."""
        head = SparseHead(network, label_smoothing=self.settings.label_smoothing)
        check_agreement(head, prepared)
        return head

    def evaluator(self, prepared: Prepared, micro_tokens: int, *, padded: bool, multiple: int) -> LanguageEvaluator:
        """Loss, perplexity and bits per byte, beside a unigram model's."""
        collator = self.collator(prepared.tokenizer, prepared.eval, seed=None, padded=padded, multiple=multiple)
        return LanguageEvaluator(
            examples=prepared.eval,
            collator=collator,
            micro_tokens=micro_tokens,
            unigram=unigram_nats(prepared.train.counts(id_count(prepared.tokenizer)) * collator.possible),
        )

    def said(self, figures: dict[str, float]) -> str:
        """The figures of an evaluation in words."""
        return (
            f"evaluation loss {figures['eval_loss']:.3f}, perplexity {figures['perplexity']:.2f}, "
            f"{figures['bits_per_byte']:.3f} bits per byte (unigram {figures['unigram_bits_per_byte']:.3f})"
        )

    @property
    def explained(self) -> str:
        """What the figures mean, for the model card."""
        return (
            f"The evaluation predicts {self.predicted} of documents that training did not see.\n"
            "`bits_per_byte` is the loss at those tokens per UTF-8 byte of the text that they stand for, with spaces\n"
            "before them; the unigram model has the frequencies of the training tokens."
        )
