"""Files by other people cannot run code or reach files outside their folder, and secrets are never written."""

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from minilm.config import Data, Model, Run, Tokens
from minilm.data.documents import load_documents
from minilm.data.tokenizer import load_tokenizer
from minilm.models.inference import load_masked_lm
from minilm.models.loading import load_model
from minilm.runs.checkpoint import find_checkpoint, read_checkpoint
from minilm.runs.output_folder import choose_output_dir, claim_output_dir
from minilm.runs.resume import restore_state
from tests.checkpoints import (
    LISTED,
    MANIFEST,
    MOMENTS,
    STATE,
    WEIGHTS,
    contents,
    facts,
    network,
    save,
    saver_in,
    trained,
)
from tests.launch import ROOT, TINY, launch

# Hostile code that runs leaves this folder in the working directory.
MARK = "executed"


class Payload:
    """An object whose pickle leaves the mark when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (MARK,)


PICKLE = pickle.dumps({"weights": Payload()})
CODE = f"import os\nos.mkdir({MARK!r})\n"


def pickled_weights(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(PICKLE)


def pickle_named_safetensors(model: Path) -> None:
    (model / WEIGHTS).write_bytes(PICKLE)


def pickle_beside_the_weights(model: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        (model / name).write_bytes(PICKLE)


def code_of_its_own(model: Path, kind: str) -> None:
    """Have the configuration ask for classes in a file beside it. `kind` is the model type that it states."""
    (model / "evil.py").write_text(CODE)
    named = {"AutoConfig": "evil.Config", "AutoModelForMaskedLM": "evil.Network", "AutoTokenizer": ["evil.T", "evil.T"]}
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**config, "model_type": kind, "auto_map": named}))


MODELS: dict[str, Callable[[Path], None]] = {
    "pickled weights": pickled_weights,
    "a pickle named model.safetensors": pickle_named_safetensors,
    "pickles beside the weights": pickle_beside_the_weights,
    "code for a known type": lambda model: code_of_its_own(model, "bert"),
    "code for an unknown type": lambda model: code_of_its_own(model, "evil"),
}


def climbing_name(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["../../outside/file"] = facts(folder.parent.parent / "outside" / "file")
    (folder / MANIFEST).write_text(json.dumps(manifest))


def linked_file(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent.parent / "outside" / "moved")
    (folder / WEIGHTS).symlink_to(folder.parent.parent / "outside" / "moved")


def pickled(name: str) -> Callable[[Path], None]:
    """Return a function that replaces the file of this name by a pickle, which the manifest lists."""

    def prepare(folder: Path) -> None:
        (folder / name).write_bytes(PICKLE)
        (folder / MANIFEST).write_text(json.dumps({one: facts(folder / one) for one in {*LISTED, name}}))

    return prepare


CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "a manifest with a path that climbs": climbing_name,
    "a symbolic link for the weights": linked_file,
    **{f"a pickle for {name}": pickled(name) for name in (WEIGHTS, MOMENTS, STATE, "scheduler.bin")},
    "code": lambda folder: code_of_its_own(folder, "evil"),
}


def attempt(work: Callable[[], object]) -> str:
    """Return `refused` if the work raises ValueError, else `loaded`."""
    try:
        work()
    except ValueError:
        return "refused"
    return "loaded"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory, with a file outside of all folders that a test loads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("mine")
    return tmp_path


def test_the_payloads_leave_their_mark_when_they_run(place):
    for run in (lambda: pickle.loads(PICKLE), lambda: exec(CODE)):
        run()
        assert (place / MARK).exists()
        (place / MARK).rmdir()


@pytest.mark.scorecard(23)
def test_code_beside_a_model_a_checkpoint_or_documents_does_not_run(tokenizer, documents, place, figure):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    clean = place / "clean"
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **size)).save_pretrained(clean)
    tokenizer.save_pretrained(clean)
    outcomes = {}
    for name, prepare in MODELS.items():
        model = Path(shutil.copytree(clean, place / name))
        prepare(model)
        start = Model(name=str(model))
        outcomes[name] = {
            attempt(lambda start=start: load_model(start, tokenizer, max_length=32, seed=0)),
            attempt(lambda model=model: load_masked_lm(model)),
        }
        outcomes[f"{name}, tokenizer"] = {
            attempt(lambda model=model: load_tokenizer(Tokens(name=str(model)), None, documents))
        }
        assert not (place / MARK).exists(), name
    assert outcomes["pickled weights"] == outcomes["code for an unknown type"] == {"refused"}
    assert outcomes["a pickle named model.safetensors"] == {"refused"}
    assert outcomes["pickles beside the weights"] == {"loaded"}

    (place / "out").mkdir()
    saver = saver_in(place / "out", tokenizer)
    save(saver, 1)
    for name, prepare in CHECKPOINTS.items():
        folder = Path(shutil.copytree(place / "out", place / f"out {name}")) / "checkpoint-1"
        prepare(folder)
        model = network(tokenizer)

        def resume(folder: Path = folder, model: BertForMaskedLM = model) -> None:
            restore_state(read_checkpoint(folder), model, trained(model))

        outcomes[name] = {attempt(resume)}
        assert not (place / MARK).exists(), name
    assert [name for name in CHECKPOINTS if outcomes[name] != {"refused"}] == ["a pickle for scheduler.bin"]

    for name, files in {"a script": {}, "a script and documents": {"a.txt": "one\ntwo\nthree\n" * 9}}.items():
        folder = place / name / "documents"
        folder.mkdir(parents=True)
        for file, content in {"documents.py": CODE, **files}.items():
            (folder / file).write_text(content)
        outcomes[name] = {attempt(lambda folder=folder: load_documents(Data(source=str(folder)), seed=0))}
        assert not (place / MARK).exists(), name
    assert (outcomes["a script"], outcomes["a script and documents"]) == ({"refused"}, {"loaded"})
    assert (place / "outside" / "file").read_text() == "mine"
    figure(f"{len(outcomes)} attempts: 0 executed code, 0 touched files outside the folder")


@pytest.mark.scorecard(23)
@pytest.mark.parametrize("linked", ["log.jsonl", "checkpoint-7", "model.safetensors"])
def test_a_link_in_an_output_folder_does_not_lead_out_of_it(linked, tokenizer, place, figure):
    outside = place / "outside"
    save(saver_in(outside, tokenizer), 7)
    (place / "out").mkdir()
    targets = {
        "log.jsonl": "file",
        "checkpoint-7": "checkpoint-7",
        "model.safetensors": "checkpoint-7/model.safetensors",
    }
    (place / "out" / linked).symlink_to(outside / targets[linked])
    before = contents(outside)
    run = Run(output_dir="out", overwrite=True)

    def start() -> None:
        folder, _ = choose_output_dir(run, "mlm")
        claim_output_dir(folder, run, network(tokenizer))

    assert attempt(start) == ("loaded" if linked == "model.safetensors" else "refused")
    assert contents(outside) == before
    if linked == "checkpoint-7":
        attempt(lambda: find_checkpoint("latest", place / "out"))
        assert contents(outside) == before
    figure("0 links of an output folder followed")


@pytest.mark.scorecard(24)
def test_secrets_of_the_environment_are_not_in_files_or_messages(tmp_path, documents, figure):
    (tmp_path / "documents.txt").write_text("\n".join(documents["text"]))
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
    secrets = {name: f"canary{name.replace('_', '')}0123456789" for name in names}
    (tmp_path / "home").mkdir()
    flags = ("--data.source", str(tmp_path / "documents.txt"), "--run.max-steps", "2", "--run.save-every", "1")
    own = {"HF_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path / "home")}
    done = launch("mlm_pydocs.py", *TINY, *flags, "--run.output-dir", str(tmp_path / "out"), **own, **secrets)
    assert done.returncode == 0, done.stderr
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"run.json", "log.jsonl", "README.md", "training.json", "ids.npy"} <= {path.name for path in written}
    written |= {Path("stdout"): done.stdout.encode(), Path("stderr"): done.stderr.encode()}
    hits = [path for path, content in written.items() for secret in secrets.values() if secret.encode() in content]
    figure(f"{len(hits)} hits in {len(written)} files")
    assert hits == []


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "subprocess", "code", "runpy", "joblib"}
# These start minilm itself in another process.
STARTS_PROCESSES = {"verify.py": ["subprocess"], "window_encoder.py": ["subprocess"]}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen", "yaml.load"}


def find_unsafe_code(source: str) -> list[str]:
    """Return the modules and calls by which a program could run what it reads, or load remote code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            name, settings = ast.unparse(node.func), {one.arg: ast.unparse(one.value) for one in node.keywords}
            found += [name] * (name in FORBIDDEN_CALLS)
            found += [name] * (name.endswith("from_pretrained") and settings.get("trust_remote_code") != "False")
            found += [name] * ("allow_pickle" in settings or settings.get("shell") == "True")
    return found


@pytest.mark.scorecard(23)
@pytest.mark.parametrize("path", sorted((ROOT / "minilm").rglob("*.py")), ids=lambda path: path.name)
def test_modules_cannot_run_what_they_read(path):
    assert find_unsafe_code(path.read_text()) == STARTS_PROCESSES.get(path.name, [])


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from subprocess import run",
        "eval('1')",
        "torch.load(path)",
        "AutoModel.from_pretrained(name)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_code_is_found(source):
    assert len(find_unsafe_code(source)) == 1


def test_the_loaders_never_call_torch_load(tokenizer, place, monkeypatch):
    asked: list[object] = []
    monkeypatch.setattr(torch, "load", lambda *words, **settings: asked.append(words))
    folder, saved = place / "model", network(tokenizer)
    saved.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pickle_beside_the_weights(folder)
    model, _ = load_masked_lm(folder)
    assert asked == []
    assert all(tensor.equal(saved.state_dict()[name]) for name, tensor in model.state_dict().items())
