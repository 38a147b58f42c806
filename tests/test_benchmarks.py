"""The parts of the benchmarks on toy sizes, in this process: they run, and both sides have the same job."""

import contextlib
import copy
import json
import math
import operator
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import chats
import classification
import communication
import comparison
import embeddings
import gpu
import gradients
import hf_trainer
import ladder
import muon
import nanogpt
import pytest
import quality
import report
import scaling
import tagging
import throughput
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from comparison import Contender, Rounds, StepCost, Task, TurnResult, build_parts, run_minilm
from synthetic import write_corpus
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForMaskedLM, BertConfig, BertModel, PreTrainedTokenizerBase, RobertaConfig
from transformers.models.modernbert import modeling_modernbert

import minilm.data.packing
import minilm.models.attention
import minilm.models.dropout
import minilm.models.fast_modules
import minilm.models.head
import minilm.models.rotary
import minilm.models.windowed_attention
from minilm import Batch, Config, Data, MaskedLM, Model, Optim, Run, Tokens
from minilm.distributed.precision import Peak
from minilm.objectives.factory import prepare_data
from tests.launch import ROOT

SIZES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
}
SIZES["roberta"] = SIZES["modernbert"] = SIZES["bert"]
CHAT_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {**SIZES["gpt2"], "n_positions": 128, "vocab_size": 410},
    "llama": {**SIZES["bert"], "max_position_embeddings": 128, "vocab_size": 410},
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")  # this process keeps the C library's ways
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Turns:
    """The other end of a side's connection: asks for so many turns."""

    def __init__(self, turns: int) -> None:
        self.left, self.sent = turns, []  # type: tuple[int, list[Any]]

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def recv(self) -> bool:
        self.left -= 1
        return self.left >= 0


def toy(config: Config) -> Config:
    """The same on a model that is all overhead."""
    own = {**config.model.config, **SIZES[config.model.type], "vocab_size": 420}
    own |= {"max_position_embeddings": 34} if config.model.type != "gpt2" else {}
    batch = replace(config.batch, examples=8, max_length=32, micro_tokens=128, workers=0)
    return replace(config, model=Model(type=config.model.type, config=own), batch=batch, run=Run(precision="fp32"))


def turns_of(
    contender: Contender, block: int = 1, *, lead_in: int = 0, evaluated: int = 0
) -> tuple[StepCost | None, list[TurnResult]]:
    """Two turns of it."""
    asked: Any = Turns(2)
    side = Task(connection=asked, config=contender.config, turns=2, block=block, lead_in=lead_in, evaluated=evaluated)
    with contextlib.suppress(SystemExit):  # as Trainer's process ends
        contender.run(side)
    work, *turns = asked.sent
    return work, turns


def check_sides(contenders: list[Contender], block: int = 1) -> None:
    """Trainer's first side and minilm's see the same; nobody sees nothing."""
    taken = {contender.name: turns_of(contender, block) for contender in contenders}
    for work, turns in taken.values():
        assert len(turns) == 2
        assert all(turn.tokens > 0 and turn.padded_tokens >= turn.tokens for turn in turns)
        assert work is None or work.flops(turns[0]) > 0
    trainer, ours = taken["HF Trainer"][1], taken["minilm"][1]
    assert [(turn.tokens, turn.square_lengths) for turn in ours] == [(t.tokens, t.square_lengths) for t in trainer]
    assert report.compute_loss_difference(ours, trainer) < 1e-5
    assert taken["minilm"][0] is not None


@pytest.mark.parametrize("name", ["masked-documents", "pair-classification"])
def test_throughput(name: str, tmp_path: Path) -> None:
    workload = throughput.WORKLOADS[name]
    config = toy(workload.config)
    if config.data.pair_column:
        texts = [" ".join(f"word{(i * j) % 50}" for j in range(30 + i % 7)) for i in range(60)]
        throughput.write_pairs(tmp_path / "pairs.jsonl", texts)
        tokens = replace(config.tokens, vocab_size=400)
        config = replace(config, data=replace(config.data, source=str(tmp_path / "pairs.jsonl")), tokens=tokens)
    else:
        data, tokens = write_corpus(tmp_path, 80, vocabulary=400, median=15, sigma=0.6)
        config = replace(config, data=data, tokens=tokens)
    check_sides(workload.contenders(config))


def test_a_quick_comparison_has_trainers_fastest_attention_alone() -> None:
    workload = throughput.WORKLOADS["masked-documents"]
    for precision, attention in (("bf16", ", eager"), ("fp32", "")):
        names = {c.name for c in workload.contenders(workload.config, workload.attentions(precision, quick=True))}
        fast = {f"HF Trainer, {grouping}{attention}" for grouping in ("group_by_length", "batch_rebalance")}
        assert names == {"HF Trainer", *fast, "minilm", "minilm, group=epoch"}
    assert len(workload.contenders(workload.config, workload.attentions("bf16", quick=False))) == 7


def test_trainers_fastest_settings_are_known_as_biased_or_not() -> None:
    workload = throughput.WORKLOADS["masked-documents"]
    contenders = workload.contenders(workload.config, ("auto",))
    assert [c.name for c in contenders if c.biased] == ["HF Trainer, group_by_length", "minilm, group=epoch"]
    turn = TurnResult(seconds=1, tokens=1, padded_tokens=1, square_lengths=1, losses=(1.0,), memory=1)
    taken = [[replace(turn, tokens=tokens)] for tokens in (100, 300, 200, 500, 400)]
    rivals = throughput.fastest_rivals(contenders, taken)
    assert [contenders[at].name for at in rivals.values()] == [
        "HF Trainer",
        "HF Trainer, batch_rebalance",
        "HF Trainer, group_by_length",
    ]


def test_a_rival_that_cannot_run_has_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = throughput.WORKLOADS["masked-documents"]
    assert not any(c.obstacle for c in workload.contenders(workload.config, ("auto",)))
    monkeypatch.delattr("transformers.trainer_pt_utils.BatchRebalanceSampler")
    unable = {c.name: c.obstacle for c in workload.contenders(workload.config, ("auto",)) if c.obstacle}
    obstacle = f"transformers {version('transformers')} does not have batch_rebalance"
    assert unable == {"HF Trainer, batch_rebalance": obstacle}


@pytest.mark.parametrize(
    ("name", "scale"), [("masked-documents", throughput.MICRO_BATCHES), ("modernbert-documents", 1)]
)
def test_gradients_are_compared_with_the_exact_one(name: str, scale: float, tmp_path: Path) -> None:
    workload = throughput.WORKLOADS[name]
    data, tokens = write_corpus(tmp_path, 300, vocabulary=400, median=15, sigma=0.6)
    # Each micro-batch has targets.
    config = replace(toy(workload.config), data=data, tokens=tokens, objective=MaskedLM(rate=0.5))
    checks = {}
    for contender in workload.contenders(config, ("eager",)):
        if contender.biased and contender.run is run_minilm:
            continue
        _, turns = turns_of(gradients.checked(contender))
        checks[contender.name] = gradients.read_check(turns)
    # transformers' RoBERTa takes the mean over each micro-batch, and Trainer adds these means.
    (rebalanced,) = [check for side, check in checks.items() if "batch_rebalance" in side]
    assert rebalanced.scale == pytest.approx(scale, rel=0.5 if scale > 1 else 1e-4)
    assert (rebalanced.error > 1e-2) == (scale > 1)
    for side, check in checks.items():
        if check is not rebalanced:
            assert check.scale == pytest.approx(1, abs=1e-4), side
            assert check.error < 1e-4, side


def test_classification_takes_the_same_steps(tmp_path: Path) -> None:
    config = toy(throughput.WORKLOADS["pair-classification"].config)
    texts = [" ".join(f"word{(i * j) % 50}" for j in range(80 + i % 7)) for i in range(60)]
    throughput.write_pairs(tmp_path / "pairs.jsonl", texts)
    config = replace(
        config,
        data=replace(config.data, source=str(tmp_path / "pairs.jsonl"), eval_fraction=0.3),
        tokens=replace(config.tokens, vocab_size=400),
        optim=replace(config.optim, lr=1e-3, schedule="constant", warmup=0),  # Trainer's first warm-up step has rate 0
        run=replace(config.run, epochs=2.0, max_steps=None, precision="fp32", save_every=0),
    )
    theirs, ours = classification.by_trainer(config), classification.by_minilm(config)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
    assert ours["eval_loss"] != pytest.approx(0.6931, rel=1e-3)


def test_tagging_takes_the_same_steps(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = []
    for _ in range(90):
        words = draw.choices(["red", "green", "runs", "sleeps", "the"], k=draw.randint(1, 25))
        rows.append({"tokens": words, "ner_tags": ["B-COL" if word in ("red", "green") else "O" for word in words]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = toy(replace(tagging.CONFIG, model=Model(type="bert", config={"hidden_dropout_prob": 0.0})))
    config = replace(
        config,
        data=Data(source=str(tmp_path / "rows.jsonl"), eval_fraction=0.3),
        tokens=Tokens(vocab_size=400),
        model=replace(config.model, config={**config.model.config, "attention_probs_dropout_prob": 0.0}),
        optim=replace(config.optim, lr=1e-2, schedule="constant", warmup=0),
    )
    limited = replace(config, run=replace(config.run, max_steps=43))
    assert tagging.plan_rounds(limited) == Rounds(count=20, warm_up=0, block=2, evaluated=20)
    contenders = tagging.find_contenders(config, "fp32")
    taken = [turns_of(contender, 4, evaluated=2)[1] for contender in contenders]
    trainer, grouped, ours = taken
    assert [turn.tokens for turn in ours] == [turn.tokens for turn in trainer]
    assert report.compute_loss_difference(ours, trainer) < 1e-5
    # An epoch, in another order.
    assert sum(turn.tokens for turn in grouped) == sum(turn.tokens for turn in ours)
    assert [turn.losses for turn in grouped] != [turn.losses for turn in trainer]
    assert ours[-1].losses[-1] < 0.9 * ours[0].losses[0]
    taken = [[replace(turn, flops=1.0) for turn in turns] for turns in taken]
    table = tagging.compute_rows(["HF Trainer", "grouped", "minilm"], [taken], Peak(flops=1e9, source="assumed"))
    assert table[2]["eval_loss"] == pytest.approx(table[0]["eval_loss"], rel=1e-4)
    assert 0.9 < table[2]["f1"][0] == table[0]["f1"][0]
    assert all(not turns[0].evaluation for turns in taken)


def test_embeddings_take_the_same_steps_as_sentence_transformers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    pytest.importorskip("sentence_transformers")
    # A tokenizer remembers how it padded last, and sentence-transformers would pad as it does.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZES["bert"])
    for part in (BertModel(config), tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = [{"anchor": f"word {i} " * (1 + i % 9), "positive": f"{i} other " * (1 + i % 5)} for i in range(100)]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[3]])))
    files = embeddings.write_pairs(tmp_path / "all.jsonl", tmp_path)
    assert [len(Path(file).read_text().splitlines()) for file in files] == [36, 64]
    settings = embeddings.configure(str(tmp_path / "model"), *files, 16)
    settings = replace(
        settings, run=Run(precision="fp32"), batch=replace(settings.batch, max_length=32, micro_tokens=100)
    )
    taken = [turns_of(contender) for contender in embeddings.find_contenders(settings, "sdpa")]
    ours, *others = [turns for _, turns in taken]
    for turns in others:
        assert [(turn.tokens, turn.square_lengths) for turn in turns] == [(t.tokens, t.square_lengths) for t in ours]
        assert report.compute_loss_difference(ours, turns) < 1e-5
    rows_of_table = embeddings.compute_rows(embeddings.find_contenders(settings, "sdpa"), [turns for _, turns in taken])
    assert [row["ours"] for row in rows_of_table] == [True, False, False, True]


@pytest.mark.parametrize("kind", chats.MODELS)
def test_chats_take_the_same_steps_as_trl(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="pip install trl")
    rows = [
        [
            {"role": "user", "content": f"Say the word {i} " * (1 + i % 5)},
            {"role": "assistant", "content": f"{i} is it. " * (1 + i % 7)},
        ]
        for i in range(100)
    ]
    rows.append([{"role": "user", "content": "long " * 200}, {"role": "assistant", "content": "Yes."}])
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    files = chats.write_chats(tmp_path / "all.jsonl", tmp_path, vocabulary=400, longest=128)
    assert [len(Path(file).read_text().splitlines()) for file in files] == [36, 64]
    model = chats.write_model(kind, chats.MODELS[kind] | CHAT_SIZES[kind], tmp_path, tmp_path / kind)
    settings = chats.configure(model, *files, 8)
    settings = replace(
        settings, run=Run(precision="fp32"), batch=replace(settings.batch, max_length=128, micro_tokens=200)
    )
    contenders = chats.find_contenders(settings, "sdpa")
    taken = [turns_of(contender)[1] for contender in contenders]
    *theirs, grouped, ours = taken
    for turns in theirs:
        assert [(turn.tokens, turn.square_lengths) for turn in turns] == [(t.tokens, t.square_lengths) for t in ours]
        assert report.compute_loss_difference(ours, turns) < 1e-5
    assert [turns[0].tokens < turns[0].padded_tokens for turns in taken] == [True, False, True, False]
    assert all(turn.tokens > 0 for turn in grouped)
    table = chats.compute_rows(kind, contenders, taken)
    assert [row["ours"] for row in table] == [False] * 3 + [True]
    assert [row["loss_difference"] is None for row in table] == [False, False, True, False]


def test_quality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, tokens = write_corpus(tmp_path, 300, vocabulary=400, median=15, sigma=0.6)
    job = quality.JOBS["documents"]
    job = replace(job, config=quality.constant(replace(toy(job.config), data=data, tokens=tokens), warmup=3))
    sides = quality.sides_of(job, "fp32")
    sides_of_blocks = quality.sides_of(quality.JOBS["pydocs"], "bf16")
    assert {*sides} - {*sides_of_blocks} == {"group_by_length", "epoch"}
    assert sides_of_blocks["torch-muon"].config.model.config["sparse_prediction"]
    assert "sparse_prediction" not in sides_of_blocks[quality.TRAINER].config.model.config
    found = {}
    for name, side in sides.items():
        contender = side.at(quality.full_name(name, side), 1e-3)
        found[contender.name] = turns_of(contender, block=2, evaluated=True)[1]
    losses = {name: [turn.eval_loss for turn in turns] for name, turns in found.items()}
    assert losses[quality.MINILM] == pytest.approx(losses[quality.TRAINER], rel=1e-5)
    assert all(value == value for side in losses.values() for value in side)  # no nan, no None
    # No two others do the same.
    assert len({tuple(side) for side in losses.values()}) >= len(losses) - 1
    turn = found[quality.MINILM][0]
    ours = [replace(turn, seconds=2.0, eval_loss=loss) for loss in (6.0, 5.0, 3.0)]
    assert [quality.seconds_to(loss, ours) for loss in (6.5, 5.5, 4.0, 2.0)] == [2.0, 3.0, 5.0, None]
    theirs = [replace(turn, seconds=5.0, eval_loss=loss) for loss in (5.5, 4.0, 3.5)]
    taken = {quality.TRAINER: theirs, "HF Trainer, sgd": theirs[:1] * 3, quality.MINILM: ours}
    rates = {side: {1e-3: 5.0, 3e-3: 4.0} for side in taken}
    rows = quality.rows_of("toy", 10, 10.0, taken, rates)
    assert [row["loss"] for row in rows] == [4.0, 5.5, 3.0]
    assert [row["seconds_to_best"] for row in rows] == [10.0, None, 5.0]
    assert [row["best_rival"] for row in rows] == [True, False, False]
    lines = capsys.readouterr().out.splitlines()
    assert "0.003 (0.001, 0.003)" in lines[-1]
    assert "30  3.000     5 s, 0.50" in lines[-1]
    assert job.rounds(7.0) == Rounds(count=7, warm_up=0, block=10, evaluated=1, seconds=7.0)


def test_trainers_model_is_evaluated_without_the_rounding_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForMaskedLM.from_config(RobertaConfig(**SIZES["roberta"], vocab_size=50)).eval()
    ids_1xL = torch.arange(5, 25)[None]
    expected_1xLxV = model(ids_1xL).logits
    wrapped = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    assert not torch.equal(wrapped(ids_1xL).logits, expected_1xLxV)
    monkeypatch.setattr(hf_trainer, "evaluate", lambda config, copied, prepared: {"logits": copied(ids_1xL).logits})
    turns = hf_trainer.Turns(mock.Mock(), mock.Mock())
    assert torch.equal(turns._evaluate(wrapped)["logits"], expected_1xLxV)
    assert not torch.equal(wrapped(ids_1xL).logits, expected_1xLxV)


def test_torchs_muon_in_trainer_takes_the_learning_rate_of_the_schedule() -> None:
    network = AutoModelForMaskedLM.from_config(RobertaConfig(vocab_size=40, pad_token_id=1, **SIZES["bert"]))
    optimizer = hf_trainer.MuonWithAdamW(network, Optim(lr=1e-2))
    # accelerate loads a copy of the optimizer's state, and with it new groups.
    prepared = Accelerator(cpu=True).prepare(optimizer)
    schedule = LambdaLR(prepared, lambda step: float(step))
    moved = []
    for _ in range(2):
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        network(input_ids=torch.arange(4, 20)[None], labels=torch.arange(4, 20)[None]).loss.backward()
        prepared.step()
        schedule.step()
        moved.append(
            {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
        )
    assert not moved[0]
    assert {"roberta.encoder.layer.0.output.dense.weight", "roberta.embeddings.word_embeddings.weight"} <= moved[1]
    matrices = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    inside = [name for name, parameter in network.named_parameters() if id(parameter) in matrices]
    assert len(inside) == 12
    assert all("encoder.layer" in name for name in inside)


def test_a_side_that_diverges_has_the_worst_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    side = quality.sides_of(quality.JOBS["pydocs"], "fp32")["sgd"]
    turn = TurnResult(seconds=1, tokens=1, padded_tokens=1, square_lengths=1, losses=(1.0,), memory=1)
    losses = iter([float("nan"), 3.0])
    monkeypatch.setattr(quality, "compare", lambda sides, *_: [[replace(turn, eval_loss=next(losses))] for _ in sides])
    assert quality.choose_rate("sgd", side, "fp32", Rounds(count=1)) == {0.1: float("inf"), 0.3: 3.0}
    assert quality.choose_rate("sgd", replace(side, rates=(0.1,)), "fp32", Rounds(count=1)) == {0.1: float("inf")}


def test_a_contender_stops_after_its_seconds() -> None:
    class Side:
        def __init__(self, seconds: float) -> None:
            self.seconds, self.turns = seconds, 0

        def send(self, message: bool) -> None:
            self.turns += message

        def recv(self) -> TurnResult:
            return TurnResult(
                seconds=self.seconds, tokens=1, padded_tokens=1, square_lengths=1, losses=(1.0,), memory=1
            )

    sides: Any = [Side(1.0), Side(4.0)]
    taken = comparison._in_turn(sides, ["fast", "slow"], [None, None], Rounds(count=9, warm_up=0, seconds=5.0))
    assert [len(turns) for turns in taken] == [5, 2]
    assert [side.turns for side in sides] == [5, 2]


NANOGPT = {
    "train.py": """
import sys

import torch

from model import GPT, GPTConfig

flags = dict(flag[2:].split("=") for flag in sys.argv[2:])
assert flags["max_iters"] == flags["eval_interval"] == "7" and flags["n_embd"] == "128"
settings = {"vocab_size": 4}
checkpoint = {"model_args": settings, "model": GPT(GPTConfig(**settings)).state_dict()}
torch.save(checkpoint, f"{flags['out_dir']}.pt")
print("iter 0: loss 1.0, time 900.00ms\\niter 1: loss 1.0, time 100.00ms\\niter 2: loss 1.0, time 50.00ms")
print("step 0: train loss 1.2, val loss 1.3\\nstep 7: train loss 1.0, val loss 1.1")
import os
os.makedirs(flags["out_dir"])
os.rename(f"{flags['out_dir']}.pt", f"{flags['out_dir']}/ckpt.pt")
""",
    "model.py": """
from dataclasses import dataclass

import torch


@dataclass
class GPTConfig:
    vocab_size: int


class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor([0.1, 0.2, 0.4, 0.3]).log())

    def forward(self, ids, targets=None):
        return self.bias.expand(*ids.shape, 4), None
""",
    "data/shakespeare_char/prepare.py": "open('val.bin', 'w').write(open('input.txt').read())",
}


def test_nanogpt(tmp_path: Path) -> None:
    for name, code in NANOGPT.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    text = tmp_path / "text.txt"
    text.write_text("dcba" * 300)
    nanogpt.prepare_nanogpt(tmp_path / "checkout", text, tmp_path / "copy")
    assert not (tmp_path / "checkout" / "data" / "shakespeare_char" / "input.txt").exists()
    blocks = nanogpt.held_out_blocks(text)
    assert "".join(map("".join, blocks)) == "dcba" * 30
    assert [len(block) for block in blocks] == [64, 56]
    found = nanogpt.run_nanogpt(tmp_path / "copy", text, 1e-3, 7, [list("dcba"), list("ab")])
    # The ids of a, b, c and d are 0 to 3. The first characters of blocks are not predicted.
    expected = -math.log(0.4 * 0.2 * 0.1 * 0.2) / 4
    assert found.pop("loss") == pytest.approx(expected)
    assert found.pop("seconds") > 0
    assert found == {"training_seconds": pytest.approx(0.7), "own_loss": 1.1}


def test_muon(tmp_path: Path) -> None:
    data, tokens = write_corpus(tmp_path, 80, vocabulary=400, median=15, sigma=0.6)
    config = replace(toy(throughput.MASKED), data=data, tokens=tokens)
    job = muon.Job(config=config, rates=(1e-2, 3e-2), block=2)
    taken = {side.name: turns_of(side, block=2, evaluated=1)[1] for side in job.contenders()}
    assert [*taken] == ["AdamW at 0.01", "Muon at 0.01", "AdamW at 0.03", "Muon at 0.03"]
    first, *others = taken.values()
    for turns in others:
        assert [turn.tokens for turn in turns] == [turn.tokens for turn in first]
        # The first loss precedes all updates.
        assert turns[0].losses[0] == first[0].losses[0]
        assert turns[1].losses[1] != first[1].losses[1]
    for turns in taken.values():
        assert all(0 < turn.evaluation["optimizer_seconds"] < turn.seconds for turn in turns)
        assert all(turn.evaluation["eval_loss"] == turn.eval_loss for turn in turns)
    turn = replace(first[0], seconds=4.0, evaluation={**first[0].evaluation, "optimizer_seconds": 1.0})
    adamw = [replace(turn, eval_loss=loss) for loss in (6.0, 5.0, 4.0, 3.5)]
    better = [replace(turn, eval_loss=loss, seconds=5.0) for loss in (5.0, 4.0, 3.0, 2.5)]
    rows = muon.rows_of("toy", job, {"AdamW at 0.01": adamw, "Muon at 0.01": better})
    assert [row["steps_to_goal"] for row in rows] == [8, 5]
    assert rows[1]["ratio"] == pytest.approx(0.8)
    lines = muon.table_of(rows).splitlines()
    assert {line.count("|") for line in lines} == {10}
    assert "| loss 3.500 after |" in lines[0]
    assert "| 5.000 | 4.000 | 3.000 | 2.500 |" in lines[-1]
    assert "| 0.80x (0.80 to 0.80) | 5 steps |" in lines[-1]
    cost = muon.cost_of("toy", config, {"adamw": adamw, "muon": better}, Rounds(count=4, block=2))
    assert (cost["adamw_seconds"], cost["muon_optimizer_seconds"], cost["ratio"]) == (2.0, 0.5, 1.25)
    lines = muon.cost_table_of([cost]).splitlines()
    assert {line.count("|") for line in lines} == {9}
    assert "| 2,000 ms | 2,500 ms | 500.0 ms | 500.0 ms | 1.25x (1.25 to 1.25) |" in lines[-1]


def test_gpu(tmp_path: Path) -> None:
    job = gpu.JOBS["GPT-2, 1,024 tokens"]
    job = replace(job, config=toy(job.config), vocabulary=400, median=12)
    contenders = gpu.contenders_of(job, tmp_path, 4)
    assert len(prepare_data(contenders[0].config).train) >= 4 * job.config.batch.examples
    compiled = contenders.pop()  # which no CPU takes
    assert compiled.config.run.compile
    check_sides(contenders, block=2)


def test_steps_that_do_not_count_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    job = replace(gpu.JOBS["GPT-2, 1,024 tokens"], vocabulary=400, median=12)
    trainer, ours, _ = gpu.contenders_of(replace(job, config=toy(job.config)), tmp_path, 6)
    alone = [turns_of(contender, block=3)[1] for contender in (trainer, ours)]
    taken = [turns_of(contender, block=2, lead_in=1)[1] for contender in (trainer, ours)]
    assert len(emptied) == 4
    assert report.compute_loss_difference(*taken) < 1e-5
    for (_, whole), (_, part) in zip(alone, taken, strict=True):
        assert part.tokens < whole.tokens  # of the same three steps


def test_gpu_wants_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_every_rung_of_the_ladder_takes_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, tokens = write_corpus(tmp_path, 80, vocabulary=400, median=10, sigma=0.6)
    config = replace(toy(throughput.MASKED), data=data, tokens=tokens)
    parts, taken = [], []
    monkeypatch.setattr(ladder, "build_parts", lambda *given: parts.append(build_parts(*given)) or parts[-1])
    for contender in ladder.contenders_of(config, ladder.RUNGS):
        with monkeypatch.context() as process:  # what a rung changes in its own process
            process.setattr("minilm.data.packing.SHORT_ROW_TOKENS", minilm.data.packing.SHORT_ROW_TOKENS)
            process.setattr(
                "minilm.models.attention._products_are_faster", minilm.models.attention._products_are_faster
            )
            taken.append(turns_of(contender)[1])
    heads: list[Any] = [part.model for part in parts]
    for name, first in (("sparse", 2), ("short", 3), ("fused", 4), ("padding_free", 5)):
        assert [getattr(head, name, False) for head in heads] == [number >= first for number in range(len(heads))], name
    machine = report.Machine(
        device=torch.device("cpu"),
        precision="fp32",
        peak=Peak(flops=1e9, source="made up"),
        hardware={"device": "a toy", "threads_per_process": 1},
    )
    rows = ladder.rows_of(ladder.RUNGS, taken, machine)
    assert all(row["loss_difference"] < 1e-5 for row in rows[:-1])
    padding = {row["name"]: row["padding"] for row in rows}
    assert padding[ladder.PLAIN] > padding[ladder.SORTED] > padding[ladder.PACKED] == 0
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    path = report.write("ladder", machine, {"rows": rows}, lambda figure: report.bars(figure.subplots(), rows), (4, 3))
    assert json.loads(path.read_text())["versions"]["torch"] == version("torch")


@pytest.mark.parametrize("pair", ["dropout", "rotary", "gelu", "window"])
def test_the_ladder_has_pairs_without_and_with(pair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, tokens = write_corpus(tmp_path, 80, vocabulary=400, median=10, sigma=0.6)
    config = replace(toy(throughput.MASKED), data=data, tokens=tokens)
    windowed = ladder.with_window(config)
    windowed = replace(windowed, batch=replace(windowed.batch, examples=2, max_length=256, micro_tokens=256))
    texts = write_corpus(tmp_path / "causal", 80, vocabulary=400, median=10, sigma=0.6, causal=True)
    causal = replace(toy(throughput.CAUSAL), data=texts[0], tokens=texts[1])
    names, own, where, function = {
        "dropout": (
            (ladder.TORCH_MASKS, ladder.OWN_MASKS),
            ladder.with_dropout(config),
            minilm.models.dropout._Dropout,
            "apply",
        ),
        "rotary": ((ladder.TORCH_ROTARY, ladder.OWN_ROTARY), windowed, minilm.models.rotary._Rotation, "apply"),
        "gelu": ((ladder.LONG_GELU, ladder.OWN_GELU), causal, torch.nn.functional, "gelu"),
        "window": ((ladder.WHOLE, ladder.CHUNKS), windowed, minilm.models.windowed_attention._Contexts, "apply"),
    }[pair]
    swapped = (
        "models.attention.fast_dropout",
        "models.fast_modules.install_fast_rotary",
        "models.attention.chunk_size",
    )
    losses = []
    for number, contender in enumerate(ladder.pair_of(names, own)):
        own_work = mock.Mock(wraps=getattr(where, function))
        with monkeypatch.context() as process, mock.patch.object(where, function, own_work):
            process.setattr("minilm.models.fast_modules.FAST_MODULES", {**minilm.models.fast_modules.FAST_MODULES})
            for changed in swapped:  # what a side changes in its own process
                process.setattr(f"minilm.{changed}", operator.attrgetter(changed)(minilm))
            process.setattr(modeling_modernbert, "apply_rotary_pos_emb", plain_turn())
            losses.append([loss for turn in turns_of(contender)[1] for loss in turn.losses])
        assert own_work.called == bool(number), contender.name
    assert pair == "dropout" or losses[0] == pytest.approx(losses[1], abs=1e-5)


def plain_turn() -> Any:
    """transformers' own, which may have been replaced."""
    turn = modeling_modernbert.apply_rotary_pos_emb
    return getattr(turn, "plain", turn)


def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, tokens = write_corpus(tmp_path, 80, vocabulary=400, median=10, sigma=0.6)
    config = replace(toy(throughput.MASKED), data=data, tokens=tokens)
    found = scaling.time_dataset(config, 4)
    assert found["start"] > found["data"] > 0
    work, turns = turns_of(Contender(name="minilm", config=config, run=run_minilm))
    assert work is not None
    turns = [replace(turn, flops=work.flops(turn)) for turn in turns]
    slower = [replace(turn, seconds=2 * turn.seconds, flops=1.5 * turn.flops) for turn in turns]
    points = scaling.compute_points([32, 64], [turns, slower], 1e9)
    shares = [point.tokens_per_second / point.ideal for point in points]
    assert shares == pytest.approx([1, 0.75])
    scaling.show("lengths", points)
    assert len(capsys.readouterr().out.splitlines()) == 4
    sized = scaling.sized_config(2, 128, 64, 512).batch
    assert sized == Batch(examples=8, max_length=64, micro_tokens=512, layout="blocks")


def test_communication() -> None:
    page = (ROOT / "docs" / "network_costs.md").read_text()
    lines = [*communication.table(), *communication.compare_with_published()]
    assert [line for line in lines if line not in page.splitlines()] == []
    assert communication.all_reduce(100e6, 2, 400e6) == 1.0
    assert communication.all_reduce(100e6, 4, 400e6) == 1.5
    assert communication.all_reduce(100e6, 4, 400e6, size=2) == 0.75
    assert communication.step_time(3.0, 2.0) == 3.0  # hidden by the backward
    assert communication.step_time(3.0, 3.0) == pytest.approx(4.0)
    assert communication.step_time(3.0, 2.0, 2) == pytest.approx(4.0)  # by the last of two alone
    _, flops, tokens = communication.MODELS["BERT-base"]
    assert flops == pytest.approx(
        0.546e9, rel=5e-3
    )  # as minilm.distributed.hardware counts it, but for the head's own layer
    compute, _, step = communication.predict("BERT-base", 1, communication.NVLINK)
    assert compute == step == pytest.approx(tokens * flops / communication.RATE)
