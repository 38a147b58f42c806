"""Laws 1 and 2 for streams of several windows: the same steps for any number of processes and workers, and resumed."""

import logging
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import minilm.data.stream_batches
import minilm.data.stream_windows
import minilm.data.window_encoder
from minilm import Config, Data, Phase
from minilm.data.batch_plan import Plan
from minilm.data.stream_batches import WindowReader
from minilm.data.stream_windows import StreamWindows
from minilm.models.sparse_head import SparseHead
from minilm.objectives.factory import prepare_run
from minilm.runs.session import _limit_tokens
from minilm.train import train
from tests.jobs import CONFIG, STEPS, end_of, finish_all, in_folder, launched, start, without_dropout, write_text
from tests.launch import read_log
from tests.laws.resume_everywhere import stopped_after

# Windows of a few steps, so that the run crosses six of them and begins the text anew.
WINDOW_TOKENS = 300


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("text")
    sources = (write_text(folder / "a.txt"), write_text(folder / "b.txt"))
    data = Data(source=sources, eval_fraction=0.1, streaming=True, window_tokens=WINDOW_TOKENS)
    return replace(CONFIG, data=data)


@pytest.fixture(scope="module")
def reference(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("out") / "reference"
    train(in_folder(config, folder))
    return folder


@pytest.fixture(scope="module")
def edges(config: Config) -> list[int]:
    """The first steps of the windows."""
    windows = prepare_run(config).stream
    assert isinstance(windows, StreamWindows)
    starts = [windows.start_of(number).step for number in range(8)]
    return [start for start in starts if start < STEPS]


def test_a_run_resumed_inside_a_window_or_at_its_edge_ends_the_same_to_the_bit(
    config: Config, reference: Path, edges: list[int], tmp_path: Path
) -> None:
    assert len(edges) >= 4
    for step in (edges[1], edges[2] - 1, edges[3] + 1):
        folder = stopped_after(step, reference, tmp_path / f"stopped-{step}")
        train(in_folder(config, folder, resume="latest"))
        assert end_of(folder) == end_of(reference), step


def test_loader_workers_change_no_bit(config: Config, reference: Path, tmp_path: Path) -> None:
    train(in_folder(replace(config, batch=replace(config.batch, workers=2)), tmp_path / "workers"))
    assert end_of(tmp_path / "workers") == end_of(reference)


def test_two_processes_make_the_same_steps(config: Config, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    finish_all(
        [(in_folder(without_dropout(config), folder), number) for number, folder in enumerate(folders, 1)], tmp_path
    )
    for ours, theirs in zip(*(read_log(folder)[0] for folder in folders), strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5)


def test_a_host_with_other_files_is_named_before_the_first_step(config: Config, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"host-{rank}").mkdir()
        text = Path(write_text(tmp_path / f"host-{rank}" / "text.txt"))
    with text.open("a") as file:
        file.write("one more\n")
    host = f"""
import os
rank = os.environ["RANK"]
os.chdir({str(tmp_path / "host-")!r} + rank)
os.environ.update(HF_HOME=os.getcwd(), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
"""
    config = replace(config, data=replace(config.data, source="text.txt"))
    job = start("fork", in_folder(config, tmp_path / "out"), tmp_path, processes=2, planted=host)
    assert job.status() != 0
    says = f"host {socket.gethostname()}: its documents or its tokenizer are not those of the main process"
    assert says in job.stderr.read_text()
    assert not (tmp_path / "out" / "log.jsonl").exists()


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_a_host_that_training_waits_for_is_named_once(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, local_rank: str
) -> None:
    for name, value in (launched(1) | {"LOCAL_RANK": local_rank}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(minilm.data.window_encoder, "_LEAST_TOKENS", 0)
    # The next window is never encoded in time.
    monkeypatch.setattr(minilm.data.stream_batches, "encode_ahead", lambda windows, number: None)
    windows = prepare_run(replace(config, run=replace(config.run, seed=77))).stream
    assert windows is not None
    reader = WindowReader(
        windows,
        lambda examples, number: Plan(examples.lengths, examples=8, micro_tokens=40),
        lambda number, examples: None,
        STEPS,
    )
    with caplog.at_level(logging.ERROR, "minilm"):
        for step in range(windows.start_of(1).step, windows.start_of(2).step + 1):
            reader.at_step(step)
    waits = f"host {socket.gethostname()}: training waits for window 3 of the stream"
    assert [record.message.startswith(waits) for record in caplog.records] == [True] * (local_rank == "0")


def test_a_killed_run_is_resumed_to_the_bit(config: Config, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    job = start("fork", in_folder(config, folder), tmp_path, processes=1)
    job.wait_for_steps(folder, 8)
    job.kill()
    job.status()
    train(in_folder(config, folder, resume="latest"))
    assert end_of(folder) == end_of(reference)


def test_settings_that_need_the_size_of_the_stream_are_refused(config: Config) -> None:
    endless = replace(config, run=replace(config.run, max_steps=None))
    with pytest.raises(
        ValueError,
        match=r"^data\.streaming: .* more than the 300 tokens of a window.*set run\.max_steps or data\.max_tokens",
    ):
        prepare_run(endless)
    phases = (Phase(start=0.5, examples=4),)
    with pytest.raises(ValueError, match=r"^run\.phases: .*only the mask rate can change"):
        prepare_run(replace(config, run=replace(config.run, phases=phases)))
    masked = (Phase(start=0.5, mask_rate=0.4),)
    assert prepare_run(replace(config, run=replace(config.run, phases=masked))).stream is not None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_ends_by_its_number_of_tokens(config: Config, tmp_path: Path, streaming: bool) -> None:
    one = replace(
        config,
        data=replace(config.data, streaming=streaming, max_tokens=800, window_tokens=400),
        run=replace(config.run, max_steps=None, eval_every=None, save_every=0),
    )
    result = train(in_folder(one, tmp_path / "out"))
    lines = read_log(tmp_path / "out")[0]
    tokens = [line["tokens"] for line in lines]
    # The sum over the steps differs from the mean by the lengths of a few examples.
    assert 650 <= tokens[-1] <= 950
    assert result.figures["steps"] == len(lines)
    assert lines[-1]["lr"] < lines[0]["lr"] / 4


def test_a_text_of_a_later_window_that_the_model_would_misread_ends_the_run_before_that_window(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minilm.data.stream_windows, "_SAMPLE_TOKENS", 100)
    sources = [write_text(tmp_path / name) for name in ("a.txt", "b.txt")]
    with Path(sources[1]).open("a") as file:
        file.write("a page with a [SEP] inside\n" * 3)
    config = replace(config, data=replace(config.data, source=tuple(sources)))
    prepared = prepare_run(config)
    windows, separator = prepared.stream, prepared.tokenizer.sep_token_id
    assert isinstance(windows, StreamWindows)
    examples = [*prepared.all_train, prepared.eval]
    assert not any((np.asarray(part.ids[:]) == separator).any() for part in examples)
    number = next(n for n in range(8) if (np.asarray(windows.open(n).ids[:]) == separator).any())
    assert number > 0
    monkeypatch.setattr(SparseHead, "_find_misread_ids", lambda self: (separator,))
    message = rf"of the texts of window {number + 1} of the stream hold the special token \[SEP\]"
    with pytest.raises(ValueError, match=message):
        train(in_folder(config, tmp_path / "out"))
    assert len(read_log(tmp_path / "out")[0]) == windows.start_of(number).step


def test_steps_larger_than_the_sample_of_the_stream_count_whole(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minilm.data.stream_windows, "_SAMPLE_TOKENS", 20)
    data = replace(config.data, max_tokens=1640, window_tokens=820)
    one = replace(config, data=data, run=replace(config.run, max_steps=None))
    prepared = prepare_run(one)
    assert prepared.stream is not None
    assert prepared.train.lengths.sum() < 50
    steps = _limit_tokens(one, prepared).run.max_steps
    assert steps is not None
    assert abs(steps - prepared.stream.start_of(2).step) <= 4
