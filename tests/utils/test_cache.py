"""The cache: other processes see an entry only when it is complete."""

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minilm import Data
from minilm.utils.cache import get_cache_folder, open_entry
from tests.jobs import CONFIG, finish, write_text


def test_the_cache_is_beside_the_caches_of_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert get_cache_folder() == tmp_path / "hf" / "minilm"
    monkeypatch.delenv("HF_HOME")
    assert get_cache_folder() == tmp_path / "xdg" / "huggingface" / "minilm"
    assert get_cache_folder().is_dir()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return get_cache_folder()


def write(folder: Path, text: str = "whole") -> None:
    """Fill an entry with a file, an empty file, and a file in a folder."""
    (folder / "file").write_text(text)
    (folder / "empty").touch()
    (folder / "below").mkdir()
    (folder / "below" / "bytes").write_bytes(bytes(range(256)) * 100)


def never(folder: Path) -> None:
    raise AssertionError("an entry of the cache was built again")


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_an_entry_that_fails_to_build_leaves_nothing_behind(home: Path, error: BaseException) -> None:
    def build(folder: Path) -> None:
        write(folder)
        raise error

    with pytest.raises(type(error)):
        open_entry("made", build)
    assert os.listdir(home) == []


def test_an_entry_appears_only_when_it_is_complete_and_is_built_once(home: Path) -> None:
    def build(folder: Path) -> None:
        write(folder)
        assert not (home / "made").exists()

    assert open_entry("made", build) == home / "made"
    assert os.listdir(home) == ["made"]
    assert (open_entry("made", never) / "file").read_text() == "whole"


def test_if_two_build_an_entry_at_once_the_first_to_finish_wins(home: Path) -> None:
    def build(folder: Path) -> None:
        write(folder, "slow")
        open_entry("made", lambda folder: write(folder, "fast"))

    assert (open_entry("made", build) / "file").read_text() == "fast"
    assert os.listdir(home) == ["made"]


def note_writes(folder: str, notes: str) -> None:
    """Have this process note each file below `folder` that it opens for writing, makes or renames.

    The lines are "<process> <event> <path>".
    """
    descriptor = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.mkdir", "os.rename") or (event == "open" and not writing(*arguments[1:])):
            return
        path = str(arguments[1] if event == "os.rename" else arguments[0])
        if path.startswith(folder):
            os.write(descriptor, f"{os.getpid()} {event} {path}\n".encode())

    def writing(mode: str | None, flags: int) -> bool:
        return flags & os.O_ACCMODE != os.O_RDONLY

    sys.addaudithook(note)


@pytest.mark.scorecard(27)
def test_two_processes_on_a_cold_cache_build_each_entry_once(tmp_path: Path, figure: Callable[[str], None]) -> None:
    data = Data(source=write_text(tmp_path / "text.txt"), eval_fraction=0.1)
    run = replace(CONFIG.run, max_steps=2, output_dir=str(tmp_path / "out"))
    cache, notes = tmp_path / "cache" / "minilm", tmp_path / "writes.txt"
    planted = f"""
import os
from tests.utils.test_cache import note_writes
os.environ["HF_HOME"] = {str(cache.parent)!r}
note_writes({str(cache)!r}, {str(notes)!r})
"""
    finish(replace(CONFIG, data=data, run=run), tmp_path, processes=2, planted=planted)
    lines = [line.split(" ", 2) for line in notes.read_text().splitlines()]
    entries = sorted(path.name for path in cache.iterdir())
    kinds = [name.split("-")[0] for name in entries]
    assert kinds == ["corpus", "corpus", *["fingerprint"] * 4, "rows", "tokenizer"]
    assert sorted(path for _, event, path in lines if event == "os.rename") == [str(cache / name) for name in entries]
    assert len({path for _, event, path in lines if event == "os.mkdir" and Path(path).parent == cache}) == len(entries)
    assert len({process for process, event, path in lines if path != str(cache)}) == 1
    assert (tmp_path / "out" / "all_results.json").exists()
    files = [path for path in cache.rglob("*") if path.is_file()]
    figure(f"{len(entries)} entries with {len(files)} files, each built once, by one of two processes")


def test_an_entry_that_cannot_be_renamed_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: object, target: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(source))

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(ValueError, match=r"hf/minilm cannot be written: Permission denied; set HF_HOME to another"):
        open_entry("made", write)
    assert os.listdir(home) == []
