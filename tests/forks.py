"""Run a recipe many times over, each in a folder of its own: what a user saw of it, and which files became others.

A run takes place in a process forked from one that has imported everything, so that a hundred take seconds. What is
asked of the hub goes to a small server on this machine, or nowhere.
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import psutil

from minilm.config import Config
from minilm.config.command_line import parse_flags
from tests.launch import ROOT, TINY

LIMIT = 20  # seconds from launch to the end
CANARY = "hf_canaryCanaryCANARY0123456789"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One mistake: `flags` are added to those of a run that is right, in a folder that `prepare` has changed."""

    flags: str = ""
    prepare: Callable[[], object] = lambda: None
    says: str
    """A part of the line that must be there."""
    recipe: str = ""
    """The recipe; by default the main job, or where the flags name a model mlm_finetune.py."""
    hub: Literal["offline", "server", "unreachable"] = "offline"
    processes: int = 1
    runs: bool = False
    """Whether the run logs a warning and continues to its end."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a user saw, and what became of the files."""

    status: int
    error: list[str]
    """Lines of standard error."""
    changed: list[str]
    """Files and folders that came, went or are others than before."""
    seconds: float

    @property
    def line(self) -> str:
        """The line with the error, or the text inside the box that tyro prints."""
        boxed = " ".join(line.strip("│ ") for line in self.error if line.startswith("│") and line.strip("│ ─"))
        return boxed or next((line for line in self.error if line.startswith("error: ")), "")


def wrong(entry: Entry, outcome: Outcome) -> str:
    """What is not as it should be; nothing when all is well."""
    # Three kinds of lines do not count: erased progress bars, lines on what the run is doing (…), and tyro's boxes.
    lines = [line for line in outcome.error if line.strip() and not re.search(r"%\||doc/s\]|^[╭│╰]| …$", line)]
    boxed = any(line.startswith("│") for line in outcome.error)
    found = {
        "status": outcome.status == (0 if entry.runs else 2),
        "lines": entry.runs or [*lines, *["box"] * boxed] in ([outcome.line], ["box"]),
        "says": entry.says in (" ".join(outcome.error) if entry.runs else outcome.line),
        "changed": entry.runs or outcome.changed == [],
        "token": not any(CANARY in line for line in outcome.error),
    }
    return ", ".join(name for name, holds in found.items() if not holds)


def flags_of(entry: Entry) -> tuple[str, list[str]]:
    """The recipe and the command line of an entry: a run of two steps, right but for the entry's own flags."""
    flags = shlex.split(entry.flags)
    right = ["--run.max-steps", "2", "--run.output-dir", "out", "--run.precision", "fp32", "--batch.max-length", "32"]
    if "--optim.name" not in flags:
        right += ["--optim.name", "adamw"]  # Muon logs a line more
    if "--data.source" not in flags:
        right += ["--data.source", "docs.txt"]
    if entry.recipe:
        return entry.recipe, ["--model.name", "classifier", *right, *flags]
    if "--model.name" in flags or "--run.resume" in flags:
        return "mlm_finetune.py", ["--model.name", "bert", *right, *flags]
    return "mlm_pydocs.py", [*TINY, *right, *flags]


def snapshot(folder: Path) -> dict[str, str]:
    """A hash of every file below `folder`; "folder" for each folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def forked(work: Callable[[], object], errors: Path, processes: int, limit: float = LIMIT) -> int:
    """Do `work` in children of this process, whose errors go to a file; the exit status that they agree on."""
    from tests.jobs import fork

    def status() -> int:
        try:
            work()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1
        return 0

    children = fork(status, errors, processes)
    _, late = psutil.wait_procs(children, limit)
    for child in late:
        child.kill()
    found = {child.wait() for child in children}
    return found.pop() if len(found) == 1 else 1


def run_recipe(recipe: str, flags: list[str]) -> None:
    """`python recipes/RECIPE FLAGS…` in this very process."""
    sys.argv = [recipe, *flags]
    runpy.run_path(str(ROOT / "recipes" / recipe), run_name="__main__")


def check_forked_recipe(recipe: str, *flags: str, place: Path, processes: int = 1, limit: float = 240) -> None:
    """Run `recipes/RECIPE` in forks of this process, which saves the seconds of imports, and check that it succeeds.

    `place` gets the file of standard error. Each of several processes has the environment that torchrun gives it.
    """
    errors = place / "stderr"
    status = forked(lambda: run_recipe(recipe, [*flags]), errors, processes, limit)
    assert status == 0, errors.read_text(errors="replace")[-3000:]


def make_materials(folder: Path) -> None:
    """What the entries start from: a text, models with different heads, and a run of two steps with its checkpoints."""
    import torch
    from datasets import Dataset
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        BertForSequenceClassification,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
    )

    from minilm.data.tokenizer_training import train_tokenizer

    os.chdir(folder)
    sentences = ("The quick brown fox jumps over the lazy dog.", "Return a list of the names.", "A short one.")
    texts = [" ".join(sentences[: 1 + i % 3]) + f" Number {i}." for i in range(60)]
    Path("docs.txt").write_text("\n".join(texts))
    torch.manual_seed(0)
    tokenizer = train_tokenizer(Dataset.from_dict({"text": texts}), "bpe", 400)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    bert = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, **size)
    small = BertConfig(vocab_size=len(tokenizer) - 9, max_position_embeddings=64, pad_token_id=0, **size)
    gpt2 = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    models = {
        "bert": BertForMaskedLM(bert),
        "small": BertForMaskedLM(small),
        "encoder": BertModel(bert),
        "classifier": BertForSequenceClassification(bert),
        "gpt2": GPT2LMHeadModel(gpt2),
    }
    for name, model in models.items():
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    flags = "--run.save-every 1 --run.output-dir run --run.precision fp32 --batch.max-length 32 --run.max-steps 2"
    run_recipe("mlm_finetune.py", f"--data.source docs.txt --model.name bert {flags}".split())


def run_forked(entries: dict[str, Entry], home: Path, endpoint: str) -> None:
    """Run the entries, each in a fork, and write what became of them to outcomes.json; `endpoint` stands for the hub.

    How the hub is reached is read by its libraries when they are imported, so that each way has a process of its own,
    forked once all that does not ask for it is imported.
    """
    import pandas  # noqa: F401
    import sklearn.metrics  # noqa: F401

    parse_flags(Config(), "", [])
    hubs = {"offline": ("HF_HUB_OFFLINE", "1"), "server": ("HF_ENDPOINT", endpoint)}
    hubs["unreachable"] = ("HF_ENDPOINT", "http://127.0.0.1:9")
    os.environ.pop("HF_HUB_OFFLINE", None)
    running = {}
    for hub, (variable, value) in hubs.items():
        if not (group := {name: entry for name, entry in entries.items() if entry.hub == hub}):
            continue
        folder = home / hub
        folder.mkdir()
        if (pid := os.fork()) == 0:
            os.environ |= {variable: value, "HF_HOME": str(folder / "cache")}
            try:
                _run_group(group, folder, first=not running)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        running[pid] = folder
    found = {}
    for pid, folder in running.items():
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError(f"the entries in {folder} have not been run")
        found |= json.loads((folder / "outcomes.json").read_text())
    (home / "outcomes.json").write_text(json.dumps(found))


def _run_group(entries: dict[str, Entry], folder: Path, *, first: bool) -> None:
    """Run entries one by one in forks of this process; the `first` group makes what the others start from too."""
    materials, making = folder.parent / "materials", folder.parent / "making"
    from transformers import BertForMaskedLM  # noqa: F401

    if first:
        making.mkdir()
        make_materials(making)
        making.rename(materials)
    while not materials.exists():
        time.sleep(0.05)
    gc.freeze()  # so that no fork copies memory for want of garbage
    outcomes = {}
    for number, (name, entry) in enumerate(entries.items()):
        place = folder / f"entry-{number}"
        shutil.copytree(materials, place)

        def work(place: Path = place, entry: Entry = entry) -> None:
            os.chdir(place)
            if os.environ.get("RANK", "0") == "0":
                with place.with_suffix(".before").open("w") as before:  # now: it may not be allowed after
                    entry.prepare()
                    json.dump(snapshot(place), before)
            recipe, flags = flags_of(entry)
            run_recipe(recipe, flags)

        start = time.monotonic()
        status = forked(work, place.with_suffix(".stderr"), entry.processes)
        seconds = time.monotonic() - start
        before, after = json.loads(place.with_suffix(".before").read_text()), snapshot(place)
        error = place.with_suffix(".stderr").read_text().splitlines()
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        outcome = Outcome(status=status, error=error, changed=changed, seconds=seconds)
        outcomes[name] = dataclasses.asdict(outcome)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


def outcomes(module: str, entries: dict[str, Entry]) -> dict[str, Outcome]:
    """What became of these entries of the table of `module`, which is run with --fork FOLDER ENDPOINT NAME…"""
    with hub_server() as endpoint, tempfile.TemporaryDirectory(prefix="minilm-") as home:
        environment = {
            **os.environ,
            **{"HF_TOKEN": CANARY, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)},
        }
        command = [sys.executable, "-m", module, "--fork", home, endpoint, *entries]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        told = json.loads(Path(home, "outcomes.json").read_text())
        return {name: Outcome(**told[name]) for name in entries}


@contextlib.contextmanager
def hub_server() -> Iterator[str]:
    """A server that refuses everything as the hub does; its address."""

    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            gated, down, who = "gated" in self.path, "down" in self.path, "whoami" in self.path
            self.send_response(503 if down else 403 if "no-access" in self.path else 401 if gated or who else 404)
            if not down and not who:
                self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
