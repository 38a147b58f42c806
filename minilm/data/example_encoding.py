"""From rows to the examples of an objective: encode them once into files, and view these as `Examples`."""

import hashlib
import inspect
import json
import logging
import os
import sys
from array import array as growing_array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from minilm.data.array_file import ArrayFile, create_array_file
from minilm.data.corpus import Examples
from minilm.data.example import Example, Remark
from minilm.data.example_notes import open_notes
from minilm.data.rows import Row, RowTable
from minilm.data.special_ids import count_embedding_rows
from minilm.data.tokenizer_state import serialize_tokenizer
from minilm.utils.cache import open_entry
from minilm.utils.progress import show_progress

log = logging.getLogger("minilm")

# A part of every hash. Raise it when this module changes what it writes.
_VERSION = 3


def encode_rows(
    tables: Sequence[RowTable],
    make_examples: Callable[[list[Row]], Iterable[Example | Remark]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    key: Any,
    name: str,
    equal_rows: bool = True,
    keep_notes: bool = False,
) -> tuple[Examples, list[int]]:
    """Make the examples of all rows. Return them and the number of examples of each table.

    They are cached by the rows, the tokenizer and `key`. Their fingerprint is a hash of the examples themselves.

    tables: the rows of one table follow those of the table before.
    make_examples: returns the examples of some rows, in the order of the rows, and remarks for the log.
    max_length: the largest number of tokens in a row of an example.
    key: JSON types that decide, with the rows and the tokenizer, what `make_examples` returns.
    name: what messages call the rows.
    equal_rows: whether all examples must have the same number of rows.
    keep_notes: whether the examples are evaluated, so that their notes are needed.

    Raises ValueError if a table gives no example, and for an example that is too long, holds an id that the tokenizer
    does not have, or has another kind of target than the first one.
    """
    rows = [table.fingerprint for table in tables]
    facts_of_all = [_VERSION, rows, serialize_tokenizer(tokenizer), max_length, equal_rows, keep_notes, key]
    content = json.dumps(facts_of_all, default=str)
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
    folder = open_entry(
        f"examples-{digest}",
        lambda folder: _Writer(max_length, count_embedding_rows(tokenizer), name, equal_rows, keep_notes).write(
            folder, tables, make_examples
        ),
    )
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    for text, count in facts["remarks"].items():
        log.warning(f"{name}: {count:,} {text}")
    bounds_R1, first_E1 = np.load(folder / "rows.npy"), np.load(folder / "examples.npy")
    nothing = np.zeros(0, np.int64)
    examples = Examples(
        ids=ArrayFile(folder / "ids.npy"),
        start=bounds_R1[first_E1[:-1]],
        stop=bounds_R1[first_E1[1:]],
        prefix=nothing,
        suffix=nothing,
        type_ids=ArrayFile(folder / "types.npy") if facts["has_types"] else None,
        labels=None if facts["has_targets"] else np.load(folder / "labels.npy"),
        token_targets=ArrayFile(folder / "targets.npy") if facts["has_targets"] else None,
        rows=(bounds_R1, first_E1) if facts["has_several_rows"] else None,
        notes=open_notes(folder) if facts["has_notes"] else None,
        fingerprint=facts["fingerprint"],
    )
    return examples, facts["counts"]


def find_document_bounds(
    table: RowTable, make_examples: Callable[[list[Row]], Iterable[Example | Remark]], examples: Examples
) -> NDArray[np.int64]:
    """Return `Examples.document_bounds` of the examples that `encode_rows` made of a table. A document is a row.

    It makes the examples of each row by itself, and keeps the result in the cache. Raise ValueError if these are not
    the same examples, since the examples of a row then depend on other rows.
    """

    def write(folder: Path) -> None:
        sizes = [0]
        for row in (row for batch in table.iter_batches() for row in batch):
            made = (example for example in make_examples([row]) if isinstance(example, Example))
            sizes.append(sum(len(ids) for example in made for ids in example.all_rows))
        np.save(folder / "bounds.npy", np.cumsum(sizes, dtype=np.int64))

    folder = open_entry(f"bounds-{table.fingerprint}-{examples.fingerprint}", write)
    bounds: NDArray[np.int64] = np.load(folder / "bounds.npy")
    ends = np.append(examples.start, examples.stop[-1])
    if bounds[-1] != ends[-1] or not np.isin(bounds, ends).all():
        raise ValueError(
            "data.exclude_loss: the objective makes other examples of a row alone than of several rows, so that the "
            "examples of a document cannot be told: leave it out"
        )
    return bounds


class _Writer:
    """Writes examples to files, and checks each of them.

    - `ids.npy`: uint32, the ids of all rows; `types.npy`: uint8, their token types; `targets.npy`: int32, the targets.
    - `rows.npy`: int64, where each row begins in `ids.npy`, and the end of the last one.
    - `examples.npy`: int64, the first row of each example, and the number of rows.
    - `labels.npy`: the target of each example: int64[E, …] or float32[E, …].
    - `notes.npy`: uint8, the notes of all examples as JSON text; `note_bounds.npy`: int64, where each one begins.
    - `facts.json`: which of these there are, and the remarks.
    """

    def __init__(self, max_length: int, vocabulary: int, name: str, equal_rows: bool, keep_notes: bool) -> None:
        self.max_length, self.vocabulary, self.name = max_length, vocabulary, name
        self.equal_rows, self.keep_notes = equal_rows, keep_notes
        self.bounds, self.first = growing_array("q", [0]), growing_array("q", [0])
        self.note_bounds = growing_array("q", [0])
        self.labels: list[Any] = []
        self.remarks: Counter[str] = Counter()
        self.kind: tuple[str, tuple[int, ...], bool] | None = None
        self.row_count = 1
        self.digest = hashlib.blake2b(digest_size=12)
        self.has_types = self.has_notes = False

    def write(
        self,
        folder: Path,
        tables: Sequence[RowTable],
        make_examples: Callable[[list[Row]], Iterable[Example | Remark]],
    ) -> None:
        counts = []
        with (
            create_array_file(folder / "ids.npy", np.dtype(np.uint32)) as ids_file,
            create_array_file(folder / "types.npy", np.dtype(np.uint8)) as types_file,
            create_array_file(folder / "targets.npy", np.dtype(np.int32)) as targets_file,
            create_array_file(folder / "notes.npy", np.dtype(np.uint8)) as notes_file,
            show_progress(total=sum(map(len, tables)), desc=f"encoding {self.name}", unit="row", leave=False) as bar,
        ):
            for table in tables:
                before = len(self.labels)
                for batch in table.iter_batches():
                    for example in make_examples(batch):
                        if isinstance(example, Remark):
                            self.remarks[example.text] += example.count
                            continue
                        ids = self._check(example, batch).astype(np.uint32)
                        types = np.zeros(len(ids)) if example.type_ids is None else np.concatenate(example.all_type_ids)
                        types = types.astype(np.uint8)
                        self.has_types |= example.type_ids is not None
                        targets = np.array(() if example.targets is None else example.targets, np.int32)
                        note = self._encode_note(example, batch)
                        arrays = ((ids, ids_file), (types, types_file), (targets, targets_file), (note, notes_file))
                        for array, file in arrays:
                            file.write(array.data)
                            self.digest.update(len(array).to_bytes(8, "little") + array.tobytes())
                    bar.update(len(batch))
                counts.append(len(self.labels) - before)
        if not all(counts) or self.kind is None:
            reasons = "; ".join(f"{count:,} {text}" for text, count in self.remarks.items())
            raise ValueError(f"the {self.name} give no example{f' ({reasons})' * bool(reasons)}: give other rows")
        kind, _, several = self.kind
        np.save(folder / "rows.npy", np.array(self.bounds, np.int64))
        np.save(folder / "examples.npy", np.array(self.first, np.int64))
        labels = np.array(self.labels, np.float32 if kind == "float" else np.int64)
        np.save(folder / "labels.npy", labels)
        np.save(folder / "note_bounds.npy", np.array(self.note_bounds, np.int64))
        for numbers in (labels, np.array(self.bounds, np.int64), np.array(self.first, np.int64)):
            self.digest.update(numbers.tobytes())
        facts = {
            "has_types": self.has_types,
            "has_targets": kind == "targets",
            "has_several_rows": several,
            "has_notes": self.has_notes,
            "remarks": self.remarks,
            "counts": counts,
            "fingerprint": self.digest.hexdigest(),
        }
        (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")

    def _check(self, example: Example, batch: list[Row]) -> NDArray[np.int64]:
        """Record the rows and the target of the example, and return the ids of all its rows."""
        where = self._describe_place(batch)
        if not isinstance(example, Example):
            raise ValueError(f"{where}: `examples` gave {type(example).__name__} in place of minilm.Example")
        rows = example.all_rows
        if (longest := max(map(len, rows))) > self.max_length:
            raise ValueError(
                f"{where}: a row of an example has {longest} tokens, more than batch.max_length={self.max_length}: cut "
                "or split it in `examples`, or raise batch.max_length"
            )
        ids = np.concatenate([np.array(row, np.int64) for row in rows])
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise ValueError(f"{where}: the tokenizer has no id {wrong}: its ids are 0 to {self.vocabulary - 1}")
        kind, value = self._read_target(example, where)
        if self.kind is None:
            self.kind, self.row_count = kind, len(rows)
        if kind != self.kind:
            raise ValueError(
                f"{where}: an example has {_describe(kind)}, but the first one of all has {_describe(self.kind)}"
            )
        if self.equal_rows and len(rows) != self.row_count:
            raise ValueError(
                f"{where}: an example has {len(rows)} rows, but the first one of all has {self.row_count}: give all "
                "examples the same number"
            )
        for row in rows:
            self.bounds.append(self.bounds[-1] + len(row))
        self.first.append(len(self.bounds) - 1)
        self.labels.append(value)
        return ids

    def _describe_place(self, batch: list[Row]) -> str:
        return f"{self.name}, {batch[0].where}" if len(batch) == 1 else f"{self.name}, from {batch[0].where} on"

    def _encode_note(self, example: Example, batch: list[Row]) -> NDArray[np.uint8]:
        """Return the note of the example as JSON text in UTF-8, and record its end; empty without notes."""
        if not self.keep_notes:
            return np.zeros(0, np.uint8)
        self.has_notes |= example.note is not None
        try:
            text = json.dumps(example.note, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._describe_place(batch)}: a note is not made of JSON types ({error})") from error
        self.note_bounds.append(self.note_bounds[-1] + len(text))
        return np.frombuffer(text, np.uint8)

    def _read_target(self, example: Example, where: str) -> tuple[tuple[str, tuple[int, ...], bool], Any]:
        """Return the kind of target, its shape and whether the example has several rows; and the target itself."""
        several = bool(example.rows)
        if example.targets is not None:
            return ("targets", (), several), 0
        if example.target is None:
            return ("none", (), several), 0
        value = np.array(example.target)
        if value.dtype.kind not in "iuf" or (value.dtype.kind == "f" and not np.isfinite(value).all()):
            raise ValueError(f"{where}: the target {example.target!r} is not made of finite numbers")
        return ("float" if value.dtype.kind == "f" else "int", value.shape, several), value


def _describe(kind: tuple[str, tuple[int, ...], bool]) -> str:
    name, shape, several = kind
    words = {"targets": "targets for its tokens", "none": "no target", "int": "a whole number", "float": "a number"}
    return words[name] + (f" list of shape {[*shape]}" if shape else "") + (" and several rows" if several else "")


def hash_own_code(kind: type) -> str:
    """Return a hash of the code that a class of a user's may run: all imported modules in the folder of its file.

    For a class of minilm's the hash is empty, since `_VERSION` and the objective's own version stand for its code.
    """
    if kind.__module__.partition(".")[0] == "minilm":
        return ""
    try:
        folder = os.path.dirname(os.path.abspath(inspect.getfile(kind)))
    except (OSError, TypeError):
        # A class that was typed into an interpreter has no file.
        return f"process {os.getpid()}"
    digest = hashlib.blake2b(digest_size=12)
    files = {getattr(module, "__file__", None) for module in [*sys.modules.values()]}
    for file in sorted(os.path.abspath(file) for file in files if isinstance(file, str)):
        if file.startswith(folder + os.sep) and "site-packages" not in file and os.path.isfile(file):
            digest.update(file.encode() + Path(file).read_bytes())
    return digest.hexdigest()
