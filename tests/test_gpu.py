"""What only a GPU can show; skipped where there is none."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

import minilm.attention
from minilm import Optim
from minilm.batch import Batch, loss_sum
from minilm.head import SparseHead
from minilm.masked import MaskedCollator
from minilm.optim import build_optimizer
from minilm.plan import Plan
from minilm.tokens import Examples, encode
from minilm.train import load_steps, train_step
from tests.reference import build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
STEPS = 6


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def head(tokenizer: PreTrainedTokenizerBase) -> SparseHead:
    size = {"hidden_size": 64, "num_attention_heads": 4, "initializer_range": 0.2}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return SparseHead(build(tokenizer, **size, **rates).cuda())


@pytest.fixture
def examples(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> Examples:
    return encode(documents, tokenizer, max_length=48)


def test_a_step_never_waits_for_the_gpu(
    accelerator: Accelerator, head: SparseHead, examples: Examples, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, optimizer = accelerator.prepare(head, build_optimizer(head, Optim()))
    plan, collator = Plan(examples.lengths, examples=12, micro_tokens=128), MaskedCollator(tokenizer, rate=0.3, seed=0)
    losses = []
    try:
        steps = load_steps(plan, examples, collator, accelerator, range(STEPS), 0)
        for number, (_, micro_batches) in enumerate(steps):
            torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")  # the first ones set things up
            result = train_step(accelerator, model, optimizer, micro_batches, lr=1e-3, max_grad_norm=1.0)
            losses.append(result.loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


def one_batch(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> Batch:
    ids = np.argsort(-examples.lengths)[:16]
    return MaskedCollator(tokenizer, rate=0.3, seed=0)([examples[int(i)] for i in ids], ids, 0)


def test_loss_and_gradients_in_fp32_are_those_of_the_cpu(
    head: SparseHead, examples: Examples, tokenizer: PreTrainedTokenizerBase
) -> None:
    batch = one_batch(examples, tokenizer)
    on_cpu = SparseHead(copy.deepcopy(head.model).cpu())
    theirs, ours = loss_sum(on_cpu, batch), loss_sum(head, batch.to(torch.device("cuda")))
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=0)
    of_ours, of_theirs = (
        torch.autograd.grad(loss, [p for p in side.parameters() if p.requires_grad], allow_unused=True)
        for loss, side in ((ours, head), (theirs, on_cpu))
    )
    for a, b in zip(of_ours, of_theirs, strict=True):
        if b is not None:
            torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_the_kernel_for_rows_of_any_length_gives_the_loss_of_groups(
    head: SparseHead, examples: Examples, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, called = one_batch(examples, tokenizer).to(torch.device("cuda")), []
    kernel = minilm.attention.varlen_attn
    monkeypatch.setattr(minilm.attention, "varlen_attn", lambda *x, **words: called.append(1) or kernel(*x, **words))
    losses = []
    for takes in (minilm.attention._takes_rows_of_any_length, lambda query, dropout: False):
        monkeypatch.setattr(minilm.attention, "_takes_rows_of_any_length", takes)
        with torch.autocast("cuda", torch.bfloat16):
            losses.append(loss_sum(head, batch))
    assert len(called) == len(head.layers)
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
