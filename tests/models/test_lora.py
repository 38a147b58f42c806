"""LoRA: steps equal those of peft with a plain forward, saved models are merged, and resuming is exact to the bit."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    pipeline,
)

from minilm import CausalLM, Classification, Config, Data, MaskedLM, Model
from minilm.data.labels import Labels
from minilm.data.micro_batch import loss_sum
from minilm.data.tokenizer_training import train_tokenizer
from minilm.models.head import freeze_unused
from minilm.models.loading import load_model
from minilm.models.lora import has_adapter
from minilm.models.row_head import RowHead
from minilm.models.sparse_head import SparseHead
from minilm.objectives.causal_lm import CausalLMCollator
from minilm.objectives.classification_loss import ClassificationLoss
from minilm.objectives.example_batches import ExampleCollator
from minilm.objectives.masking import MaskedLMCollator
from minilm.runs.model_export import save_model
from minilm.train import train
from tests.jobs import CONFIG, end_of, finish_all, in_folder, write_text
from tests.launch import read_log
from tests.laws.resume_everywhere import stopped_after
from tests.objectives.test_classification import examples_for
from tests.reference import fields, pad_rows

LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2}
# Type of the base, its fields, the layers that peft adapts by itself, and how many those are.
BASES: dict[str, tuple[str, dict[str, Any], list[str], int]] = {
    "masked": ("bert", {}, ["query", "value"], 4),
    "causal": ("llama", LLAMA, ["q_proj", "v_proj"], 4),
    "transposed": ("gpt2", {}, ["c_attn"], 2),
    "classes": ("bert", {}, ["query", "value"], 4),
}
AUTOS = {"masked": AutoModelForMaskedLM, "classes": AutoModelForSequenceClassification}
LABELS = Labels(problem="single-label", names=("no", "yes", "maybe"))
ROWS = [np.random.default_rng(length).integers(5, 300, length) for length in (24, 17, 9, 4)]


@pytest.fixture(scope="module")
def bases(tokenizer: PreTrainedTokenizerBase, documents: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with a base for each job."""
    place = tmp_path_factory.mktemp("bases")
    causal = train_tokenizer(documents, "bpe", 400, causal=True)
    for job, (kind, own, _, _) in BASES.items():
        auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
        tokenizer = tokenizer if kind == "bert" else causal
        network = load_model(Model(type=kind, config=fields(kind, own)), tokenizer, max_length=32, seed=0, auto=auto)
        save_model(network, tokenizer, _made(place / job))
    return place


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def adapted(job: str, bases: Path, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> PreTrainedModel:
    """The base with an adapter whose updates are not zero."""
    network = load_model(
        Model(name=str(bases / job), lora_rank=3, **settings),
        tokenizer,
        max_length=32,
        seed=0,
        auto=AUTOS.get(job, AutoModelForCausalLM),
        fields=LABELS.fields() if job == "classes" else {},
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1, generator=generator)
    return network


def reference_for(job: str, network: PreTrainedModel, bases: Path) -> PeftModel:
    """peft's own model with the same weights."""
    auto = AUTOS.get(job, AutoModelForCausalLM)
    base = auto.from_pretrained(bases / job, **(LABELS.fields() if job == "classes" else {}))
    reference = get_peft_model(
        base, LoraConfig(r=3, lora_alpha=16, target_modules=BASES[job][2], fan_in_fan_out=job == "transposed")
    )
    theirs = reference.base_model.model
    assert theirs.state_dict().keys() == network.state_dict().keys()
    theirs.load_state_dict(network.state_dict())
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(
            ".lora_" in name or (job == "classes" and name.startswith(("classifier", "bert.pooler")))
        )
    return reference


def losses(
    job: str, network: PreTrainedModel, reference: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> list[Tensor]:
    """Return the summed loss of a batch: ours with packed rows, and the reference's with padded rows."""
    if job == "classes":
        labels = np.array([0, 2, 1, 1])
        head: Any = RowHead(network, loss=ClassificationLoss(LABELS))
        collator: Callable[..., Any] = ExampleCollator(examples_for(ROWS, labels), "rows", padded=False, multiple=1)
    else:
        head = SparseHead(network)
        assert head.sparse
        assert head.fused
        collator = (
            MaskedLMCollator(tokenizer, rate=0.3, seed=0, padded=False, multiple=1)
            if job == "masked"
            else CausalLMCollator(tokenizer, padded=False, multiple=1)
        )
    assert head.padding_free
    freeze_unused(head)
    batch = collator(ROWS, np.arange(len(ROWS)), 0)
    lengths = [len(row) for row in ROWS]
    ids_RxL, mask_RxL = pad_rows(batch.input_ids_T, lengths, 0)
    logits = reference(input_ids=ids_RxL, attention_mask=mask_RxL).logits
    if job != "classes":
        logits = torch.cat([row[:length] for row, length in zip(logits, lengths, strict=True)])[batch.target_index_N]
    return [loss_sum(head.train(), batch), F.cross_entropy(logits, batch.target_ids_N, reduction="sum")]


@pytest.mark.parametrize("job", BASES)
def test_losses_and_gradients_are_those_of_peft_and_a_plain_forward(job, bases, tokenizer) -> None:
    network = adapted(job, bases, tokenizer)
    reference = reference_for(job, network, bases)
    ours, theirs = losses(job, network, reference, tokenizer)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    trained = 0
    for (name, mine), other in zip(network.named_parameters(), reference.base_model.model.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        if other.grad is not None:
            trained += ".lora_" in name
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)
            assert other.grad.abs().max() > 1e-6, name
    assert trained == 2 * BASES[job][3]


@pytest.mark.parametrize("job", BASES)
def test_the_saved_weights_are_merged_and_the_adapter_is_one_of_peft(job, bases, tokenizer, tmp_path) -> None:
    network = adapted(job, bases, tokenizer).eval()
    if job == "classes":  # its head is nobody else's
        torch.nn.init.normal_(network.classifier.weight)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    save_model(network, tokenizer, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    auto = AUTOS.get(job, AutoModelForCausalLM)
    plain, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    base = auto.from_pretrained(bases / job, **(LABELS.fields() if job == "classes" else {}))
    ids_BxL = torch.from_numpy(np.stack([ROWS[0], ROWS[0][::-1]]))
    with torch.no_grad():
        expected = network(input_ids=ids_BxL).logits
        assert (base(input_ids=ids_BxL).logits - expected).abs().max() > 1e-2
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        for model in (plain.eval(), loaded):
            torch.testing.assert_close(model(input_ids=ids_BxL).logits, expected, rtol=1e-5, atol=1e-5)
        if auto is AutoModelForCausalLM:
            by_itself = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
            torch.testing.assert_close(by_itself(input_ids=ids_BxL).logits, expected, rtol=1e-5, atol=1e-5)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(".lora_" in name for name in adapter) == 2 * BASES[job][3]
    head = {"base_model.model.classifier", "base_model.model.bert.pooler.dense"} if job == "classes" else set()
    assert {name.rpartition(".")[0] for name in adapter if ".lora_" not in name} == head


@pytest.mark.parametrize(
    ("kind", "targets", "expected"),
    [
        ("bert", (), {"query", "value"}),
        ("distilbert", (), {"q_lin", "k_lin", "v_lin", "out_lin"}),  # peft knows none for it
        ("bert", ("layer.1.*.key", "intermediate.dense"), {"key", "dense"}),
        ("bert", ("*",), {"query", "key", "value", "dense"}),
    ],
)
def test_the_layers_are_pefts_or_those_of_the_attention_or_those_that_are_named(
    kind, targets, expected, tokenizer, tmp_path
) -> None:
    base = load_model(Model(type=kind, config=fields(kind)), tokenizer, max_length=32, seed=0)
    save_model(base, tokenizer, tmp_path)
    model = Model(name=str(tmp_path), lora_rank=2, lora_targets=targets)
    network = load_model(model, tokenizer, max_length=32, seed=0)
    names = {name.removesuffix(".base_layer") for name, _ in network.named_modules() if name.endswith(".base_layer")}
    assert {name.rpartition(".")[2] for name in names} == expected
    assert ("bert.encoder.layer.0.attention.self.key" in names) == (targets == ("*",))
    assert "cls.predictions.decoder" not in names  # its weights are the embeddings too
    assert has_adapter(network)
    assert not has_adapter(base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": -1}, "model.lora_rank must be 0 or more"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "model.lora_alpha must be positive"),
        ({"lora_rank": 2, "name": None}, "set model.name"),
        ({"lora_rank": 2, "freeze": ("*",)}, "model.freeze: LoRA itself freezes all"),
        ({"lora_targets": ("query",)}, "set model.lora_rank"),
        (
            {"lora_rank": 2, "lora_targets": ("querry",)},
            "'querry': did you mean 'query'\\? There are: dense, key, query",
        ),
        ({"lora_rank": 2, "name": "headless"}, r"comes without cls\.predictions\..* random under LoRA"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(settings, message, bases, tokenizer, tmp_path) -> None:
    if settings.get("name") == "headless":
        AutoModelForMaskedLM.from_pretrained(bases / "masked").bert.save_pretrained(tmp_path)
        settings = {**settings, "name": str(tmp_path)}
    with pytest.raises(ValueError, match=message) as caught:
        load_model(Model(**{"name": str(bases / "masked"), **settings}), tokenizer, max_length=32, seed=0)
    assert "\n" not in str(caught.value)


def test_without_peft_a_run_says_what_to_install_before_any_work(bases, tmp_path, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    monkeypatch.setattr("minilm.objectives.factory.build_objective", lambda settings: SimpleNamespace())
    run = replace(CONFIG.run, output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="pip install 'peft>="):
        train(replace(CONFIG, model=Model(name=str(bases / "masked"), lora_rank=2), run=run))


def config_for(job: str, place: Path, bases: Path) -> Config:
    """A run of LoRA with several micro-batches a step."""
    text = Path(write_text(place / "text.txt"))
    objective, data = {"masked": MaskedLM(rate=0.3)}.get(job, CausalLM()), Data(source=str(text), eval_fraction=0.1)
    if job == "classes":
        rows = [{"text": line, "label": line.count("file") % 2} for line in text.read_text().splitlines()]
        (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        objective, data = Classification(), replace(data, source=str(place / "rows.jsonl"))
    return replace(
        CONFIG,
        data=data,
        model=Model(name=str(bases / job), lora_rank=2, config={"hidden_dropout_prob": 0.1} if job != "causal" else {}),
        objective=objective,
        run=replace(CONFIG.run, max_steps=6, save_every=3, eval_every=2),
    )


@pytest.fixture(scope="module")
def runs(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 6 steps with a checkpoint after 3, which are then resumed. One of them also runs on two processes."""
    place = tmp_path_factory.mktemp("runs")
    configs = {job: config_for(job, _made(place / f"data-{job}"), bases) for job in ("masked", "causal", "classes")}
    wholes = [(in_folder(config, place / job), 1) for job, config in configs.items()]
    finish_all([(in_folder(configs["causal"], place / "two"), 2), *wholes], _made(place / "first"))
    again = {job: stopped_after(3, place / job, place / f"{job}-again") for job in ("masked", "classes")}
    finish_all([(in_folder(configs[job], again[job], resume="latest"), 1) for job in again], _made(place / "second"))
    sharded = in_folder(configs["causal"], stopped_after(3, place / "causal", place / "sharded"), resume="latest")
    planted = "import os\nos.environ |= {'ACCELERATE_USE_FSDP': 'true', 'FSDP_VERSION': '2'}"
    finish_all([(sharded, 2)], _made(place / "third"), planted)
    return place


@pytest.mark.parametrize("job", ["masked", "classes"])
def test_a_run_resumes_from_a_checkpoint_to_the_bit(job, runs) -> None:
    ours, theirs = runs / f"{job}-again", runs / job
    assert end_of(ours) == end_of(theirs)
    for name in ("checkpoint-6/adapter.safetensors", "adapter/adapter_model.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


@pytest.mark.parametrize("job", ["masked", "classes"])
def test_a_checkpoint_loads_plainly_and_holds_moments_of_what_is_trained_alone(job, runs, bases) -> None:
    folder = runs / job / "checkpoint-6"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"adapter.safetensors", "model.safetensors"} <= manifest.keys()
    _, report = AUTOS[job].from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    final = load_file(runs / job / "model.safetensors")
    assert all(torch.equal(tensor, final[name]) for name, tensor in load_file(folder / "model.safetensors").items())
    trained = {name.split("/", 1)[1] for name in load_file(folder / "optimizer.safetensors")}
    head = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert {name for name in trained if ".lora_" not in name} == (head if job == "classes" else set())
    assert len(trained) == 2 * BASES[job][3] + (4 if job == "classes" else 0)
    before = load_file(bases / job / "model.safetensors")
    changed = {name for name in before.keys() & final.keys() if not torch.equal(before[name], final[name])}
    assert {name.split(".")[-2] for name in changed} == {"query", "value"}


def test_pipelines_take_the_result(runs) -> None:
    assert len(pipeline("fill-mask", str(runs / "masked"))("a<mask>file".replace("<mask>", "[MASK]"), top_k=2)) == 2
    assert pipeline("text-classification", str(runs / "classes"))("a file")[0]["label"]


@pytest.mark.parametrize("name", ["two", "sharded"])
def test_two_processes_make_the_steps_of_one(name, runs) -> None:
    ours, theirs = read_log(runs / name), read_log(runs / "causal")
    assert len(ours[0]) == 6
    for mine, other in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        for key in {"loss", "grad_norm", "eval_loss"} & mine.keys():
            assert mine[key] == pytest.approx(other[key], rel=1e-5), (mine["step"], key)
    for part in ("model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(runs / run / part) for run in (name, "causal"))
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)


def test_the_best_weights_are_loaded_in_the_end(bases, tmp_path) -> None:
    config = config_for("classes", tmp_path, bases)
    optim = replace(config.optim, lr=1.0, warmup=0)  # far too high
    run = {"load_best": True, "eval_every": 1, "save_every": 6}
    results = train(in_folder(replace(config, optim=optim), tmp_path / "out", **run)).figures
    best = min(read_log(tmp_path / "out")[1], key=lambda line: line["eval_loss"])
    assert results["eval_loss"] == best["eval_loss"]
    assert best["step"] < 6
    for name, other in (("model.safetensors",) * 2, ("adapter/adapter_model.safetensors", "adapter.safetensors")):
        ours, theirs = (
            load_file(tmp_path / "out" / name),
            load_file(tmp_path / "out" / f"checkpoint-{best['step']}" / other),
        )
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": 8.0}, "model.lora_alpha was 16.0, is 8.0"),
        ({"lora_rank": 0}, "model.lora_rank was 2, is 0"),
        ({}, "model.name is no longer the model that the run began with: its weights are different"),
    ],
)
def test_other_settings_or_another_base_are_refused(change, message, runs, bases, tmp_path) -> None:
    folder = stopped_after(3, runs / "masked", tmp_path / "out")
    config = config_for("masked", tmp_path, bases)
    config = replace(config, data=Data(source=str(runs / "data-masked" / "text.txt"), eval_fraction=0.1))
    base = bases / "masked"
    if not change:
        weights = (base / "model.safetensors").read_bytes()
        other = AutoModelForMaskedLM.from_pretrained(base)
        torch.nn.init.normal_(other.bert.encoder.layer[1].attention.self.value.weight)
        other.save_pretrained(base)
    try:
        with pytest.raises(ValueError, match=message) as caught:
            train(in_folder(replace(config, model=replace(config.model, **change)), folder, resume="latest"))
    finally:
        if not change:
            (base / "model.safetensors").write_bytes(weights)
    assert "\n" not in str(caught.value)
