"""Encode texts, or pairs of texts, for classification: each with its special tokens and token types."""

import itertools
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
from minilm.data.tokenizer_state import serialize_tokenizer
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
    """Encode each document as one example: its `text`, joined with its `pair` by the tokenizer if there is one.

    labels: the label of each document, int64[D], float32[D] or float32[D, C].
    max_length: the most tokens of an example. A longer one loses tokens at the end of its longer text, or at the
        beginning if the tokenizer truncates there. A warning counts these examples.
    name: what messages call the documents.
    zero_types: keep token types even if all are 0. GPT-2 needs this, since it adds the embedding of type 0 to the
        token's.

    The ids are cached by content. Raises ValueError if the tokenizer cannot encode a text.
    """
    columns = find_text_columns(documents)
    key = fingerprint_documents(documents, serialize_tokenizer(tokenizer), columns, max_length, columns=columns)
    folder = open_entry(f"pairs-{key}", lambda folder: _write(folder, documents, columns, tokenizer, max_length, name))
    offsets = np.load(folder / "offsets.npy")
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    if cut := facts["cut"]:
        log.warning(
            f"{cut:,} of {len(documents):,} {name} have more than batch.max_length={max_length} tokens and are cut"
        )
    typed = facts["typed"] or (zero_types and "token_type_ids" in tokenizer.model_input_names)
    nothing = np.zeros(0, np.int64)
    return Examples(
        ids=ArrayFile(folder / "ids.npy"),
        start=offsets[:-1],
        stop=offsets[1:],
        prefix=nothing,
        suffix=nothing,
        type_ids=ArrayFile(folder / "types.npy") if typed else None,
        labels=labels,
        fingerprint=key,
        document_bounds=offsets,
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
    """Encode the documents and write the files of `encode_pairs` into `folder`.

    - `ids.npy`: uint32, and `types.npy`: uint8, the ids and token types of all documents, with their special tokens.
    - `offsets.npy`: int64, where each document begins, and the end of the last one.
    - `facts.json`: the number of documents that were cut, and whether any token type is not 0.
    - `special.json`: the special tokens inside texts.
    """
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
            # Leave out the special tokens that the tokenizer added around the texts.
            rows = [np.extract(np.equal(row.special_tokens_mask, 0), row.ids).tolist() for row in encoded.encodings]
            special.count(batch["text"], rows, np.fromiter(itertools.chain.from_iterable(rows), np.int64))
            bar.update(len(batch["text"]))
    special.write(folder)
    # If the tokenizer does not name token types, its models do not take them.
    if "token_type_ids" not in tokenizer.model_input_names:
        types = [np.zeros_like(row) for row in types]
    np.save(folder / "ids.npy", np.concatenate(ids))
    np.save(folder / "types.npy", all_types := np.concatenate(types))
    np.save(folder / "offsets.npy", np.cumsum(sizes, dtype=np.int64))
    (folder / "facts.json").write_text(json.dumps({"cut": cut, "typed": bool(all_types.any())}), encoding="utf-8")
