"""What only a GPU can show; skipped where there is none."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import minilm.models.attention
from minilm import Optim
from minilm.data.batch_plan import Plan
from minilm.data.corpus import Examples, encode
from minilm.data.micro_batch import MicroBatch, loss_sum
from minilm.data.packing import pack
from minilm.models import short_row_attention as short_rows
from minilm.models.compilation import compile_layers
from minilm.models.sparse_head import SparseHead
from minilm.objectives.masking import MaskedLMCollator
from minilm.optim.optimizer import build_optimizer
from minilm.train import load_steps, train_step
from tests.reference import attended_rows, build

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
    plan, collator = (
        Plan(examples.lengths, examples=12, micro_tokens=128),
        MaskedLMCollator(tokenizer, rate=0.3, seed=0, padded=False, multiple=1),
    )
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


def one_batch(examples: Examples, tokenizer: PreTrainedTokenizerBase, first: int = 0, count: int = 16) -> MicroBatch:
    ids = np.argsort(-examples.lengths)[first : first + count]
    return MaskedLMCollator(tokenizer, rate=0.3, seed=0, padded=False, multiple=1)(
        [examples[int(i)] for i in ids], ids, 0
    )


def test_loss_and_gradients_in_fp32_are_those_of_the_cpu(
    head: SparseHead, examples: Examples, tokenizer: PreTrainedTokenizerBase
) -> None:
    batch = one_batch(examples, tokenizer)
    on_cpu = SparseHead(copy.deepcopy(head.model).cpu())
    theirs, ours = loss_sum(on_cpu, batch), loss_sum(head, batch.to(torch.device("cuda")))
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=0)
    names = [name for name, parameter in head.named_parameters() if parameter.requires_grad]
    of_ours, of_theirs = (
        torch.autograd.grad(loss, [p for p in side.parameters() if p.requires_grad], allow_unused=True)
        for loss, side in ((ours, head), (theirs, on_cpu))
    )
    for name, a, b in zip(names, of_ours, of_theirs, strict=True):
        if name.endswith("key.bias"):  # softmax takes no notice of it: all of its gradient is rounding
            assert max(float(a.abs().max()), float(b.abs().max())) < 1e-3
        elif b is not None:
            torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_the_kernel_for_rows_of_any_length_gives_the_loss_of_groups(
    head: SparseHead, examples: Examples, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_rows, "HEAD_SIZES", ())
    batch, called = one_batch(examples, tokenizer).to(torch.device("cuda")), []
    kernel = minilm.models.attention.varlen_attn
    monkeypatch.setattr(
        minilm.models.attention, "varlen_attn", lambda *x, **words: called.append(1) or kernel(*x, **words)
    )
    losses = []
    for takes in (minilm.models.attention._flash_attention_fits, lambda query, dropout: False):
        monkeypatch.setattr(minilm.models.attention, "_flash_attention_fits", takes)
        with torch.autocast("cuda", torch.bfloat16):
            losses.append(loss_sum(head, batch))
    assert len(called) == len(head.layers)
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)


LENGTHS = (128, 127, 65, 64, 64, 33, 32, 31, 9, 1)


@pytest.mark.parametrize("size", short_rows.HEAD_SIZES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("near", [5, 128])
def test_short_rows_are_attended_as_in_float64(near: int, causal: bool, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    states = [torch.randn(sum(LENGTHS), 3, size, generator=generator).cuda().bfloat16() for _ in range(4)]
    states[0] = states[0].transpose(0, 1).contiguous().transpose(0, 1)  # as some layers lay it out
    *states, gradient = states
    states = [x.requires_grad_() for x in states]
    packing = pack(LENGTHS).map(Tensor.cuda)
    attended = short_rows.attend_short_rows(*states, packing.position_T, packing.tiles_B1, near, causal, 0.3)
    exact = [x.detach().double().requires_grad_() for x in states]
    expected = attended_rows(exact, LENGTHS, near, causal, 0.3)
    pairs = [(attended, expected)]
    pairs += zip(
        torch.autograd.grad(attended, states, gradient),
        torch.autograd.grad(expected, exact, gradient.double()),
        strict=True,
    )
    for ours, theirs in pairs:
        assert (ours.double() - theirs).norm() < 1e-2 * theirs.norm()


@pytest.mark.parametrize("short", [True, False])
def test_compiled_layers_and_loss_are_the_plain_ones_to_rounding_for_batches_of_any_size(
    head: SparseHead,
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    short: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not short:
        monkeypatch.setattr(short_rows, "HEAD_SIZES", ())
    compiled = SparseHead(copy.deepcopy(head.model))
    compile_layers(compiled)
    for number, count in enumerate((16, 9, 40)):
        batch, found = one_batch(examples, tokenizer, number, count).to(torch.device("cuda")), []
        # What is compiled for the first batch is for all: another one would be an error.
        with torch.compiler.set_stance("default" if number == 0 else "fail_on_recompile"):
            for side in (head, compiled):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = loss_sum(side, batch)
                found.append((loss, torch.autograd.grad(loss, side.model.get_input_embeddings().weight)[0]))
        (loss, gradient), (of_compiled, gradient_of_compiled) = found
        torch.testing.assert_close(of_compiled, loss, rtol=1e-2, atol=0)
        assert (gradient_of_compiled - gradient).norm() < 5e-2 * gradient.norm()
