"""The result of a run goes to the hub at its end, whole and alone; that it may is known before the first step."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from transformers import BertConfig, BertForMaskedLM

from minilm.config import Config
from minilm.config.serialization import read_run_config
from minilm.runs.checkpoint import read_checkpoint
from minilm.runs.hub_upload import check_hub_access, create_hub_repo, upload_run
from minilm.runs.resume import check_settings
from minilm.runs.session import save_networks
from minilm.train import train
from tests.forks import CANARY
from tests.jobs import config_in, finish

REPO = "me/model"
MODEL = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
RECORDS = {"README.md", "run.json", "log.jsonl", "all_results.json"}


class Hub:
    """What a hub on this machine was asked for and got. `refuses` is a status by a part of the address."""

    def __init__(self) -> None:
        self.url, self.refuses = "", dict[str, int]()
        self.asked = list[tuple[str, str]]()
        self.tokens = dict[str, str | None]()
        self.repos = set[str]()
        self.files, self.stored = dict[str, bytes](), dict[str, bytes]()
        self.large = set[str]()  # files that go to its store of large ones

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        for part, status in self.refuses.items():
            if part in path:
                return status, {"error": "refused"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            there = name in self.repos
            self.repos.add(name)
            return 409 if there else 200, {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == f"/api/models/{REPO}":
            return 200, {"id": REPO}
        if path == f"/api/models/{REPO}/auth-check/write":
            return (200, {}) if REPO in self.repos else (404, {})
        if path == f"/api/models/{REPO}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name in self.large else "regular" for name in names}
            return 200, {"files": [{"path": n, "uploadMode": modes[n], "shouldIgnore": False} for n in names]}
        if path == f"/{REPO}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.url}/store/{each['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        if path.startswith("/store/"):
            self.stored[path.removeprefix("/store/")] = body
            return 200, {}
        if path == f"/api/models/{REPO}/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    self.files[value["path"]] = self.stored[value["oid"]]
            return 200, {"commitUrl": f"{self.url}/{REPO}/commit/0", "commitOid": "0" * 40}
        return 404, {}


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at an address of its own, to which the libraries of this process turn, with a token."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.asked.append((self.command, path))
            hub.tokens[path] = self.headers.get("Authorization")
            status, content = hub.answer(self.command, path, body)
            answer = json.dumps(content).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_PUT = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    with pytest.MonkeyPatch.context() as patch:
        # What HF_ENDPOINT and HF_HUB_OFFLINE set; the library has read them long ago.
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", CANARY)
        yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as hub:
        yield hub


def config_of(place: Path, repo: str = REPO) -> Config:
    """A run of four steps to `place`/out, with checkpoints, to be published."""
    config = config_in(place, 4, save_every=2)
    run = replace(config.run, output_dir=str(place / "out"), overwrite=True, push_to_hub=repo, license="apache-2.0")
    return replace(config, run=run)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Hub]:
    """The output folder of a run of two processes in which there was a file before, and the hub that it went to."""
    place = tmp_path_factory.mktemp("published")
    (place / "out").mkdir()
    (place / "out" / "notes.txt").write_text("mine")
    config = config_of(place, "model")  # the owner is that of the token
    with serving(Hub()) as hub:
        finish(config, place, processes=2)
    return place / "out", hub


def test_the_result_arrives_once_and_to_the_byte_without_checkpoints_or_files_of_others(published) -> None:
    out, hub = published
    assert (out / "checkpoint-4" / "optimizer.safetensors").exists()
    assert hub.files == {name: (out / name).read_bytes() for name in MODEL | RECORDS}
    assert json.loads(hub.files["all_results.json"])["steps"] == 4
    assert [path for _, path in hub.asked].count(f"/api/models/{REPO}/commit/main") == 1
    assert b'model="model"' in hub.files["README.md"]
    assert b"license: apache-2.0" in hub.files["README.md"]


def test_the_hub_gets_the_token_and_nobody_else_does(published) -> None:
    out, hub = published
    without = {path for path, token in hub.tokens.items() if token != f"Bearer {CANARY}"}
    assert without <= {"/api/agent-harnesses"}  # which the library asks for by itself
    for path in out.parent.rglob("*"):  # what was printed is among them
        assert path.is_dir() or CANARY.encode() not in path.read_bytes(), path


def test_a_resumed_run_may_be_published_elsewhere_and_its_repetition_is_not_published(published) -> None:
    out, _ = published
    checkpoint = read_checkpoint(out / "checkpoint-4")
    config = config_of(out.parent, "other/name")
    (changed,) = check_settings(checkpoint, config)
    assert changed == 'run.push_to_hub was "model", is "other/name"'
    repeated = read_run_config(str(out / "run.json")).run
    assert (repeated.push_to_hub, repeated.license) == (None, "apache-2.0")


def test_large_files_go_to_the_store_without_xet(published, hub: Hub, monkeypatch) -> None:
    out, _ = published
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.large = {"model.safetensors"}
    upload_run(REPO, out, sorted(MODEL))
    weights = (out / "model.safetensors").read_bytes()
    assert hub.stored == {hashlib.sha256(weights).hexdigest(): weights}
    assert hub.files == {name: (out / name).read_bytes() for name in MODEL | RECORDS}


@pytest.mark.parametrize(
    ("part", "status", "says"),
    [
        ("commit", 403, "the token may not write there"),
        ("commit", 500, "the hub answered with error 500: try again later"),
        ("preupload", 401, "the hub does not know the token: log in"),
        ("", 0, "the hub cannot be reached at http://127.0.0.1:9"),
    ],
)
def test_an_upload_that_fails_is_one_warning_with_the_command_to_repeat_it(
    part: str, status: int, says: str, published, hub: Hub, monkeypatch, caplog, capfd
) -> None:
    out, _ = published
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    hub.refuses = {part: status} if part else {}
    if not part:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    upload_run(REPO, out, sorted(MODEL))
    (line,) = [line for line in caplog.messages if "push_to_hub" in line]
    assert line.startswith(f"run.push_to_hub {REPO}: {says}")
    excluded = "--exclude 'checkpoint-*/*' --exclude history.jsonl --exclude 'ledger/*' --exclude notes.txt"
    command = f"hf upload {REPO} {out} . {excluded}"
    assert line.endswith(f"; the run is complete in {out}. To upload it: {command}")
    assert "\n" not in line
    assert CANARY not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("part", "status", "says"),
    [
        ("whoami", 401, "the hub does not know the token: log in with `hf auth login`, or set HF_TOKEN"),
        ("whoami", 500, "the hub answered with error 500: try again later"),
        ("create", 403, "the token may not write there"),
        ("auth-check", 403, "the token may not write there"),
        ("validate-yaml", 400, "refused"),
    ],
)
def test_a_refusal_of_the_hub_is_reported_before_anything_is_uploaded(
    part: str, status: int, says: str, hub: Hub
) -> None:
    hub.refuses = {part: status}
    if part == "create":  # of a repository that is there, create_repo is content with the right to read it
        hub.refuses["auth-check"] = status

    def ask() -> None:
        check_hub_access(REPO, "apache-2.0")
        create_hub_repo(REPO)

    with pytest.raises(ValueError, match=r"^run\.push_to_hub me/model: ") as told:
        ask()
    assert says in str(told.value)
    assert "\n" not in str(told.value)
    assert CANARY not in str(told.value)


@pytest.mark.parametrize("token", ["", "hf_of…no…hub"])
def test_an_invalid_token_of_the_hub_is_refused_without_being_shown(token: str, hub: Hub, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=r"log in with `hf auth login`, or set HF_TOKEN$") as told:
        check_hub_access(REPO, None)
    assert "hf_of" not in str(told.value)


def test_nothing_is_created_on_the_hub_until_all_else_is_checked(hub: Hub) -> None:
    check_hub_access(REPO, None)
    assert {method for method, _ in hub.asked} == {"GET"}
    create_hub_repo(REPO)
    assert hub.repos == {REPO}


def test_a_run_that_the_hub_refuses_leaves_no_file(hub: Hub, tmp_path: Path) -> None:
    hub.refuses = {"create": 403, f"/api/models/{REPO}": 404}
    with pytest.raises(ValueError, match=r"^run\.push_to_hub me/model: the token may not write there"):
        train(config_of(tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_loop_of_ones_own_publishes_each_model(hub: Hub, tokenizer, tmp_path: Path) -> None:
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    network = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **size))
    accelerator = SimpleNamespace(is_main_process=True, free_memory=lambda: None, trackers=[])
    prepared = SimpleNamespace(tokenizer=tokenizer)
    run = SimpleNamespace(accelerator=accelerator, folder=tmp_path, prepared=prepared, uploads=[])
    save_networks(
        run, SimpleNamespace(record_results=lambda figures: {"steps": 1}), {".": network, "generator": network}
    )
    upload_run(REPO, tmp_path, run.uploads)
    assert hub.files.keys() == MODEL | {f"generator/{name}" for name in MODEL} | {"all_results.json"}
