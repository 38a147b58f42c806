"""A resume refuses a changed input of the result and names it; other changes leave every bit the same."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from minilm import Batch, CausalLM, Classification, Config, Data, Model
from minilm.distributed.hardware import describe
from minilm.runs.run_inputs import _sums
from minilm.train import train
from tests.faults.damage import warnings_of_minilm
from tests.jobs import CONFIG, end_of, start, write_text
from tests.laws.resume_everywhere import stopped_after
from tests.tiny import tiny_config

pytestmark = pytest.mark.scorecard(41)

STEPS, STOPPED = 4, 2
TEXTS = ("text.txt", "more.txt")
ALL = (*TEXTS, "held.txt", "rows.jsonl", "held.jsonl", "bert", "gpt")


def sources(place: Path) -> tuple[str, ...]:
    return tuple(str(place / name) for name in TEXTS)


def masked(place: Path) -> Config:
    data = Data(source=sources(place), eval_source=str(place / "held.txt"))
    return replace(CONFIG, data=data, model=Model(name=str(place / "bert")))


def lora(place: Path) -> Config:
    return replace(masked(place), model=Model(name=str(place / "bert"), lora_rank=2))


def classifier(place: Path) -> Config:
    data = Data(source=str(place / "rows.jsonl"), eval_source=str(place / "held.jsonl"))
    return replace(masked(place), data=data, objective=Classification(class_weights="balanced"))


def stream(place: Path) -> Config:
    return replace(
        CONFIG,
        data=Data(source=sources(place), eval_fraction=0.1, streaming=True, weights=(2.0, 0.5)),
        model=Model(name=str(place / "gpt")),
        objective=CausalLM(),
        batch=Batch(examples=8, max_length=24, layout="blocks"),
    )


RUNS = {run.__name__: run for run in (masked, lora, classifier, stream)}


def write_all(place: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write all files that the runs read."""
    lines = Path(write_text(place / "text.txt")).read_text().splitlines()
    (place / "more.txt").write_text("\n".join(lines[60:100]))
    (place / "held.txt").write_text("\n".join(lines[:20]))
    for name, count in (("rows.jsonl", 60), ("held.jsonl", 20)):
        rows = [{"text": lines[n], "label": ("bad", "good")[n % 2], "n": n} for n in range(count)]
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config("bert", tokenizer)
    config.hidden_dropout_prob = 0.1
    AutoModelForMaskedLM.from_config(config).save_pretrained(place / "bert")
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2", tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.sep_token_id, max_new_tokens=9)
    model.save_pretrained(place / "gpt")
    # Tokenizers on the hub may truncate and pad by themselves.
    tokenizer.save_pretrained(place / "bert")
    truncating = AutoTokenizer.from_pretrained(place / "bert")
    truncating.backend_tokenizer.enable_truncation(16)
    truncating.backend_tokenizer.enable_padding()
    truncating.save_pretrained(place / "bert")
    causal = AutoTokenizer.from_pretrained(place / "bert")
    causal.eos_token = causal.sep_token
    causal.save_pretrained(place / "gpt")


Act = Callable[[Path], object]


def change(name: str, old: str, new: str, count: int = -1) -> Act:
    """Return an act that replaces `old` by `new` in a file."""

    def act(place: Path) -> None:
        text = (place / name).read_text()
        assert old in text
        (place / name).write_text(text.replace(old, new, count))

    return act


def set_field(name: str, field: str, value: object) -> Act:
    """Return an act that sets a field of a JSON file."""

    def act(place: Path) -> None:
        tree = json.loads((place / name).read_text())
        (place / name).write_text(json.dumps({**tree, field: value}))

    return act


def swap_sources(place: Path) -> None:
    for name, text in zip(TEXTS, [(place / name).read_text() for name in reversed(TEXTS)], strict=True):
        (place / name).write_text(text)


def move_a_line(place: Path) -> None:
    """Move the last line of the first file to the start of the second."""
    first, second = (place / name for name in TEXTS)
    lines = first.read_text().splitlines()
    first.write_text("\n".join(lines[:-1]))
    second.write_text("\n".join([lines[-1], second.read_text()]))


def add_a_token(place: Path) -> None:
    """Make a piece of words an added token with its old id, so that it matches anywhere."""
    tokenizer = AutoTokenizer.from_pretrained(place / "bert")
    tokenizer.add_tokens(min(piece for piece in tokenizer.get_vocab() if piece.isalpha() and len(piece) == 3))
    tokenizer.save_pretrained(place / "bert")


def new_weights(place: Path) -> None:
    config = AutoModelForMaskedLM.from_pretrained(place / "bert").config
    AutoModelForMaskedLM.from_config(config).save_pretrained(place / "bert")


def turn_weights(place: Path) -> None:
    """Reverse the order of the numbers in each weight."""
    model = AutoModelForMaskedLM.from_pretrained(place / "bert")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flatten().flip(0).view_as(parameter))
    model.save_pretrained(place / "bert")


def touch(place: Path) -> None:
    for path in place.rglob("*"):
        os.utime(path, (1, 1))


def copy(place: Path) -> None:
    """Replace all files by copies."""
    shutil.copytree(place, f"{place}-copy")
    shutil.rmtree(place)
    Path(f"{place}-copy").rename(place)


def move(place: Path) -> None:
    """Move all files to another folder; the configuration names the new paths."""
    (place / "moved").mkdir()
    for name in ALL:
        (place / name).rename(place / "moved" / name)


def nothing(place: Path) -> None:
    pass


TRAINING, EVALUATION = "the training examples were", "the evaluation examples were"
TOKENIZER = "the tokenizer has changed"
LOWER = {"type": "Lowercase"}
# Changes of the files that a run reads, and the name of each in the refusal.
REFUSED: dict[tuple[str, str], tuple[Act, str]] = {
    ("masked", "training text"): (change("text.txt", "quick", "slow"), TRAINING),
    ("masked", "one letter of the last source"): (change("more.txt", "fox", "fax", 1), TRAINING),
    ("masked", "order of sources"): (swap_sources, TRAINING),
    ("masked", "evaluation text"): (change("held.txt", "quick", "slow"), EVALUATION),
    ("masked", "activation"): (set_field("bert/config.json", "hidden_act", "relu"), "hidden_act of the model"),
    ("masked", "dropout"): (set_field("bert/config.json", "hidden_dropout_prob", 0.5), "hidden_dropout_prob of"),
    ("masked", "epsilon"): (set_field("bert/config.json", "layer_norm_eps", 1e-3), "layer_norm_eps of the model"),
    ("masked", "field of nobody"): (set_field("bert/config.json", "note", "new"), "note of the model configuration"),
    ("masked", "tokenizer's length"): (set_field("bert/tokenizer_config.json", "model_max_length", 99), TOKENIZER),
    ("masked", "normalizer"): (set_field("bert/tokenizer.json", "normalizer", LOWER), TOKENIZER),
    ("masked", "added token"): (add_a_token, TOKENIZER),
    ("lora", "training text"): (change("text.txt", "quick", "slow"), TRAINING),
    ("lora", "weights of the base"): (new_weights, "its weights are different"),
    ("lora", "order of the base's weights"): (turn_weights, "its weights are different"),
    ("classifier", "one training label"): (change("rows.jsonl", '"bad"', '"good"', 1), TRAINING),
    ("classifier", "one evaluation label"): (change("held.jsonl", '"bad"', '"good"', 1), EVALUATION),
    ("classifier", "training text"): (change("rows.jsonl", "quick", "slow"), TRAINING),
    ("classifier", "evaluation text"): (change("held.jsonl", "quick", "slow"), EVALUATION),
    ("classifier", "name of a class"): (
        lambda place: [change(name, '"bad"', '"awful"')(place) for name in ("rows.jsonl", "held.jsonl")],
        "id2label of the model configuration",
    ),
    ("stream", "text of the same size"): (change("text.txt", "quick", "kciuq"), TRAINING),
    ("stream", "order of sources"): (swap_sources, TRAINING),
    ("stream", "other ends of files"): (move_a_line, TRAINING),
    ("stream", "generation"): (
        set_field("gpt/generation_config.json", "max_new_tokens", 7),
        "max_new_tokens of the generation configuration was 9, is 7",
    ),
}
ALLOWED: dict[tuple[str, str], Act] = {
    ("masked", "nothing"): nothing,
    ("masked", "times of files"): touch,
    ("masked", "copies of files"): copy,
    ("masked", "paths"): move,
    ("masked", "other ends of files"): move_a_line,
    ("masked", "weights to start from"): new_weights,
    ("masked", "release that wrote the model"): set_field("bert/config.json", "transformers_version", "5.0.0"),
    ("lora", "paths"): move,
    ("classifier", "times of files"): touch,
    ("classifier", "column that is not read"): change("rows.jsonl", '"n": 1', '"n": 7'),
    ("stream", "times of files"): touch,
    ("stream", "paths"): move,
}
# Changed settings that a resume refuses, and below those that it warns of.
SETTINGS: dict[str, tuple[Callable[[Config], Config], str]] = {
    "weights of sources": (
        lambda config: replace(config, data=replace(config.data, weights=(1.0, 1.0))),
        "data.weights was",
    ),
    "delimiter": (lambda config: replace(config, data=replace(config.data, delimiter=";")), "data.delimiter was"),
    "label separator": (
        lambda config: replace(config, data=replace(config.data, label_separator=";")),
        "data.label_separator was",
    ),
    "field of the model": (
        lambda config: replace(config, model=replace(config.model, config={"hidden_dropout_prob": 0.0})),
        "model.config was",
    ),
}
WARNED: dict[str, Callable[[Config], Config]] = {
    "batch.micro_tokens": lambda config: replace(config, batch=replace(config.batch, micro_tokens=80)),
    "model.attention": lambda config: replace(config, model=replace(config.model, attention="eager")),
}


@dataclass(frozen=True)
class Resumable:
    """Runs that a test can resume from their middle after a change."""

    read: Path
    """The folder of all files that they read."""

    def config_of(self, name: str, place: Path) -> Config:
        config = RUNS[name](place)
        folder = str(self.reference(name))
        run = replace(config.run, max_steps=STEPS, eval_every=2, save_every=2, output_dir=folder)
        return replace(config, run=run)

    def reference(self, name: str) -> Path:
        """Return the folder of the run that was never stopped."""
        return self.read.parent / f"reference-{name}"

    def run(self, name: str) -> None:
        if not self.reference(name).exists():
            train(self.config_of(name, self.read))

    def go_on(
        self, name: str, folder: Path, act: Act = nothing, changed: Callable[[Config], Config] = lambda config: config
    ) -> Path:
        """Apply the change, resume the run from its middle in `folder`, and restore the files that it reads."""
        self.run(name)
        shutil.copytree(self.read, kept := folder.parent / "kept")
        stopped_after(STOPPED, self.reference(name), folder)
        try:
            act(self.read)
            place = self.read / "moved" if (self.read / "moved").exists() else self.read
            config = changed(self.config_of(name, place))
            train(replace(config, run=replace(config.run, output_dir=str(folder), resume="latest")))
        finally:
            shutil.rmtree(self.read)
            shutil.copytree(kept, self.read)
        return folder


@pytest.fixture(scope="module")
def runs(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Resumable:
    place = tmp_path_factory.mktemp("inputs") / "read"
    place.mkdir()
    write_all(place, tokenizer)
    return Resumable(place)


@pytest.mark.parametrize(("name", "what"), REFUSED)
def test_a_changed_input_is_refused_by_name(
    name: str, what: str, runs: Resumable, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    act, named = REFUSED[name, what]
    with pytest.raises(ValueError, match=r"^cannot resume from [^\n]*$") as caught:
        runs.go_on(name, tmp_path / "out", act)
    assert named in str(caught.value)
    figure(f"{name}, {what} named")


@pytest.mark.parametrize(("name", "what"), ALLOWED)
def test_what_the_result_does_not_depend_on_may_change(
    name: str, what: str, runs: Resumable, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    with warnings_of_minilm() as told:
        assert end_of(runs.go_on(name, tmp_path / "out", ALLOWED[name, what])) == end_of(runs.reference(name))
    assert not any("to the bit" in line for line in told)
    figure(f"{name}, {what}: the same bits")


@pytest.mark.parametrize("what", SETTINGS)
def test_a_changed_setting_is_refused_by_name(what: str, runs: Resumable, tmp_path: Path) -> None:
    changed, named = SETTINGS[what]
    with pytest.raises(ValueError, match=r"^cannot resume from [^\n]* with other settings: ") as caught:
        runs.go_on("masked", tmp_path / "out", changed=changed)
    assert named in str(caught.value)


@pytest.mark.parametrize("what", WARNED)
def test_what_may_change_the_last_bits_is_warned_of(
    what: str, runs: Resumable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.run("masked")
    monkeypatch.setattr(
        "minilm.runs.run_inputs.describe", lambda device: {**describe(device), "threads_per_process": 77}
    )
    with warnings_of_minilm() as told:
        runs.go_on("masked", tmp_path / "out", changed=WARNED[what])
    (line,) = [line for line in told if line.startswith("the run may not repeat to the bit: ")]
    assert f"{what} was " in line
    assert f"threads_per_process was {torch.get_num_threads()}, is 77" in line


def test_each_of_several_processes_refuses_and_one_says_so(runs: Resumable, tmp_path: Path) -> None:
    runs.run("masked")
    folder = stopped_after(STOPPED, runs.reference("masked"), tmp_path / "out")
    shutil.copytree(runs.read, place := tmp_path / "read")
    change("held.txt", "quick", "slow")(place)
    config = runs.config_of("masked", place)
    config = replace(config, run=replace(config.run, output_dir=str(folder), resume="latest"))
    job = start("fork", config, tmp_path, processes=2)
    assert job.status() == 2
    (line,) = job.stderr.read_text().splitlines()
    assert line.startswith(f"error: cannot resume from {folder}/checkpoint-{STOPPED}: {EVALUATION}")


def test_a_checksum_tells_the_order_of_numbers() -> None:
    numbers = torch.randn(2**20 + 5)
    others = [numbers.clone() for _ in range(3)]
    others[0][[3, 2**20 + 2]] = numbers[[2**20 + 2, 3]]
    others[1] = numbers.flip(0)
    others[2][-1] += 1e-5
    assert all(_sums(other) != _sums(numbers) for other in others)
    assert _sums(numbers) == _sums(numbers.clone()) == _sums(numbers.view(1, -1))
    assert _sums(torch.tensor(2.0)) != _sums(torch.tensor(3.0))
    assert _sums(torch.zeros(0)) == _sums(torch.zeros(0, 3))
