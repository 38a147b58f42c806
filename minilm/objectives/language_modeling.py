"""What masked and causal LM have in common: documents to examples, the head at the targets, loss and perplexity."""

import logging
import math
from collections.abc import Callable
from typing import Any

from datasets import concatenate_datasets
from transformers import PreTrainedModel

from minilm.config import Config
from minilm.data.corpus import Examples, PreparedData, encode
from minilm.data.document_texts import Documents
from minilm.data.documents import load_documents
from minilm.data.micro_batch import LanguageCollator
from minilm.data.special_ids import count_embedding_rows
from minilm.data.splits import is_one_dataset
from minilm.data.streaming import TextStream, join_streams, stream_documents
from minilm.data.tokenizer import load_tokenizer
from minilm.models.compatibility import check_compatibility
from minilm.models.sparse_head import SparseHead
from minilm.objectives.evaluation import LanguageEvaluator, unigram_nats

log = logging.getLogger("minilm")


def _documents(config: Config) -> tuple[Documents, Documents]:
    """Return training documents, and the evaluation documents of all parts; one object where both are the same."""
    if not config.data.streaming:
        train, parts = load_documents(config.data, config.run.seed)
        if is_one_dataset(train, parts):
            return train, train
        return train, concatenate_datasets([*parts.values()])
    stream, streams = stream_documents(config.data)
    return stream, join_streams([*streams.values()])


def _needed(config: Config, train: Documents) -> tuple[int | None, int | None]:
    """The training and evaluation examples after which no more is read of a hub's stream; None where all is read.

    That is so of several sources: how much of a run each makes up, with its weight, is known once it is read.
    """
    if not isinstance(train, TextStream) or not train.remote or config.run.max_steps is None:
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
    return documents.take(count) if isinstance(documents, TextStream) and count else documents


class LanguageModel:
    """The part of an objective (`minilm.objectives.objective.Objective`) that every language model shares."""

    settings: Any
    """Those of the objective in `minilm.config`."""
    causal: bool
    """Special tokens begin and end each document, and not each example."""
    predicted: str
    """What evaluation predicts."""
    collator: Callable[..., LanguageCollator]
    words = False
    """Training asks where words begin."""

    def prepare(self, config: Config) -> PreparedData:
        """The tokenizer, and the training and evaluation examples, from the cache where it has them."""
        if config.data.pair_column is not None:
            raise ValueError("data.pair_column: a language model reads one text; leave it out")
        train, held_out = _documents(config)
        needed = _needed(config, train)
        tokenizer = load_tokenizer(config.tokens, config.model.name, _first(train, needed[0]), causal=self.causal)
        # The number of documents in a block is not known before they are encoded.
        joined = config.batch.layout != "documents"

        def encode_part(
            documents: Documents, count: int | None, name: str, *, words: bool = False, text_bytes: bool = False
        ) -> Examples:
            return encode(
                documents if joined else _first(documents, count),
                tokenizer,
                max_length=config.batch.max_length,
                layout=config.batch.layout,
                overflow=config.tokens.overflow,
                causal=self.causal,
                words=words,
                text_bytes=text_bytes,
                name=name,
                enough_ids=count * config.batch.max_length if joined and count else None,
            )

        if train is held_out:
            examples = encode_part(train, None, "documents", words=self.words, text_bytes=True)
            return PreparedData(tokenizer=tokenizer, train=examples, eval=examples)
        return PreparedData(
            tokenizer=tokenizer,
            train=encode_part(train, needed[0], "training documents", words=self.words),
            eval=encode_part(held_out, needed[1], "evaluation documents", text_bytes=True),
        )

    def head(self, network: PreTrainedModel, prepared: PreparedData) -> SparseHead:
        """The network with its head at the targets alone."""
        head = SparseHead(network, label_smoothing=self.settings.label_smoothing)
        check_compatibility(head, prepared)
        return head

    def evaluator(self, prepared: PreparedData, micro_tokens: int, *, padded: bool, multiple: int) -> LanguageEvaluator:
        """Loss, perplexity and bits per byte, beside a unigram model's."""
        collator = self.collator(prepared.tokenizer, prepared.eval, seed=None, padded=padded, multiple=multiple)
        return LanguageEvaluator(
            examples=prepared.eval,
            collator=collator,
            micro_tokens=micro_tokens,
            unigram=unigram_nats(
                prepared.train.count_ids(count_embedding_rows(prepared.tokenizer)) * collator.can_be_target
            ),
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
