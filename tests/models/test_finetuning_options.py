"""Options for fine-tuning: freezing, layer decay, gradient checkpointing, attention by name, label smoothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from minilm import Config, Model, Optim
from minilm.config import MaskedLM
from minilm.data.corpus import PreparedData
from minilm.data.labels import Labels
from minilm.data.micro_batch import MicroBatch, loss_sum
from minilm.models.attention import ATTENTION
from minilm.models.head import freeze_unused
from minilm.models.loading import load_model
from minilm.models.row_head import RowHead
from minilm.models.sparse_head import SparseHead
from minilm.objectives.causal_lm import CausalLMCollator
from minilm.objectives.classification_loss import ClassificationLoss
from minilm.objectives.example_batches import ExampleCollator
from minilm.objectives.factory import build_objective
from minilm.objectives.masking import MaskedLMCollator
from minilm.optim.optimizer import build_optimizer, compute_layer_scales
from minilm.train import train_step
from tests.jobs import config_in, end_of, finish_all
from tests.objectives.test_classification import examples_for
from tests.reference import NO_EXAMPLES, build, fields, full_logits

ROWS = [np.arange(7, 7 + length) for length in (30, 21, 9)]
FROZEN = ("*.embeddings.*", "*.layer.0.*")


def masked(tokenizer: PreTrainedTokenizerBase) -> MicroBatch:
    return MaskedLMCollator(tokenizer, rate=0.3, seed=0, padded=False, multiple=1)(ROWS, np.arange(3), 0)


def load(tokenizer: PreTrainedTokenizerBase, kind: str = "bert", **settings: Any) -> Any:
    return load_model(Model(type=kind, config=fields(kind), **settings), tokenizer, max_length=32, seed=0)


def test_patterns_freeze_what_they_match_and_nothing_else(tokenizer: PreTrainedTokenizerBase) -> None:
    network = load(tokenizer, freeze=FROZEN)
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    expected = ("bert.embeddings.", "bert.encoder.layer.0.")
    assert frozen == {name for name, _ in network.named_parameters() if name.startswith(expected)}
    tied = load(tokenizer, freeze=("cls.predictions.decoder.weight",))  # another name of the word embeddings
    assert not tied.bert.embeddings.word_embeddings.weight.requires_grad


@pytest.fixture(scope="module")
def frozen_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with frozen layers and layer decay, the same interrupted after 3, and on two processes."""
    place = tmp_path_factory.mktemp("frozen")
    base = config_in(place, 6, save_every=3)
    base = replace(base, model=replace(base.model, freeze=FROZEN), optim=replace(base.optim, layer_decay=0.5))

    def run(name: str, **changed: Any) -> Config:
        return replace(base, run=replace(base.run, output_dir=str(place / name), keep_last=9, **changed))

    finish_all([(run("whole"), 1), (run("two"), 2)], place)
    again = run("whole", resume=str(place / "whole" / "checkpoint-3"))
    (place / "whole" / "all_results.json").unlink()
    (place / "first").mkdir()
    for name in ("model.safetensors", "log.jsonl"):
        (place / "whole" / name).rename(place / "first" / name)
    (place / "whole" / "checkpoint-6").rename(place / "first" / "checkpoint-6")
    log = (place / "first" / "log.jsonl").read_bytes()
    (place / "whole" / "log.jsonl").write_bytes(log)
    finish_all([(again, 1)], place)
    return place


def test_frozen_parameters_stay_and_have_no_moments(frozen_runs: Path) -> None:
    first, last = (load_file(frozen_runs / "whole" / f"checkpoint-{n}" / "model.safetensors") for n in (3, 6))
    moments = load_file(frozen_runs / "whole" / "checkpoint-6" / "optimizer.safetensors")
    still = {name for name in first if torch.equal(first[name], last[name])}
    assert still == {name for name in first if name.startswith(("bert.embeddings.", "bert.encoder.layer.0."))}
    assert still
    assert not any(name in moment for name in still for moment in moments)
    assert any("bert.encoder.layer.1." in moment for moment in moments)


def test_a_run_with_frozen_parameters_resumes_to_the_bit(frozen_runs: Path) -> None:
    assert end_of(frozen_runs / "whole") == end_of(frozen_runs / "first")


def test_two_processes_train_what_one_does(frozen_runs: Path) -> None:
    one, two = (load_file(frozen_runs / name / "model.safetensors") for name in ("first", "two"))
    for name in one:  # dropout is on, so that only what is frozen is the same
        frozen = name.startswith(("bert.embeddings.", "bert.encoder.layer.0."))
        assert torch.equal(one[name], two[name]) == frozen, name


@pytest.mark.parametrize(
    ("kind", "below", "above"),
    [
        ("bert", "bert.embeddings.", ("cls.",)),
        ("modernbert", "model.embeddings.", ("head.", "decoder.", "model.final_norm.")),
        ("distilbert", "distilbert.embeddings.", ("vocab_",)),
    ],
)
def test_each_layer_learns_at_a_share_of_the_rate_above(
    kind: str, below: str, above: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> None:
    network = build(tokenizer, kind)
    optimizer = build_optimizer(SparseHead(network), Optim(layer_decay=0.5, weight_decay=0.1))
    found = {p: (group["scale"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        depth = 3 if name.startswith(below) else 0 if name.startswith(above) else 1 if ".1." in name else 2
        assert found[parameter] == (0.5**depth, 0.1 if parameter.ndim >= 2 else 0.0), name
    assert all(group["scale"] == 1 for group in build_optimizer(network, Optim()).param_groups)


def test_an_update_by_layers_is_that_of_adamw_with_each_rate(tokenizer: PreTrainedTokenizerBase) -> None:
    ours, theirs = (build(tokenizer) for _ in range(2))
    scales = compute_layer_scales(theirs, 0.5)
    groups = [{"params": [p], "lr": 0.01 * scales.get(p, 1.0)} for p in theirs.parameters()]
    reference = torch.optim.AdamW(groups, weight_decay=0.0, fused=False, foreach=False)
    head = SparseHead(ours)
    batch = masked(tokenizer)
    optimizer = build_optimizer(head, Optim(layer_decay=0.5, weight_decay=0.0))
    accelerator = Accelerator(cpu=True)
    train_step(accelerator, head.train(), optimizer, [batch], lr=0.01, max_grad_norm=0.0)
    logits_TxV = full_logits(theirs.train(), batch.input_ids_T, [len(row) for row in ROWS])
    F.cross_entropy(logits_TxV[batch.target_index_N], batch.target_ids_N).backward()
    reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["bert", "modernbert", "gpt2"])
def test_layers_computed_again_give_the_same_gradients_and_keep_less(
    kind: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    results = []
    for checkpointing in (False, True):
        if kind == "gpt2":
            model = Model(
                type=kind, config={"n_embd": 32, "n_layer": 2, "n_head": 2}, gradient_checkpointing=checkpointing
            )
            from transformers import AutoModelForCausalLM

            network = load_model(model, tokenizer, max_length=32, seed=0, auto=AutoModelForCausalLM)
            batch = CausalLMCollator(tokenizer, padded=False, multiple=1)(ROWS, np.arange(3), 0)
        else:
            network, batch = load(tokenizer, kind, gradient_checkpointing=checkpointing), masked(tokenizer)
        head = SparseHead(network).train()
        assert head.padding_free
        torch.manual_seed(0)  # dropout
        kept = 0

        def count(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = loss_sum(head, batch)
        loss.backward()
        results.append((loss.detach(), [p.grad for p in network.parameters()], kept))
    (loss, gradients, kept), (again, theirs, less) = results
    torch.testing.assert_close(again, loss)
    for a, b in zip(gradients, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert less < 0.7 * kept


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert"])
def test_a_classifier_s_layers_computed_again_give_the_same_gradients(
    kind: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    labels, results = Labels(problem="single-label", names=("no", "yes", "maybe")), []
    collator = ExampleCollator(examples_for(ROWS, np.array([0, 2, 1])), "rows", padded=False, multiple=1)
    for checkpointing in (False, True):
        model = Model(type=kind, config=fields(kind), gradient_checkpointing=checkpointing)
        auto, more = AutoModelForSequenceClassification, labels.fields()
        network = load_model(model, tokenizer, max_length=32, seed=0, auto=auto, fields=more)
        head = RowHead(network, loss=ClassificationLoss(labels)).train()
        assert head.padding_free
        freeze_unused(head)
        torch.manual_seed(0)  # dropout
        loss = loss_sum(head, collator(ROWS, np.arange(3), 0))
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in network.named_parameters() if p.requires_grad}))
    (loss, gradients), (again, theirs) = results
    torch.testing.assert_close(again, loss)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_chosen_attention_is_kept_and_gives_the_same_loss(attention: str, tokenizer: PreTrainedTokenizerBase) -> None:
    usual, chosen = SparseHead(load(tokenizer)), SparseHead(load(tokenizer, attention=attention))
    assert (usual.model.config._attn_implementation, usual.padding_free) == (ATTENTION, True)
    assert (chosen.model.config._attn_implementation, chosen.padding_free) == (attention, False)
    batch = masked(tokenizer)
    padded = MaskedLMCollator(tokenizer, rate=0.3, seed=0, padded=True, multiple=1)(ROWS, np.arange(3), 0)
    torch.testing.assert_close(loss_sum(chosen, padded), loss_sum(usual, batch))


@pytest.mark.parametrize("fused", [True, False])
def test_smoothing_and_z_loss_are_added_in_training_and_not_in_evaluation(
    fused: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    network, batch = build(tokenizer), masked(tokenizer)
    head = build_objective(MaskedLM(label_smoothing=0.2, z_loss=0.1)).head(
        network, PreparedData(tokenizer=tokenizer, train=NO_EXAMPLES, eval=NO_EXAMPLES)
    )
    assert head.fused
    head.fused = fused
    logits_TxV = full_logits(network, batch.input_ids_T, [len(row) for row in ROWS])
    for training, smoothing, z_loss in ((True, 0.2, 0.1), (False, 0.0, 0.0)):
        logits_NxV = logits_TxV[batch.target_index_N]
        expected = F.cross_entropy(logits_NxV, batch.target_ids_N, reduction="sum", label_smoothing=smoothing)
        expected += z_loss * (logits_NxV.exp().sum(-1).log() ** 2).sum()
        torch.testing.assert_close(loss_sum(head.train(training), batch), expected)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("bert", {"freeze": ("*.embedings.*",)}, r"model.freeze matches no parameter: '\*.embedings.\*'"),
        ("bert", {"freeze": ("bert.embeddings.word_embedding.weight",)}, "did you mean 'bert.embeddings.word_embed"),
        ("bert", {"freeze": ("*",)}, "leaves nothing to train"),
        ("bert", {"attention": "spda"}, "model.attention 'spda': did you mean 'sdpa'"),
        ("bert", {"attention": "flash_attention_2"}, "cannot use model.attention flash_attention_2"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_in_one_line(
    kind: str, settings: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(tokenizer, kind, **settings)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_list_of_layers_has_no_layer_decay(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"leave optim\.layer_decay at 1"):
        build_optimizer(build(tokenizer, "albert"), Optim(layer_decay=0.9))
