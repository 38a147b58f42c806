"""The losses of training examples by epoch: those of the steps, for any cut; a resumed run writes the same files."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from minilm import Config, MaskedLM, SentenceEmbedding
from minilm.commands.train_examples import find_duplicates, find_hardest, measure_learning, read_losses
from minilm.objectives.factory import prepare_data
from minilm.train import train
from tests.jobs import CONFIG, config_in, finish_all, in_folder, without_dropout
from tests.launch import read_log
from tests.own_objectives import build_config, write_rows


def build(place: Path, name: str, layout: Any = "documents", micro_tokens: int = 40) -> Config:
    """Return a run of 22 steps, where an epoch has 18 steps or fewer, without dropout."""
    config = without_dropout(config_in(place, 22))
    run = replace(config.run, eval_every=22, save_every=5, keep_last=9, train_ledger=True, output_dir=str(place / name))
    batch = replace(config.batch, layout=layout, micro_tokens=micro_tokens)
    return replace(config, batch=batch, objective=MaskedLM(rate=0.3), run=run)


def ledger_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "ledger").glob("train-*"))}


def read(folder: Path) -> list[dict[str, Any]]:
    return [load_file(folder / "ledger" / name) for name in ledger_of(folder)]


@pytest.mark.parametrize("layout", ["documents", "packed", "blocks"])
def test_the_losses_of_an_epoch_add_up_to_those_of_its_steps(layout: str, tmp_path: Path) -> None:
    config = build(tmp_path, "out", layout)
    train(config)
    tables = read(tmp_path / "out")
    assert len(tables) > 1
    assert (tables[0]["targets"] >= 0).all()
    assert (tables[-1]["targets"] == -1).any()
    steps, _ = read_log(tmp_path / "out")
    total = sum(table["loss"].astype(np.float64).sum() for table in tables)
    targets = sum(table["targets"][table["targets"] > 0].sum() for table in tables)
    # The log has the mean of each step, and all steps have nearly as many targets.
    assert total / targets == pytest.approx(np.mean([line["loss"] for line in steps]), rel=0.02)


def test_neither_micro_batches_nor_processes_change_a_loss(tmp_path: Path) -> None:
    configs = [
        (build(tmp_path, name, micro_tokens=size), n) for name, size, n in (("a", 40, 1), ("b", 4096, 1), ("c", 40, 2))
    ]
    finish_all(configs, tmp_path)
    expected, *others = (read(tmp_path / name) for name in "abc")
    for tables in others:
        for table, other in zip(tables, expected, strict=True):
            assert table["targets"].tolist() == other["targets"].tolist()
            np.testing.assert_allclose(table["loss"], other["loss"], rtol=1e-3)


@pytest.mark.parametrize("step", [5, 20])
def test_a_resumed_run_has_the_files_of_a_whole_one(step: int, tmp_path: Path) -> None:
    config = build(tmp_path, "out")
    train(config)
    whole = ledger_of(tmp_path / "out")
    # The files are those of the end of the run, as after a kill.
    branch = replace(
        config.run, output_dir=str(tmp_path / "branch"), resume=str(tmp_path / "out" / f"checkpoint-{step}")
    )
    train(replace(config, run=branch))
    assert ledger_of(tmp_path / "branch") == whole
    (tmp_path / "out" / "all_results.json").unlink()
    for path in (tmp_path / "out").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    train(replace(config, run=replace(config.run, resume="latest")))
    assert ledger_of(tmp_path / "out") == whole


def test_losses_that_compare_examples_are_those_of_each_example(tmp_path: Path) -> None:
    run = replace(CONFIG.run, max_steps=4, eval_every=4, save_every=0, train_ledger=True)
    config = build_config("triplets", write_rows(tmp_path / "rows.jsonl", 60), objective=SentenceEmbedding(), run=run)
    config = in_folder(config, tmp_path / "out")
    train(config)
    (table,) = read(tmp_path / "out")
    steps, _ = read_log(tmp_path / "out")
    assert sorted(set(table["targets"].tolist())) == [-1, 1]
    assert table["loss"].sum() == pytest.approx(sum(10 * line["loss"] for line in steps), rel=1e-5)


def test_an_example_that_does_not_count_has_no_target(tmp_path: Path) -> None:
    run = replace(CONFIG.run, max_steps=6, eval_every=6, save_every=0, train_ledger=True)
    config = build_config("answers", write_rows(tmp_path / "rows.jsonl", 60), run=run)
    config = in_folder(replace(config, data=replace(config.data, exclude_loss="0-9")), tmp_path / "out")
    train(config)
    bounds = prepare_data(config).train.document_bounds
    starts = prepare_data(config).train.start
    assert bounds is not None
    table = read(tmp_path / "out")[0]
    assert set(table["targets"][starts < bounds[10]].tolist()) == {0}
    assert set(table["targets"][starts >= bounds[10]].tolist()) == {1}


@pytest.mark.parametrize("content", [b"", b"not a ledger"])
def test_a_damaged_file_does_not_keep_a_run_from_going_on(content: bytes, tmp_path: Path) -> None:
    config = build(tmp_path, "out")
    train(config)
    (tmp_path / "out" / "all_results.json").unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-22")
    (path,) = [path for path in (tmp_path / "out" / "ledger").glob("train-*") if path.name == "train-1.safetensors"]
    path.write_bytes(content)
    train(replace(config, run=replace(config.run, resume="latest")))
    table = read(tmp_path / "out")[-1]
    assert (table["targets"] >= 0).any()


def test_a_run_without_it_keeps_nothing(tmp_path: Path) -> None:
    config = build(tmp_path, "out")
    short = replace(config.run, max_steps=2)
    train(replace(config, run=short))
    assert ledger_of(tmp_path / "out").keys() == {"train-0.safetensors"}
    train(replace(config, run=replace(short, train_ledger=False, overwrite=True)))
    assert ledger_of(tmp_path / "out") == {}


def test_the_command_lists_hard_examples_copies_and_what_is_still_learnt(tmp_path: Path, run: Any) -> None:
    config = build(tmp_path, "out")
    lines = (tmp_path / "text.txt").read_text().splitlines()
    (tmp_path / "text.txt").write_text("\n".join([*lines, *[lines[12]] * 30]))
    train(replace(config, run=replace(config.run, max_steps=40, eval_every=40)))
    losses = read_losses(tmp_path / "out")
    hardest = find_hardest(losses, 5)
    assert [each.loss for each in hardest] == sorted(np.nan_to_num(losses.last, nan=-1), reverse=True)[:5]
    assert all(each.high == each.epochs for each in find_hardest(losses, 99, always_high=True))
    for each in find_duplicates(losses, 99):
        assert each.duplicate_of is not None
        assert each.duplicate_of < each.example
    status, output, error = run("ledger", str(tmp_path / "out"), "--train", "--top", "3")
    assert status is None, error
    learning = measure_learning(losses)
    assert output[-1].startswith(f"{learning:.0%} of the examples have a loss that fell")
    assert [line.split()[0] for line in output[1:-1]] == [f"{each.loss:.3f}" for each in hardest[:3]]
    status, _, error = run("ledger", str(tmp_path / "out"), "--duplicates")
    assert (status, error) == (2, ["error: --duplicates lists training examples: add --train"])


def test_copies_are_found_and_the_share_that_is_learnt_leaves_out_noise() -> None:
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 300, size=60) for _ in range(60)]
    rows[40] = rows[7].copy()
    rows[41] = rows[7].copy()
    rows[41][30] = 299

    class Rows:
        def __init__(self, prepared: object) -> None:
            pass

        def __getitem__(self, index: int) -> Any:
            return rows[index]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilm.commands.train_examples.JoinedExamples", Rows)
        patch.setattr("minilm.commands.train_examples._LOWEST_SHARE", 1.0)
        prepared: Any = type("Prepared", (), {"tokenizer": type("T", (), {"decode": lambda *_, **__: "text"})()})
        from minilm.commands.train_examples import TrainLosses

        losses = TrainLosses(mean_PxE=np.ones((2, 60)), prepared=prepared)
        found = {each.example: each.duplicate_of for each in find_duplicates(losses, 9)}
    assert found in ({40: 7, 41: 7}, {40: 7})
    noise = draw.normal(size=(2, 4000))
    assert measure_learning(TrainLosses(mean_PxE=noise, prepared=prepared)) == pytest.approx(0.0, abs=0.04)
    noise[1, :2000] -= 100
    assert measure_learning(TrainLosses(mean_PxE=noise, prepared=prepared)) == pytest.approx(0.5, abs=0.04)
