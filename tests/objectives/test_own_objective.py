"""An objective of a user's own: what it computes, what is refused, and the parts of a run that it works with."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForMultipleChoice,
    BertModel,
    PreTrainedTokenizerBase,
)

import minilm
from minilm import Batch, Config, Data, Example, Model, Objective, Optim, Run, Tokens
from minilm.config.objective_class import find_class
from minilm.config.serialization import from_dict, read_run_config, to_dict
from minilm.data.micro_batch import target_losses
from minilm.objectives.factory import build_objective, prepare_data
from minilm.objectives.gradient_cache import couple_examples
from minilm.train import train
from tests.launch import ROOT
from tests.own_objectives import NO_DROPOUT, OWN, SIZE, TAGS, Contrastive, Tagging, write_rows


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    place = tmp_path_factory.mktemp("rows")
    return Config(
        data=Data(source=write_rows(place / "rows.jsonl", 80), eval_fraction=0.25),
        tokens=Tokens(vocab_size=300),
        model=Model(type="bert", config=SIZE),
        batch=Batch(examples=10, max_length=48),
        optim=Optim(lr=1e-3),
        run=Run(max_steps=4, precision="fp32"),
    )


def changed(config: Config, objective: Any, folder: Path, **run: Any) -> Config:
    return replace(config, objective=objective, run=replace(config.run, output_dir=str(folder / "out"), **run))


def test_the_figures_of_a_tagger_are_those_of_plain_transformers(config: Config, tmp_path: Path) -> None:
    result = train(changed(config, Tagging(), tmp_path))
    prepared = prepare_data(changed(config, Tagging(), tmp_path))
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out").eval()
    assert tuple(model.config.id2label.values()) == TAGS
    losses, right = [], []
    for index in range(len(prepared.eval)):
        targets = torch.from_numpy(prepared.eval.targets_of_tokens(index))
        with torch.inference_mode():
            logits_LxC = model(torch.from_numpy(prepared.eval[index])[None]).logits[0]
        kept = targets != -100
        losses += F.cross_entropy(logits_LxC[kept], targets[kept], reduction="none").tolist()
        right += (logits_LxC.argmax(1) == targets)[kept].tolist()
    assert result.figures["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert result.figures["accuracy"] == pytest.approx(np.mean(right))
    assert result.model.config.id2label == model.config.id2label
    assert result.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert 'pipeline("token-classification"' in (tmp_path / "out" / "README.md").read_text()


def heads_of(objective: Any, model: Any, prepared: Any) -> Any:
    return objective.head(model, prepared).train()


@pytest.mark.parametrize("cuts", [1, 4, 10])
def test_the_gradient_of_a_coupled_step_is_that_of_one_large_batch(cuts: int, config: Config, tmp_path: Path) -> None:
    objective = Contrastive()
    prepared = prepare_data(changed(config, objective, tmp_path))
    torch.manual_seed(0)
    size = {**SIZE, **NO_DROPOUT}
    model = BertModel(BertConfig(**size, vocab_size=300)).train()
    head = heads_of(objective, model, prepared)
    collator = objective.collator(prepared.tokenizer, prepared.train, seed=0, padded=not head.padding_free, multiple=1)
    ids = np.arange(20)[::-1].copy()
    parts = np.array_split(ids, cuts)
    batches = [collator([prepared.train[int(i)] for i in part], part, 0) for part in parts]
    accelerator = Accelerator(cpu=True)
    losses = []
    for batch in couple_examples(accelerator, head, batches):
        part_N = target_losses(head, batch)
        part_N.sum().backward()
        losses += part_N.tolist()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()

    def embed(row: Any) -> Tensor:
        return model(torch.tensor(np.array(row))[None]).last_hidden_state[0].mean(0)

    rows = [np.split(prepared.train[int(i)], np.cumsum(prepared.train.row_lengths(int(i)))[:-1]) for i in ids]
    outputs_Ex2xH = torch.stack([torch.stack([embed(row) for row in pair]) for pair in rows])
    expected_E = objective.loss(outputs_Ex2xH, torch.zeros(20))
    expected_E.sum().backward()
    assert losses == pytest.approx(expected_E.tolist(), rel=1e-5)
    plain = {name: model.get_parameter(name).grad for name in ours}
    # The gradient of a key's bias is zero but for rounding.
    largest = max(float(gradient.abs().max()) for gradient in plain.values() if gradient is not None)
    for name, gradient in ours.items():
        expected = plain[name]
        assert expected is not None
        assert (gradient - expected).abs().max() <= 1e-5 * largest, name


def test_a_coupled_step_draws_the_same_dropout_in_both_passes(config: Config, tmp_path: Path) -> None:
    objective = Contrastive()
    prepared = prepare_data(changed(config, objective, tmp_path))
    size = {**SIZE, "hidden_dropout_prob": 0.3}
    head = heads_of(objective, BertModel(BertConfig(**size, vocab_size=300)), prepared)
    collator = objective.collator(prepared.tokenizer, prepared.train, seed=0, padded=not head.padding_free, multiple=1)
    batches = [collator([prepared.train[int(i)] for i in part], part, 0) for part in np.split(np.arange(12), 3)]
    torch.manual_seed(1)
    coupled = couple_examples(Accelerator(cpu=True), head, batches)
    first, *others = coupled
    assert first.outputs is not None
    later = [head(batch.input_ids_T, batch.packing, batch.target_index_N, None, None) for batch in others]
    outputs = torch.cat([first.outputs, *later])
    expected = objective.loss(outputs.unflatten(0, (12, 2)), torch.zeros(12))
    stored = torch.cat([batch.coupling_NxD[:, 0] for batch in coupled if batch.coupling_NxD is not None])
    assert torch.equal(stored, expected)


def test_the_evaluation_of_coupled_examples_does_not_depend_on_the_cut(config: Config, tmp_path: Path) -> None:
    figures = []
    size = {**SIZE, **NO_DROPOUT}
    config = replace(config, model=replace(config.model, config=size))
    for micro_tokens in (60, 4096):
        batch = replace(config.batch, micro_tokens=micro_tokens)
        folder = tmp_path / str(micro_tokens)
        figures.append(train(changed(replace(config, batch=batch), Contrastive(), folder, max_steps=1)).figures)
    assert figures[0]["eval_loss"] == pytest.approx(figures[1]["eval_loss"], rel=1e-5)


class Wrong(Tagging):
    """Gives what `made` holds in place of examples."""

    made: ClassVar[Any] = None

    def examples(self, rows: Any, tokenizer: Any, fields: Any) -> Iterator[Example]:
        yield from type(self).made


class Mean(Tagging):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets).mean()


class Unfinished(minilm.Objective):
    margin: float = 0.5


ONE = Example(ids=[5, 6], targets=[1, -100])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([[5, 6]], "`examples` gave list in place of minilm.Example"),
        ([Example(ids=[5] * 49, targets=[0] * 49)], "a row of an example has 49 tokens, more than batch.max_length=48"),
        ([Example(ids=[5, 400], targets=[0, 0])], "the tokenizer has no id 400: its ids are 0 to"),
        ([Example(ids=[5, -1], targets=[0, 0])], "the tokenizer has no id -1"),
        ([ONE, Example(ids=[5], target=1)], "an example has a whole number, but the first one of all has targets for"),
        ([Example(ids=[5], target=float("nan"))], "the target nan is not made of finite numbers"),
        ([Example(ids=[5], target="red")], "the target 'red' is not made of finite numbers"),
        (
            [Example(rows=[[5], [6]], target=0), Example(rows=[[5]], target=0)],
            "an example has 1 rows, but the first one of all has 2",
        ),
        ([], "the training documents give no example"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_examples_are_refused_in_one_line(made: list[Any], message: str, config: Config, tmp_path: Path) -> None:
    kind = type(f"Wrong{abs(hash(message))}", (Wrong,), {"made": made, "__module__": __name__})
    with pytest.raises(ValueError, match=message.replace("[", r"\[")) as caught:
        prepare_data(changed(config, kind(), tmp_path))
    assert "\n" not in str(caught.value)
    assert "training documents" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs `ids` with at least one token, or `rows`"),
        ({"ids": [5], "rows": [[5]]}, "needs `ids` with at least one token, or `rows`"),
        ({"rows": [[5], []]}, "has a row without a token"),
        ({"ids": [5], "targets": [1], "target": 1}, "but not both"),
        ({"ids": [5], "targets": [1, 2]}, "has 2 targets for 1 ids"),
        ({"ids": [5], "type_ids": [1, 2]}, "of another length"),
        ({"rows": [[5], [6, 7]], "type_ids": [[0], [0]]}, "of another length"),
    ],
)
def test_an_example_that_contradicts_itself_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Example(**fields)


def test_a_mean_in_place_of_losses_is_refused_before_the_first_step(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Mean.loss gave a tensor of shape \[\] for .* return one loss for each"):
        train(changed(config, Mean(), tmp_path))


def test_fields_without_a_dataclass_are_refused() -> None:
    with pytest.raises(ValueError, match="Unfinished has the field margin but is not a dataclass"):
        build_objective(Unfinished())


def test_a_field_must_not_have_a_name_that_a_run_records() -> None:
    with pytest.raises(TypeError, match=r"Named.name: a run records the class under this name"):

        class Named(minilm.Objective):
            name: str = "x"


SCRIPT = '''
"""A recipe with an objective of its own."""

from dataclasses import dataclass

from minilm import Batch, Config, Data, Model, Run, Tokens
from minilm.commands.recipe import run_recipe
from tests.own_objectives import NO_DROPOUT, SIZE, Tagging


@dataclass(frozen=True, kw_only=True)
class Mine(Tagging):
    """Tags, with a setting."""

    first_only: bool = True
    """Whether only the first token of a word is a target."""
    weight: float = 1.0
    """Factor of the loss."""

    def loss(self, outputs, targets):
        return self.weight * super().loss(outputs, targets)


CONFIG = Config(
    data=Data(source="rows.jsonl", eval_fraction=0.25),
    tokens=Tokens(vocab_size=300),
    model=Model(type="bert", config={size}),
    objective=Mine(),
    batch=Batch(examples=10, max_length=48),
    run=Run(max_steps=3, precision="fp32"),
)

if __name__ == "__main__":
    run_recipe(CONFIG, __doc__)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose class is in the recipe itself, and one run of it."""
    folder = tmp_path_factory.mktemp("recipe")
    write_rows(folder / "rows.jsonl", 80)
    (folder / "mine.py").write_text(SCRIPT.replace("{size}", repr(SIZE)))
    assert started(folder, "mine.py").returncode == 0
    return folder


def started(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Start a recipe, or with the word `minilm` a command."""
    start = ["-m", "minilm.commands.main", *words[1:]] if words[0] == "minilm" else [*words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", *start],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_fields_are_flags_with_help_and_without_a_warning(place: Path) -> None:
    done = started(place, "mine.py", "--help")
    assert done.returncode == 0
    assert "--objective.weight FLOAT" in done.stdout
    assert "Factor of the loss." in done.stdout
    assert done.stderr == ""


def test_a_run_is_repeated_from_its_record(place: Path) -> None:
    done = started(place, "mine.py", "--objective.weight", "2", "--run.output-dir", "out/two")
    assert done.returncode == 0, done.stderr
    once, twice = (
        json.loads((place / "out" / name / "all_results.json").read_text())["eval_loss"] for name in ("mine", "two")
    )
    assert twice == pytest.approx(2 * once, rel=0.05)
    again = started(place, "mine.py", "--from-run", "out/two/run.json", "--run.output-dir", "out/again")
    assert again.returncode == 0, again.stderr
    logs = [(place / "out" / name / "all_results.json").read_text() for name in ("two", "again")]
    assert [json.loads(log)["eval_loss"] for log in logs] == [twice, twice]


def test_other_commands_find_the_class_by_its_file(place: Path) -> None:
    done = started(place, "minilm", "evaluate", "out/mine", "--json")
    assert done.returncode == 0, done.stderr
    expected = json.loads((place / "out" / "mine" / "all_results.json").read_text())
    found = json.loads(done.stdout)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert found["accuracy"] == pytest.approx(expected["accuracy"])
    report = started(place, "minilm", "report", "out/mine")
    assert report.returncode == 0, report.stderr
    assert "accuracy" in (place / "report.html").read_text()
    assert str(place) not in (place / "out" / "mine" / "README.md").read_text()


def test_a_dry_run_and_seeds_work(place: Path) -> None:
    dry = started(place, "mine.py", "--dry-run", "--run.output-dir", "out/dry")
    assert dry.returncode == 0, dry.stderr
    assert "BertForTokenClassification" in dry.stdout
    assert not (place / "out" / "dry").exists()
    done = started(place, "mine.py", "--seeds", "0", "1", "--run.output-dir", "out/seeds")
    assert done.returncode == 0, done.stderr
    assert set(json.loads((place / "out" / "seeds" / "seeds.json").read_text())["accuracy"]["values"]) == {"0", "1"}


def test_a_class_that_cannot_be_found_is_told_in_one_line(place: Path, tmp_path: Path) -> None:
    run = json.loads((place / "out" / "mine" / "run.json").read_text())
    defined_in = run["config"]["objective"]["defined_in"]
    assert defined_in == {"module": "__main__", "file": str(place / "mine.py")}
    for file, text, message in (
        ("gone.py", None, "which does not exist: put the file back"),
        ("other.py", "x = 1", "which does not define it any more"),
        ("broken.py", "import nothing_of_this_name", "cannot be imported: ModuleNotFoundError"),
    ):
        if text is not None:
            (tmp_path / file).write_text(text)
        run["config"]["objective"]["defined_in"]["file"] = str(tmp_path / file)
        path = tmp_path / "run" / "run.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(run))
        with pytest.raises(ValueError, match=message) as caught:
            read_run_config(str(path))
        assert "\n" not in str(caught.value)


def test_code_inside_the_folder_of_a_run_is_not_imported(place: Path, tmp_path: Path) -> None:
    run = json.loads((place / "out" / "mine" / "run.json").read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    run["config"]["objective"]["defined_in"]["file"] = str(tmp_path / "evil.py")
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="from which minilm runs no code"):
        read_run_config(str(tmp_path / "run.json"))


def test_a_file_with_the_name_of_a_module_does_not_take_its_place(tmp_path: Path) -> None:
    file = tmp_path / "random.py"
    file.write_text("from minilm import Objective\n\nclass Mine(Objective):\n    pass\n")
    kind = find_class("Mine", {"module": "random", "file": str(file)})
    assert kind is not None
    assert issubclass(kind, Objective)
    assert __import__("random").__file__ != str(file)
    assert find_class("Mine", {"module": "random", "file": str(file)}) is kind


def test_the_record_of_an_objective_is_read_as_it_was() -> None:
    for objective in OWN.values():
        config = Config(objective=objective)
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_changed_code_gives_other_examples(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    lengths = []
    for turn, code in enumerate(("[5, 6]", "[5, 6, 7]", "[5, 6]")):
        (tmp_path / "own_module.py").write_text(
            "from minilm import Example\nfrom tests.own_objectives import Tagging\n\nclass Mine(Tagging):\n"
            f"    def examples(self, rows, tokenizer, fields):\n        for row in rows:\n"
            f"            yield Example(ids={code}, targets={code})\n"
        )
        monkeypatch.delitem(sys.modules, "own_module", raising=False)
        namespace = SimpleNamespace(**vars(__import__("own_module")))
        prepared = prepare_data(changed(config, namespace.Mine(), tmp_path / str(turn)))
        lengths.append(int(prepared.train.lengths[0]))
    assert lengths == [2, 3, 2]


def test_the_arguments_of_train_take_the_place_of_settings(config: Config, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(str(config.data.source)).read_text().splitlines()]
    seen: list[tuple[int, float, float, bool]] = []
    rates: list[tuple[int, int]] = []

    def rate(step: int, total: int) -> float:
        rates.append((step, total))
        return 0.5 / (step + 1)

    def look(step: int, figures: dict[str, Any], model: Any) -> bool:
        seen.append((step, float(figures["loss"]), figures["lr"], "eval_loss" in figures))
        model.eval()
        return step == 2

    result = train(
        replace(changed(config, None, tmp_path, eval_every=2, max_steps=9), objective=Config().objective, data=Data()),
        objective=Tagging(),
        documents=rows[:60],
        eval_documents=rows[60:],
        optimizer=lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
        learning_rate=rate,
        after_step=look,
    )
    assert [each[0] for each in seen] == [0, 1, 2]
    assert [each[2] for each in seen] == [0.5, 0.25, pytest.approx(0.5 / 3)]
    assert [each[3] for each in seen] == [False, True, False]
    assert rates[:3] == [(0, 9), (1, 9), (2, 9)]
    assert result.figures["steps"] == 3
    assert result.folder == tmp_path / "out"
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["config"]["data"]["source"] == "<documents>"
    assert record["train"]["examples"] == 60
    assert record["eval"]["examples"] == 20
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in log if "loss" in line] == [each[1] for each in seen]
    assert result.model.training is False


def test_texts_in_memory_train_a_language_model(config: Config, tmp_path: Path) -> None:
    texts = [f"the number {number} and the number {number * 7}" for number in range(90)]
    plain = changed(replace(config, data=Data()), Config().objective, tmp_path)
    result = train(plain, documents=texts)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    from_file = train(
        changed(replace(config, data=Data(source=str(tmp_path / "texts.txt"))), Config().objective, tmp_path / "file")
    )
    assert result.figures["eval_loss"] == from_file.figures["eval_loss"]


@dataclass(frozen=True, kw_only=True)
class Scores(minilm.Objective):
    """A number for a row of several texts, with types."""

    auto = BertForMultipleChoice
    outputs = "rows"
    scale: float = 2.0

    def examples(self, rows: Any, tokenizer: PreTrainedTokenizerBase, fields: Any) -> Iterator[Example]:
        for row in rows:
            ids = tokenizer(row["text"], truncation=True)["input_ids"]
            yield Example(rows=[ids, ids[:3]], type_ids=[[0] * len(ids), [1, 1, 1]], target=[0.5, self.scale])


def test_examples_keep_rows_types_and_targets(config: Config, tmp_path: Path) -> None:
    objective = Scores()
    network_free = replace(objective)
    prepared = network_free.prepare(changed(config, objective, tmp_path))
    examples = prepared.train
    rows = [json.loads(line) for line in Path(str(config.data.source)).read_text().splitlines()]
    texts = {tuple(prepared.tokenizer(row["text"], truncation=True, max_length=48)["input_ids"]) for row in rows}
    for index in range(len(examples)):
        first, second = examples.row_lengths(index)
        ids = examples[index].tolist()
        assert tuple(ids[:first]) in texts
        assert ids[first:] == ids[:3]
        assert second == 3
        assert examples.token_type_ids(index).tolist() == [0] * first + [1, 1, 1]
        assert examples.labels is not None
        assert examples.labels[index].tolist() == [0.5, 2.0]
        assert examples.padded_lengths[index] == 2 * first
        assert examples.square_lengths[index] == first**2 + 9
