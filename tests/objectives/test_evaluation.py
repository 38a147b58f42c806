"""Exact evaluation against a loop over single examples, in one process and in several."""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
)

from minilm import Batch, Config, Data, Tokens
from minilm.commands.evaluate import evaluate
from minilm.config.serialization import to_dict
from minilm.data.corpus import Examples
from minilm.models.sparse_head import SparseHead
from minilm.objectives.evaluation import LanguageModelEvaluator
from minilm.objectives.factory import prepare_data
from minilm.objectives.masking import MaskedLMCollator
from minilm.objectives.metrics import EvaluationTotals, compute_unigram_nats
from minilm.train import train
from tests.faults.damage import warnings_of_minilm
from tests.jobs import CONFIG, fork, write_text

EXAMPLES = 23
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def tiny_head(tokenizer) -> SparseHead:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.3, **SIZE)
    return SparseHead(BertForMaskedLM(config))


class Recording(MaskedLMCollator):
    """A collator that remembers which examples it was given."""

    def __init__(self, tokenizer, padded: bool = False) -> None:
        super().__init__(tokenizer, rate=0.2, seed=3, padded=padded, multiple=1)
        self.seen = []

    def __call__(self, rows, examples, epoch):
        self.seen.extend(examples.tolist())
        return super().__call__(rows, examples, epoch)


def evaluator_of(tokenizer, micro_tokens: int = 256, padded: bool = False) -> LanguageModelEvaluator:
    """Over examples of random ordinary ids, 3 to 40 long, with bytes and frequencies of no special form."""
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(1, 39, EXAMPLES + 1))
    examples = Examples(
        ids=rng.integers(5, len(tokenizer), ends[-1]),
        start=ends[:-1],
        stop=ends[1:],
        prefix=np.array([tokenizer.cls_token_id]),
        suffix=np.array([tokenizer.sep_token_id]),
        text_bytes=rng.integers(0, 9, ends[-1]),
    )
    return LanguageModelEvaluator(
        examples=examples,
        collator=Recording(tokenizer, padded),
        micro_tokens=micro_tokens,
        unigram_nats_V=compute_unigram_nats(rng.integers(0, 50, len(tokenizer))),
    )


def one_by_one(evaluator: LanguageModelEvaluator, head: SparseHead) -> EvaluationTotals:
    """The same totals from one example, and one target, at a time, through the full head."""
    nats = unigram = 0.0
    targets = utf8_bytes = 0
    rows = []
    head.model.eval()
    for index in range(len(evaluator.examples)):
        batch = evaluator.collator([evaluator.examples[index]], np.array([index]), epoch=0)
        with torch.no_grad():
            log_p_LxV = head.model(batch.input_ids_T[None]).logits[0].double().log_softmax(-1)
        for position, target in zip(batch.target_index_N.tolist(), batch.target_ids_N.tolist(), strict=True):
            nats -= float(log_p_LxV[position, target])
            targets += 1
            utf8_bytes += int(evaluator.examples.token_bytes(index)[position])
            unigram += float(evaluator.unigram_nats_V[target])
        rows.append((nats, targets, utf8_bytes))
    per_example = dict(zip(("loss", "targets", "utf8_bytes"), np.diff([(0, 0, 0), *rows], axis=0).T, strict=True))
    return EvaluationTotals(
        nats=nats, targets=targets, utf8_bytes=utf8_bytes, unigram_nats=unigram, per_example=per_example
    )


def assert_same(ours: EvaluationTotals, theirs: EvaluationTotals, nats: float) -> None:
    """`nats`: relative tolerance of the model's nats; all else is exact."""
    assert (ours.targets, ours.utf8_bytes) == (theirs.targets, theirs.utf8_bytes)
    assert ours.unigram_nats == pytest.approx(theirs.unigram_nats, rel=1e-12)
    assert ours.nats == pytest.approx(theirs.nats, rel=nats)
    assert ours.per_example["loss"] == pytest.approx(theirs.per_example["loss"], rel=10 * nats)
    for name in ("targets", "utf8_bytes"):
        assert ours.per_example[name].tolist() == theirs.per_example[name].tolist()


@pytest.fixture
def accelerator() -> Accelerator:
    torch.set_num_threads(1)  # on tensors as small as these a second thread only waits
    AcceleratorState._reset_state(reset_partial_state=True)  # whatever precision another test asked for
    return Accelerator(cpu=True)


@pytest.fixture
def no_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # what is evaluated chooses its precision


@pytest.mark.parametrize("padded", [False, True])
def test_totals_are_those_of_one_example_at_a_time(padded, tokenizer, accelerator):
    evaluator, head = evaluator_of(tokenizer, padded=padded), tiny_head(tokenizer)
    ours = evaluator(accelerator, head)
    assert ours.targets > 50
    assert_same(ours, one_by_one(evaluator, head), nats=1e-6)


@pytest.mark.scorecard(7)
@pytest.mark.parametrize("micro_tokens", [1, 64, 10**6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-9)])
def test_totals_do_not_depend_on_the_micro_batches(micro_tokens, dtype, tolerance, tokenizer, accelerator, figure):
    head = tiny_head(tokenizer).to(dtype)
    cut_otherwise, usual = (evaluator_of(tokenizer, size)(accelerator, head) for size in (micro_tokens, 256))
    assert_same(cut_otherwise, usual, nats=tolerance)
    name = str(dtype).removeprefix("torch.")
    figure(f"{micro_tokens} tokens a forward, {name}: {abs(cut_otherwise.nats / usual.nats - 1):.0e}")


def test_figures_follow_from_the_totals():
    figures = EvaluationTotals(nats=60.0, targets=20, utf8_bytes=50, unigram_nats=100.0).figures()
    assert figures == pytest.approx(
        {
            "eval_loss": 3.0,
            "perplexity": math.e**3,
            "bits_per_byte": 60 / math.log(2) / 50,
            "unigram_bits_per_byte": 100 / math.log(2) / 50,
        }
    )


def test_a_hopeless_model_and_targets_without_bytes_still_have_figures():
    figures = EvaluationTotals(nats=1e6, targets=1, utf8_bytes=0, unigram_nats=1.0).figures()
    assert all(math.isfinite(figure) for figure in figures.values())


def test_unigram_model_is_the_smoothed_frequencies():
    counts = np.array([0, 1, 6, 0])
    assert compute_unigram_nats(counts) == pytest.approx(-np.log(np.array([1, 2, 7, 1]) / 11))
    assert np.exp(-compute_unigram_nats(np.arange(10**4))).sum() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_models_mode_is_put_back(training, tokenizer, accelerator):
    evaluator, head = evaluator_of(tokenizer), tiny_head(tokenizer).train(training)
    assert evaluator(accelerator, head) == evaluator(accelerator, head)
    assert {module.training for module in head.modules()} == {training}


def test_examples_without_a_target_are_refused(tokenizer, accelerator):
    evaluator = evaluator_of(tokenizer)
    special = replace(evaluator.examples, ids=np.full(len(evaluator.examples.ids), tokenizer.pad_token_id))
    with pytest.raises(ValueError, match="hold no target"):
        replace(evaluator, examples=special)(accelerator, tiny_head(tokenizer))


@pytest.mark.scorecard(7)
def test_processes_share_the_work_and_all_return_the_totals_of_one(tokenizer, accelerator, tmp_path, figure):
    tokenizer.save_pretrained(tmp_path)
    for processes in (2, 3):
        ranks = fork(lambda: evaluate_in_this_process(tmp_path), tmp_path / "stderr", processes)
        assert [os.waitpid(rank.pid, 0)[1] for rank in ranks] == [0] * processes, (tmp_path / "stderr").read_text()
    for dtype in (torch.float32, torch.float64):
        alone, name = evaluator_of(tokenizer)(accelerator, tiny_head(tokenizer).to(dtype)), str(dtype)[6:]
        for processes in (2, 3):
            ranks = [json.loads((tmp_path / f"{name}-{processes}-{i}.json").read_text()) for i in range(processes)]
            assert all(rank["totals"] == ranks[0]["totals"] for rank in ranks)
            shared = EvaluationTotals(**ranks[0]["totals"])
            assert shared == alone  # to the bit
            for own, values in alone.per_example.items():
                assert shared.per_example[own] == values.tolist()
            assert sorted(index for rank in ranks for index in rank["seen"]) == list(range(EXAMPLES))
            figure(f"{processes} processes, {name}: the same to the bit")


def evaluate_in_this_process(folder: Path) -> int:
    """Write the totals that this process returns and the examples that it evaluated to DTYPE-PROCESSES-RANK.json."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    accelerator = Accelerator(cpu=True)
    for dtype in (torch.float32, torch.float64):
        evaluator = evaluator_of(tokenizer)
        evaluator.collator.seen.clear()  # of what construction looked at
        evaluation = evaluator(accelerator, accelerator.prepare(tiny_head(tokenizer).to(dtype)))
        name = f"{str(dtype)[6:]}-{accelerator.num_processes}-{accelerator.process_index}.json"
        lists = {own: values.tolist() for own, values in evaluation.per_example.items()}
        totals = {**vars(evaluation), "per_example": lists}
        (folder / name).write_text(json.dumps({"totals": totals, "seen": evaluator.collator.seen}))
    return 0


def saved(folder: Path, model: PreTrainedModel, tokenizer) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_tokenizer_of_a_run_that_extended_it_is_not_extended_again(tokenizer, documents, tmp_path, no_accelerator):
    folder = Path(saved(tmp_path / "model", tiny_head(tokenizer).model, tokenizer))
    documents.save_to_disk(tmp_path / "documents")
    figures = []
    for extend in (0, 20):
        config = Config(tokens=Tokens(extend=extend), batch=Batch(max_length=32))
        (folder / "run.json").write_text(json.dumps({"config": to_dict(config)}))
        figures.append(evaluate(folder, Data(source=str(tmp_path / "documents"))))
    assert figures[0] == figures[1]


@pytest.mark.parametrize(("kind", "positions", "length"), [("bert", 600, 512), ("bert", 64, 64), ("roberta", 34, 32)])
def test_a_model_without_a_run_is_evaluated_at_the_length_that_it_takes(
    kind, positions, length, tokenizer, documents, tmp_path, monkeypatch, no_accelerator
):
    fields = {**SIZE, "vocab_size": len(tokenizer), "max_position_embeddings": positions, "pad_token_id": 1}
    model, lengths = AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **fields)), []
    folder = saved(tmp_path / "model", model, tokenizer)
    documents.save_to_disk(tmp_path / "documents")
    monkeypatch.setattr(
        "minilm.commands.evaluate.prepare_data",
        lambda config: lengths.append(config.batch.max_length) or prepare_data(config),
    )
    assert evaluate(folder, Data(source=str(tmp_path / "documents")))["eval_loss"] > 0
    assert lengths == [length]


def copied(path: Path) -> None:
    """The same bytes in a file of its own."""
    shutil.copyfile(path, f"{path}.copy")
    os.replace(f"{path}.copy", path)


# What happens to a file after the run, and what is said of it.
SINCE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "nothing": ("held/a.txt", lambda path: None, ""),
    "touched": ("held/a.txt", lambda path: os.utime(path, (0, 0)), ""),
    "copied": ("held/a.txt", copied, ""),
    "renamed": ("held/a.txt", lambda path: path.rename(path.with_name("aa.txt")), ""),
    "training text": ("text.txt", lambda path: path.write_text("another"), ""),
    "another text": ("held/b.txt", lambda path: path.write_text(path.read_text() + " more"), "has changed"),
    "the same size": ("held/a.txt", lambda path: path.write_text(path.read_text()[::-1]), "has changed"),
    "a new file": ("held/c.txt", lambda path: path.write_text("one more"), "is new"),
    "a file less": ("held/b.txt", lambda path: path.unlink(), "is gone"),
}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what a run read and of the run, `out`."""
    place = tmp_path_factory.mktemp("since")
    lines = Path(write_text(place / "text.txt")).read_text().splitlines()
    (place / "held").mkdir()
    for name, part in (("a.txt", lines[:20]), ("b.txt", lines[20:40])):
        (place / "held" / name).write_text("\n".join(part))
    data = Data(source=str(place / "text.txt"), eval_source=str(place / "held"))
    train(replace(CONFIG, data=data, run=replace(CONFIG.run, max_steps=1, output_dir=str(place / "out"))))
    return place


@pytest.mark.parametrize("what", SINCE)
def test_what_changed_since_the_run_is_named_by_file(
    what: str, evaluated: Path, tmp_path: Path, no_accelerator: None
) -> None:
    file, act, message = SINCE[what]
    shutil.copytree(evaluated, kept := tmp_path / "kept")
    try:
        act(evaluated / file)
        with warnings_of_minilm() as told:
            evaluate(evaluated / "out")
    finally:
        shutil.rmtree(evaluated)
        shutil.copytree(kept, evaluated)
    line = f"{evaluated / file} {message} since the run: the figures may differ from the run's"
    assert [line for line in told if "since the run" in line] == ([line] if message else [])


def test_files_that_are_no_longer_hashed_as_a_whole_have_not_changed(
    evaluated: Path, no_accelerator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minilm.data.fingerprints._HASHED_BYTES", 1)
    with warnings_of_minilm() as told:
        evaluate(evaluated / "out")
    assert [line for line in told if "since the run" in line] == []


def test_a_run_that_did_not_tell_its_files_is_evaluated_without_a_word(
    evaluated: Path, tmp_path: Path, no_accelerator: None
) -> None:
    shutil.copytree(evaluated / "out", folder := tmp_path / "out")
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({"config": run["config"]}))
    with warnings_of_minilm() as told:
        assert evaluate(folder) == evaluate(evaluated / "out")
    assert not any("since the run" in line for line in told)
