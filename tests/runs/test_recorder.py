"""What a run leaves behind: every step logged once, totals that add up, a card that the hub can read."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, metadata_load

from minilm.config import Classification, Config, Data, MaskedLM, Model, Optim, Run
from minilm.config.serialization import read_run_config, to_dict
from minilm.data.batch_plan import Plan
from minilm.data.corpus import Examples, PreparedData
from minilm.distributed.precision import Peak, Precision
from minilm.runs import recorder as recorder_module
from minilm.runs import run_facts as facts_module
from minilm.runs.checkpoint import Progress
from minilm.runs.model_card import write_card
from minilm.runs.recorder import Recorder
from minilm.runs.run_facts import collect_run_facts, log_run_facts, write_results, write_run_json

STEP_KEYS = ["step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "seconds", "memory_gb"]
FIGURES = {"eval_loss": 3.0, "perplexity": 20.1, "bits_per_byte": 1.5, "unigram_bits_per_byte": 2.75}


@pytest.fixture
def clock(monkeypatch):
    """The recorder's clock, moved by hand; the memory never changes."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(recorder_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(recorder_module, "peak_memory", lambda device: 1_250_000_000)
    return clock


def recorder_in(
    folder: Path, *, enabled: bool = True, peak: float = 1000.0, progress: Progress | None = None
) -> Recorder:
    return Recorder(
        folder,
        lambda values, step: None,
        total_steps=3,
        peak_flops=peak,
        progress=progress or Progress(),
        enabled=enabled,
    )


def steps(recorder: Recorder, clock: SimpleNamespace, count: int, *, done: int = 0, norm: float = 0.5) -> None:
    """`count` steps of 2 seconds, 50 tokens and 600 FLOPs each, with losses 1, 2, …, after `done` of them."""
    for number in range(done + 1, done + count + 1):
        clock.now += 2.0
        loss, grad_norm = torch.tensor(float(number)), torch.tensor(norm)
        recorder.record_step(
            epoch=number / 4,
            lr=1e-3 / number,
            loss=loss,
            grad_norm=grad_norm,
            examples=np.array([number, number + 40]),
            tokens=50,
            flops=600.0,
        )


def lines(folder: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (folder / "log.jsonl").read_text().splitlines()]


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
        "memory_gb": 1.25,
    }


def test_an_evaluation_is_logged_after_its_step_and_costs_no_training_time(tmp_path, clock):
    recorder = recorder_in(tmp_path)
    steps(recorder, clock, 1)
    recorder.flush()
    clock.now += 1000.0
    recorder.record_evaluation(0.25, FIGURES, "loss 2.5", {})
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


def test_a_new_run_does_not_keep_the_log_of_an_earlier_one(tmp_path, clock):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    recorder = recorder_in(tmp_path)
    steps(recorder, clock, 1)
    recorder.close()
    assert [list(line) for line in lines(tmp_path)] == [STEP_KEYS]


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 3, "epo', b'{"step": 3, "epo\xff\n{}\n'], ids=["whole", "torn", "bytes"]
)
def test_a_resumed_log_and_its_counters_are_those_of_a_run_never_interrupted(torn, tmp_path, clock):
    for folder in ("once", "twice"):
        (tmp_path / folder).mkdir()
    once = recorder_in(tmp_path / "once")
    steps(once, clock, 4)
    expected = once.current_progress()
    once.close()

    first = recorder_in(tmp_path / "twice")
    steps(first, clock, 2)
    progress = first.current_progress()
    assert progress == Progress(
        step=2, tokens=100, seconds=4.0, flops=1200.0, log_bytes=(tmp_path / "twice" / "log.jsonl").stat().st_size
    )
    steps(first, clock, 1, done=2)
    first.close()
    with (tmp_path / "twice" / "log.jsonl").open("ab") as file:
        file.write(torn)

    clock.now += 1000.0
    second = recorder_in(tmp_path / "twice", progress=progress)
    assert [line["step"] for line in lines(tmp_path / "twice")] == [1, 2]
    steps(second, clock, 2, done=2)
    assert second.current_progress() == expected
    assert (expected.step, expected.tokens, expected.seconds, expected.flops) == (4, 200, 8.0, 2400.0)
    assert second.totals() == once.totals()
    second.close()
    assert (tmp_path / "twice" / "log.jsonl").read_bytes() == (tmp_path / "once" / "log.jsonl").read_bytes()


def test_a_log_shorter_than_the_checkpoint_remembers_is_not_filled_up_with_zeros(tmp_path, clock):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    recorder = recorder_in(tmp_path, progress=Progress(step=5, log_bytes=1000))
    steps(recorder, clock, 1, done=5)
    recorder.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 6]


def test_progress_holds_every_step_in_the_log_and_the_loss_of_an_evaluation_after_the_last(tmp_path, clock):
    recorder = recorder_in(tmp_path)
    steps(recorder, clock, 3)
    assert recorder.current_progress().figure is None
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    recorder.record_evaluation(0.75, FIGURES, "loss 2.5", {})
    progress = recorder.current_progress(figure=3.0)
    assert (progress.figure, progress.log_bytes) == (3.0, (tmp_path / "log.jsonl").stat().st_size)
    recorder.close()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("done", [0, 40])
def test_steps_without_a_finite_gradient_are_counted_in_a_row_since_the_first(enabled, done, tmp_path, clock):
    recorder = recorder_in(tmp_path, enabled=enabled, progress=Progress(step=done))
    counted = []
    for norm in (math.nan, 1.0, math.inf, math.nan, -math.inf, 1.0):
        steps(recorder, clock, 1, done=recorder.steps, norm=norm)
        counted.append((recorder.bad_steps, recorder.first_bad_step() - done if recorder.bad_steps else None))
    recorder.flush()
    assert counted == [(0, None), (1, 0), (0, None), (1, 2), (2, 2), (3, 2)]  # known one step later
    assert recorder.bad_steps == 0
    recorder.close()


def test_the_first_step_without_a_finite_gradient_does_not_depend_on_a_flush(tmp_path, clock):
    recorder = recorder_in(tmp_path)
    steps(recorder, clock, 3, norm=math.nan)
    assert (recorder.bad_steps, recorder.first_bad_step()) == (2, 0)
    recorder.flush()
    assert (recorder.bad_steps, recorder.first_bad_step()) == (3, 0)
    recorder.close()


def test_figures_that_are_not_numbers_are_strict_json(tmp_path, clock):
    recorder = recorder_in(tmp_path)
    clock.now += 1.0
    infinite, missing = torch.tensor(math.inf), torch.tensor(math.nan)
    none = np.zeros(0, np.int64)
    recorder.record_step(epoch=0.5, lr=1e-3, loss=missing, grad_norm=infinite, examples=none, tokens=50, flops=1.0)
    recorder.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    figures = json.loads(line, parse_constant=pytest.fail)
    assert figures["loss"] is None
    assert figures["grad_norm"] is None


@pytest.mark.scorecard(29)
def test_a_line_is_shown_before_the_first_step_is_done_and_ended_with_it(tmp_path, clock, capfd, figure):
    recorder = recorder_in(tmp_path)
    assert capfd.readouterr().err == "step 0/3\n"
    steps(recorder, clock, 3)
    recorder.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("step 3/3: loss 3.000, 25 tokens/s, MFU 30%, ")  # the loss is that of the step
    figure("a progress line from before the first step")


@pytest.mark.parametrize("stopped", [None, 15, 24, 25])
def test_a_spike_is_logged_with_its_examples_and_the_same_after_a_resume(stopped, tmp_path, clock, capsys):
    recorder = recorder_in(tmp_path)
    for number in range(1, 31):
        clock.now += 2.0
        loss = torch.tensor(90.5 if number == 25 else 1.0 + number % 3)
        figures = {"loss": loss, "grad_norm": torch.tensor(0.5), "tokens": 50, "flops": 600.0}
        recorder.record_step(epoch=0.5, lr=1e-3, examples=np.array([number, number + 40]), **figures)
        if number == stopped:
            progress = recorder.current_progress()
            recorder.close()
            recorder = recorder_in(tmp_path, progress=progress)
    recorder.close()
    usual = np.mean([1.0 + number % 3 for number in range(1, 25)])
    spikes = [(at, line) for at, line in enumerate(lines(tmp_path)) if "spike_loss" in line]
    assert spikes == [(25, {"step": 25, "spike_loss": 90.5, "usual_loss": usual, "examples": [25, 65]})]
    assert capsys.readouterr().out.count("step 25: loss 90.500, far above") == 1


def test_a_disabled_recorder_writes_and_shows_nothing(tmp_path, clock, capfd):
    recorder = recorder_in(tmp_path, enabled=False)
    steps(recorder, clock, 2)
    recorder.record_evaluation(0.5, FIGURES, "loss 2.5", {})
    recorder.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def facts(tokenizer, monkeypatch) -> dict:
    monkeypatch.setattr(facts_module, "describe", lambda device: {"device": "a machine", "threads_per_process": 2})
    network = type("SomeForMaskedLM", (), {"parameters": lambda self: [torch.zeros(1000), torch.zeros(234)]})()
    lengths = np.array([4, 6, 5])
    none = np.zeros(0, np.int64)

    def examples(starts: list[int], stops: list[int], fingerprint: str) -> Examples:
        start, stop = np.array(starts), np.array(stops)
        return Examples(ids=np.arange(15), start=start, stop=stop, prefix=none, suffix=none, fingerprint=fingerprint)

    return collect_run_facts(
        SimpleNamespace(num_processes=2, device=torch.device("cpu")),
        SimpleNamespace(model=network, summary="full head (it mixes)"),
        Plan(lengths, examples=2, micro_tokens=64),
        PreparedData(
            tokenizer=tokenizer,
            train=examples([0, 4, 10], [4, 10, 15], "abc"),
            eval=examples([0, 2], [2, 5], "def"),
        ),
        total_steps=7,
        precision=Precision(name="fp32", reason="asked for"),
        peak=Peak(flops=2e12, source="measured"),
    )


def test_run_json_holds_the_facts_and_repeats_the_run(tmp_path, facts):
    (tmp_path / "a.txt").write_text("words")
    data, run = Data(source=str(tmp_path / "a.txt")), Run(output_dir=str(tmp_path), samples=("A [MASK].",))
    config = Config(data=data, objective=MaskedLM(rate=0.3), run=run)
    write_run_json(tmp_path, to_dict(config), config.data, facts)
    log_run_facts(tmp_path, config, facts)
    content = json.loads((tmp_path / "run.json").read_text())
    assert [file["bytes"] for file in content["sources"][data.source]] == [5]
    assert content["head"] == "full head (it mixes)"
    assert content["train"] == {"examples": 3, "tokens": 15, "fingerprint": "abc", "unknown": 1 / 15}
    assert content["eval"] == {"examples": 2, "tokens": 5, "fingerprint": "def", "unknown": 1 / 15}
    assert {"minilm", "torch", "transformers"} <= set(content["versions"])
    assert read_run_config(str(tmp_path / "run.json")) == replace(config, run=replace(config.run, output_dir=None))


def test_the_log_reports_unknown_tokens_and_a_warm_up_as_long_as_the_run(tmp_path, facts, caplog):
    with caplog.at_level("INFO", logger="minilm"):
        write_run_json(tmp_path, to_dict(Config(optim=Optim(warmup=6))), Data(), facts)
        log_run_facts(tmp_path, Config(optim=Optim(warmup=6)), facts)
        assert not [line for line in caplog.messages if "warmup" in line]
        write_run_json(tmp_path, to_dict(Config(optim=Optim(warmup=7))), Data(), facts)
        log_run_facts(tmp_path, Config(optim=Optim(warmup=7)), facts)
    assert "train: 3 examples, 15 tokens, 6.67% of them unknown to the tokenizer" in caplog.messages
    assert caplog.messages[-1] == "optim.warmup is 7 steps and the run has 7: the learning rate never reaches optim.lr"


def test_a_run_that_starts_or_resumes_is_not_marked_as_finished(tmp_path, facts):
    write_results(tmp_path, FIGURES)
    write_run_json(tmp_path, to_dict(Config()), Data(), facts)
    log_run_facts(tmp_path, Config(), facts)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


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
    assert card.data.license is card.data.datasets is None
    assert card.data.metrics == ["perplexity"]
    found = {result.metric_name: (result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert found["bits_per_byte"] == ("bits_per_byte", 1.5)
    assert {"eval_loss", "perplexity", "bits_per_byte"} == found.keys()
    assert {(r.task_type, r.dataset_type) for r in card.data.eval_results} == {("fill-mask", "unknown")}
    for expected in ("| bits_per_byte | 1.5 |", "| optim.lr | 0.0005 |", "- A [MASK]. → dog (12%)", tmp_path.name):
        assert expected in card.text
    assert json.loads((tmp_path / "all_results.json").read_text()) == FIGURES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "all_results.json"]
    assert not any("canary" in path.read_text() for path in tmp_path.iterdir())


def test_the_card_keeps_a_local_path_to_the_base_model_out_of_its_metadata(tmp_path, facts):
    write_card(tmp_path, Config(model=Model(name=str(tmp_path))), facts, FIGURES, {})
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


def test_the_card_names_the_license_the_datasets_of_the_hub_and_what_was_evaluated(tmp_path, facts):
    (tmp_path / "mine.jsonl").write_text('{"text": "words"}')
    data = Data(source=("nyu-mll/glue", str(tmp_path / "mine.jsonl"), "gone.csv"), config="mnli")
    figures = {"eval_loss": 0.5, "f1_macro": 0.25, "accuracy_validation_matched": 0.75, "steps": 3, "mfu": 0.1}
    run = Run(license="cc-by-4.0", push_to_hub="me/model")
    config = Config(data=data, objective=Classification(), run=run)
    write_card(tmp_path, config, facts, {**figures, "pearson": math.nan}, {})
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.datasets) == ("cc-by-4.0", ["nyu-mll/glue"])
    assert card.data.metrics == ["f1", "accuracy"]
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        *(("eval_loss", 0.5), ("f1", 0.25), ("accuracy", 0.75))
    ]
    assert {r.dataset_type for r in card.data.eval_results} == {"unknown"}
    assert 'model="me/model"' in card.text
    write_card(tmp_path, replace(config, data=Data(source="nyu-mll/glue", config="mnli")), facts, figures, {})
    result = metadata_load(tmp_path / "README.md")["model-index"][0]["results"][0]
    both = "validation_matched+validation_mismatched"
    assert result["dataset"] == {"name": "nyu-mll/glue", "type": "nyu-mll/glue", "config": "mnli", "split": both}
