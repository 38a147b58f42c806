"""`minilm compare` and `minilm ledger`: figures against scipy on the raw ledger, refusals, and the power of tests."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy import stats

from minilm.commands import compare as compare_module
from minilm.commands.compare import Difference, compare_models, compare_seeds, compare_tables, load_table
from minilm.commands.evaluate import evaluate
from minilm.config import Config, Data
from minilm.runs.ledger import ExampleTable, Ledger
from minilm.train import train
from tests.jobs import config_in

Command = Callable[..., tuple[object, list[str], list[str]]]
IDENTITY = {"objective": "CausalLM", "loss": "{}", "examples": "x", "documents": "y", "overflow": "split"}


def table(
    loss: NDArray[Any], *, documents: int = 0, identity: dict[str, str] | None = None, **arrays: Any
) -> ExampleTable:
    """Return a table of a causal LM with two examples in each document, 20 targets and 80 bytes in each example."""
    count = len(loss)
    facts = {"targets": np.full(count, 20, np.int32), "utf8_bytes": np.full(count, 80, np.int32)}
    facts["document"] = np.arange(count, dtype=np.int32) // 2
    kept = {
        name: array for name, array in {**facts, **arrays, "loss": loss.astype(np.float32)}.items() if array is not None
    }
    return ExampleTable(arrays=kept, identity=IDENTITY | (identity or {}))


def classifier(correct: NDArray[Any], **identity: str) -> ExampleTable:
    facts = {"targets": np.ones(len(correct), np.int32), "correct": correct, "loss": np.float32(1.5 - correct)}
    return ExampleTable(arrays=facts, identity={**IDENTITY, "objective": "Classification", **identity})


def draw_losses(seed: int, change: float, examples: int = 400) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return losses of two models over documents of different difficulty: the second is `1 + change` times the first.

    The models also differ by 5% at random in each example, in both directions.
    """
    random = np.random.default_rng(seed)
    first = 60 * random.gamma(4, 0.25, examples)
    return first, first * (1 + change) * (1 + 0.05 * random.standard_normal(examples))


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module, "_MOST_RESAMPLES", 999)


def test_a_change_of_one_percent_is_found_and_no_change_is_not(few_resamples: None) -> None:
    planted = [compare_tables(*map(table, draw_losses(seed, -0.01)))[0] for seed in range(10)]
    assert all(each.p <= 0.05 for each in planted)
    assert all(each.high < 0 for each in planted)
    # The interval holds the true change, which is 1% of the first figure, in 95 of 100 cases.
    assert sum(each.low <= -0.01 * each.first <= each.high for each in planted) >= 8
    nothing = [compare_tables(*map(table, draw_losses(seed, 0.0)))[0] for seed in range(40)]
    assert sum(each.p <= 0.05 for each in nothing) <= 6


def test_the_figures_are_those_of_scipy_on_the_raw_numbers() -> None:
    first, second = draw_losses(3, -0.004)
    bits, loss = compare_tables(table(first), table(second))
    by_document = [each.astype(np.float32).reshape(-1, 2).sum(1, dtype=np.float64) for each in (first, second)]
    per_byte = [each / 160 / math.log(2) for each in by_document]
    assert (bits.figure, bits.count, bits.unit) == ("bits_per_byte", 200, "documents")
    assert [bits.first, bits.second] == pytest.approx([each.mean() for each in per_byte], rel=1e-12)
    assert bits.difference == pytest.approx((per_byte[1] - per_byte[0]).mean(), rel=1e-9)
    assert loss.difference == pytest.approx(bits.difference * 4 * math.log(2), rel=1e-9)
    # Documents of one size have the t-test's interval and p-value, but for its assumption.
    reference = stats.ttest_rel(per_byte[1], per_byte[0])
    interval = reference.confidence_interval(0.95)
    assert bits.p == pytest.approx(reference.pvalue, abs=0.01)
    assert [bits.low, bits.high] == pytest.approx(
        [interval.low, interval.high], abs=0.05 * (interval.high - interval.low)
    )
    assert loss.p == bits.p


def test_answers_are_compared_by_mcnemars_test() -> None:
    # Of 100 answers, both have 60 right and 28 wrong; 10 are right in the second alone, and 2 in the first alone.
    first, second = (np.array([*[True] * 60, *[False] * 28, *[side == 1] * 10, *[side == 0] * 2]) for side in (0, 1))
    loss, accuracy = compare_tables(classifier(first), classifier(second, examples="by another tokenizer"))
    assert (loss.figure, accuracy.figure) == ("eval_loss", "accuracy")
    assert [accuracy.first, accuracy.second] == pytest.approx([0.62, 0.7])
    assert accuracy.difference == pytest.approx(0.08)
    # The exact test of McNemar: twice the probability of at most 2 of 12 fair coins.
    assert accuracy.p == pytest.approx(2 * sum(math.comb(12, k) for k in range(3)) / 2**12)
    assert str(accuracy) == f"+0.080 ± {(accuracy.high - accuracy.low) / 2:.3f} accuracy, p = 0.039, 100 documents"


def test_a_table_against_itself_has_no_difference() -> None:
    first, _ = draw_losses(0, 0)
    for own in (table(first), table(first, document=None), classifier(first > 60)):
        for each in compare_tables(own, own):
            assert (each.difference, each.low, each.high, each.p) == (0, 0, 0, 1)
    assert str(compare_tables(table(first, document=None), table(first, document=None))[0]) == (
        "+0.000 ± 0.000 bits per byte, p = 1, 400 examples"
    )


def test_other_tokenizers_are_compared_by_the_bytes_of_documents() -> None:
    first, second = draw_losses(5, 0.03)
    # The second model has one example where the first one has two, and the last document has none of its own.
    own = second.reshape(-1, 2).sum(1)
    half = {
        "targets": np.full(200, 33, np.int32),
        "utf8_bytes": np.full(200, 158, np.int32),
        "document": np.arange(200),
    }
    (bits,) = compare_tables(table(first), table(own, **half, identity={"examples": "z"}))
    assert bits.figure == "bits_per_byte"
    assert bits.count == 200
    assert bits.second == pytest.approx(own.sum() / (200 * 158) / math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"identity": {"documents": "others"}},
            "the evaluation documents of the models, or their labels, are not the same",
        ),
        ({"identity": {"objective": "CausalLM"}}, "different objectives, MaskedLM and CausalLM"),
        ({"identity": {"loss": '{"temperature": 0.1}'}}, "the losses of the models have different settings"),
        ({"identity": {"examples": "z"}}, "different tokenizers, so that their masks hide different text"),
        ({"targets": np.full(400, 21)}, "not evaluated on the same examples of the documents: objective.eval_rate"),
        ({"utf8_bytes": np.full(400, 81)}, "not evaluated on the same examples of the documents: objective.eval_rate"),
        ({"loss": np.full(400, np.nan)}, "not a finite number"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, Any], message: str) -> None:
    losses, _ = draw_losses(0, 0)
    ours = table(losses, identity={"objective": "MaskedLM"})
    identity = {"objective": "MaskedLM"} | change.get("identity", {})
    with pytest.raises(ValueError, match=message):
        compare_tables(ours, table(**({"loss": losses} | change | {"identity": identity})))


def test_a_single_document_and_joined_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="a single one of its documents"):
        compare_tables(table(np.ones(2)), table(np.ones(2)))
    other = {"objective": "QuestionAnswering"}
    with pytest.raises(ValueError, match="the same examples of the documents: their tokenizers or settings"):
        compare_tables(table(np.ones(9), identity=other), table(np.ones(9), identity={**other, "examples": "z"}))
    with pytest.raises(ValueError, match="different tokenizers, and their examples are not whole"):
        compare_tables(table(np.ones(9), document=None), table(np.ones(9), document=None, identity={"examples": "z"}))
    cut = {"overflow": "truncate"}
    with pytest.raises(ValueError, match="different tokenizers, and their examples are not whole"):
        compare_tables(table(np.ones(9), identity=cut), table(np.ones(9), identity={**cut, "examples": "z"}))


def test_a_seed_without_a_finite_loss_is_refused() -> None:
    broken = table(np.full(4, np.nan))
    with pytest.raises(ValueError, match="not a finite number"):
        compare_seeds([(table(np.ones(4)), table(np.ones(4))), (table(np.ones(4)), broken)])


def write_run(folder: Path, loss: NDArray[Any]) -> None:
    prepared: Any = SimpleNamespace(eval=SimpleNamespace(document=None, fingerprint="x"), eval_documents="y")
    folder.mkdir(parents=True)
    facts = {"targets": np.full(len(loss), 20), "utf8_bytes": np.full(len(loss), 80)}
    Ledger(folder=folder, config=Config(), prepared=prepared).write(7, {"loss": loss, **facts})


def test_seeds_are_compared_by_the_t_test_of_pairs(tmp_path: Path, run: Command) -> None:
    figures = np.zeros((2, 3))
    for side, (name, change) in enumerate((("a", 0.0), ("b", -0.02))):
        for seed in range(3):
            loss = draw_losses(seed, change)[1].astype(np.float32)
            write_run(tmp_path / name / f"seed-{seed}", loss)
            figures[side, seed] = loss.sum(dtype=np.float64) / 400 / 20
        # The fourth seed of one folder, and the first of the other, have no pair.
        seeds = {"eval_loss": {"values": {str(seed): 1.0 for seed in range(side, 3 + side)}}}
        (tmp_path / name / "seeds.json").write_text(json.dumps(seeds))
    status, lines, _ = run("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json")
    bits, loss = (Difference(**json.loads(line)) for line in lines)
    assert (status, loss.count, loss.unit, bits.figure) == (None, 2, "seeds", "bits_per_byte")
    reference = stats.ttest_rel(figures[1, 1:], figures[0, 1:])
    assert loss.p == pytest.approx(reference.pvalue)
    assert loss.difference == pytest.approx((figures[1, 1:] - figures[0, 1:]).mean())
    assert (loss.low + loss.high) / 2 == pytest.approx(loss.difference)
    _, lines, _ = run("compare", str(tmp_path / "a"), str(tmp_path / "a"))
    assert lines == [f"+0.000 ± 0.000 {name}, p = 1, 3 seeds" for name in ("bits per byte", "evaluation loss")]
    status, _, error = run("compare", str(tmp_path / "a"), str(tmp_path / "b" / "seed-1"))
    assert (status, "compare one of its runs" in error[-1]) == (2, True)
    with pytest.raises(ValueError, match="they share 1: train more seeds"):
        compare_seeds([[table(np.ones(4)), table(np.ones(4))]])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with other learning rates, and the text that they read."""
    place = tmp_path_factory.mktemp("runs")
    config = config_in(place, 6)
    for name, lr in (("a", 3e-3), ("b", 1e-2)):
        run = replace(config.run, eval_every=2, save_every=4, output_dir=str(place / name))
        train(replace(config, optim=replace(config.optim, lr=lr), run=run))
    return place


def test_two_runs_are_compared_by_their_ledgers(runs: Path, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    status, lines, _ = run("compare", str(runs / "a"), str(runs / "b"), "--json")
    bits, loss = map(json.loads, lines)
    assert status is None
    facts, a, b = (
        load_file(runs / name)
        for name in ("a/ledger/examples.safetensors", *(f"{x}/ledger/eval-6.safetensors" for x in "ab"))
    )
    difference = (b["loss"].astype(float) - a["loss"]).sum()
    assert loss["difference"] == pytest.approx(difference / facts["targets"].sum(), rel=1e-6)
    assert bits["difference"] == pytest.approx(difference / facts["utf8_bytes"].sum() / math.log(2), rel=1e-6)
    assert bits["count"] == 9  # two documents have no target
    status, lines, _ = run("compare", str(runs / "a"), str(runs / "a"))
    assert (status, lines) == (
        None,
        [f"+0.000 ± 0.000 {name}, p = 1, 9 documents" for name in ("bits per byte", "evaluation loss")],
    )
    # A checkpoint has the evaluation of its step.
    assert load_table(str(runs / "a" / "checkpoint-4"), None).arrays["loss"].tolist() == (
        load_file(runs / "a" / "ledger" / "eval-4.safetensors")["loss"].tolist()
    )


def test_models_without_a_ledger_are_evaluated(runs: Path, tmp_path: Path, run: Command) -> None:
    for name in "ab":
        shutil.copytree(runs / name, tmp_path / name, ignore=shutil.ignore_patterns("ledger", "checkpoint-*"))
    bits, loss = compare_models(tmp_path / "a", runs / "a")
    assert bits.difference == pytest.approx(0, abs=1e-6)
    # Plain models, on data of the user.
    (tmp_path / "a" / "run.json").unlink()
    words = ("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json", "--data.source", str(runs / "text.txt"))
    status, _, error = run(*words)
    assert status == 2
    assert "batch.max_length" in error[-1]
    (tmp_path / "b" / "run.json").unlink()
    status, lines, error = run(*words)
    assert status is None, error
    figures = [evaluate(tmp_path / name, Data(source=str(runs / "text.txt"))) for name in "ab"]
    bits, loss = (Difference(**json.loads(line)) for line in lines)
    assert [loss.first, loss.second] == pytest.approx([each["eval_loss"] for each in figures], rel=1e-6)
    assert [bits.first, bits.second] == pytest.approx([each["bits_per_byte"] for each in figures], rel=1e-6)
    status, _, error = run("compare", str(tmp_path / "a"), str(runs / "b"))
    assert status == 2
    assert "has no run.json that names evaluation documents: give --data.source" in error[-1]


def test_the_hardest_examples_are_listed_with_their_texts(runs: Path, tmp_path: Path, run: Command) -> None:
    status, lines, _ = run("ledger", str(runs / "a"), "--json", "--top", "16")
    rows = [json.loads(line) for line in lines]
    assert (status, len(rows)) == (None, 16)
    assert sorted(row["example"] for row in rows) == [*range(16)]
    facts, last = (load_file(runs / "a" / "ledger" / name) for name in ("examples.safetensors", "eval-6.safetensors"))
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    text = (runs / "text.txt").read_text()
    for row in rows:
        i = row["example"]
        assert row["loss"] == pytest.approx(last["loss"][i] / max(1, facts["targets"][i]))
        assert row["document"] == facts["document"][i]
        assert row["text"].strip() in text
    # Each evaluation has 2 of 16 examples in its highest tenth.
    assert sum(row["high"] for row in rows) == 3 * 2
    status, lines, _ = run("ledger", str(runs / "a"), "--always-high")
    assert [line.split()[0] for line in lines[1:]] == [f"{row['loss']:.3f}" for row in rows if row["high"] == 3]
    shutil.copytree(runs / "a", tmp_path / "moved", ignore=shutil.ignore_patterns("checkpoint-*"))
    content = json.loads((tmp_path / "moved" / "run.json").read_text())
    content["config"]["data"]["source"] = str(tmp_path / "other.txt")
    (tmp_path / "moved" / "run.json").write_text(json.dumps(content))
    (tmp_path / "other.txt").write_text(text.upper())
    status, lines, error = run("ledger", str(tmp_path / "moved"), "--top", "1", "--json")
    assert (status, json.loads(lines[0])["text"]) == (None, None)
    assert "are not shown: they have changed since the run" in error[-1]
    status, _, error = run("ledger", str(tmp_path))
    assert status == 2
    assert "has no ledger" in error[-1]
