"""Tokenised shards: the documents, windows and steps of the text; resumed after any piece; and damage is found."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minilm.commands.main import main
from minilm.config import Data, Tokens
from minilm.data import tokenize_source
from minilm.data.corpus import ExampleForm
from minilm.data.shards import open_pools
from minilm.data.stream_windows import StreamWindows
from minilm.data.streaming import stream_documents
from minilm.data.token_shards import MANIFEST, is_tokenized
from minilm.data.tokenize_source import tokenize
from minilm.objectives.factory import prepare_run
from minilm.train import train
from minilm.utils.cache import get_cache_folder
from tests.jobs import CONFIG, end_of, write_text

PIECE_TOKENS = 700


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece ends with a batch of rows, so that these files have several."""
    monkeypatch.setattr("minilm.data.columnar_files.BATCH_ROWS", 20)


@pytest.fixture
def source(tmp_path: Path) -> tuple[str, str]:
    for name in "ab":
        (tmp_path / "text" / name).mkdir(parents=True)
    one, two = (write_text(tmp_path / "text" / name / "text.txt") for name in "ab")
    Path(one).write_text("\n\nnaïve “quotes”\n" + Path(one).read_text().replace("fox", "dog"))
    return one, two


@pytest.fixture
def saved(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def folder(tmp_path: Path, source: tuple[str, str], saved: str) -> Path:
    tokens = tokenize(Data(source=source), saved, tmp_path / "tokens", words=True, piece_tokens=PIECE_TOKENS)
    assert tokens > 2 * PIECE_TOKENS
    return tmp_path / "tokens"


def _windows(data: Data, tokenizer: PreTrainedTokenizerBase, *, causal: bool) -> StreamWindows:
    pools = open_pools(data, {}, weighted=False)
    assert pools is not None
    return StreamWindows(
        data=data,
        pools=pools,
        revisions={},
        identity=stream_documents(data)[0].identity,
        tokenizer=tokenizer,
        form=ExampleForm.of(tokenizer, max_length=24, layout="documents", overflow="split", causal=causal),
        words=True,
        tokens=300,
        seed=3,
        held_out=0.05,
        examples=4,
        row_tokens=None,
    )


@pytest.mark.parametrize("causal", [False, True])
def test_the_windows_and_the_held_out_texts_are_those_of_the_text(
    source: tuple[str, str], folder: Path, tokenizer: PreTrainedTokenizerBase, causal: bool
) -> None:
    data = [Data(source=where, streaming=True) for where in (source, str(folder))]
    text, tokens = (_windows(one, tokenizer, causal=causal) for one in data)
    for number in range(9):
        ours, theirs = tokens.open(number), text.open(number)
        for name in ("ids", "start", "stop", "is_word_start"):
            assert np.array_equal(getattr(ours, name)[:], getattr(theirs, name)[:]), name
        assert tokens.start_of(number).step == text.start_of(number).step
    held_out = [[*stream_documents(one)[1][""].texts()] for one in data]
    assert held_out[0] == held_out[1] != []


def test_a_run_makes_the_steps_of_the_text_to_the_bit(
    source: tuple[str, str], folder: Path, saved: str, tmp_path: Path
) -> None:
    config = replace(CONFIG, tokens=Tokens(name=saved), run=replace(CONFIG.run, max_steps=8))
    data = [Data(source=source, streaming=True, window_tokens=300), Data(source=str(folder), window_tokens=300)]
    for number, one in enumerate(data):
        run = replace(config.run, output_dir=str(tmp_path / f"out-{number}"))
        train(replace(config, data=one, run=run))
    assert end_of(tmp_path / "out-0") == end_of(tmp_path / "out-1")


def test_an_interrupted_command_continues_and_writes_the_same(
    source: tuple[str, str], folder: Path, saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = tokenize_source._TokenPieces.write, list[str]()

    def interrupt(pieces: Any, folder: Path) -> Any:
        calls.append(folder.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(pieces, folder)

    def again() -> None:
        tokenize(Data(source=source), saved, tmp_path / "again", words=True, piece_tokens=PIECE_TOKENS)

    monkeypatch.setattr(tokenize_source._TokenPieces, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        again()
    assert not is_tokenized(str(tmp_path / "again"))
    again()
    # The first piece is not written again.
    assert calls.count(calls[0]) == 1
    assert (tmp_path / "again" / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()


def test_several_processes_write_the_same(
    source: tuple[str, str], saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tokenize", *source, "--tokenizer", saved, "--processes"]
    for processes in ("1", "2"):
        main([*words, processes, "--output", str(tmp_path / processes)])
    assert f"written: {tmp_path / '2'}, " in capsys.readouterr().out
    assert (tmp_path / "1" / MANIFEST).read_bytes() == (tmp_path / "2" / MANIFEST).read_bytes()


class _KilledProcess:
    """A job that ends the process that receives it, as the kernel does where memory is short."""

    folder = Path("tokens")

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_a_killed_process_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    # A forked process dies as well as a spawned one, which would import the libraries first.
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr("multiprocessing.get_context", lambda method: fork)
    with pytest.raises(ValueError, match="tokens: a process was killed"):
        tokenize_source._run_processes(cast(Any, _KilledProcess()), 2)
    assert dict(os.environ) == before


def _cut(folder: Path) -> None:
    path = folder / "tokens-00000-00001" / "ids.npy"
    path.write_bytes(path.read_bytes()[:-2])


def _remove(folder: Path) -> None:
    shutil.rmtree(folder / "tokens-00001-00000")


@pytest.mark.parametrize(
    ("damage", "says"),
    [(_cut, r"tokens-00000-00001/ids\.npy: it differs from its SHA-256"), (_remove, r"tokens-00001-00000/.*cannot be")],
)
def test_damage_is_found_before_it_is_trained_on(folder: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=says):
        prepare_run(replace(CONFIG, data=Data(source=str(folder))))


@pytest.mark.parametrize(
    ("data", "tokens", "says"),
    [
        ({}, {"name": "bert"}, r"it was tokenised with another tokenizer .* pass --tokens\.name \S+/tokens/tokenizer"),
        ({"eval_fraction": 0.5}, {}, r"texts of a share of 0\.05 for evaluation, less than data\.eval_fraction 0\.5"),
        ({"split": "train[:5]"}, {}, r"tokenised shards have no split 'train\[:5\]'"),
    ],
)
def test_a_run_that_cannot_use_the_shards_is_refused(
    folder: Path, unigram: PreTrainedTokenizerBase, data: dict[str, Any], tokens: dict[str, Any], says: str
) -> None:
    if tokens:
        unigram.save_pretrained(folder.parent / "bert")
        tokens = {"name": str(folder.parent / "bert")}
    config = replace(CONFIG, data=Data(source=str(folder), **data), tokens=Tokens(**tokens))
    with pytest.raises(ValueError, match=says):
        prepare_run(config)


def test_weighted_shards_need_no_window_before_the_first_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    shutil.copytree(folder, tmp_path / "other")
    data = Data(source=(str(folder), str(tmp_path / "other")), weights=(1, 2), window_tokens=300)
    assert prepare_run(replace(CONFIG, data=data)).stream is not None
    assert not [*get_cache_folder().glob("window*")]


def test_words_are_refused_where_the_shards_do_not_have_them(
    source: tuple[str, str], saved: str, tmp_path: Path
) -> None:
    tokenize(Data(source=source), saved, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"does not say where words begin, which objective\.unit needs"):
        prepare_run(replace(CONFIG, data=Data(source=str(tmp_path / "plain"))))


def test_a_folder_of_something_else_is_not_written_to(source: tuple[str, str], folder: Path, saved: str) -> None:
    before = json.loads((folder / MANIFEST).read_bytes())
    with pytest.raises(ValueError, match=r"it was begun with other values of words, piece_tokens: choose another"):
        tokenize(Data(source=source), saved, folder)
    with pytest.raises(ValueError, match=r"it is not empty: choose another folder"):
        tokenize(Data(source=source), saved, Path(saved))
    assert json.loads((folder / MANIFEST).read_bytes()) == before


def test_a_command_that_was_killed_while_it_began_finds_its_folder_again(
    tmp_path: Path, source: tuple[str, str], folder: Path, saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    again = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tokenize(Data(source=source), saved, again, words=True, piece_tokens=PIECE_TOKENS)
    assert again.exists()
    tokenize(Data(source=source), saved, again, words=True, piece_tokens=PIECE_TOKENS)
    assert (again / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()
    assert (again / "tokenizer" / "tokenizer.json").read_bytes() == (
        folder / "tokenizer" / "tokenizer.json"
    ).read_bytes()
