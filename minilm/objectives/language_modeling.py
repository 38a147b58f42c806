"""The parts that masked and causal LM share: from documents to examples, the head, and the evaluation."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, ClassVar

from datasets import concatenate_datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import Config
from minilm.config.phases import list_periods
from minilm.data.corpus import ExampleForm, Examples, PreparedData, encode
from minilm.data.document_texts import Documents, fingerprint_documents, iterate_batches
from minilm.data.documents import load_documents
from minilm.data.glue import apply_glue_task
from minilm.data.memory import MemoryDocuments
from minilm.data.micro_batch import LanguageCollator
from minilm.data.shards import Pool, open_pools
from minilm.data.special_ids import count_embedding_rows
from minilm.data.splits import is_one_dataset
from minilm.data.stream_windows import StreamWindows
from minilm.data.streaming import TextStream, join_streams, stream_documents
from minilm.data.token_shards import TokenFolder, is_tokenized
from minilm.data.tokenizer import load_tokenizer
from minilm.models.compatibility import check_compatibility
from minilm.models.sparse_head import SparseHead
from minilm.objectives.evaluation import LanguageModelEvaluator
from minilm.objectives.metrics import compute_unigram_nats
from minilm.objectives.objective import Objective

# A tokenizer is trained on this many characters of a stream for each token of a window. A stream that fits into one
# window hardly ever has more.
_TOKENIZER_CHARACTERS = 8


@dataclass(frozen=True)
class LanguageModelObjective(Objective):
    """The base class of language models' objectives. Each token of a document can be a target."""

    settings: Any
    """The settings of the objective, such as a `minilm.config.MaskedLM`."""
    causal: ClassVar[bool]
    """True if special tokens begin and end each document; False if they begin and end each example."""

    @property
    def eval_targets(self) -> str:
        """The tokens that the evaluation predicts, in words, for the model card."""
        raise NotImplementedError

    @property
    def needs_word_starts(self) -> bool:
        """Whether the collator for training needs to know which tokens begin a word."""
        return False

    def collator(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        seed: int | None,
        padded: bool,
        multiple: int,
    ) -> LanguageCollator:
        raise NotImplementedError

    def prepare(self, config: Config, memory: MemoryDocuments | None = None) -> PreparedData:
        if config.data.pair_column is not None:
            raise ValueError("data.pair_column: a language model reads one text; leave it out")
        config = replace(config, data=apply_glue_task(config.data))
        folders = [TokenFolder.open(source) for source in config.data.sources if is_tokenized(source)]
        if folders:
            config = _use_tokens(config, folders[0])
        train, held_out = _load_documents(config, memory)
        if isinstance(train, TextStream) and isinstance(held_out, TextStream) and train is not held_out:
            pools = open_pools(config.data, train.revisions, weighted=False)
            if pools is not None:
                return self._prepare_stream(config, train, held_out, pools)
        tokenizer = load_tokenizer(config.tokens, config.model.name, train, causal=self.causal)
        encode_examples = partial(
            encode,
            tokenizer=tokenizer,
            max_length=config.batch.max_length,
            layout=config.batch.layout,
            overflow=config.tokens.overflow,
            causal=self.causal,
        )
        words = self.needs_word_starts
        if train is held_out:
            examples = encode_examples(train, words=words, text_bytes=True, name="documents")
            return PreparedData(
                tokenizer=tokenizer, train=examples, eval=examples, eval_documents=fingerprint_documents(train)
            )
        return PreparedData(
            tokenizer=tokenizer,
            train=encode_examples(train, words=words, name="training documents"),
            eval=encode_examples(held_out, text_bytes=True, name="evaluation documents"),
            eval_documents=fingerprint_documents(held_out),
        )

    def training_texts(self, config: Config) -> Iterator[str]:
        train, _ = _load_documents(config, None)
        return chain.from_iterable(iterate_batches(train))

    def _prepare_stream(
        self, config: Config, train: TextStream, held_out: TextStream, pools: Sequence[Pool]
    ) -> PreparedData:
        """Return the data of a stream: all documents if they fill one window, else in windows.

        pools: the training documents without weights.
        """
        data, batch = config.data, config.batch
        folders = [TokenFolder.open(source) for source in data.sources if is_tokenized(source)]
        if not folders:
            # This raises the error for a source without documents.
            next(train.texts(), None)
        tokenizer = load_tokenizer(
            config.tokens,
            config.model.name,
            train.take_characters(_TOKENIZER_CHARACTERS * data.window_tokens),
            causal=self.causal,
        )
        for folder in folders:
            folder.check_run(tokenizer, words=self.needs_word_starts)
        shape: dict[str, Any] = {
            "max_length": batch.max_length,
            "layout": batch.layout,
            "overflow": config.tokens.overflow,
            "causal": self.causal,
        }
        is_share = data.eval_source is None and data.eval_split is None
        windows = StreamWindows(
            data=data,
            pools=tuple(pools),
            revisions=train.revisions,
            identity=train.identity,
            tokenizer=tokenizer,
            form=ExampleForm.of(tokenizer, **shape),
            words=self.needs_word_starts,
            tokens=data.window_tokens,
            seed=config.run.seed,
            held_out=data.eval_fraction if is_share else 0.0,
            examples=batch.examples,
            row_tokens=batch.max_length if batch.layout == "packed" else None,
        )
        # Weights repeat texts, which tokenised shards do not have. In windows, they are shares.
        is_small, enough = not (folders and data.weights) and windows.is_one_window, None
        if is_small and not data.weights:
            examples = windows.open(0, warn=True)
        elif is_small:
            examples = encode(train, tokenizer, **shape, words=self.needs_word_starts, name="training documents")
        else:
            _check_stream_settings(config)
            if data.weights:
                weighted = open_pools(data, train.revisions, weighted=True)
                assert weighted is not None
                windows = replace(windows, pools=weighted, _starts=[])
            examples = windows.sample()
            # All held-out documents of a stream may take longer to evaluate than the run.
            enough = math.ceil(data.eval_fraction * data.window_tokens) if is_share else None
        return PreparedData(
            tokenizer=tokenizer,
            train=examples,
            eval=encode(held_out, tokenizer, **shape, text_bytes=True, name="evaluation documents", enough_ids=enough),
            eval_documents=fingerprint_documents(held_out, enough),
            stream=None if is_small else windows,
        )

    def head(self, network: PreTrainedModel, prepared: PreparedData) -> SparseHead:
        head = SparseHead(network, label_smoothing=self.settings.label_smoothing, z_loss=self.settings.z_loss)
        check_compatibility(head, prepared)
        return head

    def evaluator(
        self, prepared: PreparedData, micro_tokens: int, *, padded: bool, multiple: int
    ) -> LanguageModelEvaluator:
        collator = self.collator(prepared.tokenizer, prepared.eval, seed=None, padded=padded, multiple=multiple)
        # The unigram model has the frequencies of the ids that can be targets.
        counts_V = prepared.train.count_ids(count_embedding_rows(prepared.tokenizer)) * collator.can_be_target
        return LanguageModelEvaluator(
            examples=prepared.eval,
            collator=collator,
            micro_tokens=micro_tokens,
            unigram_nats_V=compute_unigram_nats(counts_V),
        )

    def format_figures(self, figures: dict[str, float]) -> str:
        return (
            f"evaluation loss {figures['eval_loss']:.3f}, perplexity {figures['perplexity']:.2f}, "
            f"{figures['bits_per_byte']:.3f} bits per byte (unigram {figures['unigram_bits_per_byte']:.3f})"
        )

    @property
    def card_text(self) -> str:
        return (
            f"The evaluation predicts {self.eval_targets} of documents that training did not see.\n"
            "`bits_per_byte` is the loss at those tokens per UTF-8 byte of the text that they stand for, with spaces\n"
            "before them; the unigram model has the frequencies of the training tokens."
        )


def _check_stream_settings(config: Config) -> None:
    """Raise ValueError for settings that a stream of several windows cannot have."""
    tokens = f"{config.data.window_tokens:,}"
    if config.run.max_steps is None and config.data.max_tokens is None:
        raise ValueError(
            f"data.streaming: the documents have more than the {tokens} tokens of a window, so the steps of an epoch "
            "are not known: set run.max_steps or data.max_tokens, or raise data.window_tokens"
        )
    for setting, value in (
        ("data.exclude_loss", config.data.exclude_loss),
        ("run.train_ledger", config.run.train_ledger),
    ):
        if value:
            raise ValueError(
                f"{setting}: the documents have more than the {tokens} tokens of a window, so they have no numbers: "
                "leave it out, or raise data.window_tokens"
            )
    if any(period.config.batch != config.batch or period.config.data != config.data for period in list_periods(config)):
        raise ValueError(
            f"run.phases: the documents have more than the {tokens} tokens of a window, and only the mask rate can "
            "change then: leave data.streaming out, or raise data.window_tokens"
        )


def _use_tokens(config: Config, folder: TokenFolder) -> Config:
    """Return the configuration of a run on tokenised shards: a stream with their tokenizer."""
    tokens = config.tokens
    if tokens.name is None:
        tokens = replace(tokens, name=folder.tokenizer)
    return replace(config, data=replace(config.data, streaming=True), tokens=tokens)


def _load_documents(config: Config, memory: MemoryDocuments | None) -> tuple[Documents, Documents]:
    """Return the training documents and all evaluation documents; one object twice if both are the same."""
    if not config.data.streaming:
        train, parts = load_documents(config.data, config.run.seed, memory=memory)
        if is_one_dataset(train, parts):
            return train, train
        return train, concatenate_datasets([*parts.values()])
    stream, streams = stream_documents(config.data)
    return stream, join_streams([*streams.values()])
