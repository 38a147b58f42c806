"""Streams: they give the tokens of the mapped documents, store nothing else, and read no more than needed."""

import gzip
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from datasets import Dataset, Features, Image, IterableDataset, Value
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from minilm.config import Batch, Config, Data, Run, Tokens
from minilm.data.corpus import encode
from minilm.data.documents import load_documents
from minilm.data.held_out import hash_texts, is_held_out
from minilm.data.shards import START, TextShard, open_shards
from minilm.data.streaming import TextStream, stream_documents
from minilm.objectives.masked_lm import MaskedLMObjective
from tests.fake_hub import COMMIT, replace_hub

TEXTS = [f"Document {number}, naïve and “quoted”." for number in range(25)]
LINES = "\n".join([*TEXTS[:9], " ", *TEXTS[9:]]).encode()
JSONL = "".join(json.dumps({"number": 1, "a": {"text": [text, "."]}}) + "\n" for text in TEXTS).encode()


def _parquet() -> bytes:
    file = io.BytesIO()
    Dataset.from_dict({"text": TEXTS, "number": [*range(25)]}).to_parquet(file, batch_size=10)
    return file.getvalue()


SOURCES: dict[str, tuple[bytes, dict[str, Any]]] = {
    "a.txt": (LINES, {}),
    "a.txt.gz": (gzip.compress(LINES), {}),
    "paragraphs.txt": (b"\n\n".join(text.encode() for text in TEXTS), {"document": "paragraph"}),
    "windows.txt": ("Citroën\nand others\n".encode("cp1252"), {}),
    "a.jsonl": (JSONL, {"column": "a.text"}),
    "a.jsonl.gz": (gzip.compress(JSONL), {"column": "a.text"}),
    "a.csv": (("number,text\n" + "".join(f'1,"{text}"\n' for text in TEXTS)).encode(), {}),
    "a.parquet": (_parquet(), {}),
}


def _texts(stream: TextStream) -> list[str]:
    return [text for batch in stream.iter(batch_size=4) for text in batch["text"]]


def _write(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


@pytest.mark.parametrize("name", SOURCES)
def test_a_stream_gives_the_mapped_documents_in_their_order_and_stores_none(tmp_path: Path, name: str) -> None:
    content, options = SOURCES[name]
    source = _write(tmp_path, name, content)
    data = Data(source=source, eval_source=source, streaming=True, **options)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    before = {*cache.rglob("*.arrow")}
    train, held_out = stream_documents(data)
    found = _texts(train)
    assert {*cache.rglob("*.arrow")} == before
    assert found == _texts(train) == _texts(held_out[""])
    assert found == load_documents(replace(data, streaming=False), seed=0)[0]["text"][:]


def test_a_saved_dataset_is_streamed_by_rows_and_splits(tmp_path: Path) -> None:
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    files = sorted(tmp_path.rglob("*"))
    split = {"split": "train[3:20]", "eval_split": "train[:3]+train[20:]"}
    train, held_out = stream_documents(Data(source=str(tmp_path / "saved"), streaming=True, **split))
    assert _texts(train) == TEXTS[3:20]
    assert {name: _texts(part) for name, part in held_out.items()} == {
        "train[:3]": TEXTS[:3],
        "train[20:]": TEXTS[20:],
    }
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.95])
def test_the_share_held_out_is_near_the_fraction_and_stays_when_the_source_grows(
    tmp_path: Path, fraction: float
) -> None:
    lines = [f"line {number}" for number in range(4000)]

    def hold_out(lines: list[str]) -> tuple[list[str], list[str]]:
        source = _write(tmp_path, "a.txt", "\n".join(lines).encode())
        train, held_out = stream_documents(Data(source=source, streaming=True, eval_fraction=fraction))
        return _texts(train), _texts(held_out[""])

    outside, inside = hold_out(lines)
    assert sorted(inside + outside) == sorted(lines)
    # Five standard deviations of the binomial distribution.
    assert abs(len(inside) - 4000 * fraction) < 5 * (4000 * fraction * (1 - fraction)) ** 0.5
    more_outside, more_inside = hold_out(["a new line", *reversed(lines), "line 7"])
    assert {*inside} <= {*more_inside}
    assert {*outside} <= {*more_outside}
    assert not {*more_inside} & {*more_outside}


def test_weights_repeat_the_sources_of_a_stream(tmp_path: Path) -> None:
    sources = (_write(tmp_path, "a.txt", b"a\nb\nc\nd"), _write(tmp_path, "b.txt", b"e\nf\ng\nh"))
    data = Data(source=sources, weights=(0.5, 2), streaming=True, eval_source=sources[0])
    assert "".join(_texts(stream_documents(data)[0])) == "bdefghefgh"


@pytest.mark.parametrize("layout", ["documents", "blocks"])
def test_the_ids_are_those_of_the_mapped_documents_and_a_second_run_reads_nothing(
    tmp_path: Path, layout: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = _write(tmp_path, "a.txt", LINES)
    data = Data(source=source, eval_source=source, streaming=True)
    stream, mapped = stream_documents(data)[0], load_documents(replace(data, streaming=False), seed=0)[0]
    one, other = (encode(documents, tokenizer, max_length=16, layout=layout) for documents in (stream, mapped))
    assert len(one) == len(other)
    assert all(np.array_equal(one[i], other[i]) for i in range(len(one)))

    def unread() -> Iterator[str]:
        raise AssertionError("read again")

    again = encode(replace(stream, texts=unread), tokenizer, max_length=8, layout=layout)
    assert np.array_equal(again.ids[:], one.ids[:])


def test_the_identity_of_a_stream_depends_on_its_content_and_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    data = Data(source=_write(tmp_path, "a.txt", LINES), streaming=True)
    others = [replace(data, **options) for options in ({"split": "train[:9]"}, {"document": "paragraph"})]
    others.append(replace(data, eval_fraction=0.5))
    identity = stream_documents(data)[0].identity
    assert stream_documents(data)[0].identity == identity
    assert all(stream_documents(other)[0].identity != identity for other in others)
    assert stream_documents(data)[1][""].identity != identity
    os.utime(path, ns=(1, 1))
    copy = replace(data, source=_write(tmp_path, "b.txt", LINES))
    assert stream_documents(data)[0].identity == stream_documents(copy)[0].identity == identity
    path.write_bytes(LINES.replace(b"Document 1,", b"Document 8,"))
    os.utime(path, ns=(1, 1))
    assert stream_documents(data)[0].identity != identity


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the hub by a dataset of a million rows. Return the list of the rows that were read."""
    read: list[int] = []

    def rows() -> Iterator[dict[str, str]]:
        for number in range(10**6):
            read.append(number)
            yield {"text": f"Row {number} of the dataset, which has some words."}

    def load_dataset(path: str, **options: Any) -> IterableDataset:
        assert (path, options) == (
            "some/rows",
            {"name": None, "split": "train", "revision": "abc", "streaming": True},
        )
        return IterableDataset.from_generator(rows)

    replace_hub(monkeypatch, load_dataset)
    return read


@pytest.mark.parametrize("layout", ["documents", "blocks", "packed"])
def test_a_hub_stream_is_read_only_as_far_as_a_window_needs(hub: list[int], layout: str) -> None:
    config = Config(
        data=Data(source="some/rows", streaming=True, eval_fraction=0.1, window_tokens=20_000),
        tokens=Tokens(vocab_size=400),
        batch=Batch(examples=10, max_length=64, layout=layout),
        run=Run(max_steps=400),
    )
    prepared = MaskedLMObjective(config.objective).prepare(config)
    assert prepared.stream is not None
    assert len(prepared.stream.open(0).ids) >= 20_000
    assert len(prepared.eval.ids) >= 2_000
    # The tokenizer and the sample for the checks read more than the window.
    assert max(hub) < 100_000
    assert "abc" in stream_documents(config.data)[0].identity


def test_several_small_hub_streams_are_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **options: Any) -> IterableDataset:
        rows = Dataset.from_dict({"text": [f"{path} {number}" for number in range(300)]})
        return rows.to_iterable_dataset(num_shards=3)

    replace_hub(monkeypatch, load_dataset)
    config = Config(
        data=Data(source=("some/a", "some/b"), weights=(1, 0.5), streaming=True, eval_fraction=0.1),
        tokens=Tokens(kind="characters"),
        batch=Batch(examples=10),
        run=Run(max_steps=2),
    )
    prepared = MaskedLMObjective(config.objective).prepare(config)
    assert "b" in prepared.tokenizer.get_vocab()
    held = [
        int(is_held_out(hash_texts([f"{path} {number}" for number in range(300)]), 0.1).sum())
        for path in ("some/a", "some/b")
    ]
    assert [len(prepared.train), len(prepared.eval)] == [300 - held[0] + (300 - held[1]) // 2, sum(held)]
    assert prepared.stream is None


def test_a_task_of_glue_is_streamed_with_its_own_column_and_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **options: Any) -> IterableDataset:
        texts = [f"{options['split']} text {number} of the task" for number in range(100)]
        return Dataset.from_dict({"sentence": texts, "label": [0] * 100}).to_iterable_dataset()

    replace_hub(monkeypatch, load_dataset)
    config = Config(
        data=Data(source="nyu-mll/glue", config="sst2", streaming=True), tokens=Tokens(vocab_size=300), batch=Batch()
    )
    prepared = MaskedLMObjective(config.objective).prepare(config)
    # No training document is held out, since the task has a split to evaluate on.
    assert [len(prepared.train), len(prepared.eval)] == [100, 100]
    assert "validation" in prepared.tokenizer.decode(prepared.eval[0])


def test_files_of_the_hub_whose_other_columns_differ_in_type_are_read_from_any_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [_write(tmp_path, "a.csv", _csv(25_000, "7")), _write(tmp_path, "b.csv", _csv(25_000, "seven"))]
    rows = datasets.load_dataset("csv", data_files=files, split="train", streaming=True)
    replace_hub(monkeypatch, lambda path, **options: rows)
    shards = open_shards(Data(source="some/rows", streaming=True), "some/rows", "abc")
    assert len(shards) == 2
    texts = [f"row {number}" for number in range(25_000)]
    for shard in shards:
        assert isinstance(shard, TextShard)
        assert [text for batch in shard.read(START) for text in batch.texts] == texts
        place = [place for batch in shard.read(START) for place in batch.places][1234]
        assert [text for batch in shard.read(place) for text in batch.texts] == texts[1234:]


def test_a_column_of_the_hub_that_is_not_read_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"image": Image(), "text": Value("string"), "a": {"text": Value("string")}})
    images = [{"bytes": b"no image", "path": None}] * len(TEXTS)
    table = {"image": images, "text": TEXTS, "a": [{"text": text} for text in TEXTS]}
    file = str(tmp_path / "a.parquet")
    # The datasets library itself would need Pillow to write the column.
    parquet.write_table(pyarrow.Table.from_pydict(table, schema=features.arrow_schema), file)
    rows = datasets.load_dataset("parquet", data_files=file, split="train", streaming=True)
    replace_hub(monkeypatch, lambda path, **options: rows)
    for column in ("text", "a.text"):
        data = Data(source="some/rows", column=column, streaming=True, eval_split="train")
        assert _texts(stream_documents(data)[0]) == TEXTS
        (shard,) = open_shards(data, "some/rows", COMMIT)
        assert [text for batch in shard.read((9, 0)) for text in batch.texts] == TEXTS[9:]


def test_a_place_in_a_group_of_rows_that_a_file_no_longer_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _write(tmp_path, "a.parquet", _parquet())
    rows = datasets.load_dataset("parquet", data_files=file, split="train", streaming=True)
    replace_hub(monkeypatch, lambda path, **options: rows)
    (shard,) = open_shards(Data(source="some/rows", streaming=True), "some/rows", COMMIT)
    with pytest.raises(
        ValueError, match=r"^some/rows, row group 99, row 0: the file has fewer groups of rows than before"
    ):
        next(iter(shard.read((99 * 2**32, 0))))


def _csv(rows: int, number: str) -> bytes:
    return "".join(
        ["text,number\n", *(f"row {row},{number if row > 12_000 else ''}\n" for row in range(rows))]
    ).encode()


def test_a_part_of_the_hub_without_an_end_is_refused(hub: list[int]) -> None:
    data = Data(source="some/rows", split="train[1000:]", streaming=True, eval_fraction=0.1)
    with pytest.raises(ValueError, match=r"^data source some/rows: .*give an end, as in train\[1000:51000\]"):
        _texts(stream_documents(data)[0])
    assert _texts(stream_documents(replace(data, split="train[1000:1010]"))[0])


@pytest.mark.parametrize("part", ["opening", "reading"])
def test_a_hub_that_fails_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "A first row."}
        raise ConnectionError("the connection was\nreset")

    def load_dataset(path: str, **options: Any) -> IterableDataset:
        if part == "opening":
            raise ConnectionError("the connection was\nreset")
        return IterableDataset.from_generator(rows)

    replace_hub(monkeypatch, load_dataset)
    with pytest.raises(ValueError, match=r"^data source some/rows: [^\n]+\Z"):
        _texts(stream_documents(Data(source="some/rows", streaming=True, eval_fraction=0.1))[0])


REFUSED: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "share of rows": (LINES, {"split": "train[:10%]"}, "cannot read the part train"),
    "no such split": (LINES, {"split": "test"}, "no split 'test'"),
    "blank": (b"\n \n", {}, "no document has text"),
    "empty": (b"", {}, "is empty"),
    "not text": (b"ok\n\x81\n", {}, "line 2: not UTF-8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_source_that_cannot_be_streamed_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    content, options, message = REFUSED[case]
    data = Data(source=_write(tmp_path, "a.txt", content), streaming=True, **options)
    with pytest.raises(ValueError, match=rf"^[^\n]*a\.txt[^\n]*{message}[^\n]*\Z"):
        _texts(stream_documents(data)[0])


LONG: dict[str, tuple[str, str, bytes, str]] = {
    "NUL": ("a.txt", "text", b"ok\nno\0\n", "line 2: it holds a NUL"),
    "NUL in a row": ("a.csv", "text", b"text,n\nok,1\nno\0,2\n", "line 3: it holds a NUL"),
    "two problems": ("a.jsonl", "text", b'{"text": "caf\xe9"}\n\n\0\n', "line 1: not UTF-8; convert the file"),
    "Windows-1252": ("a.txt", "text", b"ok\ncaf\xe9\n", "line 2: not UTF-8; convert the file"),
    "Windows-1252 in a row": ("a.csv", "text", b"text,n\nok,1\ncaf\xe9,2\n", "line 3: not UTF-8; convert the file"),
}


@pytest.mark.parametrize("case", LONG)
def test_a_long_stream_is_not_read_before_its_first_document_and_its_bad_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("minilm.data.tables._DETECTED_BYTES", 0)
    monkeypatch.setattr("minilm.data.tables.detect_encoding", lambda files: pytest.fail("all files were read"))
    name, column, content, message = LONG[case]
    data = Data(
        source=_write(tmp_path, name, content),
        column=column,
        streaming=True,
        eval_source=_write(tmp_path, "b.txt", b"b\n"),
    )
    with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(name)}, {message}[^\n]*\Z"):
        _texts(stream_documents(data)[0])
    ((shard,),) = [open_shards(data, data.source)]
    with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(name)}, {message}[^\n]*\Z"):
        [*shard.read(START)]


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [
        (JSONL, "b.text", "no column 'b.text'"),
        (JSONL, "number", "line 1: column 'number' holds int where text"),
        (JSONL[:-9], "a.text", "line 25: not JSON, or cut off"),
    ],
)
def test_a_row_that_cannot_be_streamed_is_named(tmp_path: Path, content: bytes, column: str, message: str) -> None:
    data = Data(source=_write(tmp_path, "a.jsonl", content), column=column, streaming=True)
    with pytest.raises(ValueError, match=rf"^[^\n]*a\.jsonl[^\n]*{message}[^\n]*\Z"):
        _texts(stream_documents(data)[0])


def test_labels_are_not_streamed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.streaming: only language models"):
        load_documents(Data(source=_write(tmp_path, "a.jsonl", JSONL), streaming=True), seed=0, labels=True)
