"""The ledger of a run: what it holds equals the figures of the evaluations, and a resumed run writes the same."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from minilm import (
    Batch,
    CausalLM,
    Classification,
    Config,
    Data,
    MaskedLM,
    Model,
    Optim,
    Run,
    SentenceEmbedding,
)
from minilm.objectives.factory import build_objective
from minilm.runs import ledger as ledger_module
from minilm.runs.ledger import Ledger, find_evaluations, identify_examples, read_evaluation, start_ledger, step_of
from minilm.train import train
from tests.jobs import config_in
from tests.launch import read_log


def in_folder(place: Path, **settings: Any) -> Config:
    """Return a run of 6 steps with an evaluation after every second one."""
    config = config_in(place, 6)
    run = replace(config.run, eval_every=2, save_every=4, output_dir=str(place / "out"))
    return replace(config, run=replace(run, **settings))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "ledger").iterdir()}


def test_safetensors_alone_reads_losses_that_add_up_to_the_figures(tmp_path: Path) -> None:
    train(in_folder(tmp_path, keep_last=1))
    facts = load_file(tmp_path / "out" / "ledger" / "examples.safetensors")
    assert {name: array.dtype for name, array in facts.items()} == dict.fromkeys(
        ("targets", "utf8_bytes", "document"), np.int32
    )
    with safe_open(tmp_path / "out" / "ledger" / "examples.safetensors", "np") as file:
        assert json.loads(file.metadata()["identity"]).keys() == {
            *("objective", "loss", "examples", "documents", "overflow")
        }
    _, evaluations = read_log(tmp_path / "out")
    assert [line["step"] for line in evaluations] == [2, 4, 6]
    for line in evaluations:
        values = load_file(tmp_path / "out" / "ledger" / f"eval-{line['step']}.safetensors")
        assert {name: (array.dtype, array.shape) for name, array in values.items()} == {"loss": (np.float32, (16,))}
        total = values["loss"].astype(np.float64).sum()
        assert total / facts["targets"].sum() == pytest.approx(line["eval_loss"], rel=1e-6)
        assert total / facts["utf8_bytes"].sum() / math.log(2) == pytest.approx(line["bits_per_byte"], rel=1e-6)


def test_a_resumed_run_has_the_ledger_of_a_whole_one_and_an_overwritten_one_keeps_nothing(tmp_path: Path) -> None:
    config = in_folder(tmp_path)
    train(config)
    whole = bytes_of(tmp_path / "out")
    (tmp_path / "out" / "all_results.json").unlink()
    for leftover in ("eval-9.safetensors", ".eval-6.safetensors-0123456789ab"):
        (tmp_path / "out" / "ledger" / leftover).write_bytes(b"of the killed run")
    for path in (tmp_path / "out" / "checkpoint-6").iterdir():
        path.unlink()
    (tmp_path / "out" / "checkpoint-6").rmdir()
    train(replace(config, run=replace(config.run, resume="latest")))
    assert bytes_of(tmp_path / "out") == whole
    train(replace(config, run=replace(config.run, max_steps=2, overwrite=True, ledger=False)))
    assert bytes_of(tmp_path / "out").keys() == {"examples.safetensors"}


def test_a_resumed_run_without_a_ledger_keeps_none_of_before(tmp_path: Path) -> None:
    config = in_folder(tmp_path, keep_last=9)
    train(config)
    (tmp_path / "out" / "all_results.json").unlink()
    train(replace(config, run=replace(config.run, resume=str(tmp_path / "out" / "checkpoint-4"), ledger=False)))
    assert find_evaluations(tmp_path / "out") == []


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_ledger_that_is_not_minilms_is_refused_and_left_alone(kind: str, tmp_path: Path) -> None:
    config = in_folder(tmp_path, overwrite=True)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "eval-2.safetensors").write_text("mine")
    (tmp_path / "out").mkdir()
    if kind == "file":
        (tmp_path / "out" / "ledger").write_text("mine")
    else:
        (tmp_path / "out" / "ledger").symlink_to(tmp_path / "others")
    with pytest.raises(ValueError, match="holds ledger, which is not a folder of minilm"):
        train(config)
    assert (tmp_path / "others" / "eval-2.safetensors").read_text() == "mine"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ledger"}


def test_the_settings_of_a_loss_are_part_of_its_identity(tmp_path: Path) -> None:
    prepared: Any = SimpleNamespace(eval=SimpleNamespace(fingerprint="x"), eval_documents="y")

    def identity(objective: Any) -> Any:
        return identify_examples(Config(objective=objective), prepared)

    assert identity(SentenceEmbedding(temperature=0.1)) != identity(SentenceEmbedding())
    assert identity(SentenceEmbedding(pooling="first")) == identity(SentenceEmbedding())
    assert identity(MaskedLM(rate=0.3, label_smoothing=0.1)) == identity(MaskedLM())


def test_a_loss_of_all_examples_together_is_not_kept() -> None:
    objective = build_objective(SentenceEmbedding())
    assert objective.describe_examples(torch.ones(4, 2, 8), torch.ones(4)) == {}
    assert objective.describe_examples(torch.ones(4, 2, 8), torch.arange(8).view(4, 2)).keys() == {"loss"}


def test_a_long_document_has_several_examples(tmp_path: Path) -> None:
    config = in_folder(tmp_path, max_steps=1)
    model = Model(type="gpt2", config={"n_embd": 16, "n_layer": 1, "n_head": 2})
    train(replace(config, objective=CausalLM(), model=model, batch=Batch(max_length=8)))
    document = load_file(tmp_path / "out" / "ledger" / "examples.safetensors")["document"]
    assert {*document.tolist()} == {*range(11)}
    assert len(document) > 11
    assert (np.diff(document) >= 0).all()


def test_classifiers_have_the_answers_and_averages_have_their_own(tmp_path: Path) -> None:
    rows = [{"text": "good " * (1 + i % 3) + f"{i}", "label": ["no", "yes"][i % 2]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = in_folder(tmp_path, max_steps=2)
    data = Data(source=str(tmp_path / "rows.jsonl"), eval_fraction=0.5)
    figures = train(replace(config, data=data, objective=Classification(), optim=Optim(lr=3e-3, ema=0.5))).figures
    values = load_file(tmp_path / "out" / "ledger" / "eval-2.safetensors")
    assert values.keys() == {"loss", "correct", "ema_loss", "ema_correct"}
    for prefix in ("", "ema_"):
        assert values[f"{prefix}correct"].mean() == figures[f"{prefix}accuracy"]
        assert values[f"{prefix}loss"].mean() == pytest.approx(figures[f"{prefix}eval_loss"], rel=1e-6)


def test_the_oldest_evaluations_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = SimpleNamespace(document=None, fingerprint="a")
    prepared: Any = SimpleNamespace(eval=examples, eval_documents="b")
    ledger = start_ledger(tmp_path, Config(), prepared, 0)
    assert isinstance(ledger, Ledger)
    monkeypatch.setattr(ledger_module, "LEDGER_BYTES", 3 * 5 * 4)
    for step in (9, 10, 100, 1000):
        ledger.write(step, {"loss": np.arange(5.0) + step, "targets": np.ones(5, np.int64)})
    assert [step_of(path) for path in find_evaluations(tmp_path)] == [10, 100, 1000]
    table = read_evaluation(find_evaluations(tmp_path)[-1])
    assert table.mean_loss.tolist() == [1000, 1001, 1002, 1003, 1004]
    assert table.identity == {
        "objective": "MaskedLM",
        "loss": "{}",
        "examples": "a",
        "documents": "b",
        "overflow": "split",
    }
    ledger.write(1001, {})
    (tmp_path / "ledger" / "eval-1000.safetensors").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"eval-1000\.safetensors cannot be read"):
        read_evaluation(find_evaluations(tmp_path)[-1])
    assert isinstance(start_ledger(tmp_path, Config(), prepared, 100), Ledger)
    assert [step_of(path) for path in find_evaluations(tmp_path)] == [10, 100]
    assert start_ledger(tmp_path, Config(run=Run(ledger=False)), prepared, 100) is None
    assert find_evaluations(tmp_path) == []
