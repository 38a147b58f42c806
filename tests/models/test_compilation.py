"""Compiled layers give the results of the plain ones for batches of any size. Evaluation compiles nothing."""

import copy
import functools

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minilm.config import Run
from minilm.data.corpus import encode
from minilm.data.micro_batch import loss_sum
from minilm.distributed.launch import start
from minilm.models.compilation import compile_layers
from minilm.models.sparse_head import SparseHead
from minilm.models.temporary_changes import evaluation_mode
from minilm.objectives.masking import MaskedLMCollator
from tests.reference import build


@pytest.fixture(autouse=True)
def _without_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the traced operations one by one. The flag refuses a CPU, and a compiler for it takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def heads(tokenizer: PreTrainedTokenizerBase) -> tuple[SparseHead, SparseHead]:
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    network = build(tokenizer, num_hidden_layers=3, initializer_range=0.2, **rates)
    torch.compiler.reset()
    return SparseHead(network), SparseHead(copy.deepcopy(network))


def gradients(head: SparseHead, loss: Tensor) -> list[Tensor]:
    wanted = [parameter for parameter in head.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(p) if gradient is None else gradient for p, gradient in zip(wanted, found, strict=True)]


def test_losses_and_gradients_are_the_plain_ones_for_batches_of_any_size(
    heads: tuple[SparseHead, SparseHead], documents: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    plain, compiled = heads
    compile_layers(compiled)
    examples, collator = (
        encode(documents, tokenizer, max_length=48),
        MaskedLMCollator(tokenizer, rate=0.3, seed=0, padded=False, multiple=1),
    )
    for number, count in enumerate((16, 9, 23)):
        ids = np.argsort(-examples.lengths)[number : number + count]
        batch = collator([examples[int(i)] for i in ids], ids, 0)
        # What is compiled for the first batch is for all: another one would be an error.
        with torch.compiler.set_stance("default" if number == 0 else "fail_on_recompile"):
            loss = loss_sum(compiled, batch)
            ours = gradients(compiled, loss)
        expected = loss_sum(plain, batch)
        theirs = gradients(plain, expected)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        scale = max(float(x.abs().max()) for x in theirs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * scale)


def test_an_evaluation_compiles_nothing(
    heads: tuple[SparseHead, SparseHead], documents: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    plain, compiled = heads
    compile_layers(compiled)
    examples = encode(documents, tokenizer, max_length=48)
    ids = np.arange(8)
    batch = MaskedLMCollator(tokenizer, rate=0.3, seed=0, padded=False, multiple=1)(
        [examples[int(i)] for i in ids], ids, 0
    )
    before = torch._dynamo.utils.counters["frames"].copy()
    with evaluation_mode(compiled):
        found = loss_sum(compiled, batch)
    assert torch._dynamo.utils.counters["frames"] == before
    with evaluation_mode(plain):
        torch.testing.assert_close(found, loss_sum(plain, batch), rtol=1e-6, atol=0)


def test_on_a_cpu_it_is_refused() -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"run\.compile is for GPUs"):
        start(Run(compile=True))


def test_a_model_without_a_list_of_layers_is_refused(heads: tuple[SparseHead, SparseHead]) -> None:
    head, _ = heads
    head.model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match=r"no list of layers: leave run\.compile out"):
        compile_layers(head)


def test_sharding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match=r"run\.compile has not been tried with sharding: leave one of them out"):
        start(Run(compile=True))


def test_what_repeats_to_the_bit_is_not_compiled() -> None:
    with pytest.raises(ValueError, match=r"leave out run\.compile or run\.deterministic\Z"):
        Run(compile=True, deterministic=True)
