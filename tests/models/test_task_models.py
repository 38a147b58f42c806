"""Models for tags, answers, choices and embeddings: loaded from any checkpoint, adapted by LoRA, and verified."""

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_detectron2_available

from minilm.config import Model
from minilm.data.micro_batch import MicroBatch, concatenate_rows
from minilm.models.embedding_head import EmbeddingHead
from minilm.models.head import Head, freeze_unused
from minilm.models.loading import check_model, load_model
from minilm.models.row_head import RowHead
from minilm.models.sparse_head import SparseHead
from minilm.runs import verify_head
from minilm.runs.model_export import save_model
from tests.models.test_embedding_head import weighted_sums
from tests.models.test_heads import build, choice_losses, span_losses
from tests.reference import NO_EXAMPLES, fields
from tests.tiny import tiny_config

TAGS = {"id2label": {0: "O", 1: "B-A", 2: "I-A"}, "label2id": {"O": 0, "B-A": 1, "I-A": 2}}
# The head of each task, and the modules of BERT that LoRA trains as a whole.
TASKS: dict[Any, tuple[Callable[[PreTrainedModel], Head], set[str], str | None]] = {
    AutoModelForTokenClassification: (SparseHead, {"classifier"}, "TOKEN_CLS"),
    AutoModelForQuestionAnswering: (lambda model: SparseHead(model, loss=span_losses), {"qa_outputs"}, "QUESTION_ANS"),
    AutoModelForMultipleChoice: (
        lambda model: RowHead(model, loss=choice_losses),
        {"classifier", "bert.pooler.dense"},
        None,
    ),
    AutoModel: (
        lambda model: EmbeddingHead(model, pooling="mean", loss=weighted_sums),
        set(),
        "FEATURE_EXTRACTION",
    ),
}
EVERY_TASK = pytest.mark.parametrize(
    "auto", TASKS, ids=lambda auto: auto.__name__.removeprefix("AutoModel") or "hidden"
)


def read(auto: Any, folder: Path | str, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> PreTrainedModel:
    more = TAGS if auto is AutoModelForTokenClassification else {}
    return load_model(Model(name=str(folder), **settings), tokenizer, max_length=32, seed=0, auto=auto, fields=more)


def outputs_of(model: Any, ids_RxL: Tensor) -> Tensor:
    """Return what a model gives for rows, or for questions with one choice: logits or hidden states."""
    with torch.no_grad():
        output = model(input_ids=ids_RxL)
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits])
    found: Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return found


def shaped(auto: Any, ids_RxL: Tensor) -> Tensor:
    return ids_RxL[:, None] if auto is AutoModelForMultipleChoice else ids_RxL


@pytest.fixture(scope="module")
def base(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked LM, as most checkpoints are."""
    folder = tmp_path_factory.mktemp("base")
    save_model(
        load_model(Model(type="bert", config=fields("bert")), tokenizer, max_length=32, seed=0), tokenizer, folder
    )
    return folder


@EVERY_TASK
def test_a_masked_lm_becomes_a_model_for_any_task_and_is_saved_as_one(
    auto: Any, base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "minilm"):
        network = read(auto, base, tokenizer).eval()
    (message,) = caplog.messages
    if auto is AutoModel:
        assert "comes without a pooler, which embeddings do not use: it starts at random and is not trained" in message
        assert caplog.records[0].levelno == logging.INFO
    else:
        assert f"comes without {len(TASKS[auto][1]) * 2} weights of Bert" in message
        assert "they start at random" in message
    trained = load_file(base / "model.safetensors")
    kept = {name: x for name, x in network.state_dict().items() if f"bert.{name.removeprefix('bert.')}" in trained}
    assert len(kept) > 30
    assert all(torch.equal(x, trained[f"bert.{name.removeprefix('bert.')}"]) for name, x in kept.items())
    save_model(network, tokenizer, tmp_path)
    plain, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    ids_RxL = shaped(auto, torch.arange(5, 37).view(2, 16))
    for name, x in plain.state_dict().items():
        assert torch.equal(x, network.state_dict()[name])
    # The last bits of a product may depend on where its factors lie in memory.
    torch.testing.assert_close(outputs_of(plain.eval(), ids_RxL), outputs_of(network, ids_RxL), rtol=0, atol=1e-6)


@EVERY_TASK
def test_what_a_head_does_not_use_is_frozen_and_nothing_else(
    auto: Any, base: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    head = TASKS[auto][0](read(auto, base, tokenizer))
    freeze_unused(head)
    frozen = {name for name, parameter in head.model.named_parameters() if not parameter.requires_grad}
    assert frozen == ({"pooler.dense.weight", "pooler.dense.bias"} if auto is AutoModel else set())


def test_a_tagger_keeps_its_head_for_its_own_tags_and_gets_a_new_one_for_others(
    base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    auto = AutoModelForTokenClassification
    first = read(auto, base, tokenizer)
    save_model(first, tokenizer, tmp_path)
    again = read(auto, tmp_path, tokenizer)
    assert torch.equal(again.classifier.weight, first.classifier.weight)
    caplog.clear()
    limits: Any = {"max_length": 32, "seed": 1, "auto": auto, "new_labels": True}
    other = {"id2label": {0: "O", 1: "B-X", 2: "I-X"}, "label2id": {"O": 0, "B-X": 1, "I-X": 2}}
    renamed = load_model(Model(name=str(tmp_path)), tokenizer, fields=other, **limits)
    assert "trained for other labels (O, B-A, I-A): classifier.bias, classifier.weight start at random" in caplog.text
    assert not torch.equal(renamed.classifier.weight, first.classifier.weight)
    assert torch.equal(renamed.bert.embeddings.word_embeddings.weight, first.bert.embeddings.word_embeddings.weight)
    more = {"id2label": dict(enumerate("abcde")), "label2id": {name: id for id, name in enumerate("abcde")}}
    wider = load_model(Model(name=str(tmp_path)), tokenizer, fields=more, **limits)
    assert wider.classifier.weight.shape == (5, 32)
    assert wider.config.id2label == more["id2label"]


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "bart"])
def test_a_classifier_of_three_labels_becomes_a_model_with_two_outputs_for_an_answer(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classifier = build(kind, AutoModelForSequenceClassification, tokenizer, num_labels=3)
    save_model(classifier, tokenizer, tmp_path)
    with caplog.at_level(logging.INFO, "minilm"):
        network = read(AutoModelForQuestionAnswering, tmp_path, tokenizer)
    assert "has 3 labels (LABEL_0, LABEL_1, LABEL_2), which question answering does not use" in caplog.text
    assert network.config.num_labels == 2
    head = SparseHead(network, loss=span_losses)
    _, packing = concatenate_rows([np.arange(5, 9)], padded=not head.padding_free, multiple=1)
    assert head(torch.arange(5, 9), packing, torch.arange(4)).shape == (4, 2)


def test_a_model_for_answers_keeps_its_outputs_by_any_name(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    names = {0: "start", 1: "end"}
    answerer = build("bert", AutoModelForQuestionAnswering, tokenizer, id2label=names)
    save_model(answerer, tokenizer, tmp_path)
    network = read(AutoModelForQuestionAnswering, tmp_path, tokenizer)
    assert torch.equal(network.qa_outputs.weight, answerer.qa_outputs.weight)
    assert network.config.id2label == names


def test_labels_of_a_model_for_answers_are_refused_before_anything_is_loaded() -> None:
    model = Model(type="bert", config={"id2label": {"0": "a"}})
    with pytest.raises(ValueError, match=r"^model\.config\.id2label: .*, but two outputs, .*; leave it out\Z"):
        check_model(model, max_length=32, auto=AutoModelForQuestionAnswering)
    check_model(model, max_length=32, auto=AutoModelForTokenClassification)


@EVERY_TASK
def test_new_models_are_built_even_for_a_tokenizer_without_padding(
    auto: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    bare = deepcopy(tokenizer)
    bare.pad_token = None
    for kind in ("bert", "roberta"):
        network = load_model(Model(type=kind, config=fields(kind)), bare, max_length=32, seed=0, auto=auto)
        assert isinstance(network, auto._model_mapping[type(network.config)])
        assert TASKS[auto][0](network).padding_free


def test_a_model_that_cannot_read_ids_alone_is_refused_in_one_line(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    AutoModel.from_config(tiny_config("t5", tokenizer)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"^T5Model cannot read a row from its token ids alone \([^\n]*\): take another"
    ):
        read(AutoModel, tmp_path, tokenizer)


@pytest.mark.parametrize("auto", [AutoModelForQuestionAnswering, AutoModelForMultipleChoice])
def test_a_model_that_finds_a_question_by_separators_is_refused_in_one_line(
    auto: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = Model(type="longformer", config={**fields("longformer", {}), "attention_window": [4, 4]})
    with pytest.raises(
        ValueError, match=r"^Longformer\w+ only reads rows with three separators, [^\n]*: take another m"
    ):
        load_model(model, tokenizer, max_length=32, seed=0, auto=auto)
    # Its configuration is right for another head.
    load_model(model, tokenizer, max_length=32, seed=0, auto=AutoModelForTokenClassification)


def test_a_model_that_needs_a_library_is_refused_in_one_line(tokenizer: PreTrainedTokenizerBase) -> None:
    if is_detectron2_available():
        pytest.skip("detectron2 is installed")
    with pytest.raises(ValueError, match=r"^model\.type layoutlmv2: LayoutLMv2Model requires the detectron2 [^\n]*\Z"):
        load_model(Model(type="layoutlmv2"), tokenizer, max_length=32, seed=0, auto=AutoModelForTokenClassification)


def test_other_weights_than_a_poolers_may_not_start_at_random_under_lora(
    base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    network = AutoModelForMaskedLM.from_pretrained(base)
    weights = {name: x for name, x in network.state_dict().items() if "layer.1.attention.self.query" not in name}
    network.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"comes without encoder\.layer\.1\.attention.* random under LoRA"):
        read(AutoModel, tmp_path, tokenizer, lora_rank=2)


@EVERY_TASK
def test_lora_adapts_attention_and_trains_the_head_as_a_whole(
    auto: Any, base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    make, whole, task = TASKS[auto]
    network = read(auto, base, tokenizer, lora_rank=3)
    head = make(network)
    assert head.padding_free
    freeze_unused(head)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[0] for name in trained if "lora_" not in name} == whole
    assert sum("lora_" in name for name in trained) == 2 * 4
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=generator)
    save_model(network.eval(), tokenizer, tmp_path)
    ids_RxL = shaped(auto, torch.arange(5, 37).view(2, 16))
    expected = outputs_of(network, ids_RxL)
    merged, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    more = TAGS if auto is AutoModelForTokenClassification else {}
    loaded = PeftModel.from_pretrained(auto.from_pretrained(base, **more), tmp_path / "adapter")
    assert loaded.peft_config["default"].task_type == task
    for model in (merged.eval(), loaded.eval()):
        torch.testing.assert_close(outputs_of(model, ids_RxL), expected, rtol=1e-5, atol=1e-5)


class RowCollator:
    """A collator that joins rows, with a target for each token, as far as a comparison of outputs needs one."""

    multiple = 1

    def __init__(self, padded: bool) -> None:
        self.padded = padded

    def rate(self, progress: float = 0.0) -> float:
        return 1.0

    def __call__(self, rows: Any, examples: Any, epoch: int, progress: float = 0.0) -> MicroBatch:
        ids_T, packing = concatenate_rows(rows, padded=self.padded, multiple=1)
        every_T = torch.arange(len(ids_T))
        return MicroBatch(
            input_ids_T=torch.from_numpy(ids_T), packing=packing, target_index_N=every_T, target_ids_N=every_T
        )


class FirstTokenCollator(RowCollator):
    """The same, with a target for each row, as an objective of choices or embeddings has it."""

    def __call__(self, rows: Any, examples: Any, epoch: int, progress: float = 0.0) -> MicroBatch:
        batch = super().__call__(rows, examples, epoch, progress)
        first_R = (batch.packing.position_T == 0).nonzero()[:, 0]
        return replace(batch, target_index_N=first_R, target_ids_N=first_R)


@EVERY_TASK
def test_a_shortcut_that_is_wrong_on_rows_of_a_run_is_found(
    auto: Any, base: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = TASKS[auto][0](read(auto, base, tokenizer))
    freeze_unused(head)
    ids = np.random.default_rng(0).integers(5, len(tokenizer), 120)
    start = np.array([0, 30, 47, 64, 75])
    examples = replace(NO_EXAMPLES, ids=ids, start=start, stop=np.array([30, 47, 64, 75, 105]))
    kind = (
        RowCollator if auto in (AutoModelForTokenClassification, AutoModelForQuestionAnswering) else FirstTokenCollator
    )
    find: Any = verify_head._find_wrong_shortcuts
    assert head.padding_free
    assert find(head, examples, kind, trained=True) == []
    packed = type(head._inputs).packed

    def confuse(*arguments: Any) -> dict[str, Any]:
        inputs = packed(*arguments)
        return {**inputs, "position_ids": inputs["position_ids"] // 2}

    monkeypatch.setattr(type(head._inputs), "packed", confuse)
    assert find(head, examples, kind, trained=True) == ["padding_free"]
