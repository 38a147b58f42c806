"""`write_atomically` leaves the old content or all of the new content."""

import os
import stat
from pathlib import Path

import pytest

from minilm.utils.atomic_files import write_atomically


@pytest.mark.parametrize("text", ["", "naïve\n😀\r\n", "x" * 100_000])
@pytest.mark.parametrize("old", [None, "old"])
def test_write_atomically_replaces_the_whole_file_for_all_readers(tmp_path: Path, old: str | None, text: str) -> None:
    path = tmp_path / "a.json"
    if old is not None:
        path.write_text(old)
    write_atomically(path, text)
    assert path.read_bytes() == text.encode()
    assert os.listdir(tmp_path) == ["a.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["write", "fsync", "replace"])
def test_write_atomically_that_fails_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException, old: str | None
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    path, opened = tmp_path / "a.json", Path.open
    if old is not None:
        path.write_text(old)
    if place == "write":

        def unwritable(*arguments: object, **options: object) -> object:
            file = opened(*arguments, **options)  # type: ignore[call-overload]
            file.write = fail
            return file

        monkeypatch.setattr(Path, "open", unwritable)
    else:
        monkeypatch.setattr(os, place, fail)
    with pytest.raises(type(error)):
        write_atomically(path, "new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == ({} if old is None else {"a.json": old})


def test_write_atomically_renames_only_a_file_that_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: (synced.append((os.fstat(file).st_ino, os.fstat(file).st_size)), fsync(file))
    )
    renamed = []
    monkeypatch.setattr(os, "replace", lambda a, b: (renamed.append((os.stat(a).st_ino, len("new"))), replace(a, b)))
    write_atomically(tmp_path / "a.json", "new")
    assert [*renamed, (tmp_path.stat().st_ino, tmp_path.stat().st_size)] == synced
