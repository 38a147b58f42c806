"""Filters of documents: the survivors are those of a brute-force reference, in any number of processes and commands."""

import json
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from transformers import PreTrainedTokenizerBase

from minilm.commands.main import main
from minilm.config import Data
from minilm.data import document_filters
from minilm.data.document_filters import KEPT, FilterJob, Filters, format_removed
from minilm.data.held_out import hash_texts
from minilm.data.shard_pieces import PieceJob
from minilm.data.shards import START, open_shards
from minilm.data.token_shards import MANIFEST, TokenFolder
from minilm.data.tokenize_source import tokenize
from minilm.utils.file_lock import lock_file

# Short lines of few letters, so that many of them are the same.
LINES = st.text("ab é", min_size=1, max_size=5).filter(lambda text: bool(text.strip()))
SOURCES = st.lists(st.lists(LINES, min_size=1, max_size=30), min_size=1, max_size=4)
FILES = [
    [f"File {file}, document {i % 23}, naïve and “quoted”." + " More words." * (i * file % 5) for i in range(size)]
    for file, size in enumerate((40, 7, 90))
]

needs_datasketch = pytest.mark.skipif(not find_spec("datasketch"), reason="pip install -e '.[dedup]'")
BOTH = pytest.mark.parametrize("deduplicate", ["exact", pytest.param("near", marks=needs_datasketch)])


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """These files have several pieces. A piece ends with a batch of rows."""
    monkeypatch.setattr("minilm.data.columnar_files.BATCH_ROWS", 20)
    monkeypatch.setattr(document_filters, "_PIECE_DOCUMENTS", 20)


@pytest.fixture
def saved(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def _write(folder: Path, files: Sequence[Sequence[str]]) -> tuple[str, ...]:
    folder.mkdir(parents=True)
    paths = [folder / f"{number}.jsonl" for number in range(len(files))]
    for path, texts in zip(paths, files, strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tuple(map(str, paths))


def _judge(folder: Path, files: Sequence[Sequence[str]], filters: Filters) -> FilterJob:
    """Return a job that has written the verdicts on documents."""
    data = Data(source=_write(folder / "text", files))
    job = FilterJob(folder=folder, shards=[s for one in data.sources for s in open_shards(data, one)], filters=filters)
    job.run()
    return job


def _filter_by_force(files: Sequence[Sequence[str]], filters: Filters) -> list[list[str]]:
    """Return the documents that stay."""
    kept, before = list[list[str]](), list[str]()
    for texts in files:
        kept.append([])
        for text in texts:
            if len(text) < filters.min_characters or len(text) > (filters.max_characters or 10**9):
                continue
            if not (filters.deduplicate and text in before):
                before.append(text)
                kept[-1].append(text)
    return kept


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=SOURCES,
    filters=st.builds(
        Filters,
        min_characters=st.sampled_from([0, 2, 3]),
        max_characters=st.sampled_from([None, 3, 4]),
        deduplicate=st.sampled_from([None, "exact"]),
    ),
)
def test_the_survivors_are_those_of_a_brute_force_reference(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[str]], filters: Filters
) -> None:
    expected = _filter_by_force(files, filters)
    folder = tmp_path_factory.mktemp("filters")
    if not any(expected):
        with pytest.raises(ValueError, match=r"the filters remove all \d+ documents; change --min-characters or"):
            _judge(folder, files, filters)
        return
    job = _judge(folder, files, filters)
    kept = [
        [text for text, verdict in zip(texts, job.read(number), strict=True) if verdict == KEPT]
        for number, texts in enumerate(files)
    ]
    assert kept == expected
    counts = job.count()
    documents = counts.pop("documents")
    assert documents == sum(map(len, files))
    assert sum(counts.values()) == documents - sum(map(len, expected))


@BOTH
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=SOURCES, more=SOURCES)
def test_a_decision_does_not_change_when_files_are_added(
    tmp_path_factory: pytest.TempPathFactory,
    deduplicate: Literal["exact", "near"],
    files: list[list[str]],
    more: list[list[str]],
) -> None:
    filters = Filters(deduplicate=deduplicate, ngram_size=1)
    one, two = (_judge(tmp_path_factory.mktemp("filters"), all, filters) for all in (files, files + more))
    for number in range(len(files)):
        assert np.array_equal(one.read(number), two.read(number))


def test_the_tokens_are_those_of_the_survivors(tmp_path: Path, saved: str) -> None:
    filters = Filters(min_characters=40, max_characters=70, deduplicate="exact")
    expected = _filter_by_force(FILES, filters)
    assert 0 < sum(map(len, expected)) < sum(map(len, FILES)) / 2
    for name, files, chosen in (("all", FILES, filters), ("survivors", expected, None)):
        source = _write(tmp_path / "text" / name, files)
        tokenize(Data(source=source, eval_fraction=0.3), saved, tmp_path / name, piece_tokens=200, filters=chosen)
    folders = [TokenFolder.open(str(tmp_path / name)) for name in ("all", "survivors")]
    for number, texts in enumerate(expected):
        batches = [[*folder.shards[number].read(START)] for folder in folders]
        ids = [np.concatenate([batch.encoded.ids for batch in one]) for one in batches]
        assert np.array_equal(*ids)
        hashes = [np.concatenate([batch.hashes() for batch in one]) for one in batches]
        assert np.array_equal(hashes[0], hashes[1])
        assert np.array_equal(hashes[0], hash_texts(texts))
    held_out = [[*folder.iterate_held_out(0.3)] for folder in folders]
    assert held_out[0] == held_out[1] != []


def test_a_file_of_which_nothing_stays_has_no_tokens(tmp_path: Path, saved: str) -> None:
    source = _write(tmp_path / "text", [FILES[0], FILES[0], FILES[1]])
    tokenize(Data(source=source), saved, tmp_path / "tokens", filters=Filters(deduplicate="exact"))
    empty = TokenFolder.open(str(tmp_path / "tokens")).shards[1]
    assert [*empty.read(START)] == []


def _interrupt_every(writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every command be interrupted before a write: of a piece, or of the verdicts on a file."""
    count = 0

    def interrupting(write: Callable[..., Any]) -> Callable[..., Any]:
        def one(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count % writes == 0:
                raise KeyboardInterrupt
            return write(*arguments)

        return one

    monkeypatch.setattr(PieceJob, "_write_piece", interrupting(PieceJob._write_piece))
    monkeypatch.setattr(document_filters, "write_atomically", interrupting(document_filters.write_atomically))


@BOTH
@pytest.mark.parametrize("writes", [4, 5, 7])  # the verdicts on the three files are written in one command
def test_interrupted_commands_write_the_same(
    tmp_path: Path, saved: str, monkeypatch: pytest.MonkeyPatch, writes: int, deduplicate: Literal["exact", "near"]
) -> None:
    data = Data(source=_write(tmp_path / "text", FILES))

    def work(folder: Path) -> None:
        tokenize(data, saved, folder, piece_tokens=300, filters=Filters(min_characters=40, deduplicate=deduplicate))

    work(tmp_path / "at once")
    _interrupt_every(writes, monkeypatch)
    interruptions = 0
    while not (tmp_path / "parts" / MANIFEST).exists():
        try:
            work(tmp_path / "parts")
        except KeyboardInterrupt:
            interruptions += 1
        assert interruptions < 100
    assert interruptions > 1
    manifests = [(tmp_path / name / MANIFEST).read_bytes() for name in ("at once", "parts")]
    assert manifests[0] == manifests[1]
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("at once", "parts")]
    assert names[0] == names[1]
    assert not any("survey" in name for name in names[0])


@BOTH
def test_several_processes_write_the_same_and_say_what_they_leave_out(
    tmp_path: Path, saved: str, capfd: pytest.CaptureFixture[str], deduplicate: Literal["exact", "near"]
) -> None:
    source = _write(tmp_path / "text", FILES)
    words = ["tokenize", *source, "--tokenizer", saved, "--min-characters", "40", "--deduplicate", deduplicate]
    for processes in ("1", "2"):
        main([*words, "--processes", processes, "--output", str(tmp_path / processes)])
        said = capfd.readouterr().err
        counts = json.loads((tmp_path / processes / MANIFEST).read_bytes())["filtered"]
        assert format_removed(counts) in said
    assert (tmp_path / "1" / MANIFEST).read_bytes() == (tmp_path / "2" / MANIFEST).read_bytes()
    if deduplicate == "exact":
        kept = sum(map(len, _filter_by_force(FILES, Filters(min_characters=40, deduplicate="exact"))))
        assert counts["documents"] - counts["exact copies"] - counts["too short"] == kept
    else:
        assert counts["near-copies"] > 0


def test_a_file_of_a_process_that_ends_early_is_read_by_another(tmp_path: Path) -> None:
    data = Data(source=_write(tmp_path / "text", FILES))
    shards = [shard for source in data.sources for shard in open_shards(data, source)]
    job = FilterJob(folder=tmp_path, shards=shards, filters=Filters(deduplicate="exact"))
    with lock_file(tmp_path / ".file-00001.lock", wait=False):
        waiting = threading.Thread(target=job.run)
        waiting.start()
        waiting.join(1)
        assert waiting.is_alive()
    waiting.join(60)
    assert job._is_decided()


def test_numbers_are_said_with_the_filters_that_were_asked_for() -> None:
    counts = {"documents": 50_000, "exact copies": 1_100, "near-copies": 103, "too short": 0}
    line = "removed 1,203 of 50,000 documents: 1,100 exact copies, 103 near-copies, 0 too short"
    assert format_removed(counts) == line


def test_bad_flags_are_refused_in_a_line(tmp_path: Path, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"--max-characters 3 is less than --min-characters 4, so that no document"):
        Filters(min_characters=4, max_characters=3)
    for flag in ("--threshold", "--num-perm", "--ngram-size"):
        with pytest.raises(SystemExit):
            main(["tokenize", "text", "--tokenizer", saved, "--output", "out", "--deduplicate", "exact", flag, "1"])
        assert f"error: {flag} needs --deduplicate near: add it, or leave the flag out\n" in capsys.readouterr().err
    data = Data(source=_write(tmp_path / "text", FILES))
    tokenize(data, saved, tmp_path / "tokens", filters=Filters(deduplicate="exact"))
    for filters in (Filters(), Filters(min_characters=40, deduplicate="exact")):
        with pytest.raises(ValueError, match=r"it was begun with other values of filters: choose another folder"):
            tokenize(data, saved, tmp_path / "tokens", filters=filters)


def test_near_copies_are_refused_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--deduplicate near needs datasketch, which is not installed: pip install"):
        Filters(deduplicate="near")
