"""What a result depends on may not change before a resume, which names it; anything else may, and changes no bit."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase

from minilm import Config, Data, Model
from minilm.train import train
from tests.jobs import CONFIG, end_of, write_text
from tests.laws.resume_everywhere import stopped_after
from tests.tiny import tiny_config

STEPS, STOPPED = 6, 3


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def set_field(folder: Path, name: str, field: str, value: object) -> None:
    tree = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**tree, field: value}))


def touch(place: Path) -> None:
    for path in place.rglob("*"):
        os.utime(path, (1, 1))


def copy(place: Path) -> None:
    """The same bytes in files of their own."""
    shutil.copytree(place, f"{place}-copy")
    shutil.rmtree(place)
    Path(f"{place}-copy").rename(place)


def move(place: Path) -> None:
    """Other paths for the same bytes, which the configuration follows."""
    (place / "moved").mkdir()
    for name in ("text.txt", "held.txt", "base"):
        (place / name).rename(place / "moved" / name)


# What is changed in the folder of all that the run reads, and how the refusal names it.
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "training text": (lambda place: change(place / "text.txt", "quick", "slow"), "the training examples were"),
    "evaluation text": (lambda place: change(place / "held.txt", "quick", "slow"), "the evaluation examples were"),
    "activation": (lambda place: set_field(place / "base", "config.json", "hidden_act", "relu"), "hidden_act of"),
    "dropout": (lambda place: set_field(place / "base", "config.json", "hidden_dropout_prob", 0.5), "hidden_dropout"),
    "epsilon": (lambda place: set_field(place / "base", "config.json", "layer_norm_eps", 1e-3), "layer_norm_eps of"),
    "tokenizer": (
        lambda place: set_field(place / "base", "tokenizer_config.json", "model_max_length", 99),
        "the tokenizer is another one",
    ),
}
ALLOWED: dict[str, Callable[[Path], None]] = {
    "nothing": lambda place: None,
    "times of files": touch,
    "copies of files": copy,
    "paths": move,
    "weights to start from": lambda place: AutoModelForMaskedLM.from_config(tiny_config_of(place)).save_pretrained(
        place / "base"
    ),
}


def tiny_config_of(place: Path) -> object:
    return AutoModelForMaskedLM.from_pretrained(place / "base").config


def config_of(place: Path) -> Config:
    return replace(
        CONFIG,
        data=Data(source=str(place / "text.txt"), eval_source=str(place / "held.txt")),
        model=Model(name=str(place / "base")),
        run=replace(CONFIG.run, max_steps=STEPS, eval_every=2, output_dir=str(place.parent / "reference")),
    )


@pytest.fixture(scope="module")
def reference(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that a run reads, in `read`, and beside it the run that was never stopped."""
    place = tmp_path_factory.mktemp("inputs") / "read"
    place.mkdir()
    write_text(place / "text.txt")
    (place / "held.txt").write_text("\n".join((place / "text.txt").read_text().splitlines()[:20]))
    config = tiny_config("bert", tokenizer)
    config.hidden_dropout_prob = 0.1
    AutoModelForMaskedLM.from_config(config).save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    train(config_of(place))
    return place


@pytest.fixture
def go_on(reference: Path, tmp_path: Path) -> Callable[[Callable[[Path], None]], Path]:
    """Change something, resume the run from its middle, and put all back; returns its folder."""

    def go_on(act: Callable[[Path], None]) -> Path:
        shutil.copytree(reference, kept := tmp_path / "kept")
        folder = stopped_after(STOPPED, reference.parent / "reference", tmp_path / "out")
        try:
            act(reference)
            place = reference / "moved" if (reference / "moved").exists() else reference
            config = config_of(place)
            train(replace(config, run=replace(config.run, output_dir=str(folder), resume="latest")))
        finally:
            shutil.rmtree(reference)
            shutil.copytree(kept, reference)
        return folder

    return go_on


@pytest.mark.scorecard(41)
@pytest.mark.parametrize("what", REFUSED)
def test_a_changed_input_is_refused_by_name(
    what: str, go_on: Callable[[Callable[[Path], None]], Path], figure: Callable[[str], None]
) -> None:
    act, named = REFUSED[what]
    with pytest.raises(ValueError, match=r"^cannot resume from [^\n]*$") as caught:
        go_on(act)
    assert named in str(caught.value)
    figure(f"{what} named")


@pytest.mark.scorecard(41)
@pytest.mark.parametrize("what", ALLOWED)
def test_what_the_result_does_not_depend_on_may_change(
    what: str,
    reference: Path,
    go_on: Callable[[Callable[[Path], None]], Path],
    figure: Callable[[str], None],
) -> None:
    assert end_of(go_on(ALLOWED[what])) == end_of(reference.parent / "reference")
    figure(f"{what}: the same bits")
