"""What a user can get wrong, and what minilm says to it: `python -m tests.bad_input` prints a line for each.

Every entry is a run of a recipe in a folder of its own, in a process forked from one that has imported everything, so
that the whole table takes a minute. Entries about the hub talk to a small server on this machine.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import runpy
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
    hub: Literal["offline", "server", "unreachable"] = "offline"
    runs: bool = False
    """The run is warned of, and goes on to its end."""


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
        """The line that says what is wrong; of tyro's box, what is inside."""
        boxed = " ".join(line.strip("│ ") for line in self.error if line.startswith("│") and line.strip("│ ─"))
        return boxed or next((line for line in self.error if line.startswith("error: ")), "")


def wrong(entry: Entry, outcome: Outcome) -> str:
    """What is not as it should be; nothing when all is well."""
    # A bar that was taken back is no line, nor is the box that tyro draws around one.
    said = [
        line for line in outcome.error if line.strip() and "%|" not in line and not line.startswith(("╭", "│", "╰"))
    ]
    boxed = any(line.startswith("│") for line in outcome.error)
    found = {
        "status": outcome.status == (0 if entry.runs else 2),
        "lines": entry.runs or [*said, *["box"] * boxed] in ([outcome.line], ["box"]),
        "says": entry.says in (" ".join(outcome.error) if entry.runs else outcome.line),
        "changed": entry.runs or outcome.changed == [],
        "token": not any(CANARY in line for line in outcome.error),
    }
    return ", ".join(name for name, holds in found.items() if not holds)


def flags_of(entry: Entry) -> tuple[str, list[str]]:
    """The recipe and the command line of an entry: a run of two steps, right but for the entry's own flags."""
    flags = entry.flags.split()
    right = ["--run.max-steps", "2", "--run.output-dir", "out", "--run.precision", "fp32", "--batch.max-length", "32"]
    if "--data.source" not in flags:
        right += ["--data.source", "docs.txt"]
    if "--model.name" in flags or "--run.resume" in flags:
        return "mlm_finetune.py", ["--model.name", "bert", *right, *flags]
    return "mlm_pydocs.py", [*TINY, *right, *flags]


def snapshot(folder: Path) -> dict[str, str]:
    """A hash of every file below `folder`; "folder" for each folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def forked(work: Callable[[], object], output: Path) -> int:
    """Do `work` in a child of this process, whose output and errors go to files; its exit status."""
    pid = os.fork()
    if pid == 0:
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(output.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        status = 1
        try:
            work()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return -9


def run_recipe(recipe: str, flags: list[str]) -> None:
    """`python recipes/RECIPE FLAGS…` in this very process."""
    sys.argv = [recipe, *flags]
    runpy.run_path(str(ROOT / "recipes" / recipe), run_name="__main__")


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

    from minilm.tokens import train_tokenizer

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


def main_in_one_process(names: list[str], folder: Path) -> None:
    """Run the entries of these names, each in a fork, and write what became of them to outcomes.json."""
    materials = folder / "materials"
    materials.mkdir()
    make_materials(materials)  # in this process, so that the forks find everything imported
    outcomes = {}
    for number, name in enumerate(names):
        place, entry = folder / f"entry-{number}", ENTRIES[name]
        shutil.copytree(materials, place)

        def work(place: Path = place, entry: Entry = entry) -> None:
            os.chdir(place)
            with place.with_suffix(".before").open("w") as before:
                entry.prepare()
                json.dump(snapshot(place), before)
            recipe, flags = flags_of(entry)
            run_recipe(recipe, flags)

        start = time.monotonic()
        status = forked(work, place)
        seconds = time.monotonic() - start
        before, after = json.loads(place.with_suffix(".before").read_text()), snapshot(place)
        error = place.with_suffix(".stderr").read_text().splitlines()
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        outcome = Outcome(status=status, error=error, changed=changed, seconds=seconds)
        outcomes[name] = dataclasses.asdict(outcome)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


def outcomes(names: list[str]) -> dict[str, Outcome]:
    """What became of the entries of these names."""
    found: dict[str, Outcome] = {}
    with hub_server() as endpoint, tempfile.TemporaryDirectory(prefix="minilm-") as home:
        # Read by the libraries when they are imported, so that each of these needs a process of its own.
        hubs = {"offline": ("HF_HUB_OFFLINE", "1"), "server": ("HF_ENDPOINT", endpoint)}
        hubs["unreachable"] = ("HF_ENDPOINT", "http://127.0.0.1:9")
        running = {}
        for hub, (variable, value) in hubs.items():
            if not (group := [name for name in names if ENTRIES[name].hub == hub]):
                continue
            folder = Path(home, hub)
            folder.mkdir()
            environment = {
                **{key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"},
                **{variable: value, "HF_HOME": f"{folder}/cache", "HF_TOKEN": CANARY, "OMP_NUM_THREADS": "1"},
                **{"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)},
            }
            command = [sys.executable, "-m", "tests.bad_input", "--one-process", str(folder), *group]
            nowhere = subprocess.DEVNULL
            running[folder] = subprocess.Popen(command, env=environment, stdout=nowhere, stderr=nowhere, cwd=ROOT)
        for folder, process in running.items():
            process.wait()
            told = json.loads((folder / "outcomes.json").read_text())
            found |= {name: Outcome(**values) for name, values in told.items()}
    return {name: found[name] for name in names}


@contextlib.contextmanager
def hub_server() -> Iterator[str]:
    """A server that refuses everything as the hub does; its address."""

    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            gated, down = "gated" in self.path, "down" in self.path
            self.send_response(503 if down else 403 if "no-access" in self.path else 401 if gated else 404)
            if not down:
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


def main() -> None:
    if sys.argv[1:2] == ["--one-process"]:
        main_in_one_process(sys.argv[3:], Path(sys.argv[2]))
        return
    for name, outcome in outcomes(sys.argv[1:] or list(ENTRIES)).items():
        line = outcome.line or next((line for line in outcome.error if ENTRIES[name].says in line), "")
        flaws = wrong(ENTRIES[name], outcome)
        print(f"{name} ({outcome.seconds:.1f} s){' WRONG: ' if flaws else ''}{flaws}\n    {line}")


def text(name: str, content: bytes | str) -> Callable[[], object]:
    """Prepare a file of this content."""
    data = content.encode() if isinstance(content, str) else content
    return lambda: Path(name).write_bytes(data)


def jsonl(*values: object) -> Callable[[], object]:
    return text("docs.jsonl", "".join(json.dumps({"text": value}) + "\n" for value in values))


def edit(name: str, **changes: object) -> Callable[[], object]:
    """Change entries of a JSON file."""
    return lambda: Path(name).write_text(json.dumps(json.loads(Path(name).read_text()) | changes))


def without(name: str) -> Callable[[], object]:
    """Remove a special token from the tokenizer of the model `bert`."""

    def prepare() -> None:
        path = Path("bert/tokenizer_config.json")
        config = json.loads(path.read_text())
        config.pop(name)
        path.write_text(json.dumps(config))

    return prepare


def truncated(name: str) -> Callable[[], object]:
    def prepare() -> None:
        import pandas

        rows = pandas.DataFrame({"text": Path("docs.txt").read_text().splitlines()})
        if name.endswith(".parquet"):
            rows.to_parquet(name, row_group_size=20)
        else:
            rows.to_json(name, orient="records", lines=True)
        os.truncate(name, Path(name).stat().st_size - 9)

    return prepare


def damaged_row_group() -> None:
    """Three row groups, of which the second has a page of zeros."""
    import pandas
    from pyarrow import parquet

    rows = pandas.DataFrame({"text": [f"{line} {line}" for line in Path("docs.txt").read_text().splitlines()]})
    rows.to_parquet("docs.parquet", row_group_size=20)
    offset = parquet.ParquetFile("docs.parquet").metadata.row_group(1).column(0).data_page_offset
    with open("docs.parquet", "r+b") as file:
        file.seek(offset)
        file.write(bytes(40))


def pickled_weights() -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file("bert/model.safetensors"), "bert/pytorch_model.bin")
    os.unlink("bert/model.safetensors")


def no_room() -> None:
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000)


def no_permission() -> None:
    """A folder that may not be written to; the superuser, who may everything, becomes another user."""
    for path in (Path.cwd().parent.parent, Path.cwd().parent):
        path.chmod(0o755)
    for path in Path.cwd().rglob("*"):
        path.chmod(0o755)
    Path.cwd().chmod(0o555)
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)


def no_bf16() -> None:
    import minilm.hardware

    minilm.hardware.gemm_rate = lambda dtype, *rest: 1e9 if "bfloat16" in str(dtype) else 1e11


ENTRIES: dict[str, Entry] = {
    "empty text file": Entry(prepare=text("docs.txt", ""), says="docs.txt"),
    "blank text file": Entry(prepare=text("docs.txt", "\n \n"), says="no document with text in it"),
    "empty jsonl": Entry(flags="--data.source docs.jsonl", prepare=text("docs.jsonl", ""), says="docs.jsonl"),
    "missing file": Entry(flags="--data.source doc.txt", says="doc.txt: no such file"),
    "missing folder": Entry(flags="--data.source texts/", says="texts/: no such"),
    "folder without matching files": Entry(
        flags="--data.source bert/nothing", prepare=lambda: Path("bert/nothing").mkdir(), says="no file ending in .txt"
    ),
    "unknown column": Entry(
        flags="--data.source docs.jsonl --data.column txet",
        prepare=jsonl("a", "b"),
        says="'txet': did you mean 'text'? There are: text",
    ),
    "None for a text": Entry(flags="--data.source docs.jsonl", prepare=jsonl("a", "b", None), says="row 2"),
    "a number for a text": Entry(flags="--data.source docs.jsonl", prepare=jsonl(3, 4), says="row 0"),
    "a list for a text": Entry(flags="--data.source docs.jsonl", prepare=jsonl(["a"], ["b"]), says="row 0"),
    "text, then a number": Entry(flags="--data.source docs.jsonl", prepare=jsonl("a", 3), says="row 1"),
    "text, then a list": Entry(flags="--data.source docs.jsonl", prepare=jsonl("a", ["b"]), says="row 1"),
    "invalid UTF-8": Entry(prepare=text("docs.txt", b"ok\n\x81\n"), says="docs.txt, line 2: not UTF-8"),
    "invalid UTF-8 in jsonl": Entry(
        flags="--data.source docs.jsonl",
        prepare=text("docs.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n'),
        says="docs.jsonl, line 2",
    ),
    "invalid UTF-8 in csv": Entry(
        flags="--data.source docs.csv", prepare=text("docs.csv", b"text\na\n\x81\n"), says="docs.csv, line 3"
    ),
    "truncated jsonl": Entry(
        flags="--data.source docs.jsonl", prepare=truncated("docs.jsonl"), says="docs.jsonl, line 60"
    ),
    "truncated parquet": Entry(
        flags="--data.source docs.parquet", prepare=truncated("docs.parquet"), says="docs.parquet"
    ),
    "damaged row group": Entry(
        flags="--data.source docs.parquet", prepare=damaged_row_group, says="docs.parquet: row group 1 of 3"
    ),
    "impossible model": Entry(flags="--model.config.num-attention-heads 3", says="model.config: The hidden size"),
    "unknown split": Entry(flags="--data.source docs.txt --data.split test", says="test"),
    "unknown evaluation split": Entry(flags="--data.source docs.txt --data.eval-split validation", says="validation"),
    "bad slice": Entry(flags="--data.source docs.txt --data.split train[:5z]", says="train[:5z]"),
    "nothing to evaluate on": Entry(flags="--data.eval-fraction 0.001", says="evaluation part is empty"),
    "no mask token": Entry(flags="--model.name bert", prepare=without("mask_token"), says="no mask token"),
    "no pad token": Entry(flags="--model.name bert", prepare=without("pad_token"), says="--tokens.name"),
    "vocabulary larger than the embedding": Entry(
        flags="--model.name small", says="the tokenizer has 382 tokens and the model's embedding 373 rows"
    ),
    "more tokens than positions": Entry(flags="--model.name bert --batch.max-length 65", says="64 positions"),
    "every example too short": Entry(
        flags="--model.name bert", prepare=text("docs.txt", "a\n" * 9), says="hold no target"
    ),
    "model folder missing": Entry(flags="--model.name ./nowhere", says="./nowhere"),
    "model folder empty": Entry(
        flags="--model.name empty", prepare=lambda: Path("empty").mkdir(), says="there is no tokenizer.json"
    ),
    "model without weights": Entry(
        flags="--model.name bert", prepare=lambda: os.unlink("bert/model.safetensors"), says="bert"
    ),
    "model with another head": Entry(flags="--model.name gpt2", says="gpt2"),
    "encoder without a head": Entry(flags="--model.name encoder", says="start at random", runs=True),
    "classifier": Entry(flags="--model.name classifier", says="start at random", runs=True),
    "corrupt weights": Entry(
        flags="--model.name bert", prepare=text("bert/model.safetensors", b"no header" * 99), says="bert"
    ),
    "truncated weights": Entry(
        flags="--model.name bert", prepare=lambda: os.truncate("bert/model.safetensors", 5000), says="bert"
    ),
    "pickled weights": Entry(flags="--model.name bert", prepare=pickled_weights, says="safetensors"),
    "corrupt model configuration": Entry(flags="--model.name bert", prepare=text("bert/config.json", "{"), says="bert"),
    "corrupt tokenizer": Entry(flags="--model.name bert", prepare=text("bert/tokenizer.json", "{"), says="bert"),
    "unknown model type in a configuration": Entry(
        flags="--model.name bert", prepare=edit("bert/config.json", model_type="brt"), says="brt"
    ),
    "unknown flag": Entry(flags="--batch.exmples 3", says="--batch.examples"),
    "unknown model type": Entry(flags="--model.type bertt", says="did you mean 'bert'"),
    "unknown model field": Entry(
        flags="--model.name bert --model.config hiden_size 3", says="did you mean 'hidden_size'"
    ),
    "value of the wrong type": Entry(flags="--batch.examples many", says="many"),
    "unknown choice": Entry(flags="--batch.layout block", says="blocks"),
    "rate 1.5": Entry(flags="--objective.rate 1.5", says="objective.rate"),
    "lr -1": Entry(flags="--optim.lr -1", says="optim.lr"),
    "lr nan": Entry(flags="--optim.lr nan", says="optim.lr"),
    "0 epochs": Entry(flags="--run.epochs 0", says="run.epochs"),
    "output folder not empty": Entry(flags="--run.output-dir bert", says="is not empty"),
    "output folder not writable": Entry(prepare=no_permission, says="out cannot be written"),
    "output folder is a file": Entry(flags="--run.output-dir docs.txt", says="docs.txt cannot be written"),
    "no room for a checkpoint": Entry(prepare=no_room, says="free"),
    "fp16 on a CPU": Entry(flags="--run.precision fp16", says="needs a GPU"),
    "bf16 where it is slow": Entry(flags="--run.precision bf16", prepare=no_bf16, says="WARNING", runs=True),
    "resume from nothing": Entry(flags="--run.resume latest", says="no complete checkpoint"),
    "resume from another folder": Entry(flags="--run.resume bert", says="bert"),
    "resume with another model": Entry(
        flags="--run.resume latest --run.output-dir run --model.name other/model",
        says='model.name was "bert", is "other/model"',
    ),
    "resume with another tokenizer": Entry(
        flags="--run.resume latest --run.output-dir run --tokens.name gpt2", says="tokens.name"
    ),
    "resume with other documents": Entry(
        flags="--run.resume latest --run.output-dir run --run.max-steps 3",
        prepare=text("docs.txt", "Other words.\n" * 60),
        says="examples",
    ),
    "overwrite, then refused": Entry(
        flags="--run.overwrite --run.output-dir run --data.source nothing.txt", says="nothing.txt"
    ),
    "from a run that is none": Entry(flags="--from-run bert/config.json", says="bert/config.json"),
    "offline, model not in the cache": Entry(
        flags="--model.name some/model",
        says="HF_HUB_OFFLINE",
    ),
    "offline, dataset not in the cache": Entry(
        flags="--data.source some/dataset",
        says="HF_HUB_OFFLINE",
    ),
    "gated model": Entry(flags="--model.name some/gated", says="gated", hub="server"),
    "gated model, no access": Entry(flags="--model.name some/gated-no-access", says="gated", hub="server"),
    "missing model": Entry(flags="--model.name some/missing", says="some/missing", hub="server"),
    "gated dataset": Entry(flags="--data.source some/gated", says="gated", hub="server"),
    "missing dataset": Entry(flags="--data.source some/missing", says="some/missing", hub="server"),
    "hub not reachable, model": Entry(flags="--model.name some/model", says="reach", hub="unreachable"),
    "hub not reachable, dataset": Entry(flags="--data.source some/dataset", says="reach", hub="unreachable"),
    "hub not reachable, resume with another model": Entry(
        flags="--run.resume latest --run.output-dir run --model.name other/model",
        says="model.name",
        hub="unreachable",
    ),
}

if __name__ == "__main__":
    main()
