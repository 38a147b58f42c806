"""The short form of tests/faults/power.py, and a disk that is full indeed."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from minilm.runs.checkpoint import find_checkpoint, read_checkpoint
from tests.faults.power import disk_of, every_cut, every_error
from tests.jobs import config_in, start


@pytest.mark.scorecard(13)
def test_a_power_cut_at_any_call_of_a_save_leaves_the_old_checkpoint_or_the_new_one(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    figure(every_cut(tmp_path, tokenizer, "all"))


@pytest.mark.scorecard(13)
def test_an_error_at_any_call_of_a_save_costs_no_checkpoint_and_names_the_new_one(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    figure(every_error(tmp_path, tokenizer))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    with disk_of("1m", tmp_path) as disk:
        yield disk


@pytest.mark.scorecard(14)
def test_a_full_disk_ends_a_run_in_one_line_and_leaves_its_checkpoints_whole(
    small_disk: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    folder = small_disk / "out"
    config = config_in(tmp_path, steps=60)
    run = replace(config.run, output_dir=str(folder), save_every=2, keep_last=99)
    job = start("fork", replace(config, run=run), tmp_path, processes=1)
    assert job.status() == 1
    told = job.stderr.read_text()
    (line,) = re.findall(r"^error: .*$", told, re.MULTILINE)
    assert re.fullmatch(rf"error: {folder}/checkpoint-\d+ could not be written: .*No space left on device.*", line)
    assert "Traceback" not in told
    whole = [read_checkpoint(path).progress.step for path in folder.glob("checkpoint-*")]
    assert sorted(whole) == list(range(2, max(whole) + 1, 2))
    assert not list(folder.glob(".*"))
    assert find_checkpoint("latest", folder).progress.step == max(whole)
    figure(f"{len(whole)} checkpoints filled the disk and are whole; one line; nothing half-written")
