"""From documents to token ids: encode them once into a corpus on disk, and view the corpus as examples.

A corpus holds the ids of all documents, one after the other, in one flat file. The layout and the maximum length only
decide how it is cut into examples. If they change, nothing is encoded again.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from minilm.data.array_file import ArrayFile, create_array_file
from minilm.data.document_texts import Documents, count_documents, fingerprint_documents, iterate_batches
from minilm.data.labels import Labels
from minilm.data.special_ids import find_prefix_and_suffix
from minilm.data.special_token_counter import read_special_tokens
from minilm.data.stream_pieces import PieceRuns, PresentIds
from minilm.data.text_encoder import TextEncoder, surround
from minilm.data.tokenizer_state import serialize_backend
from minilm.utils.cache import open_entry
from minilm.utils.progress import show_progress

if TYPE_CHECKING:
    from minilm.data.stream_windows import StreamWindows

# The number of documents that are cut into examples at a time. Intermediate arrays need several times the memory of the
# result.
_CHUNK_DOCUMENTS = 2**20


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Token ids by example: example i is `prefix + ids[start[i]:stop[i]] + suffix`.

    E is the number of examples, I the number of ids of all documents.
    """

    ids: NDArray[np.integer] | ArrayFile | PresentIds
    """Integers [I], in the order of the documents."""
    start: NDArray[np.int64]
    """int64[E], where each example begins in `ids`."""
    stop: NDArray[np.int64]
    """int64[E], where it ends."""
    prefix: NDArray[np.int64]
    """The special tokens at the beginning of each example."""
    suffix: NDArray[np.int64]
    """The special tokens at the end of each example."""
    type_ids: NDArray[np.uint8] | ArrayFile | None = None
    """uint8[I], the token types, which say to which of two texts an id belongs. None if the model needs none."""
    labels: NDArray[Any] | None = None
    """The target of each example, if it has one: int64[E] or float32[E], or with more axes, such as [E, C]."""
    token_targets: NDArray[np.int32] | ArrayFile | None = None
    """int32[I], the target of each token, or `minilm.data.example.NO_TARGET`. None if tokens have no targets."""
    rows: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    """For examples of several rows: int64[R + 1], where each of all R rows begins in `ids`, and int64[E + 1], the first
    row of each example. Both end with the end of the last one. None if each example is one row."""
    notes: Sequence[Any] | None = None
    """What each example notes for the figures of an evaluation (`minilm.data.example.Example.note`), if any does."""
    fingerprint: str = ""
    """A hash of the documents and of the tokenizer that encoded them."""
    is_word_start: NDArray[np.bool_] | ArrayFile | None = None
    """bool[I], True where an id begins a word. None if `encode` was not asked for words."""
    text_bytes: NDArray[np.integer] | ArrayFile | None = None
    """Integers [I], the UTF-8 bytes of text that each id stands for. None if `encode` was not asked for them."""
    document: NDArray[np.int64] | None = None
    """int64[E], the number of the document of each example, from 0. None without `text_bytes`, or if
    examples join documents."""
    document_bounds: NDArray[np.int64] | None = None
    """int64[D + 1], where each document begins in `ids`, and the end of the last one. None if it is not known."""
    pieces: PieceRuns | None = None
    """The pieces of a stream from which the ids come. None for examples that each process can read."""
    special_tokens: dict[int, tuple[int, str]] = field(default_factory=dict)
    """The special tokens inside texts: for each id, the number of the first text with it, from 1, and how it begins."""

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        middle = self.ids[self.start[index] : self.stop[index]]
        return np.concatenate((self.prefix, middle, self.suffix), dtype=np.int64, casting="same_kind")

    def row_lengths(self, index: int) -> list[int]:
        """Return the number of tokens of each row of an example."""
        if self.rows is None:
            return [int(self.stop[index] - self.start[index]) + len(self.prefix) + len(self.suffix)]
        bounds_R1, first_E1 = self.rows
        lengths: list[int] = np.diff(bounds_R1[first_E1[index] : first_E1[index + 1] + 1]).tolist()
        return lengths

    def targets_of_tokens(self, index: int) -> NDArray[np.int64]:
        """Return the targets of the tokens of an example, int64[L] with L tokens. There must be `token_targets`."""
        assert self.token_targets is not None
        return self.token_targets[self.start[index] : self.stop[index]].astype(np.int64)

    def token_type_ids(self, index: int) -> NDArray[np.int64]:
        """Return the token types of an example, int64[L] with L tokens. There must be `type_ids`."""
        assert self.type_ids is not None
        return self.type_ids[self.start[index] : self.stop[index]].astype(np.int64)

    def word_starts(self, index: int) -> NDArray[np.bool_]:
        """Return which tokens of an example begin a word, bool[L] with L tokens.

        Each special token counts as a word. If a word is cut between two examples, each part counts as a word.
        """
        assert self.is_word_start is not None
        starts = self.is_word_start[self.start[index] : self.stop[index]].copy()
        starts[:1] = True
        return surround(starts, self.prefix, self.suffix, True)

    def token_bytes(self, index: int) -> NDArray[np.int64]:
        """Return the UTF-8 bytes of text that each token of an example stands for, int64[L]; 0 for special tokens."""
        assert self.text_bytes is not None
        sizes = self.text_bytes[self.start[index] : self.stop[index]].astype(np.int64)
        return surround(sizes, self.prefix, self.suffix, 0)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each example, special tokens included, int64[E]."""
        return self.stop - self.start + (len(self.prefix) + len(self.suffix))

    @property
    def longest_row(self) -> int:
        """The number of tokens of the longest row."""
        return int((self.lengths if self.rows is None else np.diff(self.rows[0])).max())

    @property
    def padded_lengths(self) -> NDArray[np.int64]:
        """The number of places that each example takes when its rows are padded to the longest of them, int64[E]."""
        if self.rows is None:
            return self.lengths
        bounds_R1, first_E1 = self.rows
        longest_E = np.maximum.reduceat(np.diff(bounds_R1), first_E1[:-1])
        return np.diff(first_E1) * longest_E

    @property
    def square_lengths(self) -> NDArray[np.int64]:
        """The sum of the squared lengths of each example's rows, int64[E]. The work of attention depends on it."""
        if self.rows is None:
            return self.lengths**2
        bounds_R1, first_E1 = self.rows
        squares: NDArray[np.int64] = np.add.reduceat(np.diff(bounds_R1) ** 2, first_E1[:-1])
        return squares

    def identity(self) -> dict[str, Any]:
        """Return what distinguishes these examples from others, as JSON types."""
        return {"examples": len(self), "tokens": int(self.lengths.sum()), "fingerprint": self.fingerprint}

    def count_ids(self, vocab_size: int) -> NDArray[np.int64]:
        """Return how often each id occurs in the corpus, int64[vocab_size]. `prefix` and `suffix` do not count."""
        total = np.zeros(vocab_size, np.int64)
        for at in range(0, len(self.ids), 2**22):
            total += np.bincount(self.ids[at : at + 2**22], minlength=vocab_size)
        return total


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """The tokenizer and the examples of a run."""

    tokenizer: PreTrainedTokenizerBase
    train: Examples
    eval: Examples
    periods: tuple[Examples, ...] = ()
    """The training examples of each period of the run (`minilm.config.phases.list_periods`). Empty for those of
    `train` in the whole run."""
    labels: Labels | None = None
    """The meaning of the labels, if there are any."""
    eval_parts: dict[str, int] = field(default_factory=dict)
    """The number of evaluation examples of each part, in the order of `eval`."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration that the data decides, such as the names of its labels."""
    eval_documents: str = ""
    """A hash of the evaluation documents, and of their labels, which does not depend on the tokenizer."""
    added_tokens: int = 0
    """The number of tokens that the objective has added to the tokenizer, after those of `tokens.extend`."""
    stream: "StreamWindows | None" = None
    """The training documents, if they are read while the run trains. `train` then holds the first of them, which stand
    for all of them before the first step."""
    holders_PxN: NDArray[np.bool_] | None = None
    """bool[P, N], which of the P processes has which of the N pieces of `stream`. None if each has all pieces."""

    @property
    def without_stream(self) -> "PreparedData":
        """The same data with the examples of `train` alone."""
        return replace(self, stream=None)

    @property
    def train_by_period(self) -> tuple[Examples, ...]:
        """The training examples of each period of the run."""
        return self.periods or (self.train,)

    @property
    def all_train(self) -> list[Examples]:
        """The training examples of the configuration itself and of all periods, each once."""
        return [*{id(examples): examples for examples in (self.train, *self.periods)}.values()]


def encode(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    layout: str = "documents",
    overflow: str = "split",
    causal: bool = False,
    words: bool = False,
    text_bytes: bool = False,
    name: str = "documents",
    enough_ids: int | None = None,
) -> Examples:
    """Encode the column `text` and cut it into examples of at most `max_length` tokens, special tokens included.

    layout: "documents" makes one example of each document. "blocks" joins all documents by the tokenizer's separator
        and cuts them into full blocks; only the last block may be shorter.
    overflow: what happens to a document that is too long. "split" makes pieces of nearly equal length. "truncate" drops
        the end.
    causal: the special tokens begin and end each document, wherever it is cut. Otherwise they begin and end each
        example.
    words: also find where words begin, for `Examples.word_starts`.
    text_bytes: also count the bytes of text of each token, for `Examples.token_bytes`.
    name: what messages call the documents.
    enough_ids: stop reading documents as soon as there are this many ids. Truncated ids do not count.

    The ids are cached by the content of the documents, or by the identity of a stream, so that a second run starts at
    once. A warning names the special tokens inside texts. Raises ValueError if no document has a token, or if the
    tokenizer cannot encode a text.
    """
    form = ExampleForm.of(tokenizer, max_length=max_length, layout=layout, overflow=overflow, causal=causal)
    counted = form.room if enough_ids and layout != "blocks" and overflow == "truncate" else None
    # The serialized backend does not include this setting.
    splits = tokenizer.split_special_tokens
    key = fingerprint_documents(documents, serialize_backend(tokenizer), splits, *form.around, enough_ids, counted)
    kind = "-".join(["corpus", *["words"] * words, *["bytes"] * text_bytes, key])
    folder = open_entry(
        kind,
        lambda folder: _write_corpus(
            folder,
            documents,
            TextEncoder(tokenizer, *form.around, words=words, text_bytes=text_bytes, name=name),
            enough_ids,
            counted,
        ),
    )
    special_tokens = read_special_tokens(folder, tokenizer, name)
    examples = open_examples(
        folder, form, words=words, text_bytes=text_bytes, fingerprint=key, special_tokens=special_tokens
    )
    if len(examples) == 0:
        raise ValueError(
            f"the {name} hold no token to predict, since all are empty once encoded. Give other documents."
        )
    return examples


@dataclass(frozen=True, kw_only=True)
class ExampleForm:
    """How documents become examples: the special tokens around them, and where they are cut."""

    prefix: NDArray[np.int64]
    """The special tokens at the beginning of each example."""
    suffix: NDArray[np.int64]
    """The special tokens at the end of each example."""
    around: tuple[list[int], list[int]]
    """The special tokens before and after each document."""
    room: int
    """The most ids of an example, without `prefix` and `suffix`."""
    layout: str
    overflow: str

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, *, max_length: int, layout: str, overflow: str, causal: bool
    ) -> "ExampleForm":
        """Return the form of examples with these settings, which are the arguments of `encode`."""
        prefix, suffix = find_prefix_and_suffix(tokenizer)
        before, after = prefix[:0], suffix[:1] if layout == "blocks" else suffix[:0]
        if causal:
            before, after = prefix, suffix if len(suffix) else np.array([tokenizer.eos_token_id], np.int64)
            prefix, suffix = prefix[:0], suffix[:0]
        return cls(
            prefix=prefix,
            suffix=suffix,
            around=(before.tolist(), after.tolist()),
            room=max_length - len(prefix) - len(suffix),
            layout=layout,
            overflow=overflow,
        )


def open_examples(
    folder: Path,
    form: ExampleForm,
    *,
    words: bool = False,
    text_bytes: bool = False,
    fingerprint: str,
    special_tokens: dict[int, tuple[int, str]] | None = None,
    breaks: Sequence[int] = (),
) -> Examples:
    """Return the examples of a corpus in `folder`, which may be none.

    breaks: the ids, in ascending order, at which the layout "blocks" begins a new block.

    The other arguments are those of `Examples`.
    """
    offsets = np.load(folder / "offsets.npy")
    start, stop = _cut_into_examples(offsets, form.room, form.layout, form.overflow, breaks)
    return Examples(
        ids=ArrayFile(folder / "ids.npy"),
        start=start,
        stop=stop,
        prefix=form.prefix,
        suffix=form.suffix,
        fingerprint=fingerprint,
        is_word_start=ArrayFile(folder / "begins.npy") if words else None,
        text_bytes=ArrayFile(folder / "bytes.npy") if text_bytes else None,
        document=np.searchsorted(offsets, start, side="right") - 1 if text_bytes and form.layout != "blocks" else None,
        document_bounds=offsets,
        special_tokens=special_tokens or {},
    )


def _cut_into_examples(
    offsets: NDArray[np.int64], room: int, layout: str, overflow: str, breaks: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each example begins and ends. An example has between 1 and `room` ids.

    offsets: int64[D + 1] for D documents; document i is `ids[offsets[i]:offsets[i + 1]]`.
    """
    if layout == "blocks":
        bounds = [0, *breaks, int(offsets[-1])]
        start = np.concatenate([np.arange(first, last, room) for first, last in pairwise(bounds)])
        ends = np.array(bounds[1:])
        stop = np.minimum(start + room, ends[np.searchsorted(ends, start, side="right")])
    elif overflow == "truncate":
        start, stop = offsets[:-1], np.minimum(offsets[1:], offsets[:-1] + room)
    else:
        chunks = range(0, len(offsets), _CHUNK_DOCUMENTS)
        parts = [_split_evenly(offsets[at : at + _CHUNK_DOCUMENTS + 1], room) for at in chunks]
        start, stop = (np.concatenate(side) for side in zip(*parts, strict=True))
    keep = stop > start
    return (start, stop) if keep.all() else (start[keep], stop[keep])


def _split_evenly(offsets: NDArray[np.int64], room: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split each document into as few pieces of at most `room` ids as possible, as equal in length as possible."""
    sizes = np.diff(offsets)
    pieces = -(-sizes // room)
    document = np.repeat(np.arange(len(sizes)), pieces)
    # 0, 1, … inside each document.
    order = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = offsets[document] + order * sizes[document] // pieces[document]
    return start, offsets[document] + (order + 1) * sizes[document] // pieces[document]


def _write_corpus(
    folder: Path, documents: Documents, encoder: TextEncoder, enough_ids: int | None, counted: int | None
) -> None:
    """Encode the documents and write the files of a corpus into `folder`.

    - `ids.npy`: all ids, in `encoder.dtype`. The encoder surrounds each document with special tokens.
    - `offsets.npy`: int64, where each document begins, and the end of the last one.
    - `special.json`: the special tokens inside texts.
    - `begins.npy`: bool, True for an id that begins a word; empty without `encoder.words`.
    - `bytes.npy`: uint32, the bytes of text that each id stands for; empty without `encoder.text_bytes`.

    Reading ends as soon as there are `enough_ids`. If `counted` is given, at most that many ids of a document count.
    """
    sizes, total = array("q", [0]), 0
    with (
        create_array_file(folder / "ids.npy", encoder.dtype) as ids_file,
        create_array_file(folder / "begins.npy", np.dtype(bool)) as starts_file,
        create_array_file(folder / "bytes.npy", np.dtype(np.uint32)) as bytes_file,
        show_progress(
            total=count_documents(documents), desc=f"encoding {encoder.name}", unit="doc", leave=False
        ) as bar,
    ):
        for texts in iterate_batches(documents):
            encoded = encoder.encode(texts)
            sizes.extend(encoded.sizes.tolist())
            ids_file.write(encoded.ids.data)
            if encoded.is_word_start is not None:
                starts_file.write(encoded.is_word_start.data)
            if encoded.text_bytes is not None:
                bytes_file.write(encoded.text_bytes.data)
            bar.update(len(texts))
            if enough_ids:
                total += int(np.minimum(encoded.sizes, counted or encoded.sizes).sum())
                if total >= enough_ids:
                    break
    np.save(folder / "offsets.npy", np.cumsum(sizes, dtype=np.int64))
    encoder.special.write(folder)
