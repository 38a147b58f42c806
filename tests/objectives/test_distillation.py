"""Distillation: the loss with a teacher, for each kind of objective, and the teachers that are refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from minilm import Batch, Classification, Config, Data, MaskedLM, Model, Optim, Run, Tokens
from minilm.data.micro_batch import target_losses
from minilm.objectives.distillation import add_teacher
from minilm.objectives.factory import build_network, build_objective, prepare_data
from minilm.runs.early_stopping import TrainingStopped
from minilm.train import train
from tests.launch import read_log
from tests.own_objectives import NO_DROPOUT, SIZE, Contrastive, Tagging, write_rows


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """The configurations of a masked LM, a classifier and a tagger whose runs left a teacher in their folders."""
    place = tmp_path_factory.mktemp("teachers")
    source = write_rows(place / "rows.jsonl", 120)
    common = Config(
        data=Data(source=source, eval_fraction=0.2),
        tokens=Tokens(vocab_size=300),
        model=Model(type="bert", config={**SIZE, **NO_DROPOUT}),
        batch=Batch(examples=10, max_length=48),
        optim=Optim(lr=3e-3),
        run=Run(max_steps=6, precision="fp32"),
    )
    configs = {
        "masked": replace(common, objective=MaskedLM(rate=0.3)),
        "classes": replace(common, objective=Classification(), data=replace(common.data, label_column="right")),
        "tags": replace(common, objective=Tagging()),
    }
    for name, config in configs.items():
        train(replace(config, run=replace(config.run, output_dir=str(place / name))))
    return {
        name: replace(config, run=replace(config.run, output_dir=str(place / name), seed=1))
        for name, config in configs.items()
    }


def with_teacher(config: Config, folder: Path, teacher: str | None = None, **settings: Any) -> Config:
    """Return the run of a student, whose teacher is the model in the configuration's folder."""
    named = replace(config.objective, teacher=teacher or config.run.output_dir, **settings)
    tokens = replace(config.tokens, name=config.run.output_dir)
    return replace(config, objective=named, tokens=tokens, run=replace(config.run, output_dir=str(folder / "out")))


@pytest.mark.parametrize(
    ("name", "kind"), [("masked", "bert"), ("masked", "mpnet"), ("classes", "bert"), ("tags", "bert")]
)
def test_the_loss_is_the_usual_one_mixed_with_the_divergence_from_the_teacher(
    name: str, kind: str, teachers: dict[str, Config], tmp_path: Path
) -> None:
    config = with_teacher(teachers[name], tmp_path, teacher_weight=0.3, teacher_temperature=2.0)
    config = replace(config, model=replace(config.model, type=kind))
    objective, prepared = build_objective(config.objective), prepare_data(config)
    network = build_network(config, prepared)
    head = objective.head(network, prepared).train()
    add_teacher(head, config, objective, prepared)
    collator = objective.collator(prepared.tokenizer, prepared.train, seed=0, padded=not head.padding_free, multiple=1)
    ids = torch.arange(8).numpy()
    batch = collator([prepared.train[int(i)] for i in ids], ids, 0)
    ours = target_losses(head, batch)
    ours.sum().backward()
    gradients = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()

    teacher = objective.auto.from_pretrained(str(teachers[name].run.output_dir)).eval()
    assert head.teacher is not None
    assert not [parameter for parameter in head.parameters() if parameter in {*teacher.parameters()}]
    kept, head.teacher = head.teacher, None
    args = (batch.input_ids_T, batch.packing, batch.target_index_N)
    student_logits = head.logits(*args, batch.type_ids_T).float()
    pieces = torch.split(batch.input_ids_T, batch.packing.lengths)
    with torch.no_grad():
        rows = [teacher(ids_L[None]).logits[0] for ids_L in pieces]
    teacher_logits = torch.stack(rows) if name == "classes" else torch.cat(rows)[batch.target_index_N]
    usual = F.cross_entropy(student_logits, batch.target_ids_N, reduction="none")
    soft = F.kl_div(
        (student_logits / 2).log_softmax(-1), (teacher_logits / 2).softmax(-1), reduction="none", log_target=False
    ).sum(-1)
    expected = 0.7 * usual + 0.3 * 4 * soft
    assert torch.allclose(ours, expected, atol=1e-5)
    expected.sum().backward()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for parameter, gradient in gradients.items():
        plain = network.get_parameter(parameter).grad
        assert plain is not None
        assert (gradient - plain).abs().max() <= 1e-4 * largest
    # The evaluation does not compare with the teacher.
    head.teacher = kept
    head.eval()
    assert torch.allclose(head(*args, batch.target_ids_N, batch.type_ids_T), usual, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_micro_batches_do_not_change_a_run_with_a_teacher(
    kind: str, teachers: dict[str, Config], tmp_path: Path
) -> None:
    losses = []
    for micro_tokens in (80, 4096):
        config = with_teacher(teachers["masked"], tmp_path / str(micro_tokens))
        config = replace(config, model=replace(config.model, type=kind))
        train(replace(config, batch=replace(config.batch, micro_tokens=micro_tokens)))
        losses.append([line["loss"] for line in read_log(tmp_path / str(micro_tokens) / "out")[0]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != losses[1]


def test_a_student_comes_near_to_its_teacher_and_leaves_it_alone(teachers: dict[str, Config], tmp_path: Path) -> None:
    folder = Path(str(teachers["masked"].run.output_dir))
    before = load_file(folder / "model.safetensors")
    config = with_teacher(teachers["masked"], tmp_path, teacher_weight=1.0)
    config = replace(config, run=replace(config.run, max_steps=150), optim=Optim(lr=5e-3))
    result = train(config)
    steps, _ = read_log(result.folder)
    assert steps[-1]["loss"] < 0.3 * steps[0]["loss"]
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    saved = load_file(result.folder / "model.safetensors")
    assert saved.keys() == before.keys()
    AutoModelForMaskedLM.from_pretrained(result.folder)


def test_a_resume_with_another_teacher_is_refused(teachers: dict[str, Config], tmp_path: Path) -> None:
    source = Path(str(teachers["masked"].run.output_dir))
    for name in ("teacher", "same"):
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = with_teacher(teachers["masked"], tmp_path, teacher=str(tmp_path / "teacher"))
    train(replace(config, run=replace(config.run, save_every=3)))
    again = replace(config, run=replace(config.run, resume="latest"))
    with pytest.raises(TrainingStopped, match="is finished"):
        train(replace(again, objective=replace(again.objective, teacher=str(tmp_path / "same"))))
    other = AutoModelForMaskedLM.from_pretrained(tmp_path / "teacher")
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"objective.teacher is not the model that the run began with"):
        train(again)


@pytest.mark.parametrize(("student", "teacher"), [("bert", "mpnet"), ("mpnet", "bert")])
def test_a_model_and_its_teacher_may_differ_in_the_need_for_padding(
    student: str, teacher: str, teachers: dict[str, Config], tmp_path: Path
) -> None:
    config = teachers["masked"]
    source = str(config.run.output_dir)
    learnt = replace(config, tokens=Tokens(name=source), model=replace(config.model, type=teacher))
    train(replace(learnt, run=replace(config.run, output_dir=str(tmp_path / "teacher"))))
    mine = with_teacher(config, tmp_path, teacher=str(tmp_path / "teacher"), teacher_weight=1.0)
    mine = replace(mine, model=replace(mine.model, type=student))
    # A model is as far from itself as it should be: not at all.
    same = replace(mine, model=Model(name=str(tmp_path / "teacher")), tokens=Tokens())
    train(mine)
    train(replace(same, run=replace(same.run, output_dir=str(tmp_path / "same"))))
    assert read_log(tmp_path / "same")[0][0]["loss"] == pytest.approx(0, abs=1e-6)
    assert read_log(tmp_path / "out")[0][0]["loss"] > 1e-3


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("masked", lambda config, place: {"tokens": Tokens(vocab_size=301)}, "has other tokens than the model"),
        (
            "masked",
            lambda config, place: {"objective": replace(config.objective, teacher=str(place))},
            "tokenizer cannot be loaded",
        ),
        (
            "tags",
            lambda config, place: {"objective": Contrastive(teacher=config.objective.teacher)},
            "has no logits to compare with a teacher's",
        ),
        ("classes", None, "has the labels .* take a teacher that was trained for the same labels"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_in_one_line(
    name: str,
    change: Callable[[Config, Path], dict[str, Any]] | None,
    message: str,
    teachers: dict[str, Config],
    tmp_path: Path,
) -> None:
    config = with_teacher(teachers[name], tmp_path)
    if change is None:
        teacher = AutoModelForSequenceClassification.from_pretrained(
            str(teachers[name].run.output_dir), id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}
        )
        teacher.save_pretrained(tmp_path / "named")
        AutoTokenizer.from_pretrained(str(teachers[name].run.output_dir)).save_pretrained(tmp_path / "named")
        config = replace(config, objective=replace(config.objective, teacher=str(tmp_path / "named")))
    else:
        config = replace(config, **change(config, tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_weight": 1.5}, "objective.teacher_weight must lie in"),
        ({"teacher_temperature": 0}, "objective.teacher_temperature must be positive"),
    ],
)
def test_settings_of_a_teacher_are_checked(settings: dict[str, Any], message: str) -> None:
    for kind in (MaskedLM, Classification, Tagging):
        with pytest.raises(ValueError, match=message):
            kind(**settings)
