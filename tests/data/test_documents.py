"""Documents: every source gives the same texts, every split is exact, and every error is one line."""

import gzip
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset, DatasetDict

from minilm.config import Data
from minilm.data.documents import load_documents
from minilm.data.sources import fingerprint_sources
from minilm.data.text_decoding import detect_encoding
from tests.file_writers import write_mds, write_tar_of_texts

TEXTS = [f"Document {number}, naïve and “quoted”." for number in range(20)]
TEXTS_SORTED = sorted(TEXTS)
ROWS = [{"text": text, "number": number} for number, text in enumerate(TEXTS)]
# Nested columns as in ELI5.
NESTED = [
    {"q_id": str(i), "answers": {"a_id": ["x", "y"], "text": text.split(" "), "score": [1, 2]}}
    for i, text in enumerate(TEXTS)
]
OBJECTS = [{"answers": [{"text": word, "score": 1} for word in text.split(" ")]} for text in TEXTS]


def _jsonl(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _table(separator: str) -> bytes:
    quote = '"' if separator == "," else ""
    rows = (separator.join((str(number), f"{quote}{text}{quote}")) for number, text in enumerate(TEXTS))
    return "\n".join((separator.join(("number", "text")), *rows)).encode()


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    Dataset.from_list(list(rows)).to_parquet(file)
    return file.getvalue()


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _all(data: Data) -> list[str]:
    """Return training and evaluation texts together, sorted."""
    train, held_out = load_documents(data, seed=0)
    return sorted([*train["text"], *held_out[""]["text"]])


def _arrow(rows: Sequence[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist(list(rows))
    with pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return file.getvalue()


LINES = "\n".join(TEXTS).encode()
SOURCES = {
    "a.txt": LINES,
    "windows.txt": "\r\n".join(TEXTS).encode(),
    "blank-lines.txt": "\n \n".join(TEXTS).encode(),
    "a.txt.gz": gzip.compress(LINES),
    "a.jsonl": _jsonl(ROWS),
    "only-text.jsonl": _jsonl([{"text": text} for text in TEXTS]),
    "a.jsonl.gz": gzip.compress(_jsonl(ROWS)),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.csv.gz": gzip.compress(_table(",")),
    "a.arrow": _arrow(ROWS),
    "a.json": json.dumps(ROWS).encode(),
    "a.csv": _table(","),
    "a.tsv": _table("\t"),
    "a.tsv.gz": gzip.compress(_table("\t")),
    "a.parquet": _parquet(ROWS),
    "a.mds": write_mds(ROWS, {"text": "str", "number": "int"}),
    "a.tar": write_tar_of_texts(TEXTS),
    "odd [1] name*.txt": LINES,
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    source = _write(tmp_path, {name: SOURCES[name]}) / name
    assert _all(Data(source=str(source))) == TEXTS_SORTED


@pytest.mark.parametrize("rows", [NESTED, OBJECTS], ids=["lists", "objects"])
@pytest.mark.parametrize(("name", "write"), [("a.jsonl", _jsonl), ("a.parquet", _parquet)])
def test_a_dotted_column_reaches_into_a_column_and_joins_its_list(
    tmp_path: Path, name: str, write: Any, rows: Any
) -> None:
    source = _write(tmp_path, {name: write(rows)}) / name
    assert _all(Data(source=str(source), column="answers.text")) == TEXTS_SORTED


def test_a_paragraph_ends_at_a_blank_line(tmp_path: Path) -> None:
    source = _write(tmp_path, {"a.txt": "\n\n".join(f"{text}\nand more" for text in TEXTS).encode()}) / "a.txt"
    found = _all(Data(source=str(source), document="paragraph"))
    assert [text.strip() for text in found] == [f"{text}\nand more" for text in TEXTS_SORTED]


def test_a_file_can_be_one_document_whose_end_is_held_out(tmp_path: Path) -> None:
    whole = {"a.txt": "one line\n\nand others\n" * 50, "b.txt": "x" * 1000}
    source = _write(tmp_path, {name: text.encode() for name, text in whole.items()})
    train, held_out = load_documents(Data(source=str(source), document="file", eval_fraction=0.1), seed=3)
    pairs = zip(train["text"], held_out[""]["text"], strict=True)
    assert [begin + end for begin, end in pairs] == list(whole.values())
    assert [len(text) for text in train["text"]] == [int(0.9 * len(text)) for text in whole.values()]


def test_files_lie_at_any_depth_below_a_folder_or_a_glob(tmp_path: Path) -> None:
    deep = {"a.txt": TEXTS[:5], "in/a.txt": TEXTS[5:9], "in/the/depth/b.txt": TEXTS[9:15]}
    files = {name: "\n".join(texts).encode() for name, texts in deep.items()}
    _write(tmp_path, {**files, "in/c.txt.gz": gzip.compress("\n".join(TEXTS[15:]).encode())})
    assert _all(Data(source=str(tmp_path))) == _all(Data(source=str(tmp_path / "**/*.txt*"))) == TEXTS_SORTED


@pytest.mark.parametrize("source", ["", "*.txt", "**/*.txt", "?.txt"])
def test_a_folder_and_a_glob_stand_for_all_their_files(tmp_path: Path, source: str) -> None:
    halves = {"a.txt": "\n".join(TEXTS[:7]).encode(), "b.txt": "\n".join(TEXTS[7:]).encode()}
    _write(tmp_path, {**halves, ".hidden.txt": b"never read", "README.md": b"never read", "c.TXT.bak": b"never read"})
    assert _all(Data(source=str(tmp_path / source))) == TEXTS_SORTED


def test_hidden_files_below_a_folder_are_not_read_but_the_folder_may_be_hidden(tmp_path: Path) -> None:
    folder = tmp_path / ".data"
    _write(folder, {"a.txt": LINES, ".ipynb_checkpoints/a-checkpoint.csv": b"text\nold\n", "in/.old/b/c.txt": b"old"})
    assert _all(Data(source=str(folder))) == _all(Data(source=f"{folder}/../.data")) == TEXTS_SORTED


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_dataset_saved_to_disk_is_read_by_split(tmp_path: Path, split: str) -> None:
    DatasetDict({split: Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    assert _all(Data(source=str(tmp_path / "saved"), split=split)) == TEXTS_SORTED
    with pytest.raises(ValueError, match=rf"no split '{split}x': did you mean '{split}'\?"):
        load_documents(Data(source=str(tmp_path / "saved"), split=f"{split}x"), seed=0)


def test_a_saved_dataset_is_cut_into_slices_and_its_folder_stays_as_it_is(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    files = sorted(tmp_path.rglob("*"))
    data = Data(source=str(tmp_path / "saved"), split="train[:75%]", eval_split="train[-5:]+train[3:5]")
    train, held_out = load_documents(data, seed=0)
    assert train["text"][:] == TEXTS[:15]
    assert {name: part["text"][:] for name, part in held_out.items()} == {
        "train[-5:]": TEXTS[15:],
        "train[3:5]": TEXTS[3:5],
    }
    assert _all(Data(source=str(tmp_path / "saved"))) == TEXTS_SORTED
    assert sorted(tmp_path.rglob("*")) == files


def test_evaluation_documents_come_from_eval_source_whole(tmp_path: Path) -> None:
    _write(tmp_path, {"a.jsonl": _jsonl(ROWS), "b.jsonl": _jsonl(ROWS[:3])})
    data = Data(source=str(tmp_path / "a.jsonl"), eval_source=str(tmp_path / "b.jsonl"), eval_fraction=0.5)
    train, held_out = load_documents(data, seed=0)
    assert (train["text"][:], held_out[""]["text"][:]) == (TEXTS, TEXTS[:3])


def test_eval_split_takes_a_part_of_the_source(tmp_path: Path) -> None:
    source = _write(tmp_path, {"a.txt": LINES}) / "a.txt"
    train, held_out = load_documents(Data(source=str(source), split="train[:75%]", eval_split="train[75%:]"), seed=0)
    assert (train["text"][:], held_out[""]["text"][:]) == (TEXTS[:15], TEXTS[15:])


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.95])
def test_the_held_out_fraction_is_exact_disjoint_and_decided_by_the_seed(tmp_path: Path, fraction: float) -> None:
    data = Data(source=str(_write(tmp_path, {"a.txt": LINES}) / "a.txt"), eval_fraction=fraction)

    def texts(seed: int) -> tuple[list[str], list[str]]:
        train, held_out = load_documents(data, seed=seed)
        return train["text"][:], held_out[""]["text"][:]

    train, held_out = texts(1)
    assert sorted(train + held_out) == TEXTS_SORTED
    assert len(held_out) == round(len(TEXTS) * fraction)
    assert texts(1) == (train, held_out)
    others = [set(texts(seed)[1]) for seed in (2, 3, 4)]
    assert any(other != set(held_out) for other in others)


def _several(folder: Path, **options: Any) -> Data:
    """Return settings for a text file and a JSON file of 20 documents each."""
    others = [{"text": text.replace("Document", "Other")} for text in TEXTS]
    _write(folder, {"a.txt": LINES, "b.jsonl": _jsonl(others)})
    return Data(source=(str(folder / "a.txt"), str(folder / "b.jsonl")), eval_fraction=0.2, **options)


def test_several_sources_follow_each_other_and_each_has_a_share_held_out(tmp_path: Path) -> None:
    data = _several(tmp_path)
    train, held_out = load_documents(data, seed=0)
    alone = [load_documents(replace(data, source=source), seed=0) for source in data.sources]
    assert train["text"][:] == [text for part in alone for text in part[0]["text"]]
    assert held_out[""]["text"][:] == [text for part in alone for text in part[1][""]["text"]]
    assert (len(train), len(held_out[""])) == (32, 8)


def test_a_weight_repeats_training_documents_and_no_evaluation_documents(tmp_path: Path) -> None:
    data = _several(tmp_path, weights=(2.25, 0.5))
    train, held_out = load_documents(data, seed=0)
    whole, held_out_whole = load_documents(replace(data, weights=()), seed=0)
    assert held_out[""]["text"][:] == held_out_whole[""]["text"][:]
    counts = Counter(train["text"])
    first, second = whole["text"][:16], whole["text"][16:]
    assert sorted(counts[text] for text in first) == [2] * 12 + [3] * 4
    assert sorted(counts[text] for text in second) == [0] * 8 + [1] * 8
    drawn = [{*load_documents(data, seed=seed)[0]["text"][36:]} for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    # Nothing is held out, and the documents have the order of the files.
    ends = replace(data, eval_source=data.sources[0])
    assert not {*load_documents(ends, seed=0)[0]["text"][45:]} <= {
        text.replace("Document", "Other") for text in TEXTS[:10]
    }


def test_sources_share_their_evaluation_parts(tmp_path: Path) -> None:
    data = replace(_several(tmp_path), split="train[:15]", eval_split="train[15:18]+train[18:]")
    train, held_out = load_documents(data, seed=0)
    assert train["text"][14:16] == [TEXTS[14], TEXTS[0].replace("Document", "Other")]
    assert {name: len(part) for name, part in held_out.items()} == {"train[15:18]": 6, "train[18:]": 4}


def test_a_weight_that_leaves_nothing_of_a_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"b\.jsonl: data\.weights 0\.02 selects none of 16 documents"):
        load_documents(_several(tmp_path, weights=(1, 0.02)), seed=0)


NOT_TEXT = [None, 3, 1.5, True, ["a"], {"a": "b"}]
REFUSED: dict[str, tuple[dict[str, bytes], str, dict[str, Any], str]] = {
    "missing file": ({}, "a.txt", {}, "no such file"),
    "missing folder": ({}, "folder", {}, "no such file"),
    "glob without a match": ({}, "*.jsonl", {}, "no such file"),
    "file of another kind": ({"a.pdf": b"x"}, "a.pdf", {}, "no file ending in .txt"),
    "folder without files": ({"in/a.pdf": b"x"}, "in", {}, "no file ending in .txt"),
    "folder of two kinds": ({"in/a.txt": LINES, "in/b.csv": b"x"}, "in", {}, r"several kinds \(.csv, .txt\)"),
    "unknown column": ({"a.jsonl": _jsonl(ROWS)}, "a.jsonl", {"column": "txet"}, "'txet': did you mean 'text'"),
    "unknown column, listed": ({"a.csv": _table(",")}, "a.csv", {"column": "zzz"}, "There are: number, text"),
    "no such split": ({"a.txt": LINES}, "a.txt", {"split": "test"}, "no split 'test'"),
    "no such eval_split": ({"a.txt": LINES}, "a.txt", {"eval_split": "validation"}, "no split 'validation'"),
    "nothing held out": ({"a.txt": b"a\nb\nc"}, "a.txt", {}, "of 3 documents leaves no evaluation document"),
    "all held out": ({"a.txt": b"a\nb\nc"}, "a.txt", {"eval_fraction": 0.9}, "leaves no training document"),
    "empty text": ({"a.txt": b""}, "a.txt", {}, ""),
    "blank text": ({"a.txt": b"\n \n\t\n"}, "a.txt", {}, "no document has text"),
    "empty jsonl": ({"a.jsonl": b""}, "a.jsonl", {}, ""),
    "only a header": ({"a.csv": b"text\n"}, "a.csv", {}, ""),
    "truncated jsonl": ({"a.jsonl": _jsonl(ROWS)[:-9]}, "a.jsonl", {}, f"line {len(ROWS)}: not JSON, or cut off"),
    "truncated parquet": ({"a.parquet": _parquet(ROWS)[:-9]}, "a.parquet", {}, "[Pp]arquet"),
    **{
        f"truncated {name}": ({name: content[:-9]}, name, {}, r"after line \d+: cannot be read; copy the file again")
        for name, content in SOURCES.items()
        if name.endswith(".gz")
    },
    "no gzip": ({"a.txt.gz": LINES}, "a.txt.gz", {}, "after line 0: cannot be read"),
    "truncated arrow": ({"a.arrow": _arrow(ROWS)[:-99]}, "a.arrow", {}, "not Arrow, or cut off"),
    "bad slice of a file": ({"a.txt": LINES}, "a.txt", {"split": "train[5"}, r"train\[5' is not written like"),
    "not text": ({"a.txt": b"ok\n\x81\n"}, "a.txt", {}, "line 2: not UTF-8"),
    "two encodings": ({"a.txt": b"ok\n\xe9\n", "b.txt": b"ok\n\xc3\xa9\n"}, ".", {}, "line 2: not UTF-8"),
    "a NUL": ({"a.txt": b"ok\n\0\n"}, "a.txt", {}, "line 2: not UTF-8"),
    **{
        f"{value!r} {where}": (
            {"a.jsonl": _jsonl([{**more, "text": text} for text in ("fine" if like is None else like, value)])},
            "a.jsonl",
            {},
            f"line {2 if like is None else 1}: column 'text' holds {type(value).__name__}",
        )
        for value in NOT_TEXT
        for where, more in (("alone", {}), ("beside another column", {"x": 1}))
        for like in ((None,) if value is None else (value,))
    },
    "None inside a joined list": (
        {"a.jsonl": _jsonl([{"a": {"text": ["fine"]}}, {"a": {"text": ["fine", None]}}])},
        "a.jsonl",
        {"column": "a.text"},
        "line 2: column 'a.text' holds",
    ),
    "unknown nested column": (
        {"a.jsonl": _jsonl(NESTED)},
        "a.jsonl",
        {"column": "answers.txt"},
        "did you mean 'answers.text'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused_in_one_line_that_names_the_source(tmp_path: Path, case: str) -> None:
    files, name, options, message = REFUSED[case]
    source = str(_write(tmp_path, files) / name)
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*\Z") as refusal:
        load_documents(Data(source=source, **options), seed=0)
    assert source in str(refusal.value)


def test_a_text_in_windows_1252_is_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [f"Citroën number {number}" for number in range(40)]
    (tmp_path / "a.txt").write_bytes("\n".join(["ascii", *lines]).encode("cp1252"))
    train, held_out = load_documents(Data(source=str(tmp_path / "a.txt")), seed=0)
    assert sorted([*train["text"], *held_out[""]["text"]]) == sorted(["ascii", *lines])
    assert "a.txt, line 2: not UTF-8, so the file is read as Windows-1252" in caplog.text


def test_a_letter_may_lie_across_the_blocks_that_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("minilm.data.text_decoding._BLOCK", 1)
    path = tmp_path / "a.txt"
    for content, expected in (("ok\nä€😀\n".encode(), "utf-8"), (b"ok\n\xc3", "cp1252")):
        path.write_bytes(content)
        assert detect_encoding([str(path)]) == expected
    assert caplog.text.count("so the file is read as Windows-1252") == 1


def test_the_fingerprint_of_a_source_is_the_size_and_hash_of_each_file(tmp_path: Path) -> None:
    data = _several(tmp_path, eval_source=str(tmp_path / "a.txt"))
    content = (tmp_path / "b.jsonl").read_bytes()
    facts = fingerprint_sources(data)
    assert [*facts] == [*data.sources]
    hashed = hashlib.sha256(content).hexdigest()
    assert facts[data.sources[1]] == [{"file": data.sources[1], "bytes": len(content), "sha256": hashed}]
    assert fingerprint_sources(Data()) == fingerprint_sources(Data(source="on/hub")) == {}
