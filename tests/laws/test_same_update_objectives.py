"""Law 1 for objectives, a user's own and built-in ones, also if the loss compares a step's examples; their resume."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from minilm import Config, Run
from minilm.train import train
from tests.jobs import end_of, finish_all
from tests.launch import read_log
from tests.own_objectives import MODELS, OBJECTIVES, build_config, write_rows

LAYOUTS = {(1, 80): "1 process, many micro-batches", (2, 80): "2 processes", (3, 4096): "3 processes"}
STEPS = 12
RUN = Run(max_steps=STEPS, eval_every=6, save_every=5, keep_last=9, precision="fp32")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, int, int], Path]:
    """Return the output folder of the run of an objective, with a model, in a layout."""
    place = tmp_path_factory.mktemp("objectives")
    source = write_rows(place / "rows.jsonl")

    def config(name: str, model: str, processes: int, micro_tokens: int) -> Config:
        folder = place / f"{name}-{model}-{processes}-{micro_tokens}"
        config = build_config(name, source, model=MODELS[model], run=replace(RUN, output_dir=str(folder)))
        return replace(config, batch=replace(config.batch, micro_tokens=micro_tokens))

    everything = [(name, model, *layout) for name in OBJECTIVES for model in MODELS for layout in ((1, 4096), *LAYOUTS)]
    finish_all([(config(*each), each[2]) for each in everything], place)
    return lambda *each: Path(config(*each).run.output_dir or "")


@pytest.mark.scorecard(4)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUTS.get)
def test_neither_processes_nor_micro_batches_change_the_update_of_an_objective(
    layout: tuple[int, int], name: str, model: str, runs: Callable[[str, str, int, int], Path]
) -> None:
    ours, expected = (read_log(runs(name, model, *each)) for each in (layout, (1, 4096)))
    assert [len(part) for part in ours] == [STEPS, 2]
    differences = [
        abs(line[key] / other[key] - 1)
        for part, others in zip(ours, expected, strict=True)
        for line, other in zip(part, others, strict=True)
        for key in ("loss", "grad_norm", "eval_loss")
        if key in other
    ]
    for part, others in zip(ours, expected, strict=True):
        for name in ("exact_match", "f1", "accuracy"):
            assert [line.get(name) for line in part] == [line.get(name) for line in others]
    # No difference at all would mean that the layouts were the same.
    assert 0 < max(differences) <= 1e-5


def test_the_layouts_learn(runs: Callable[[str, str, int, int], Path]) -> None:
    for name in ("tags", "pairs", "triplets", "names"):
        steps, _ = read_log(runs(name, "packed", 1, 4096))
        assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_resumed_run_of_an_objective_is_equal_to_the_bit(
    name: str, runs: Callable[[str, str, int, int], Path], tmp_path: Path
) -> None:
    reference = runs(name, "packed", 1, 80)
    shutil.copytree(reference, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-1*", "all_results.json"))
    source = str(reference.parent / "rows.jsonl")
    run = replace(RUN, output_dir=str(tmp_path / "out"), resume=str(tmp_path / "out" / "checkpoint-5"))
    train(build_config(name, source, run=run))
    assert end_of(tmp_path / "out") == end_of(reference)
