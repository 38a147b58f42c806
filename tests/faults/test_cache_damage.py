"""A damaged cache does not change the result of a run, and a warning names the file."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from minilm import Data
from minilm.data.array_file import ArrayFile, create_array_file
from minilm.utils import cache
from minilm.utils.atomic_files import hash_file
from minilm.utils.cache import get_cache_folder, open_entry
from tests.faults.damage import DAMAGES, configs, trial
from tests.faults.power import disk_of
from tests.jobs import CONFIG, config_in, end_of, finish, start

pytestmark = pytest.mark.scorecard(40)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of an empty cache."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return get_cache_folder()


@pytest.mark.parametrize(
    "name", ["masked LM with words", "masked LM of a saved dataset", "causal LM of a stream", "classified pairs"]
)
def test_results_are_the_same_after_damage_to_each_file(
    name: str, home: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    files, damages, wrong = trial(configs(tmp_path)[name], ways=3)
    assert not wrong
    assert files >= 4
    figure(f"{name}: {files} files, {damages} damages, {len(wrong)} wrong results")


def test_a_run_on_a_damaged_cache_ends_to_the_bit(tmp_path: Path) -> None:
    config = config_in(tmp_path, steps=4, save_every=4)
    home, planted = tmp_path / "hf", f"import os; os.environ['HF_HOME'] = {str(tmp_path / 'hf')!r}"

    def end(name: str) -> dict[str, object]:
        run = replace(config.run, output_dir=str(tmp_path / name))
        finish(replace(config, run=run), tmp_path, planted=planted)
        return end_of(tmp_path / name)

    right = end("right")
    for path in (home / "minilm").glob("*/*"):
        if path.name in ("ids.npy", "fingerprint"):
            os.truncate(path, path.stat().st_size // 2)
    assert end("again") == right


def open_many(name: str, tries: int, damaging: bool) -> int:
    """Open an entry many times. Either damage it now and then, or return how often its file was missing."""
    wrong = 0
    for number in range(tries):
        folder = open_entry(name, lambda folder: (folder / "file").write_text("whole" * 1000))
        if damaging:
            if number % 3 == 0:
                DAMAGES[number % 2](folder / "file", folder)
        else:
            wrong += not (folder / "file").exists()
    return wrong


def test_several_processes_open_a_damaged_entry_at_once(home: Path) -> None:
    children = []
    for number in range(4):
        if (child := os.fork()) == 0:
            logging.disable()
            status = 1
            try:
                status = min(open_many("made", 60, damaging=number == 0), 100)
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    folder = open_entry("made", lambda folder: (folder / "file").write_text("whole" * 1000))
    assert (folder / "file").read_text() == "whole" * 1000
    assert os.listdir(home) == ["made"]


def test_a_deleted_cache_does_not_disturb_a_process_that_has_it_open(home: Path) -> None:
    def build(folder: Path) -> None:
        with create_array_file(folder / "ids.npy", np.dtype(np.uint16)) as file:
            file.write(np.arange(1000, dtype=np.uint16).data)

    file = ArrayFile(open_entry("ids", build) / "ids.npy")
    shutil.rmtree(home)
    assert np.array_equal(file[990:], np.arange(990, 1000))
    assert ArrayFile(open_entry("ids", build) / "ids.npy")[5:6] == 5


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    with create_array_file(tmp_path / "ids.npy", np.dtype(np.uint16)) as out:
        out.write(np.arange(1000, dtype=np.uint16).data)
    file = ArrayFile(tmp_path / "ids.npy")
    os.truncate(tmp_path / "ids.npy", 500)
    with pytest.raises(OSError, match=r"ids\.npy was truncated while the run read it"):
        file[900:]


def test_blocks_at_even_distances_of_a_very_long_file_are_checked(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(cache, "_CHECKED_BYTES", 1000)

    def build(folder: Path) -> None:
        (folder / "file").write_bytes(bytes(10_050))

    def changed(at: int) -> bool:
        with (open_entry("long", build) / "file").open("r+b") as file:
            file.seek(at)
            file.write(b"x")
        caplog.clear()
        open_entry("long", build)
        return "has a different checksum" in caplog.text

    # Of 101 blocks, about every tenth and the last are read.
    assert [block for block in range(101) if changed(block * 100 + 30)] == [9, 19, 29, 39, 49, 59, 69, 79, 89, 100]
    os.truncate(home / "long" / "file", 10_049)
    caplog.clear()
    assert (open_entry("long", build) / "file").stat().st_size == 10_050
    assert "has a different size" in caplog.text


def test_the_checksum_of_a_file_is_that_of_its_bytes(home: Path) -> None:
    content = os.urandom(2**21 + 12_345)
    folder = open_entry("made", lambda folder: (folder / "file").write_bytes(content))
    facts = json.loads((folder / "manifest.json").read_text())["files"]["file"]
    assert facts == {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def test_an_entry_is_checked_faster_than_sha256_would(home: Path, figure: Callable[[str], None]) -> None:
    size = 2**27
    folder = open_entry("large", lambda folder: (folder / "file").write_bytes(os.urandom(2**20) * 128))
    begin = time.process_time()
    open_entry("large", lambda folder: None)
    seconds = time.process_time() - begin
    begin = time.process_time()
    hash_file(folder / "file")
    assert seconds < time.process_time() - begin
    figure(f"checked at {size / seconds / 1e9:.0f} GB/s")


@pytest.mark.parametrize(("size", "streaming"), [("16k", False), ("2m", False), ("256k", True)])
def test_a_full_disk_below_the_cache_is_named(size: str, streaming: bool, tmp_path: Path) -> None:
    text = "\n".join(f"{number} {number * 7919 % 10007} a line like many others, and long" for number in range(20_000))
    (tmp_path / "text.txt").write_text(text)
    config = replace(CONFIG, data=Data(source=str(tmp_path / "text.txt"), eval_fraction=0.1, streaming=streaming))
    with disk_of(size, tmp_path) as disk:
        planted = (
            f"import os, datasets; os.environ['HF_HOME'] = {str(disk)!r}\n"
            f"datasets.config.HF_DATASETS_CACHE = {str(disk / 'datasets')!r}"
        )
        run = replace(config.run, max_steps=1, output_dir=str(tmp_path / "out"))
        job = start("fork", replace(config, run=run), tmp_path, processes=1, planted=planted)
        assert job.status() == 2
        line = job.stderr.read_text().splitlines()[-1]
        full = (
            rf"error: the disk is full while the cache {disk}(/minilm)? is written: free some space, or set HF_HOME .*"
        )
        assert re.fullmatch(full, line)
        assert not list(disk.glob("minilm/.*"))
    assert not (tmp_path / "out").exists()
