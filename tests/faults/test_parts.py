"""A process that dies or fails while a checkpoint is written in parts leaves nothing that passes for a checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest

from minilm import Config, Data
from minilm.runs.checkpoint import find_complete_checkpoints, read_checkpoint
from tests.distributed.test_sharding import IN_PARTS
from tests.jobs import CONFIG, end_of, finish, start, write_text

STEPS = 4
# In the write of checkpoint 3, one process does this after its part is on disk.
PLANTED = """
import os, signal
import minilm.runs.checkpoint_saver as saver

def write_share(folder, share, *rest, real=saver.write_share):
    files = real(folder, share, *rest)
    if "checkpoint-3" in str(folder) and os.environ["RANK"] == "{rank}":
        {fault}
    return files

saver.write_share = write_share
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
FULL = "raise OSError(28, 'No space left on device')"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    return replace(
        CONFIG, data=Data(source=text, eval_fraction=0.1), run=replace(CONFIG.run, max_steps=STEPS, keep_last=STEPS)
    )


def into(folder: Path, config: Config, resume: str | None = None) -> Config:
    return replace(config, run=replace(config.run, output_dir=str(folder), resume=resume))


@pytest.fixture(scope="module")
def reference(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reference")
    finish(into(place / "out", config), place, 2, IN_PARTS)
    return place / "out"


@pytest.mark.scorecard(12)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (KILL, "lost contact with another process of the job"),
        (FULL, "checkpoint-3 could not be written: No space left"),
    ],
    ids=["killed", "full"],
)
def test_a_part_that_is_not_joined_costs_no_other_checkpoint(fault, reason, rank, config, reference, tmp_path) -> None:
    folder = tmp_path / "out"
    job = start("fork", into(folder, config), tmp_path, planted=IN_PARTS + PLANTED.format(rank=rank, fault=fault))
    assert job.gone(60), job.stderr.read_text()
    assert job.status() != 0
    assert reason in job.stderr.read_text()
    complete = find_complete_checkpoints(folder)
    assert [path.name for path in complete] == ["checkpoint-1", "checkpoint-2"]
    for path in complete:
        read_checkpoint(path)
    finish(into(folder, config, "latest"), tmp_path, 2, IN_PARTS)
    assert not list(folder.glob(".checkpoint*"))
    assert end_of(folder) == end_of(reference)
