"""Law 1: a step's update does not depend on micro-batches, processes or workers, and a run can be repeated."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from minilm import Batch, Config, Data, MaskedLM, Model, Optim, Run, Tokens
from minilm.train import train
from tests.jobs import end_of, finish_all
from tests.launch import launch, read_log

MODELS = {
    "packed": Model(
        type="modernbert",
        config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "padded": Model(  # its own attention code needs padding
        type="mpnet",
        config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
}
CONFIG = Config(
    tokens=Tokens(vocab_size=400),
    model=MODELS["packed"],
    objective=MaskedLM(rate=0.3, final_rate=0.2, unit="word"),
    batch=Batch(examples=12, max_length=48, micro_tokens=4096),
    optim=Optim(lr=1e-3),
    run=Run(max_steps=60, eval_every=20, precision="fp32"),
)
# For (processes, micro_tokens), how most steps are cut: processes x micro-batches.
LAYOUTS = {(1, 256): "1x2", (1, 128): "1x4", (1, 64): "1x8", (2, 128): "2x2", (4, 4096): "4x1"}


@pytest.fixture(scope="module")
def config(documents: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = tmp_path_factory.mktemp("text") / "documents.txt"
    path.write_text("\n".join(documents["text"]))
    return replace(CONFIG, data=Data(source=str(path), eval_fraction=0.2))


def changed(config: Config, folder: Path, micro_tokens: int = 4096, model: str = "packed", workers: int = 0) -> Config:
    return replace(
        config,
        batch=replace(config.batch, micro_tokens=micro_tokens, workers=workers),
        model=MODELS[model],
        run=replace(config.run, output_dir=str(folder)),
    )


@pytest.fixture(scope="module")
def runs(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, int], Path]:
    """Return the output folders of runs: each model in each layout, and in one micro-batch on one process."""
    folder = tmp_path_factory.mktemp("runs")
    everything = [(model, *layout) for model in MODELS for layout in ((1, 4096), *LAYOUTS)]
    finish_all(
        [(changed(config, folder / f"{model}-{n}-{size}", size, model), n) for model, n, size in everything], folder
    )
    return lambda model, processes, micro_tokens: folder / f"{model}-{processes}-{micro_tokens}"


def apart(ours: Path, reference: Path) -> float:
    """Return the largest relative difference of a loss, gradient norm or evaluation. Check that all else is equal."""
    steps, evaluations = read_log(ours)
    expected_steps, expected_evaluations = read_log(reference)
    assert len(steps) == len(expected_steps) == 60
    differences = []
    for line, expected in zip((*steps, *evaluations), (*expected_steps, *expected_evaluations), strict=True):
        for key in expected.keys() - {"seconds", "tokens_per_second", "mfu", "memory_gb"}:
            if key in ("step", "epoch", "lr", "tokens"):
                assert line[key] == expected[key]
            else:
                differences.append(abs(line[key] / expected[key] - 1))
    return max(differences)


@pytest.mark.scorecard(4)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUTS.get)
def test_neither_processes_nor_micro_batches_change_the_update(
    layout: tuple[int, int], model: str, runs: Callable[[str, int, int], Path], figure: Callable[[str], None]
) -> None:
    difference = apart(runs(model, *layout), runs(model, 1, 4096))
    figure(f"{LAYOUTS[layout]} {model}: {difference:.0e}")
    assert 0 < difference <= 1e-5  # no difference at all would mean that the layouts were the same


def test_a_launched_run_has_the_same_updates(runs: Callable[[str, int, int], Path], tmp_path: Path) -> None:
    reference = runs("packed", 1, 4096)
    flags = ("--from-run", str(reference / "run.json"), "--run.output-dir", str(tmp_path / "out"))
    done = launch("mlm_pydocs.py", *flags, processes=2)
    assert done.returncode == 0, done.stderr
    assert apart(tmp_path / "out", reference) <= 1e-5


@pytest.mark.parametrize(
    "workers",
    [
        pytest.param(0, marks=pytest.mark.scorecard(1), id="the same again"),
        pytest.param(2, marks=pytest.mark.scorecard(6), id="2 workers"),
    ],
)
def test_runs_are_bitwise_equal(
    workers: int, config: Config, runs: Callable[[str, int, int], Path], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    train(changed(config, tmp_path / "out", 128, workers=workers))
    assert end_of(tmp_path / "out") == end_of(runs("packed", 1, 128))
    figure(f"{workers} workers: 60 steps bitwise equal" if workers else "1 process: 60 steps bitwise equal")


@pytest.mark.scorecard(1)
def test_runs_with_dropout_are_bitwise_equal(config: Config, tmp_path: Path, figure: Callable[[str], None]) -> None:
    names = [(processes, name) for processes in (1, 2) for name in ("first", "second")]
    dropout = {**MODELS["packed"].config, "mlp_dropout": 0.2, "attention_dropout": 0.2}
    jobs = []
    for processes, name in names:
        job = changed(config, tmp_path / f"{name}-{processes}", 128)
        model, short = replace(job.model, config=dropout), replace(job.run, max_steps=20)
        jobs.append((replace(job, model=model, run=short), processes))
    finish_all(jobs, tmp_path)
    for processes in (1, 2):
        first, second = (end_of(tmp_path / f"{name}-{processes}") for name in ("first", "second"))
        assert first == second
        figure(f"{processes} process(es), dropout on: weights, moments and log bitwise equal")
