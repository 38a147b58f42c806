"""Stored documents: `load_documents` reads the sources into datasets with one document per row."""

from dataclasses import dataclass

import datasets
import numpy as np
from datasets import Dataset

from minilm.config import Data
from minilm.data.glue import apply_glue_task
from minilm.data.pydocs import load_pydocs
from minilm.data.rows import BlankPolicy
from minilm.data.sources import check_data_settings, load_rows, no_documents_error, quiet_datasets
from minilm.data.splits import assemble_splits
from minilm.utils.local_files import is_plain_text


@quiet_datasets()
def load_documents(data: Data, seed: int, *, labels: bool = False) -> tuple[Dataset, dict[str, Dataset]]:
    """Return (training documents, evaluation documents by name).

    Each is a dataset with the string column `text`. If `data.pair_column` is set, the column `pair` holds a second
    text. With `labels`, the column `label` has the type that it has in the source, such as a ClassLabel.
    Documents without a visible character are dropped. With `labels`, they raise ValueError. The datasets are
    memory-mapped, except those of pydocs and those of a single-document file that is cut in two.

    `minilm.data.splits.assemble_splits` says which documents are for evaluation. If a fraction is held out, `seed`
    decides which documents it holds. Raise ValueError in one line that names the file, row, column or split.
    """
    data = apply_glue_task(data)
    check_data_settings(data, labels=labels)
    if data.streaming:
        raise ValueError("data.streaming: only language models can read a stream; leave it out")
    if "pydocs" in data.sources and data.eval_split:
        raise ValueError("data.eval_split: pydocs has no splits; give data.eval_fraction or data.eval_source")
    return assemble_splits(data, _DatasetReader(data, seed, labels))


@quiet_datasets()
def load_all_documents(data: Data) -> Dataset:
    """Return the documents of `data.split` of all sources, one source after the other. Blank documents are kept."""
    check_data_settings(data, labels=False)
    return _join([_read(data, source, data.split, labels=False, blank="keep") for source in data.sources], data)


@dataclass(frozen=True)
class _DatasetReader:
    """Reads documents as datasets (a `minilm.data.splits.SplitReader`)."""

    data: Data
    seed: int
    labels: bool

    def read(self, source: str, split: str) -> Dataset:
        return _read(self.data, source, split, self.labels)

    def hold_out(self, source: str) -> tuple[Dataset, Dataset]:
        """Hold out random documents. For pydocs, these are whole modules; for a file that is one document, its end."""
        fraction = self.data.eval_fraction
        if source == "pydocs" and not self.labels:
            train_texts, eval_texts = load_pydocs(fraction)
            return Dataset.from_dict({"text": train_texts}), Dataset.from_dict({"text": eval_texts})
        documents = self.read(source, self.data.split)
        if self.data.document == "file" and is_plain_text(source):
            return _cut_ends(documents, fraction)
        count = round(len(documents) * fraction)
        if not 0 < count < len(documents):
            part = "training" if count else "evaluation"
            raise ValueError(
                f"{source}: data.eval_fraction={fraction} of {len(documents)} documents leaves no {part} document; "
                "change data.eval_fraction or give data.eval_source"
            )
        parts = documents.train_test_split(test_size=count, seed=self.seed)
        return parts["train"], parts["test"]

    def repeat(self, documents: Dataset, source: str, weight: float) -> Dataset:
        """Repeat all documents. For the fraction of `weight`, add a random share of them, in their order."""
        whole, share = divmod(weight, 1)
        drawn = np.random.default_rng(self.seed).permutation(len(documents))[: round(share * len(documents))]
        indices = [*range(len(documents))] * int(whole) + sorted(drawn.tolist())
        if not indices:
            raise ValueError(
                f"{source}: data.weights {weight} selects none of {len(documents)} documents; give a larger weight"
            )
        return documents.select(indices)

    def join(self, parts: list[Dataset]) -> Dataset:
        return _join(parts, self.data)


def _join(parts: list[Dataset], data: Data) -> Dataset:
    """Return the documents of several sources, one source after the other."""
    try:
        return datasets.concatenate_datasets(parts)
    except ValueError as error:
        dtypes = ", ".join(f"{part.features['label']} in {s}" for part, s in zip(parts, data.sources, strict=True))
        raise ValueError(
            f"data.label_column: the labels of the sources differ in type: {dtypes}; write all labels alike"
        ) from error


def _cut_ends(documents: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Return the beginnings of the documents, and their ends, which have `fraction` of the characters."""
    texts = documents["text"]
    cuts = [int(len(text) * (1 - fraction)) for text in texts]
    train = Dataset.from_dict({"text": [text[:cut] for text, cut in zip(texts, cuts, strict=True)]})
    return train, Dataset.from_dict({"text": [text[cut:] for text, cut in zip(texts, cuts, strict=True)]})


def _read(data: Data, source: str, split: str, labels: bool, *, blank: BlankPolicy = "drop") -> Dataset:
    """Return the documents of a split. With labels, blank documents raise ValueError, whatever `blank` is."""
    if labels and (source == "pydocs" or is_plain_text(source)):
        owner = "pydocs has" if source == "pydocs" else f"data source {source}: a .txt file has"
        raise ValueError(f"{owner} no labels; give .jsonl, .csv, .tsv or .parquet")
    if source == "pydocs":
        return Dataset.from_dict({"text": load_pydocs()[0]})
    rows = load_rows(data, source, split, labels=labels, blank="refuse" if labels else blank)
    if len(rows) == 0:
        raise no_documents_error(data, source, split)
    return rows
