"""Law 1: a step's update does not depend on micro-batches, processes, workers, or on which run it is."""

from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from safetensors.torch import load_file

from minilm import Batch, Config, Data, MaskedLM, Model, Optim, Run, Tokens
from minilm.train import train
from tests.launch import launch, read_log

CONFIG = Config(
    tokens=Tokens(vocab_size=400),
    model=Model(
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
    objective=MaskedLM(rate=0.3),
    batch=Batch(examples=12, max_length=48, micro_tokens=4096),
    optim=Optim(lr=1e-3),
    run=Run(max_steps=60, precision="fp32"),
)


@pytest.fixture(scope="module")
def text(documents: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "documents.txt"
    path.write_text("\n".join(documents["text"]))
    return str(path)


@pytest.fixture(scope="module")
def reference(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, one micro-batch a step."""
    return run(tmp_path_factory.mktemp("out") / "reference", text)


def run(
    folder: Path, text: str, batch: dict[str, object] | None = None, model: dict[str, object] | None = None
) -> Path:
    train(
        replace(
            CONFIG,
            data=Data(source=text, eval_fraction=0.2),
            batch=replace(CONFIG.batch, **(batch or {})),
            model=replace(CONFIG.model, config={**CONFIG.model.config, **(model or {})}),
            run=replace(CONFIG.run, output_dir=str(folder)),
        )
    )
    return folder


def expect_same_losses(ours: Path, reference: Path, relative: float) -> None:
    steps, evaluations = read_log(ours)
    expected_steps, expected_evaluations = read_log(reference)
    assert len(steps) == len(expected_steps) == 60
    for line, expected in zip(steps, expected_steps, strict=True):
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=relative), (line["step"], key)
        assert {key: line[key] for key in ("step", "epoch", "lr", "tokens")} == {
            key: expected[key] for key in ("step", "epoch", "lr", "tokens")
        }
    for line, expected in zip(evaluations, expected_evaluations, strict=True):
        assert line == pytest.approx(expected, rel=relative)


@pytest.mark.parametrize("micro_tokens", [2048, 256, 128, 48])
def test_micro_batches_do_not_change_the_update(micro_tokens: int, text: str, reference: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", text, {"micro_tokens": micro_tokens})
    expect_same_losses(tmp_path / "out", reference, 1e-5)


@pytest.mark.parametrize(("processes", "micro_tokens"), [(2, 4096), (2, 128), (4, 4096)])
def test_processes_do_not_change_the_update(
    processes: int, micro_tokens: int, text: str, reference: Path, tmp_path: Path
) -> None:
    run_json = str(reference / "run.json")
    flags = ("--from-run", run_json, "--run.output-dir", str(tmp_path / "out"))
    done = launch("mlm_pydocs.py", *flags, "--batch.micro-tokens", str(micro_tokens), processes=processes)
    assert done.returncode == 0, done.stderr
    expect_same_losses(tmp_path / "out", reference, 1e-5)


@pytest.mark.parametrize("changed", [{}, {"workers": 2}], ids=["the same again", "loader workers"])
def test_runs_are_bitwise_equal(changed: dict[str, object], text: str, reference: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", text, changed)
    expect_same_losses(tmp_path / "out", reference, 0)
    ours, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", reference))
    assert ours.keys() == expected.keys()
    assert all(ours[name].equal(expected[name]) for name in ours)


def test_dropout_repeats(text: str, tmp_path: Path) -> None:
    dropout = {"mlp_dropout": 0.2, "attention_dropout": 0.2}
    first, second = (run(tmp_path / name, text, {"micro_tokens": 256}, dropout) for name in ("first", "second"))
    expect_same_losses(second, first, 0)
