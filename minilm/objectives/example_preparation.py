"""From the documents of a run to the examples of its objective."""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from minilm.config import Config, Data
from minilm.data.columns import Column
from minilm.data.corpus import Examples, PreparedData
from minilm.data.documents import load_row_tables
from minilm.data.example import NO_TARGET, Example, Remark
from minilm.data.example_encoding import encode_rows, find_document_bounds, hash_own_code
from minilm.data.memory import MemoryDocuments
from minilm.data.rows import Row, RowTable
from minilm.data.special_ids import count_embedding_rows
from minilm.data.splits import is_one_dataset
from minilm.data.tokenizer import load_tokenizer
from minilm.models.token_types import fit_token_types

if TYPE_CHECKING:
    from minilm.objectives.objective import Objective

# The keys of `Objective.columns` whose cells must be texts. A cell under another key may hold what JSON can hold.
_TEXT_ROLES = ("text", "pair", "negative")


def prepare_examples(objective: "Objective", config: Config, memory: MemoryDocuments | None = None) -> PreparedData:
    """Return what `Objective.prepare` does: the tokenizer, and the examples for training and evaluation."""
    if config.batch.layout == "blocks":
        raise ValueError("batch.layout blocks joins documents, which only language models can read: leave it out")
    train, parts = load_row_tables(config.data, config.run.seed, build_role_columns(objective, config.data), memory)
    # This refuses ids of classes that mean something else in the source of the evaluation.
    train.join([*parts.values()])
    fields = objective.fields(train, config)
    tokenizer = _load_tokenizer(objective, config, train)
    own_rows = count_embedding_rows(tokenizer)
    objective.adapt_tokenizer(tokenizer)
    if objective.pairs is not None:
        fit_token_types(tokenizer, config.model, objective.auto, pair=objective.pairs)
    settings = dataclasses.asdict(objective)
    own = type(objective)
    key = [own.__module__, own.__qualname__, objective.version, hash_own_code(own), settings, fields]
    shift = _shift_targets if objective.outputs == "next_tokens" else _keep

    unused = copy.deepcopy(tokenizer)
    unused.model_max_length = config.batch.max_length
    # A tokenizer remembers how it truncated, which must not change the key of later examples.
    reading = copy.deepcopy(unused)

    def make_examples(rows: list[Row]) -> Iterable[Example | Remark]:
        return map(shift, objective.examples(rows, reading, fields))

    def encode(tables: Sequence[RowTable], name: str, *, evaluated: bool = True) -> tuple[Examples, list[int]]:
        return encode_rows(
            tables,
            make_examples,
            unused,
            max_length=config.batch.max_length,
            key=key,
            name=name,
            equal_rows=objective.equal_rows,
            keep_notes=evaluated,
        )

    if is_one_dataset(train, parts):
        examples, counts = encode([train], "documents")
        train_examples = eval_examples = examples
    else:
        train_examples, _ = encode([train], "training documents", evaluated=False)
        if config.data.exclude_loss is not None:
            bounds = find_document_bounds(train, make_examples, train_examples)
            train_examples = replace(train_examples, document_bounds=bounds)
        eval_examples, counts = encode([*parts.values()], "evaluation documents")
    return PreparedData(
        tokenizer=tokenizer,
        train=train_examples,
        eval=eval_examples,
        eval_parts=dict(zip(parts, counts, strict=True)),
        eval_documents="-".join(part.fingerprint for part in parts.values()),
        fields={name: value for name, value in fields.items() if not name.startswith("_")},
        added_tokens=count_embedding_rows(tokenizer) - own_rows,
    )


def build_role_columns(objective: "Objective", data: Data) -> list[Column]:
    """Return the columns that the objective reads."""
    return [
        Column(role=role, name=name, kind="text" if role in _TEXT_ROLES else "json")
        for role, name in objective.columns(data).items()
    ]


def _load_tokenizer(objective: "Objective", config: Config, rows: RowTable) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the run. If it must be trained or extended, it learns from `texts` of the rows."""
    texts: list[str] = []
    if (config.tokens.name or config.model.name) is None or config.tokens.extend:
        texts = [text for batch in rows.iter_batches() for row in batch for text in objective.texts(row)]
    documents = Dataset.from_dict({"text": texts})
    return load_tokenizer(config.tokens, config.model.name, documents, causal=objective.outputs == "next_tokens")


def _shift_targets(example: Example | Remark) -> Example | Remark:
    """Return the example with the target of each token at the token before it, where the model predicts it."""
    if isinstance(example, Remark):
        return example
    if example.targets is None:
        raise ValueError('an Example has no `targets`, which outputs = "next_tokens" needs: give one for each id')
    return dataclasses.replace(example, targets=[*example.targets[1:], NO_TARGET])


def _keep(example: Example | Remark) -> Example | Remark:
    return example


def find_texts(value: Any) -> Iterator[str]:
    """Yield each string inside a value of JSON types."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from find_texts(inner)
