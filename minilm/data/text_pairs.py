"""Texts, or pairs of texts, encoded whole for classification: special tokens, token types and all."""

import json
import logging
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from minilm.data.array_file import ArrayFile
from minilm.data.corpus import Examples
from minilm.data.document_texts import DOCUMENTS_PER_BATCH, find_text_columns, fingerprint_documents
from minilm.data.encoding_errors import locate_encoding_errors
from minilm.data.special_token_counter import SpecialTokenCounter, read_special_tokens
from minilm.data.tokenizer import serialize_tokenizer
from minilm.utils.cache import open_entry
from minilm.utils.progress import show_progress

log = logging.getLogger("minilm")


def encode_pairs(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    labels: NDArray[np.generic],
    *,
    max_length: int,
    name: str,
    zero_types: bool = False,
) -> Examples:
    """One example a document: its `text`, and its `pair` where there is that column, as the tokenizer joins them.

    What is longer than `max_length` tokens loses tokens from the end of its longer text; a warning says how many did.
    Token types are kept where any is not 0, or with `zero_types` where the tokenizer gives them at all: GPT-2 adds the
    embedding of type 0 to that of a word. The ids are cached by content.
    """
    columns = find_text_columns(documents)
    tokenizer.backend_tokenizer.no_truncation()  # what it was saved with is not what it is
    tokenizer.backend_tokenizer.no_padding()
    key = fingerprint_documents(documents, serialize_tokenizer(tokenizer), columns, max_length, columns=columns)
    folder = open_entry(f"pairs-{key}", lambda folder: _write(folder, documents, columns, tokenizer, max_length, name))
    tokenizer.backend_tokenizer.no_truncation()
    offsets = np.load(folder / "offsets.npy")
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    if cut := facts["cut"]:
        log.warning(f"{cut:,} of {len(documents):,} {name} have more than batch.max_length={max_length} tokens: cut")
    typed = facts["typed"] or (zero_types and "token_type_ids" in tokenizer.model_input_names)
    none = np.zeros(0, np.int64)
    return Examples(
        ids=ArrayFile(folder / "ids.npy"),
        start=offsets[:-1],
        stop=offsets[1:],
        prefix=none,
        suffix=none,
        type_ids=ArrayFile(folder / "types.npy") if typed else None,
        labels=labels,
        fingerprint=key,
        special_tokens=read_special_tokens(folder, tokenizer, name),
    )


def _write(
    folder: Path,
    documents: Dataset,
    columns: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    name: str,
) -> None:
    ids, types, sizes, cut, special = [], [], [0], 0, SpecialTokenCounter(tokenizer)
    with show_progress(total=len(documents), desc=f"encoding {name}", unit="doc", leave=False) as bar:
        for batch in documents.iter(batch_size=DOCUMENTS_PER_BATCH):
            with ExitStack() as stack:
                for column in columns:
                    stack.enter_context(locate_encoding_errors(tokenizer, batch[column], name, first=len(sizes)))
                encoded = tokenizer(
                    *(batch[column] for column in columns),
                    truncation=True,
                    max_length=max_length,
                    return_attention_mask=False,
                    return_token_type_ids=True,
                )
            for row in encoded.encodings:
                ids.append(np.array(row.ids, np.uint32))
                types.append(np.array(row.type_ids, np.uint8))
                sizes.append(len(row.ids))
                cut += bool(row.overflowing)
            own = [np.extract(np.equal(row.special_tokens_mask, 0), row.ids).tolist() for row in encoded.encodings]
            special.count(batch["text"], own, ())
            bar.update(len(batch["text"]))
    special.write(folder)
    if "token_type_ids" not in tokenizer.model_input_names:  # its models have no use for them
        types = [np.zeros_like(row) for row in types]
    np.save(folder / "ids.npy", np.concatenate(ids))
    np.save(folder / "types.npy", all_types := np.concatenate(types))
    np.save(folder / "offsets.npy", np.cumsum(sizes, dtype=np.int64))
    (folder / "facts.json").write_text(json.dumps({"cut": cut, "typed": bool(all_types.any())}), encoding="utf-8")
