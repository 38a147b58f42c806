"""The forks of the loop: their losses against plain models, their steps under any cut, and what they save."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining, PreTrainedTokenizerBase

from minilm import Batch, Config, Data, Model, Optim, Run
from minilm.commands.seeds import train_seeds
from minilm.data.micro_batch import collate_all_targets, target_losses
from minilm.objectives.masking import MaskedLMCollator
from recipes import fork_electra, fork_minilm
from tests.forks import check_forked_recipe
from tests.jobs import finish_all
from tests.launch import read_log
from tests.reference import build, fields, pad_rows

FORKS = {"fork_minilm": fork_minilm, "fork_electra": fork_electra}
STEPS = 30


@pytest.fixture(scope="module")
def configs(tokenizer: PreTrainedTokenizerBase, documents: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small run of each fork."""
    place = tmp_path_factory.mktemp("materials")
    (place / "documents.txt").write_text("\n".join(documents["text"]))
    for part in (build(tokenizer, hidden_size=48, num_attention_heads=4, initializer_range=0.1), tokenizer):
        part.save_pretrained(place / "teacher")
    common = Config(
        data=Data(source=str(place / "documents.txt"), eval_fraction=0.1),
        batch=Batch(examples=12, max_length=32),
        optim=Optim(lr=3e-3),
        run=Run(max_steps=STEPS, precision="fp32"),
    )
    student = Model(name=str(place / "teacher"), type="bert", config={**fields("bert"), "hidden_size": 24})
    electra = Model(type="electra", config={**fields("electra"), "hidden_size": 32, "embedding_size": 32})
    return {
        "fork_minilm": replace(common, model=student, optim=Optim(lr=1e-2)),
        "fork_electra": replace(common, model=electra, tokens=replace(common.tokens, vocab_size=400)),
    }


# What is drawn depends on the process, as dropout does; the rest does not.
PLANTED = """
import minilm.train
from recipes import {name}
minilm.train.train = lambda config: {name}.train(config, "fork")
{name}.draw = lambda logits_NxV: logits_NxV.topk(2).indices[:, 1]
"""


@pytest.fixture(scope="module")
def runs(configs: dict[str, Config], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The output folder of a run of each fork: in one piece, in micro-batches, and on two processes."""
    place = tmp_path_factory.mktemp("runs")
    for name, config in configs.items():
        layouts = {"one": (4096, 1), "cut": (64, 1), "two": (4096, 2)}
        jobs = [
            (
                replace(
                    config,
                    batch=replace(config.batch, micro_tokens=size),
                    run=replace(config.run, output_dir=str(place / f"{name}-{layout}")),
                ),
                processes,
            )
            for layout, (size, processes) in layouts.items()
        ]
        finish_all(jobs, place, PLANTED.format(name=name))
    return lambda name, layout: place / f"{name}-{layout}"


def losses(folder: Path) -> Tensor:
    return torch.tensor([line["loss"] for line in read_log(folder)[0]])


@pytest.mark.parametrize("name", FORKS)
def test_the_loss_falls(name: str, runs: Callable[[str, str], Path]) -> None:
    found = losses(runs(name, "one"))
    assert len(found) == STEPS
    assert found[-5:].mean() < 0.8 * found[:5].mean()


@pytest.mark.parametrize("layout", ["cut", "two"])
@pytest.mark.parametrize("name", FORKS)
def test_neither_micro_batches_nor_processes_change_the_updates(
    name: str, layout: str, runs: Callable[[str, str], Path]
) -> None:
    ours, expected = losses(runs(name, layout)), losses(runs(name, "one"))
    assert not torch.equal(ours, expected)  # or the layouts would be one
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=0)


def test_what_is_saved_loads(runs: Callable[[str, str], Path], tokenizer: PreTrainedTokenizerBase) -> None:
    student, electra = runs("fork_minilm", "one"), runs("fork_electra", "one")
    for folder, auto in (
        (student, AutoModel),
        (electra, AutoModelForPreTraining),
        (electra / "generator", AutoModelForMaskedLM),
    ):
        model, report = auto.from_pretrained(folder, output_loading_info=True)
        assert all(key.startswith("pooler") for key in report["missing_keys"])  # masked LMs have none
        assert not report["unexpected_keys"]
        model(torch.ones(1, 8, dtype=torch.int64))
    assert AutoModel.from_pretrained(student).config.hidden_size == 24
    words = [
        AutoModel.from_pretrained(folder).get_input_embeddings().weight for folder in (electra, electra / "generator")
    ]
    assert torch.equal(*words)  # they were one


ROWS = [np.arange(7, 7 + length) for length in (20, 19, 12, 5)]


def test_divergences_are_those_of_plain_models_row_by_row(tokenizer: PreTrainedTokenizerBase) -> None:
    student, teacher = build(tokenizer, hidden_size=24), build(tokenizer, hidden_size=48, num_hidden_layers=3, seed=1)

    def states(model: Any, row: Tensor) -> list[Tensor]:
        hidden_1xLxH = model.bert(row[None], output_hidden_states=True).hidden_states[-2]
        attention = model.bert.encoder.layer[-1].attention.self
        return [linear(hidden_1xLxH)[0] for linear in (attention.query, attention.key, attention.value)]

    expected = []
    with torch.no_grad():
        for row in map(torch.from_numpy, ROWS):
            total_L = torch.zeros(len(row))
            for pair in zip(states(student, row), states(teacher, row), strict=True):
                q, p = (
                    torch.stack([(x @ x.T / x.shape[1] ** 0.5).softmax(-1) for x in x_LxH.chunk(12, dim=1)])
                    for x_LxH in pair
                )
                total_L += (p * (p / q).log()).sum(-1).mean(0)
            expected.append(total_L)
        batch = collate_all_targets(ROWS, np.arange(4), 0, 0.0)
        found_N = target_losses(fork_minilm.Distiller(student, teacher), batch)
    torch.testing.assert_close(found_N, torch.cat(expected), rtol=1e-4, atol=1e-6)


def test_electras_loss_is_that_of_transformers(
    tokenizer: PreTrainedTokenizerBase, configs: dict[str, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_electra, "draw", lambda logits_NxV: logits_NxV.argmax(-1))
    electra = fork_electra.Electra(configs["fork_electra"], tokenizer).eval()
    batch = MaskedLMCollator(tokenizer, rate=0.4, seed=0, padded=False, multiple=1)(ROWS, np.arange(4), 0)
    electra.targets_per_token = torch.tensor(batch.target_count / len(batch.input_ids_T))
    lengths = [len(row) for row in ROWS]
    original_T = torch.from_numpy(np.concatenate(ROWS))
    with torch.no_grad():
        found = target_losses(electra, batch) / batch.target_count
        ids_RxL, mask_RxL = pad_rows(batch.input_ids_T, lengths, 0)
        labels_T = torch.full_like(original_T, -100).index_copy(0, batch.target_index_N, batch.target_ids_N)
        labels_RxL, _ = pad_rows(labels_T, lengths, -100)
        theirs = electra.generator.model(input_ids=ids_RxL, attention_mask=mask_RxL, labels=labels_RxL)
        original_RxL, _ = pad_rows(original_T, lengths, 0)
        shown_RxL = torch.where(labels_RxL == -100, ids_RxL, theirs.logits.argmax(-1))
        labels_RxL = (shown_RxL != original_RxL).long()
        told = electra.discriminator.model(input_ids=shown_RxL, attention_mask=mask_RxL, labels=labels_RxL)
    assert labels_RxL.sum() > 0
    torch.testing.assert_close(found, theirs.loss + 50 * told.loss, rtol=1e-5, atol=1e-5)


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    torch.manual_seed(0)
    logits_V = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    counts_V = fork_electra.draw(logits_V.expand(20_000, 4)).bincount(minlength=4)
    torch.testing.assert_close(counts_V / 20_000, logits_V.softmax(-1), rtol=0, atol=0.01)


@pytest.mark.parametrize("name", FORKS)
def test_forks_run_from_their_command_line_on_two_processes(
    name: str, runs: Callable[[str, str], Path], tmp_path: Path
) -> None:
    run = str(runs(name, "one") / "run.json")
    flags = ("--from-run", run, "--run.output-dir", str(tmp_path / "out"), "--optim.schedule", "constant")
    check_forked_recipe(f"{name}.py", *flags, "--run.max-steps", "3", place=tmp_path, processes=2)
    assert losses(tmp_path / "out")[0] == pytest.approx(float(losses(runs(name, "one"))[0]), rel=1e-2)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["processes"] == 2


def test_a_fork_trains_with_several_seeds(configs: dict[str, Config], tmp_path: Path) -> None:
    run = replace(configs["fork_electra"].run, max_steps=2, output_dir=str(tmp_path / "out"))
    summary = train_seeds(replace(configs["fork_electra"], run=run), "fork", [0, 1], fork_electra.train)
    assert summary["steps"] == {"mean": 2.0, "std": 0.0, "values": {"0": 2, "1": 2}}
    first, second = (losses(tmp_path / "out" / f"seed-{seed}") for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fork_minilm", {"model": Model(type="bert", config={"hidden_size": 32})}, "not a multiple of 12"),
        ("fork_electra", {"model": Model(type="bert")}, "leave model.name and model.type out"),
        ("fork_electra", {"run": Run(resume="latest")}, "leave run.resume out"),
    ],
)
def test_what_a_fork_cannot_do_is_refused(
    name: str, change: dict[str, Any], message: str, configs: dict[str, Config], tmp_path: Path
) -> None:
    config = replace(configs[name], **change)
    config = replace(config, run=replace(config.run, output_dir=str(tmp_path / "out")))
    if name == "fork_minilm":
        size = {**fields("bert"), **config.model.config}
        config = replace(config, model=replace(configs[name].model, config=size))
    with pytest.raises(ValueError, match=message) as caught:
        FORKS[name].train(config, name)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
