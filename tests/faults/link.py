"""Two hosts, which are network namespaces, train together; then the link between them is cut. Needs root.

Each host reads a stream in windows from files of its own, with a cache of its own. In a second run, each host has the
tokens of one of two sources, which the other host lacks.

python -m tests.faults.link
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset

from minilm import Config, Data, MaskedLM
from minilm.data.tokenize_source import tokenize
from minilm.data.tokenizer_training import train_tokenizer
from tests.jobs import Job, config_in, start, without_dropout
from tests.launch import read_log

TIMEOUT = 5  # run.timeout, seconds
COMPARED = 60  # steps


@dataclass(frozen=True)
class Hosts:
    """The names of two namespaces, and of the interface that each has."""

    names: tuple[str, str]
    interfaces: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What became of the run."""

    difference: float
    """Largest relative difference of a step's loss from one process alone."""
    seconds: float
    """From the cut until the last process that trained was gone."""
    launchers: float
    """Until the launchers were, too."""
    told: list[list[str]]
    """The lines that told why, by host."""
    tracebacks: int
    resumed: int
    """Steps made after the run was resumed."""


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two network namespaces joined by a cable; PermissionError where this process may not make them."""
    unique = os.getpid()
    hosts = Hosts(names=(f"minilm{unique}a", f"minilm{unique}b"), interfaces=(f"m{unique}a", f"m{unique}b"))
    try:
        for name in hosts.names:
            ip("netns", "add", name)
        ip("link", "add", hosts.interfaces[0], "type", "veth", "peer", "name", hosts.interfaces[1])
        for number, (name, interface) in enumerate(zip(hosts.names, hosts.interfaces, strict=True), start=1):
            ip("link", "set", interface, "netns", name)
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", interface)
            for device in ("lo", interface):
                ip("-n", name, "link", "set", device, "up")
        yield hosts
    finally:
        for name in hosts.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def ip(*words: str) -> None:
    try:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise PermissionError("network namespaces need the program ip of iproute2") from error
    if done.returncode != 0:
        raise PermissionError(f"network namespaces need CAP_SYS_ADMIN and CAP_NET_ADMIN: {done.stderr.strip()}")


def start_both(hosts: Hosts, config: Config, place: Path) -> list[Job]:
    """One process of the run on each host, in the working directory `host-<rank>` and with a cache of its own."""
    jobs = []
    for rank, (name, interface) in enumerate(zip(hosts.names, hosts.interfaces, strict=True)):
        own = place / f"host-{rank}"
        rendezvous = ("--nnodes", "2", "--node-rank", str(rank), "--master-addr", "10.77.0.1", "--master-port", "29400")
        own_folders = ("env", "-C", str(own), f"HF_HOME={own / 'hf'}", f"GLOO_SOCKET_IFNAME={interface}")
        prefix = ("ip", "netns", "exec", name, *own_folders, sys.executable, "-m")
        launcher = (*prefix, "torch.distributed.run", *rendezvous, "--nproc-per-node", "1")
        jobs.append(start("torchrun", config, own, command=launcher))
    return jobs


def losses(folder: Path, steps: int) -> list[float]:
    return [line["loss"] for line in read_log(folder)[0][:steps]]


def train_apart(place: Path) -> float:
    """Train on two sources, of which each host has the tokens of one.

    Return the largest relative difference of a step's loss from one process that has the tokens of both.
    """
    config = without_dropout(config_in(place, steps=COMPARED))
    texts = (place / "text.txt").read_text()
    train_tokenizer(Dataset.from_dict({"text": texts.splitlines()}), "bpe", 300).save_pretrained(place / "tokenizer")
    for name, text in (("a", texts), ("b", texts.replace("fox", "dog"))):
        (place / f"{name}.txt").write_text(text)
        tokenize(Data(source=str(place / f"{name}.txt")), str(place / "tokenizer"), place / "both" / name)
    for rank in range(2):
        shutil.copytree(place / "both", place / f"host-{rank}")
        for ids in (place / f"host-{rank}" / "ba"[rank]).glob("*/ids.npy"):
            ids.unlink()
    data = replace(config.data, source=("a", "b"), weights=(1, 2), eval_fraction=0.05, window_tokens=300)
    batch = replace(config.batch, layout="blocks")
    config = replace(config, data=data, batch=batch, objective=MaskedLM(rate=0.3))
    alone = replace(config, run=replace(config.run, output_dir=str(place / "alone")))
    job = start("fork", alone, place, processes=1, planted=f"import os; os.chdir({str(place / 'both')!r})")
    assert job.status() == 0, job.stderr.read_text()
    jobs: list[Job] = []
    with two_hosts() as hosts:
        try:
            jobs = start_both(hosts, replace(config, run=replace(config.run, output_dir=str(place / "out"))), place)
            for job in jobs:
                assert job.status() == 0, job.stderr.read_text()[-3000:]
        finally:
            for job in jobs:
                job.kill()
    return compare_losses(place / "out", place / "alone")


def compare_losses(folder: Path, alone: Path) -> float:
    """Return the largest relative difference of the losses of two runs in their first steps."""
    pairs = zip(losses(folder, COMPARED), losses(alone, COMPARED), strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def cut_the_link(place: Path) -> Found:
    """Train across the hosts, cut, resume; what was found."""
    config = without_dropout(config_in(place, steps=100_000))
    for rank in range(2):
        (place / f"host-{rank}").mkdir()
        shutil.copy(place / "text.txt", place / f"host-{rank}")
    data = replace(config.data, source="text.txt", streaming=True, window_tokens=300)
    run = replace(config.run, timeout=TIMEOUT, eval_every=100_000)
    optim = replace(config.optim, schedule="constant", warmup=0)
    config = replace(config, data=data, run=run, optim=optim, objective=MaskedLM(rate=0.3))
    on_one_host = f"import os; os.chdir({str(place / 'host-0')!r})"
    alone = replace(config, run=replace(run, output_dir=str(place / "alone"), max_steps=COMPARED))
    job = start("fork", alone, place, processes=1, planted=on_one_host)
    assert job.status() == 0, job.stderr.read_text()
    folder = place / "out"
    config = replace(config, run=replace(run, output_dir=str(folder)))
    jobs: list[Job] = []
    with two_hosts() as hosts:
        try:
            jobs = start_both(hosts, config, place)
            workers = [job.workers(1)[0] for job in jobs]
            jobs[0].wait_for_steps(folder, 2 * COMPARED)
            ip("-n", hosts.names[1], "link", "set", hosts.interfaces[1], "down")
            began = time.monotonic()
            seconds = []
            for job, worker in zip(jobs, workers, strict=True):
                assert job.gone(TIMEOUT + 30, [worker]), job.stderr.read_text()[-3000:]
                seconds.append(time.monotonic() - began)
            assert all(job.gone(60) for job in jobs), "a launcher was left behind"
            ended = time.monotonic() - began
        finally:
            for job in jobs:
                job.kill()
    reached = max(int(path.parent.name.split("-")[1]) for path in folder.glob("checkpoint-*/manifest.json"))
    again = replace(config, run=replace(config.run, resume="latest", max_steps=reached + 10))
    job = start("fork", again, place, processes=2, planted=on_one_host)
    assert job.status() == 0, job.stderr.read_text()
    errors = [job.stderr.read_text() for job in jobs]
    return Found(
        difference=compare_losses(folder, place / "alone"),
        seconds=max(seconds),
        launchers=ended,
        told=[[line for line in text.splitlines() if line.startswith("error: ")] for text in errors],
        tracebacks=sum("in exit_on_error" in text for text in errors),
        resumed=json.loads((folder / "all_results.json").read_text())["steps"] - reached,
    )


def main() -> None:
    """The command line."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        print(cut_the_link(Path(place)))
    with tempfile.TemporaryDirectory() as place:
        print(f"losses on two hosts with different tokens within {train_apart(Path(place)):.0e} of one process")


if __name__ == "__main__":
    main()
