"""Law 1 for hosts that have different pieces of tokenised shards: the steps of one process that has all of them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

import minilm.distributed.piece_exchange
from minilm import Config, Data
from minilm.commands.dry_run import dry_run
from minilm.config import Phase
from minilm.data.token_shards import check_piece_file
from minilm.data.tokenize_source import tokenize
from minilm.data.window_encoder import describe_windows, open_windows
from minilm.distributed.piece_exchange import exchange_pieces
from minilm.objectives.factory import prepare_run
from minilm.train import train
from tests.jobs import CONFIG, end_of, finish, fork, in_folder, without_dropout, write_text
from tests.launch import read_log
from tests.laws.resume_everywhere import stopped_after

STEPS = 8
WINDOW_TOKENS = 300
# Relative to the working directory of a host.
PIECES = Data(source="both", window_tokens=WINDOW_TOKENS)
SOURCES = Data(source=("a", "b"), weights=(1, 2), window_tokens=WINDOW_TOKENS)
TOKEN_FILES = ("ids.npy", "begins.npy")


def remove_tokens(folder: Path, kept: Callable[[int], bool]) -> None:
    """Remove the tokens of each piece of a folder for whose number `kept` is False."""
    for number, piece in enumerate(sorted(folder.glob("tokens-*"))):
        for name in () if kept(number) else TOKEN_FILES:
            (piece / name).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """`all` has all tokens, and `host-0` and `host-1` have different ones."""
    place = tmp_path_factory.mktemp("hosts")
    tokenizer.save_pretrained(place / "tokenizer")
    texts = [write_text(place / f"{name}.txt") for name in "ab"]
    Path(texts[1]).write_text(Path(texts[1]).read_text().replace("fox", "dog"))
    for name, source in (("a", texts[0]), ("b", texts[1]), ("both", tuple(texts))):
        with pytest.MonkeyPatch.context() as patch:
            # A piece ends with a batch of rows, so that these files have several.
            patch.setattr("minilm.data.columnar_files.BATCH_ROWS", 10)
            tokenize(Data(source=source), str(place / "tokenizer"), place / "all" / name, words=True, piece_tokens=200)
    for rank in range(2):
        host = shutil.copytree(place / "all", place / f"host-{rank}")
        remove_tokens(host / "both", lambda number, rank=rank: number % 2 == rank)  # type: ignore[misc]
        remove_tokens(host / "ba"[rank], lambda number: False)
    return place


def on_hosts(place: Path) -> str:
    """Return code by which each process of a job is on a host of its own."""
    return f"""
import os
os.chdir({str(place / "host-")!r} + os.environ["RANK"])
os.environ.update(HF_HOME=os.getcwd(), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
"""


def settings(data: Data, layout: str = "documents", **run: Any) -> Config:
    short = replace(CONFIG.run, max_steps=STEPS, eval_every=5, **run)
    batch = replace(CONFIG.batch, layout=layout)
    return replace(CONFIG, data=replace(data, eval_fraction=0.05), batch=batch, run=short)


@pytest.mark.parametrize(
    ("data", "layout", "run"),
    [
        (PIECES, "documents", {}),
        (SOURCES, "blocks", {}),
        (replace(PIECES, window_tokens=10**6), "blocks", {"phases": (Phase(start=0.5, examples=4),)}),
    ],
    ids=["pieces", "sources", "one window"],
)
def test_two_hosts_make_the_steps_of_one_process_that_has_all_tokens(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Data, layout: str, run: dict[str, Any]
) -> None:
    config = without_dropout(settings(data, layout, **run))
    finish(in_folder(config, tmp_path / "two"), tmp_path, 2, on_hosts(place))
    monkeypatch.chdir(place / "all")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    train(in_folder(config, tmp_path / "one"))
    (ours, our_evaluations), (theirs, their_evaluations) = (read_log(tmp_path / name) for name in ("two", "one"))
    assert len(ours) == STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["tokens"] == other["tokens"]
        for key in ("loss", "grad_norm"):
            assert mine[key] == pytest.approx(other[key], rel=1e-5)
    for mine, other in zip(our_evaluations, their_evaluations, strict=True):
        assert mine["unigram_bits_per_byte"] == other["unigram_bits_per_byte"]
        assert mine["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-5)


def test_two_hosts_resume_to_the_bit(place: Path, tmp_path: Path) -> None:
    config = settings(PIECES)
    finish(in_folder(config, tmp_path / "reference"), tmp_path, 2, on_hosts(place))
    folder = stopped_after(5, tmp_path / "reference", tmp_path / "stopped")
    finish(in_folder(config, folder, resume="latest"), tmp_path, 2, on_hosts(place))
    assert end_of(folder) == end_of(tmp_path / "reference")


def test_two_hosts_can_plan_a_run(place: Path, tmp_path: Path) -> None:
    def plan() -> int:
        exec(on_hosts(place), {})
        dry_run(in_folder(settings(PIECES), tmp_path / "out"), "run")
        return 0

    job = fork(plan, tmp_path / "stderr", 2)
    for process in job:
        assert process.wait(60) == 0, (tmp_path / "stderr").read_text()


def test_a_piece_that_no_host_has_is_named(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "all" / "both", tmp_path / "both")
    remove_tokens(tmp_path / "both", lambda number: number != 1)
    config = settings(replace(PIECES, source=str(tmp_path / "both")))
    with pytest.raises(ValueError, match=r"tokens-00000-00001/ids\.npy: no host of the run has it: copy it to one"):
        train(in_folder(config, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_tokens_that_a_host_lacks_are_never_read(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that knows nothing of hosts gets an error in place of wrong ids."""
    monkeypatch.chdir(place / "host-0")
    for data in (PIECES, replace(PIECES, window_tokens=10**6)):
        prepared = prepare_run(settings(data))
        with pytest.raises(ValueError, match=r"both/tokens-00000-00001/ids\.npy: this host does not have it"):
            prepared.train.count_ids(1000)


def test_blocks_need_a_host_with_all_files_of_a_source(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather_from_both(bits: list[Any]) -> list[Any]:
        return [*bits, ~bits[0]]

    monkeypatch.setattr(minilm.distributed.piece_exchange, "gather_object", gather_from_both)
    monkeypatch.chdir(place / "host-0")
    prepared = prepare_run(settings(PIECES, "blocks"))
    with pytest.raises(ValueError, match=r"^batch\.layout blocks .* no host has all files of a source"):
        exchange_pieces(prepared)


def test_tokens_that_vanish_during_a_run_end_it(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place / "host-0" / "both", tmp_path / "both")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    windows = prepare_run(settings(PIECES)).stream
    assert windows is not None
    description = describe_windows(windows)
    assert open_windows(description).pieces == windows.pieces
    remove_tokens(tmp_path / "both", lambda number: False)
    with pytest.raises(ValueError, match="the files of the stream have changed"):
        open_windows(description)
    # This process has read them before.
    check_piece_file.cache_clear()
    with pytest.raises(ValueError, match=r"(ids|begins)\.npy: cannot be read"):
        windows.start_of(20)
