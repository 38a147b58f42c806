"""Two runs in one folder: the second is refused in one line, and the first ends with the same result."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from minilm import Config
from minilm.utils.folder_lock import LOCK, lock_folder, unlock_at_end
from tests.jobs import Job, config_in, end_of, finish, start

pytestmark = pytest.mark.scorecard(43)

STEPS = 12
# The run stops before its sixth step until there is a file named go.
WAITING = """
import time
from pathlib import Path
import minilm.train
step, done = minilm.train.train_step, []
def wait(*arguments, **options):
    done.append(1)
    while len(done) == 6 and not Path({go!r}).exists():
        time.sleep(0.01)
    return step(*arguments, **options)
minilm.train.train_step = wait
"""


@dataclass
class Live:
    """A run that is alive, and waits until the file `go` exists."""

    config: Config
    folder: Path
    job: Job
    go: Path

    @property
    def main(self) -> int:
        """The id of the process that has the lock."""
        return self.job.processes[0].pid


def run_in(place: Path, **changes: object) -> Config:
    """Return a run of a few steps with a checkpoint after every second step."""
    config = config_in(place, steps=STEPS, save_every=2)
    return replace(config, run=replace(config.run, output_dir=str(place / "out"), keep_last=STEPS, **changes))


def begin(place: Path, *, processes: int = 1, workers: int = 0) -> Live:
    """Begin a run and wait for its second checkpoint."""
    config, go = run_in(place), place / "go"
    config = replace(config, batch=replace(config.batch, workers=workers))
    job = start("fork", config, place, processes=processes, planted=WAITING.format(go=str(go)))
    job.wait_for_steps(place / "out", 4)
    end = time.monotonic() + 60
    while not (place / "out" / "checkpoint-4" / "manifest.json").exists() and time.monotonic() < end:
        time.sleep(0.01)
    return Live(config, place / "out", job, go)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Return the result of a run that nothing disturbs."""
    place = tmp_path_factory.mktemp("reference")
    finish(run_in(place), place)
    assert not (place / "out" / LOCK).exists()
    return end_of(place / "out")


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    """Yield a run that is alive."""
    live = begin(tmp_path)
    yield live
    live.job.kill()


def line_of(job: Job) -> str:
    """Return the one line with which a run is refused."""
    assert job.status() == 2, job.stderr.read_text()
    (line,) = job.stderr.read_text().splitlines()
    return line


def test_each_second_run_is_refused_and_the_first_ends_the_same(
    live: Live, reference: dict[str, object], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    used = (
        f"error: run.output_dir {live.folder} is in use by another run (process {live.main} on "
        f"{socket.gethostname()!r}): wait for its end, stop it, or choose another folder"
    )
    attempts = {
        "overwrite": {"overwrite": True},
        "resume latest": {"resume": "latest"},
        "resume of a checkpoint": {"resume": str(live.folder / "checkpoint-2"), "output_dir": None},
        "new": {},
    }
    names = {path.name for path in live.folder.iterdir()}
    for number, (what, changes) in enumerate(attempts.items()):
        for processes in (1, 2) if what == "overwrite" else (1,):
            place = tmp_path / f"second-{number}-{processes}"
            place.mkdir()
            second = start(
                "fork", replace(live.config, run=replace(live.config.run, **changes)), place, processes=processes
            )
            line = line_of(second)
            assert line == used if what != "new" else "is not empty" in line, line
    assert {path.name for path in live.folder.iterdir()} == names
    live.go.touch()
    assert live.job.status() == 0
    assert end_of(live.folder) == reference
    assert not (live.folder / LOCK).exists()
    figure(f"{len(attempts)} of {len(attempts)} second runs refused in one line; the first ended to the bit")


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0)])
def test_a_run_whose_main_process_was_killed_is_resumed_at_once(
    processes: int, workers: int, reference: dict[str, object], tmp_path: Path
) -> None:
    live = begin(tmp_path, processes=processes, workers=workers)
    beside = [*live.job.processes[0].children(), *live.job.processes[1:]]
    assert len(beside) == workers + processes - 1
    try:
        # A suspended process cannot notice that the main process is gone.
        for process in beside:
            process.suspend()
        os.kill(live.main, signal.SIGKILL)
        live.job.gone(10, live.job.processes[:1])
        assert (live.folder / LOCK).exists()
        again = replace(live.config, run=replace(live.config.run, resume="latest"))
        (tmp_path / "again").mkdir()
        finish(again, tmp_path / "again")
        # Two processes add numbers in another order than one, which changes the last bits.
        assert processes > 1 or end_of(live.folder) == reference
        assert (live.folder / "all_results.json").exists()
    finally:
        for process in beside:
            process.kill()
        live.job.kill()


def test_one_of_two_resumes_at_the_same_time_continues(
    reference: dict[str, object], live: Live, tmp_path: Path
) -> None:
    live.job.kill()
    again = replace(live.config, run=replace(live.config.run, resume="latest"))
    jobs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        planted = WAITING.format(go=str(live.go))  # so that the first is alive until the second was refused
        jobs.append(start("fork", again, tmp_path / name, processes=1, planted=planted))
    processes, end = [process for job in jobs for process in job.processes], time.monotonic() + 60
    while all(each.status() != psutil.STATUS_ZOMBIE for each in processes) and time.monotonic() < end:
        time.sleep(0.05)
    live.go.touch()
    statuses = [job.status() for job in jobs]
    assert sorted(statuses) == [0, 2]
    refused = jobs[statuses.index(2)].stderr.read_text()
    assert re.fullmatch(r"error: run\.output_dir \S+ is in use by another run .*\n", refused)
    assert end_of(live.folder) == reference


def test_the_lock_file_of_a_killed_run_does_not_block_others(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"pid": os.getpid(), "host": "elsewhere"}))
    for _ in range(2):
        with unlock_at_end():
            lock_folder(tmp_path)
            lock_folder(tmp_path)
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[]", b'{"pid": "x"}', b'{"pid": 1}'])
def test_a_lock_is_respected_if_its_file_does_not_name_the_process(content: bytes, tmp_path: Path) -> None:
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        lock_folder(tmp_path)
        (tmp_path / LOCK).write_bytes(content)
        os.write(write, b"x")
        signal.pause()
    os.read(read, 1)
    with pytest.raises(ValueError, match=rf"run\.output_dir {tmp_path} is in use by another run: wait"):
        lock_folder(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with unlock_at_end():
        lock_folder(tmp_path)


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("kept")
    (tmp_path / LOCK).symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic"):
        lock_folder(tmp_path)
    assert (tmp_path / "other").read_text() == "kept"


def test_a_warning_names_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(descriptor: int, kind: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", fail)
    with unlock_at_end():
        lock_folder(tmp_path)
    assert f"{tmp_path} cannot be locked" in caplog.text
