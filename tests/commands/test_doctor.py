"""What `minilm doctor` finds, and what it says to fix."""

import json
import multiprocessing
import shutil
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from minilm.commands import doctor
from minilm.commands.doctor import Finding
from minilm.distributed import hardware

CPU = torch.device("cpu")


def test_each_finding_is_one_line_and_two_processes_connect(run, monkeypatch):
    monkeypatch.setattr(doctor, "_TIMEOUT_SECONDS", 300.0)
    monkeypatch.setattr(doctor, "_threads", lambda: Finding(what="threads", found="1", fix="unset it"))
    status, output, _ = run("doctor", "--json")
    found = {line["what"]: line for line in map(json.loads, output)}
    assert list(found) == [
        *("hardware", "precision", "memory", "threads", "versions", "disk", "cache", "hub", "processes"),
    ]
    assert found["processes"]["found"].startswith("2 connected over gloo")
    assert found["processes"]["fix"] == ""
    assert "bf16 matrix product here runs at" in found["precision"]["found"]
    assert f"torch {torch.__version__}" in found["versions"]["found"]
    assert (found["threads"]["fix"], status) == ("unset it", 1)


def test_a_finding_with_a_fix_is_marked(run, monkeypatch):
    found = [Finding(what="disk", found="none free", fix="free some"), Finding(what="hub", found="asked")]
    monkeypatch.setattr(doctor, "check_machine", lambda: iter(found))
    assert run("doctor") == (1, ["FIX   disk       none free -> free some", "ok    hub        asked"], [])
    monkeypatch.setattr(doctor, "check_machine", lambda: iter(found[1:]))
    assert run("doctor")[0] is None


def _fail(rank: int, folder: str) -> None:
    raise RuntimeError("no interface")


def _hang(rank: int, folder: str) -> None:
    time.sleep(60)


@pytest.mark.parametrize(
    ("instead", "patience", "message"),
    [(_fail, 60, "(RuntimeError: no interface)"), (_hang, 0.5, "(no answer within 0.5 seconds)")],
)
def test_processes_that_fail_or_hang_are_reported(instead, patience, message, monkeypatch):
    monkeypatch.setattr(doctor, "_TIMEOUT_SECONDS", patience)
    monkeypatch.setattr(doctor, "_sum_ranks", instead)
    # Forked processes save the seconds of imports. The test of the whole command spawns its processes.
    monkeypatch.setattr(doctor, "spawn", partial(start_processes, start_method="fork"))
    finding = doctor._processes()
    assert message in finding.found
    assert finding.fix
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("threads", "usable", "variable", "fix"),
    [
        (8, 8, None, ""),
        (1, 8, "1", "OMP_NUM_THREADS=1 slows"),
        (1, 1, "1", ""),
        (8, 2, None, "set OMP_NUM_THREADS=2"),
    ],
)
def test_threads(threads, usable, variable, fix, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(doctor, "usable_processors", lambda: usable)
    monkeypatch.setattr(doctor, "_busy_processors", lambda: 0.2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    finding = doctor._threads()
    assert finding.fix.startswith(fix)
    assert bool(finding.fix) == bool(fix)
    assert "other programs" not in finding.found


def test_busy_processors_are_reported_with_the_threads_to_use(monkeypatch):
    monkeypatch.setattr(doctor, "usable_processors", lambda: 4)
    monkeypatch.setattr(doctor, "_busy_processors", lambda: 1.7)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # as it says itself
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    finding = doctor._threads()
    assert finding.fix == ""
    assert "other programs take 1.7 of the 4 processors" in finding.found
    assert "OMP_NUM_THREADS=2 python" in finding.found


def test_versions_that_minilm_does_not_run_on(monkeypatch):
    wanted = ["torch>=2.11", "numpy>=99", "no-such-package>=1", "peft>=9; extra == 'lora'"]
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    assert doctor._versions().fix == 'pip install "numpy>=99" "no-such-package>=1"'


def test_the_memory_of_a_container_counts_and_a_full_disk_is_reported(monkeypatch):
    limits = {"/sys/fs/cgroup/memory.max": 3 * 10**9, "/sys/fs/cgroup/memory.current": 2 * 10**9}
    monkeypatch.setattr(hardware, "_read_number", limits.get)
    finding = doctor._memory(CPU)
    assert finding.found == "1.0 GB free of 3.0 GB allowed here"
    assert "--batch.micro-tokens" in finding.fix
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    assert "--run.output-dir" in doctor._disk().fix
    assert "HF_HOME" in next(doctor._caches()).fix


def test_a_cache_that_cannot_be_written_and_an_offline_hub_are_reported(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    cache, hub = doctor._caches()
    assert cache.found == f"the cache {tmp_path}/file/minilm cannot be written: Not a directory"
    assert cache.fix == "set HF_HOME to another folder"
    assert hub.found == "not used: HF_HUB_OFFLINE set"
