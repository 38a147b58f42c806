"""What a run leaves behind: every step logged once, totals that add up, a card that the hub can read."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from minilm import record
from minilm.config import Config, MaskedLM, Model, Run, read_run
from minilm.hardware import Peak, Precision
from minilm.plan import Plan
from minilm.record import Recorder, announce, run_facts, write_card, write_results
from minilm.tokens import Examples

STEP_KEYS = ["step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "seconds"]
FIGURES = {"eval_loss": 3.0, "perplexity": 20.1, "bits_per_byte": 1.5, "unigram_bits_per_byte": 2.75}


@pytest.fixture
def clock(monkeypatch):
    """The recorder's clock, moved by hand."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(record, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def recorder_in(folder, *, enabled: bool = True, peak: float = 1000.0) -> Recorder:
    return Recorder(folder, total_steps=3, peak_flops=peak, enabled=enabled)


def steps(recorder: Recorder, clock, count: int) -> None:
    """`count` steps of 2 seconds, 50 tokens and 600 FLOPs each, with losses 1, 2, …"""
    for number in range(1, count + 1):
        clock.now += 2.0
        loss, norm = torch.tensor(float(number)), torch.tensor(0.5)
        recorder.step(epoch=number / 4, lr=1e-3 / number, loss=loss, grad_norm=norm, tokens=50, flops=600.0)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_step_is_logged_when_the_next_one_is_done_and_the_last_on_close(tmp_path, clock):
    recorder = recorder_in(tmp_path)
    steps(recorder, clock, 3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    recorder.close()
    recorder.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert [list(line) for line in lines(tmp_path)] == [STEP_KEYS] * 3
    assert lines(tmp_path)[2] == {
        "step": 3,
        "epoch": 0.75,
        "loss": 3.0,
        "lr": 1e-3 / 3,
        "grad_norm": 0.5,
        "tokens": 150,
        "tokens_per_second": 25.0,
        "mfu": 0.3,
        "seconds": 6.0,
    }


def test_an_evaluation_is_logged_after_its_step_and_costs_no_training_time(tmp_path, clock):
    recorder = recorder_in(tmp_path)
    steps(recorder, clock, 1)
    recorder.settle()
    clock.now += 1000.0
    recorder.evaluation(0.25, FIGURES)
    steps(recorder, clock, 1)
    recorder.close()
    assert lines(tmp_path)[1] == {"step": 1, "epoch": 0.25, **FIGURES}
    assert [line.get("seconds") for line in lines(tmp_path)] == [2.0, None, 4.0]


def test_totals_are_the_sums_of_the_steps(tmp_path, clock):
    recorder = recorder_in(tmp_path)
    steps(recorder, clock, 3)
    expected = {"steps": 3, "tokens": 150, "train_seconds": 6.0, "tokens_per_second": 25.0, "mfu": 0.3}
    assert recorder.totals() == expected
    recorder.close()


def test_figures_that_are_not_numbers_are_strict_json(tmp_path, clock):
    recorder = recorder_in(tmp_path)
    clock.now += 1.0
    infinite, missing = torch.tensor(math.inf), torch.tensor(math.nan)
    recorder.step(epoch=0.5, lr=1e-3, loss=missing, grad_norm=infinite, tokens=50, flops=1.0)
    recorder.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    figures = json.loads(line, parse_constant=pytest.fail)
    assert figures["loss"] is None
    assert figures["grad_norm"] is None


def test_a_disabled_recorder_writes_and_shows_nothing(tmp_path, clock, capfd):
    recorder = recorder_in(tmp_path, enabled=False)
    steps(recorder, clock, 2)
    recorder.evaluation(0.5, FIGURES)
    recorder.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def facts(tokenizer, monkeypatch) -> dict:
    monkeypatch.setattr(record, "describe", lambda device: {"device": "a machine", "threads_per_process": 2})
    network = type("SomeForMaskedLM", (), {"num_parameters": lambda self: 1234})()
    lengths = np.array([4, 6, 5])
    start = np.array([0, 2])
    none = np.zeros(0, np.int64)
    return run_facts(
        SimpleNamespace(num_processes=2, device=torch.device("cpu")),
        SimpleNamespace(model=network, sparse=False, reason="it mixes"),
        Plan(lengths, examples=2, micro_tokens=64),
        tokenizer,
        Examples(ids=np.arange(5), start=start, stop=np.array([2, 5]), prefix=none, suffix=none),
        total_steps=7,
        precision=Precision(name="fp32", reason="asked for"),
        peak=Peak(flops=2e12, source="measured"),
    )


def test_run_json_holds_the_facts_and_repeats_the_run(tmp_path, facts):
    config = Config(objective=MaskedLM(rate=0.3), run=Run(output_dir=str(tmp_path), samples=("A [MASK].",)))
    announce(tmp_path, config, facts)
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["head"] == "full (it mixes)"
    assert (content["train"], content["eval"]) == ({"examples": 3, "tokens": 15}, {"examples": 2, "tokens": 5})
    assert {"minilm", "torch", "transformers"} <= set(content["versions"])
    assert read_run(str(tmp_path / "run.json")) == replace(config, run=replace(config.run, output_dir=None))


@pytest.mark.parametrize("base", [None, "org/base-model", 'odd: "name" # ü'])
def test_the_card_is_read_by_the_hub_and_no_temporary_or_secret_stays(base, tmp_path, facts, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary")
    config = Config(model=Model(name=base))
    write_results(tmp_path, FIGURES)
    write_card(tmp_path, config, facts, FIGURES, {"A [MASK].": "dog (12%)"})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "fill-mask"
    assert card.data.tags == ["minilm", "fill-mask"]
    assert card.data.base_model == base
    for expected in ("| bits_per_byte | 1.5 |", "| optim.lr | 0.0005 |", "- A [MASK]. → dog (12%)", tmp_path.name):
        assert expected in card.text
    assert json.loads((tmp_path / "all_results.json").read_text()) == FIGURES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "all_results.json"]
    assert not any("canary" in path.read_text() for path in tmp_path.iterdir())


def test_the_card_keeps_a_local_path_to_the_base_model_out_of_its_metadata(tmp_path, facts):
    write_card(tmp_path, Config(model=Model(name=str(tmp_path))), facts, FIGURES, {})
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None
