"""A run that reads a dataset of a hub window by window, over HTTP. The hub is a server on this machine."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from minilm import Config, Data
from minilm.commands.replay import read_documents
from minilm.objectives.factory import build_objective
from minilm.utils.number_ranges import format_ranges
from tests.jobs import CONFIG, WORDS, end_of, finish, in_folder, start, without_dropout
from tests.launch import ROOT

NAME, OTHER = "me/texts", "me/others"
COMMITS = ("a" * 40, "b" * 40)
STEPS = 24


class Hub:
    """Datasets of the same Parquet files on a hub, whose names begin with `me/`.

    `commit` is the newest of each, and `left` the number of reads that succeed. If it is `busy`, each process that asks
    for the newest commit sees another. The commits in `gone` were removed. Files whose names begin with `refused` may
    not be read. The commits in `others` have other files. It does
    not answer the first `unanswered` questions for the newest commit.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.url = files, ""
        self.commit, self.left, self.busy, self.gone = COMMITS[0], 10**9, False, set[str]()
        self.unanswered = 0
        self.refused, self.others = "nothing", dict[str, dict[str, bytes]]()
        self.read = list[tuple[str, str]]()
        """The commit and the file of each read."""

    def files_of(self, commit: str) -> dict[str, bytes]:
        return self.others.get(commit, self.files)

    def facts(self, path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def describe(self, path: str) -> Any:
        """Return what the hub's interface answers; None for what it does not have."""
        api = "/api/datasets/me/[^/]+"
        if match := re.fullmatch(f"{api}(?:/revision/([^/]+))?", path):
            if not match[1] and self.unanswered:
                self.unanswered -= 1
                return None
            commit = match[1] or self.commit
            if self.busy and not match[1]:
                self.commit = f"{int(self.commit, 16) + 1:040x}"
            siblings = [{"rfilename": name} for name in self.files_of(commit)]
            name = "/".join(path.split("/")[3:5])
            return {"id": name, "sha": commit, "siblings": siblings, "private": False, "gated": False, "tags": []}
        if tree := re.fullmatch(f"{api}/tree/([^/]+)/?(.*)", path):
            files = self.files_of(tree[1]).items()
            return [self.facts(name, content) for name, content in files if name.startswith(tree[2])]
        if match := re.fullmatch(f"{api}/paths-info/([^/]+)", path):
            return [self.facts(name, content) for name, content in self.files_of(match[1]).items()]
        return None

    def content(self, path: str) -> bytes | None:
        """Return the bytes of a file, or None for another path. The hub has no file left after `left` reads."""
        found = re.fullmatch("/datasets/me/[^/]+/resolve/([^/]+)/(.*)", path)
        if not found or found[2] not in self.files_of(found[1]):
            return None
        self.read.append((found[1], found[2]))
        self.left -= 1
        return self.files_of(found[1])[found[2]] if self.left >= 0 else None


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Start a hub, and let new processes use it. Its files are also in `tmp_path`/files."""
    hub, words = Hub({}), WORDS.split()
    (tmp_path / "files").mkdir()
    for number in range(3):
        texts = [
            " ".join(words[i * j * (number + 1) % len(words)] for j in range(1, 3 + i * 7 % 15)) for i in range(90)
        ]
        file = io.BytesIO()
        Dataset.from_dict({"text": texts}).to_parquet(file, batch_size=16)
        hub.files[f"train-{number}.parquet"] = file.getvalue()
        (tmp_path / "files" / f"{number}.parquet").write_bytes(file.getvalue())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path, status = self.path.partition("?")[0], 200
            is_gone = any(commit in path for commit in hub.gone)
            answer = None if is_gone else hub.describe(path)
            content = json.dumps(answer).encode() if answer is not None else None if is_gone else hub.content(path)
            if content is None:
                status = 403 if path.rpartition("/")[2].startswith(hub.refused) else 404
                content = b"{}"
            size, etag = len(content), hashlib.sha1(content).hexdigest()
            if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
                status, content = 206, content[int(part[1]) : int(part[2]) + 1]
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RevisionNotFound" if is_gone else "EntryNotFound")
            if status == 206:
                self.send_header("Content-Range", f"bytes {part[1]}-{part[2]}/{size}")  # type: ignore[index]
            self.send_header("ETag", f'"{etag}"')
            match = re.search("/resolve/([^/]+)/", path)
            self.send_header("X-Repo-Commit", match[1] if match and match[1] != "main" else hub.commit)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_POST = do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield hub
    server.shutdown()
    server.server_close()


def _config(source: str, folder: Path) -> Config:
    data = Data(source=source, streaming=True, eval_fraction=0.1, window_tokens=500)
    return in_folder(without_dropout(replace(CONFIG, data=data)), folder, max_steps=STEPS, save_every=8)


# The libraries read these settings when they are imported, which was before the fork.
READ_ENVIRONMENT = """
import importlib
import datasets.config
import huggingface_hub
importlib.reload(huggingface_hub.constants)
importlib.reload(datasets.config)
huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT
huggingface_hub.close_session()
"""


def _finish(config: Config, place: Path, monkeypatch: pytest.MonkeyPatch, processes: int = 1) -> tuple[int, str]:
    """Run in processes of its own with an empty cache. Return the exit status and the errors."""
    place.mkdir(exist_ok=True)
    monkeypatch.setenv("HF_HOME", str(place / "cache"))
    job = start("fork", config, place, processes=processes, planted=READ_ENVIRONMENT)
    return job.status(), job.stderr.read_text().strip()


def test_a_run_on_a_hub_makes_the_steps_of_a_run_on_its_files_and_resumes_after_a_cut(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / name for name in ("local", "hub", "cut")]
    local, remote, cut = (
        _config(source, folder / "out")
        for source, folder in zip((str(tmp_path / "files"), NAME, NAME), folders, strict=True)
    )
    folders[0].mkdir()
    finish(local, folders[0])
    assert _finish(remote, folders[1], monkeypatch)[0] == 0
    right = end_of(folders[1] / "out")
    assert right == end_of(folders[0] / "out")
    assert {commit for commit, _ in hub.read} == {COMMITS[0]}
    # The hub ends its answers when the run has read three quarters of what it needs.
    hub.left = len(hub.read) * 3 // 4
    status, error = _finish(cut, folders[2], monkeypatch)
    assert status == 2
    assert re.fullmatch(f"error: data source {NAME}: .+", error.rpartition("\n")[2])
    assert [*(folders[2] / "out").glob("checkpoint-*")]
    hub.left = 10**9
    # Another machine goes on, whose cache is empty. The dataset has a new commit.
    hub.commit = COMMITS[1]
    resumed = replace(cut, run=replace(cut.run, resume="latest"))
    assert _finish(resumed, tmp_path / "elsewhere", monkeypatch)[0] == 0
    assert end_of(folders[2] / "out") == right
    assert {commit for commit, _ in hub.read} == {COMMITS[0]}


# Ways to read a hub without several windows.
WHOLE = {
    "one window": {"streaming": True, "window_tokens": 10**6},
    "a part": {"streaming": True, "split": "train[:200]"},
    "weights": {"streaming": True, "weights": (1,), "window_tokens": 10**6},
    "mapped": {},
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_run_without_windows_resumes_on_the_commits_with_which_it_began(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    config = _config(NAME, tmp_path / "out")
    config = replace(config, data=Data(source=NAME, eval_source=OTHER, **WHOLE[case]))
    assert _finish(config, tmp_path / "first", monkeypatch)[0] == 0
    right = end_of(tmp_path / "out")
    hub.commit = COMMITS[1]
    resumed = replace(config, run=replace(config.run, resume=str(tmp_path / "out" / "checkpoint-8")))
    assert _finish(resumed, tmp_path / "elsewhere", monkeypatch) == (0, ANY)
    assert end_of(tmp_path / "out") == right
    assert {commit for commit, _ in hub.read} == {COMMITS[0]}


@pytest.mark.parametrize("case", [*WHOLE, "windows"])
def test_all_processes_read_the_commit_that_run_json_records(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    hub.busy = True
    config = _config(NAME, tmp_path / "out")
    config = replace(config, data=replace(config.data, **WHOLE[case]) if case != "windows" else config.data)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    status, errors = _finish(config, tmp_path, monkeypatch, processes=2)
    assert status == 0, errors
    assert {commit for commit, _ in hub.read} == {COMMITS[0]}
    recorded = json.loads((tmp_path / "out" / "run.json").read_text())["sources"]
    assert recorded == {NAME: {"revision": COMMITS[0]}}


def test_a_stream_does_not_begin_without_a_commit_for_all_processes(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.unanswered = 1
    config = _config(NAME, tmp_path / "out")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    status, errors = _finish(config, tmp_path, monkeypatch, processes=2)
    assert status != 0, json.loads((tmp_path / "out/checkpoint-8/training.json").read_text())["revisions"]
    assert f"error: data source {NAME}: " in errors


def test_a_commit_that_the_hub_no_longer_has_is_named(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(NAME, tmp_path / "out")
    assert _finish(config, tmp_path / "first", monkeypatch)[0] == 0
    hub.commit = COMMITS[1]
    hub.gone.add(COMMITS[0])
    resumed = replace(config, run=replace(config.run, resume=str(tmp_path / "out" / "checkpoint-8")))
    status, error = _finish(resumed, tmp_path / "elsewhere", monkeypatch)
    assert status == 2
    assert error.rpartition("\n")[2] == (
        f"error: data source {NAME}: the hub no longer has the commit {COMMITS[0]} with which this began: start again "
        "without run.resume, or with another output folder"
    )


@pytest.mark.parametrize("start", ["a checkpoint", "the beginning"])
def test_a_replay_reads_the_commit_of_its_run(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    config = _config(NAME, tmp_path / "out")
    config = replace(config, data=Data(source=NAME, eval_fraction=0.1), run=replace(config.run, max_steps=10))
    assert _finish(config, tmp_path / "first", monkeypatch)[0] == 0
    local = replace(config, data=replace(config.data, source=str(tmp_path / "files")))
    texts = [*build_objective(local.objective).training_texts(local)]
    (tmp_path / "texts").write_text("\n".join(text for text in texts if texts.count(text) == 1))
    if start == "the beginning":
        for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    else:
        # Its first step is the ninth.
        (tmp_path / "texts").write_text(texts[107])
    numbers = read_documents(local, str(tmp_path / "texts"))
    # The newest commit has another text before all others.
    hub.others[COMMITS[0]], hub.commit = {**hub.files}, COMMITS[1]
    file = io.BytesIO()
    Dataset.from_dict({"text": ["a new text"]}).to_parquet(file)
    hub.files["train--1.parquet"] = file.getvalue()
    command = ["replay", str(tmp_path / "out"), "--without", str(tmp_path / "texts")]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    result = _python(f"import sys\nfrom minilm.commands.main import main\nsys.argv[1:] = {command}\nmain()")
    assert result.returncode == 0, result.stderr
    assert f"the replay begins after step {8 if start == 'a checkpoint' else 0}\n" in result.stderr
    facts = json.loads((tmp_path / "out-without" / "run.json").read_text())
    assert facts["config"]["data"]["exclude_loss"] == format_ranges(numbers)
    assert facts["sources"] == {NAME: {"revision": COMMITS[0]}}
    assert {commit for commit, _ in hub.read} == {COMMITS[0]}


def _python(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_a_stream_never_reads_a_copy_of_the_cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    assert _python(f"import datasets; datasets.load_dataset({NAME!r}, split='train')").returncode == 0
    # The copy has no groups of rows, so that a place in the third group of a file is not in it.
    read = f"""
from minilm import Data
from minilm.data.shards import open_shards
shards = open_shards(Data(source={NAME!r}, streaming=True), {NAME!r}, {COMMITS[0]!r})
print(sum(len(batch.texts) for shard in shards for batch in shard.read((2 * 2**32, 0))))
"""
    assert _python(read).stdout.strip() == str(3 * (90 - 32))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = _python(read)
    assert result.stdout == ""
    assert f"ValueError: data source {NAME}: HF_HUB_OFFLINE forbids the hub" in result.stderr


def test_another_commit_than_that_of_the_run_is_never_read(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit = COMMITS[1]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    assert _python(f"import datasets; datasets.load_dataset({NAME!r}, split='train')").returncode == 0
    read = f"""
from minilm import Data
from minilm.data.documents import load_documents
from minilm.data.sources import pin_revisions
with pin_revisions({{{NAME!r}: {COMMITS[0]!r}}}):
    print(len(load_documents(Data(source={NAME!r}, eval_split="train"), 0)[0]))
"""
    hub.refused = "README"
    result = _python(read)
    assert result.stdout == ""
    assert result.stderr.strip().rpartition("\n")[2] == (
        f"ValueError: data source {NAME}: the hub did not give the commit {COMMITS[0]} of this run, and the newest "
        f"copy in the cache is of {COMMITS[1]}; try again later"
    )
    hub.refused = "nothing"
    assert _python(read).stdout == "270\n"


def test_without_the_hub_only_a_checked_copy_of_json_is_read(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files = {"0.jsonl": b'{"text": "hello"}\n', "1.jsonl": b'{"text": 5}\n'}
    good = {"0.jsonl": b'{"text": "hello"}\n', "1.jsonl": b'{"text": "5"}\n'}
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    read = f"""
from minilm import Data
from minilm.data.documents import load_documents
print(*load_documents(Data(source={NAME!r}, eval_split="train"), 0)[0]["text"])
"""
    assert _python(f"import datasets; datasets.load_dataset({NAME!r}, split='train')").returncode == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert f"ValueError: data source {NAME}: HF_HUB_OFFLINE forbids the hub" in _python(read).stderr
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert "holds values that are not text" in _python(read).stderr
    hub.files, hub.commit = good, COMMITS[1]
    assert _python(read).stdout == "hello 5\n"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert _python(read).stdout == "hello 5\n"


@pytest.fixture
def tokenize(hub: Hub, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that tokenises a source into a folder, after it has executed some code."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))

    def run(source: str, folder: str, *words: str, first: str = "") -> subprocess.CompletedProcess[str]:
        command = ["tokenize", source, "--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / folder)]
        # The processes that the command starts import the file too.
        start = "if __name__ == '__main__':\n    from minilm.commands.main import main\n    main()\n"
        script = tmp_path / "command.py"
        script.write_text(f"import sys\nsys.argv[1:] = {[*command, *words]!r}\n{first}\n{start}")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)

    return run


def test_a_dataset_of_a_hub_is_tokenised_like_its_files(hub: Hub, tmp_path: Path, tokenize: Any) -> None:
    for name, source in (("remote", NAME), ("local", str(tmp_path / "files"))):
        result = tokenize(source, name, "--processes", "2")
        assert result.returncode == 0, result.stderr
    pieces = sorted((tmp_path / "local").glob("tokens-*/*.npy"))
    assert len(pieces) >= 9
    for piece in pieces:
        other = tmp_path / "remote" / piece.relative_to(tmp_path / "local")
        assert other.read_bytes() == piece.read_bytes(), piece


def test_a_dataset_of_a_hub_is_tokenised_to_the_end_at_the_commit_with_which_it_began(
    hub: Hub, tmp_path: Path, tokenize: Any
) -> None:
    assert tokenize(NAME, "whole").returncode == 0
    hub.left = len(hub.read) * 3 // 4
    assert tokenize(NAME, "remote").returncode != 0
    assert (tmp_path / "remote" / "settings.json").exists()
    hub.left, hub.commit = 10**9, COMMITS[1]
    upgrade = "import datasets\ndatasets.__version__ = '99.0'"
    refused = tokenize(NAME, "remote", first=upgrade)
    assert refused.returncode != 0
    assert re.search(r"begun with other values of documents, datasets \(\S+, now 99\.0\): choose", refused.stderr)
    result = tokenize(NAME, "remote")
    assert result.returncode == 0, result.stderr
    assert {commit for commit, _ in hub.read} == {COMMITS[0]}
    for piece in sorted((tmp_path / "whole").glob("tokens-*/*.npy")):
        other = tmp_path / "remote" / piece.relative_to(tmp_path / "whole")
        assert other.read_bytes() == piece.read_bytes(), piece


def test_a_folder_that_was_begun_without_a_record_of_the_commit_is_continued(
    hub: Hub, tmp_path: Path, tokenize: Any
) -> None:
    hub.left = 12
    assert tokenize(NAME, "remote").returncode != 0
    hub.left = 10**9
    path = tmp_path / "remote" / "settings.json"
    settings = json.loads(path.read_text())
    del settings["revisions"], settings["datasets"]
    path.write_text(json.dumps(settings))
    result = tokenize(NAME, "remote")
    assert result.returncode == 0, result.stderr
    hub.commit = COMMITS[1]
    assert "it was begun with other values of documents: choose" in tokenize(NAME, "remote").stderr
