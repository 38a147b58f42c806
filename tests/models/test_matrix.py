"""The matrix of architectures: some that need special care pass, and errors show in its results."""

import dataclasses
import os

import pytest
import torch

import minilm.train
from tests import matrix
from tests.matrix import Result, measure, measure_in_process
from tests.reference import ScaledLosses

# The shortcuts of the head: sparse, padding_free, and whether it needs rows of equal length.
TAKES = {
    ("masked", "luke"): (True, False, False),  # cuts its hidden states to the length of a row
    ("masked", "fnet"): (False, False, True),  # mixes all tokens of a row, padding too
    ("masked", "bart"): (True, False, False),  # an encoder and a decoder
    ("causal", "lfm2_moe"): (True, False, False),  # its convolutions see the row before, at first a little
    ("causal", "opt"): (True, True, False),  # calls the decoder inside its base model
    ("causal", "gemma3"): (True, True, False),  # its text model's configuration is inside its own
    ("causal", "roberta"): (True, True, False),  # sees later tokens unless it is told to be a decoder
    ("classification", "bart"): (False, False, False),  # reads the class off a row's end token
    ("classification", "convbert"): (False, False, True),  # its convolutions see padding, at first hardly
    ("classification", "gemma3"): (False, False, False),  # looks for the padding's id inside its configuration
    ("classification", "gpt2"): (False, False, False),  # pads with the token that ends texts
    ("classification", "perceiver"): (False, False, False),  # has the layer of the labels in its base model
    ("classification", "roberta"): (False, True, False),  # reads the class off the first token
    ("token-classification", "gpt2"): (True, True, False),  # pads with the token that ends texts
    ("token-classification", "yoso"): (False, False, True),  # lets padding into its attention
    ("question-answering", "bart"): (True, False, False),  # an encoder and a decoder
    ("question-answering", "splinter"): (False, False, False),  # looks for the question by a token's id
    ("multiple-choice", "roberta"): (False, True, False),  # reads the choice off the first token
    ("multiple-choice", "xlnet"): (False, False, True),  # reads the choice off the last token, padding too
}


@pytest.mark.parametrize(("head", "kind"), TAKES)
def test_loss_and_gradients_are_those_of_the_plain_model_that_reads_each_row_alone(head: str, kind: str) -> None:
    result = measure(head, kind)
    assert result.equal, result
    found = tuple(result.shortcuts.get(name, False) for name in ("sparse", "padding_free", "needs_equal_lengths"))
    assert found == TAKES[head, kind]
    assert result.refused == result.decoder == ((head, kind) == ("causal", "roberta"))


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        ("masked", "funnel"),
        ("causal", "xlnet"),
        ("classification", "canine"),
        ("question-answering", "longformer"),
        ("multiple-choice", "longformer"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line_before_training(head: str, kind: str) -> None:
    result = measure(head, kind)
    assert (result.built, result.refused, result.measured) == (True, True, False)
    assert result.why.startswith("refused: ValueError: ")
    assert "\n" not in result.why


@pytest.mark.parametrize("head", matrix.HEADS)
def test_a_wrong_loss_is_seen(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = "llama" if head == "causal" else "distilbert"
    result = measure(head, kind)
    assert result.equal
    # Trainer counts padding as places of an answer, and divides the loss of several micro-batches by too little.
    assert (result.trainer == "right") == (head == "causal")
    right = minilm.train.counted_losses
    monkeypatch.setattr(minilm.train, "counted_losses", lambda *given: ScaledLosses(right(*given), 1.0001))
    result = measure(head, kind)
    assert result.measured
    assert not result.equal
    assert result.loss == pytest.approx(1e-4, rel=0.1)


def test_wrong_gradients_are_seen() -> None:
    right = {"a": torch.ones(3), "b": torch.ones(2)}
    assert matrix.gradient_error(right, right) == 0
    for wrong in ({"a": torch.ones(3)}, {**right, "a": torch.tensor([1.0, 1.0, 1.001])}):
        assert matrix.gradient_error(wrong, right) > matrix.GRADIENT
    broken = {**right, "a": torch.tensor([torch.nan, 1.0, 1.0])}  # by the plain model, too
    assert matrix.gradient_error(broken, broken) == 0
    assert matrix.gradient_error(broken, right) == matrix.gradient_error(right, broken) == torch.inf


def _hangs(head: str, kind: str) -> Result:
    while True:
        pass


def _crashes(head: str, kind: str) -> Result:
    os._exit(3)


@pytest.mark.parametrize(("way", "why"), [(_hangs, "no end in 1 s"), (_crashes, "its process died")])
def test_a_model_that_hangs_or_crashes_does_not_end_the_command(
    way: object, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "LIMIT", 1)
    monkeypatch.setattr(matrix, "measure", way)
    assert why in measure_in_process("masked", "bert").why


def test_the_table_counts_the_shortcuts_that_a_head_can_use() -> None:
    every = {"sparse": True, "padding_free": True, "fused": True}
    right = Result(
        head="masked", kind="a", built=True, measured=True, loss=0.0, gradient=0.0, trainer="right", shortcuts=every
    )
    results = {
        "masked": [right, dataclasses.replace(right, special={"text": "equal"}), Result(head="masked", kind="b")],
        "token-classification": [dataclasses.replace(right, head="token-classification", gradient=1.0)],
        "multiple-choice": [],
    }
    lines = [line.split("|")[1:-1] for line in matrix.table(results).splitlines()]
    cells = {name.strip(): [cell.strip() for cell in rest] for name, *rest in lines}
    assert cells[""] == ["masked LM", "token classification"]
    assert cells["types in transformers"] == ["3", "1"]
    assert cells["built at a tiny size"] == ["2", "1"]
    assert cells["same loss and gradients as the plain model on single rows"] == ["2", "0"]
    assert cells["the same with special ids in and around the texts"] == ["1", "0"]
    assert cells["head at the targets alone"] == cells["packed, without padding"] == ["2", "1"]
    assert cells["loss in parts, without all logits in memory"] == ["2", "–"]
