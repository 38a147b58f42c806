"""What a process says when it loses the others, and which one says it."""

import os
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from minilm.commands.recipe import exit_on_error
from minilm.distributed.launch import lost_peer_as_error
from minilm.runs.checkpoint import Progress
from tests.checkpoints import saver_in
from tests.jobs import launched

CLOSED = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:53400. This is "
    "typically caused by a remote worker crashing. Check its logs"
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(CLOSED), "Connection closed by peer [127.0.0.1]:53400"),
        (RuntimeError("[gloo/x.cc:78] Timed out waiting 5000ms for recv"), "Timed out waiting 5000ms for recv"),
        (RuntimeError("Application timeout caused pair closure"), "Application timeout caused pair closure"),
        (
            dist.DistBackendError("NCCL communicator was aborted on rank 1\nmore"),
            "NCCL communicator was aborted on rank 1",
        ),
        (dist.DistNetworkError("the server has gone"), "the server has gone"),
    ],
    ids=["closed", "silent", "silent before", "nccl", "store"],
)
def test_an_error_for_want_of_another_process_is_one_line(error, reason):
    with pytest.raises(ConnectionError) as caught, lost_peer_as_error(lambda: "go on"):
        raise error
    assert str(caught.value) == f"lost contact with another process of the job ({reason}); go on"


def test_an_error_of_another_kind_stays_what_it_is():
    with pytest.raises(RuntimeError, match="out of memory"), lost_peer_as_error():
        raise RuntimeError("CUDA out of memory")


def test_the_hint_names_the_checkpoint_to_resume_from_once_it_is_written(tokenizer, tmp_path):
    saver = saver_in(tmp_path, tokenizer)
    assert saver.resume_hint() == "no checkpoint was saved"
    saver.save(Progress(step=7))
    assert saver.resume_hint() == "--run.resume latest continues from checkpoint-7"


def test_of_the_processes_of_a_host_the_first_to_end_tells_why(tmp_path, monkeypatch, capsys):
    def lose() -> None:
        raise ConnectionError("lost")

    monkeypatch.setattr(os, "_exit", sys.exit)
    for rank, message in ((1, "error: lost\n"), (0, "")):
        (tmp_path / str(rank)).mkdir()
        for name, value in launched(rank).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(Path(tmp_path, str(rank), "error.json")))
        with pytest.raises(SystemExit):
            exit_on_error(lose)
        assert capsys.readouterr().err == message
