"""train_step against a loop written out in plain torch, and what a whole run leaves behind."""

import copy
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerBase
from transformers import pipeline as hf_pipeline

import minilm.train
from minilm import Batch, Config, Data, Model, Optim, Run, Tokens
from minilm.data.batch_plan import Plan
from minilm.data.corpus import Examples, encode
from minilm.data.micro_batch import MicroBatch
from minilm.models.inference import fill_mask
from minilm.models.sparse_head import SparseHead
from minilm.objectives.masking import MaskedLMCollator
from minilm.optim.optimizer import build_optimizer
from minilm.train import load_steps, train, train_step
from tests.launch import read_log
from tests.reference import full_logits

TINY_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.fixture
def examples(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> Examples:
    return encode(documents, tokenizer, max_length=48)


@pytest.fixture
def network(tokenizer: PreTrainedTokenizerBase) -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **TINY_BERT))


def config(documents: Dataset, folder: Path, **run: Any) -> Config:
    text = folder / "documents.txt"
    text.write_text("\n".join(documents["text"]))
    return Config(
        data=Data(source=str(text), eval_fraction=0.2),
        tokens=Tokens(vocab_size=400),
        model=Model(type="bert", config=TINY_BERT),
        batch=Batch(examples=8, max_length=48, micro_tokens=128),
        optim=Optim(lr=3e-3),
        run=replace(Run(max_steps=4, precision="fp32", output_dir=str(folder / "out")), **run),
    )


@pytest.mark.parametrize("max_grad_norm", [0.5, 0.0], ids=["clipped", "not clipped"])
def test_steps_equal_plain_torch(
    examples: Examples, network: BertForMaskedLM, tokenizer: PreTrainedTokenizerBase, max_grad_norm: float
) -> None:
    collator = MaskedLMCollator(tokenizer, rate=0.15, seed=0, padded=False, multiple=1)
    plain = copy.deepcopy(network)
    decayed = [p for p in plain.parameters() if p.ndim >= 2]
    others = [p for p in plain.parameters() if p.ndim < 2]
    plain_optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}]
    )
    accelerator = Accelerator(cpu=True)
    head = SparseHead(network)
    model, optimizer = accelerator.prepare(head, build_optimizer(head, Optim(weight_decay=0.1)))
    plan = Plan(examples.lengths, examples=12, micro_tokens=100)
    for index, (step, micro_batches) in enumerate(load_steps(plan, examples, collator, accelerator, range(5), 0)):
        assert len(micro_batches) > 1
        lr = 1e-3 * (index + 1)
        result = train_step(accelerator, model, optimizer, micro_batches, lr=lr, max_grad_norm=max_grad_norm)

        ids = np.concatenate(step.micro_batches[0])
        # One padded batch, masked logits picked late.
        batch = collator([examples[int(i)] for i in ids], ids, step.epoch)
        logits_TxV = full_logits(plain, batch.input_ids_T, examples.lengths[ids].tolist())
        loss = F.cross_entropy(logits_TxV[batch.target_index_N], batch.target_ids_N)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm or torch.inf)
        for group in plain_optimizer.param_groups:
            group["lr"] = lr
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        assert float(result.loss) == pytest.approx(loss.item(), rel=1e-5)
        assert float(result.grad_norm) == pytest.approx(norm.item(), rel=1e-4)
    for ours, expected in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, expected, atol=1e-4)


class Casts(TorchDispatchMode):
    """Counts how often each parameter is copied to bfloat16."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
        self.counts = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.counts[self.names.get(args[0].data_ptr(), "")] += 1
        return function(*args, **kwargs)


def test_a_step_in_bf16_casts_a_weight_once_for_all_micro_batches_and_changes_no_bit(
    examples: Examples, network: BertForMaskedLM, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        plan, collator = (
            Plan(examples.lengths, examples=12, micro_tokens=100),
            MaskedLMCollator(tokenizer, rate=0.15, seed=0, padded=False, multiple=1),
        )
        ((_, micro_batches),) = load_steps(plan, examples, collator, accelerator, range(1), 0)
        counts, weights = [], []
        for once in (True, False):
            copied = copy.deepcopy(network)
            model, optimizer = accelerator.prepare(SparseHead(copied), build_optimizer(copied, Optim()))
            if not once:  # then a micro-batch's forward has a context of its own, which ends with it
                monkeypatch.setattr(accelerator, "autocast", nullcontext)
            with Casts(copied) as casts:
                train_step(accelerator, model, optimizer, micro_batches, lr=1e-3, max_grad_norm=1.0)
            counts.append(casts.counts["bert.encoder.layer.0.intermediate.dense.weight"])
            weights.append(torch.cat([parameter.detach().flatten() for parameter in copied.parameters()]))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert len(micro_batches) > 1
    assert counts == [1, len(micro_batches)]
    assert torch.equal(*weights)


@pytest.mark.scorecard(6)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than processors
def test_workers_of_any_number_prepare_the_same_batches_and_masks(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, figure: Callable[[str], None]
) -> None:
    accelerator, collator = (
        Accelerator(cpu=True),
        MaskedLMCollator(tokenizer, rate=0.15, seed=0, padded=False, multiple=1),
    )
    plan = Plan(examples.lengths, examples=12, micro_tokens=100)

    def prepared(workers: int) -> list[tuple[Any, ...]]:
        steps = load_steps(plan, examples, collator, accelerator, range(3, 23), workers)
        return [(step.epoch, step.tokens, *map(tensors, batches)) for step, batches in steps]

    def tensors(batch: MicroBatch) -> tuple[object, ...]:
        own = (batch.input_ids_T, batch.target_index_N, batch.target_ids_N, batch.packing.position_T)
        return tuple(tensor.tolist() for tensor in own)

    alone = prepared(0)
    assert alone == prepared(1) == prepared(4)
    assert alone[0] != alone[1]
    figure(f"{len(alone)} steps, {sum(len(step) - 2 for step in alone)} micro-batches: equal to the bit")


@pytest.mark.scorecard(26)
def test_a_run_resumes_in_the_middle_of_a_million_examples_at_once(
    tokenizer: PreTrainedTokenizerBase, figure: Callable[[str], None]
) -> None:
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(1, 60, 1_000_001))
    ids, none = rng.integers(5, len(tokenizer), ends[-1]).astype(np.uint16), np.zeros(0, np.int64)
    examples = Examples(ids=ids, start=ends[:-1], stop=ends[1:], prefix=none, suffix=none)
    accelerator, collator = (
        Accelerator(cpu=True),
        MaskedLMCollator(tokenizer, rate=0.15, seed=0, padded=False, multiple=1),
    )
    start = time.perf_counter()
    plan = Plan(examples.lengths, examples=32, micro_tokens=1024)
    plan.padding_share()
    examples.identity()
    at = plan.steps_per_epoch // 2 + 3 * plan.steps_per_epoch
    step, _ = next(iter(load_steps(plan, examples, collator, accelerator, range(at, at + 9), 0)))
    seconds = time.perf_counter() - start
    assert (step.epoch, len(step.examples)) == (3, 32)
    figure(f"first batch after {seconds:.2f} s, step {at:,}")
    assert seconds < 2  # usually a tenth of it; iterating to the step would take minutes


@pytest.mark.scorecard(11)
def test_overfits_one_batch(
    examples: Examples, network: BertForMaskedLM, tokenizer: PreTrainedTokenizerBase, figure: Callable[[str], None]
) -> None:
    accelerator = Accelerator(cpu=True)
    collator = MaskedLMCollator(tokenizer, rate=0.15, seed=0, padded=False, multiple=1)
    head = SparseHead(network)
    model, optimizer = accelerator.prepare(head, build_optimizer(head, Optim()))
    plan = Plan(examples.lengths, examples=8, micro_tokens=400)
    ((_, micro_batches),) = load_steps(plan, examples, collator, accelerator, range(1), 0)
    for _ in range(150):
        result = train_step(accelerator, model, optimizer, micro_batches, lr=3e-3, max_grad_norm=1.0)
    assert float(result.loss) < 0.05
    figure(f"masked LM: loss {float(result.loss):.3f} after 150 steps")


def test_deterministic_algorithms_are_on_during_the_run_only_and_change_nothing_on_a_cpu(
    documents: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    outs = [str(tmp_path / name) for name in ("plain", "deterministic", "plain again")]
    switches: list[tuple[bool, str | None]] = []
    step = minilm.train.train_step

    def watched(*args: Any, **options: Any) -> Any:
        now = (torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        switches.extend([now] if switches[-1:] != [now] else [])
        return step(*args, **options)

    monkeypatch.setattr(minilm.train, "train_step", watched)
    for out, asked in zip(outs, (False, True, False), strict=True):
        train(config(documents, tmp_path, output_dir=out, deterministic=asked))
        assert not torch.are_deterministic_algorithms_enabled()
    assert switches == [(False, None), (True, ":4096:8"), (False, ":4096:8")]
    weights = [Path(out, "model.safetensors").read_bytes() for out in outs]
    assert weights[0] == weights[1] == weights[2]


@pytest.mark.scorecard(28)
def test_the_model_loads_in_plain_transformers_with_the_same_answers(documents: Dataset, tmp_path: Path) -> None:
    text = "Return a [MASK] of the names."
    train(config(documents, tmp_path, samples=(text,)))
    out = str(tmp_path / "out")
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    assert next(model.parameters()).dtype == torch.float32
    ours = fill_mask(model, tokenizer, [text], top_k=5)[0][0]
    theirs = hf_pipeline("fill-mask", model=out, device="cpu")(text, top_k=5)
    assert [fill.probability for fill in ours] == pytest.approx([answer["score"] for answer in theirs], abs=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert text in card
    assert ours[0].token in card


def test_a_run_leaves_its_records(documents: Dataset, tmp_path: Path) -> None:
    results = train(config(documents, tmp_path, eval_every=3)).figures
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "all_results.json", "config.json", "history.jsonl", "log.jsonl"),
        *("model.safetensors", "run.json", "tokenizer.json", "tokenizer_config.json", "checkpoint-4", "ledger"),
    }
    assert json.loads((out / "all_results.json").read_text()) == results
    assert results.keys() == {
        *("eval_loss", "perplexity", "bits_per_byte", "unigram_bits_per_byte"),
        *("steps", "tokens", "train_seconds", "tokens_per_second", "mfu"),
    }
    steps, evaluations = read_log(out)
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["step"] for line in evaluations] == [3, 4]
    assert steps[-1]["tokens"] == results["tokens"]


def test_learns_and_counts_epochs(documents: Dataset, tmp_path: Path) -> None:
    results = train(config(documents, tmp_path, max_steps=None, epochs=2.5)).figures
    steps, evaluations = read_log(tmp_path / "out")
    assert steps[-1]["epoch"] == pytest.approx(2.5, abs=1 / 6)
    assert [line["epoch"] for line in evaluations] == [1, 2, steps[-1]["epoch"]]
    assert results["eval_loss"] < evaluations[0]["eval_loss"] < 6


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(type="bert", config={"max_position_embeddings": 47}), "batch.max_length=48 .* 47 positions"),
        (Model(type="bert", config={"max_position_embeddings": "many"}), "max_position_embeddings"),
        (Model(type="bert", config={"hiden_size": 32}), "did you mean 'hidden_size'"),
        (Model(type="gpt2"), "gpt2 has no MaskedLM head"),
        (Model(name="./saved", config={"max_position_embeddings": 47}), "batch.max_length=48 .* 47 positions"),
    ],
)
def test_a_model_that_cannot_be_is_refused_before_anything_is_read(
    model: Model,
    message: str,
    network: BertForMaskedLM,
    documents: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "minilm.objectives.masked_lm.MaskedLMObjective.prepare", lambda *_: pytest.fail("work was done")
    )
    with pytest.raises(ValueError, match=message):
        train(replace(config(documents, tmp_path), model=model, batch=Batch(max_length=48)))


def test_packed_steps_hold_nearly_as_many_tokens_each(documents: Dataset, tmp_path: Path) -> None:
    packed = replace(config(documents, tmp_path), batch=Batch(examples=3, max_length=64, layout="packed"))
    train(packed)
    steps, _ = read_log(tmp_path / "out")
    assert all(0.5 * 3 * 64 < tokens <= 3 * 64 for tokens in np.diff([0, *(line["tokens"] for line in steps)]))
    examples = json.loads((tmp_path / "out" / "run.json").read_text())["train"]["examples"]
    assert 1 / steps[0]["epoch"] < examples / 3  # steps of an epoch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": Batch(max_length=65)}, "64 positions"),
        ({"model": Model(type="bertt")}, "did you mean 'bert'"),
        ({"run": Run(output_dir="{full}", precision="fp32")}, "is not empty"),
        ({"run": Run(precision="fp16")}, "needs a GPU"),
        ({"data": Data(source="missing.txt")}, "no such file"),
        ({"data": Data(source="pydocs", eval_split="validation")}, "pydocs has no splits"),
        ({"run": Run(samples=("one <mask> two",), precision="fp32")}, r"no \[MASK\] in the text"),
    ],
)
def test_bad_input_ends_before_the_first_step(
    change: dict[str, Any], message: str, documents: Dataset, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("kept")
    if "run" in change:
        folder = full if change["run"].output_dir else tmp_path / "out"
        change = {"run": replace(change["run"], output_dir=str(folder))}
    with pytest.raises(ValueError, match=message) as error:
        train(replace(config(documents, tmp_path), **change))
    assert "\n" not in str(error.value)
    assert (full / "mine.txt").read_text() == "kept"
    assert not (tmp_path / "out" / "log.jsonl").exists()
