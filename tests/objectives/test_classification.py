"""Sequence classification: labels, losses by every family of models, figures, and a run from file to pipeline."""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, List, Value
from sklearn import metrics
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    pipeline,
)

from minilm import Batch, Classification, Config, Data, Model, Optim, Run, Tokens
from minilm.commands.evaluate import evaluate
from minilm.data.corpus import Examples
from minilm.data.labels import Labels, read_labels
from minilm.data.micro_batch import loss_sum
from minilm.data.text_pairs import encode_pairs
from minilm.models.inference import classify, load_classifier
from minilm.models.loading import load_model
from minilm.models.model_config import read_model_labels
from minilm.models.row_head import RowHead
from minilm.objectives.classification_loss import ClassificationLoss
from minilm.objectives.example_batches import ExampleCollator
from minilm.objectives.metrics import compute_classification_figures
from minilm.train import train
from tests.jobs import finish_all
from tests.launch import read_log
from tests.reference import TYPES, assert_same_gradients, fields, pad_rows

OTHERS = {"gpt2": {}, "llama": {"num_attention_heads": 4, "num_key_value_heads": 2}, "fnet": {}}
WITHOUT_PADDING = {"bert", "roberta", "distilbert", "electra", "modernbert"}
LENGTHS = (40, 33, 9, 9, 6, 4)
SINGLE = Labels(problem="single-label", names=("no", "yes", "maybe"))
PROBLEMS = {
    "single-label": (SINGLE, np.array([0, 2, 1, 1, 0, 2])),
    "multi-label": (
        replace(SINGLE, problem="multi-label"),
        np.eye(6, 3, dtype=np.float32) + np.eye(6, 3, 1, np.float32),
    ),
    "regression": (Labels(problem="regression", names=("LABEL_0",)), np.linspace(-1, 2, 6, dtype=np.float32)),
}


def build(tokenizer, kind: str, labels: Labels) -> PreTrainedModel:
    own = OTHERS.get(kind, TYPES.get(kind))
    model = Model(type=kind, config=fields(kind, own))
    more = labels.fields()
    return load_model(
        model, tokenizer, max_length=48, seed=0, auto=AutoModelForSequenceClassification, fields=more
    ).train()


def examples_for(rows: Sequence[np.ndarray], labels: np.ndarray, types: np.ndarray | None = None) -> Examples:
    ends = np.cumsum([0, *map(len, rows)])
    none = np.zeros(0, np.int64)
    return Examples(
        ids=np.concatenate(rows),
        start=ends[:-1],
        stop=ends[1:],
        prefix=none,
        suffix=none,
        type_ids=types,
        labels=labels,
    )


def rows_for(lengths: Sequence[int] = LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(5, 300, length) for length in lengths]


@pytest.mark.parametrize("rounding", [0, 7])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("kind", [*TYPES, *OTHERS])
def test_loss_and_gradients_are_those_that_transformers_takes(
    kind: str, problem: str, rounding: int, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minilm.models.model_inputs.count_padding_rows", lambda rows, device: rounding)
    labels, values = PROBLEMS[problem]
    model = build(tokenizer, kind, labels)
    plain, head = deepcopy(model), RowHead(model, loss=ClassificationLoss(labels))
    assert (head.padding_free, head.needs_equal_lengths) == (kind in WITHOUT_PADDING, kind == "fnet")
    rows, two = rows_for(), kind in ("bert", "electra", "albert")
    types_T = np.concatenate([np.arange(len(row)) > len(row) // 2 for row in rows]).astype(np.uint8) if two else None
    examples = examples_for(rows, values, types_T)
    batch = ExampleCollator(examples, "rows", padded=not head.padding_free, multiple=1)(rows, np.arange(6), 0)
    loss = loss_sum(head, batch) / 6
    ids_RxL, mask_RxL = pad_rows(torch.from_numpy(np.concatenate(rows)), LENGTHS, tokenizer.pad_token_id)
    more = {"token_type_ids": pad_rows(torch.from_numpy(types_T).long(), LENGTHS, 0)[0]} if two else {}
    labels_N = torch.from_numpy(values)
    if head.needs_equal_lengths:
        losses = [
            plain(input_ids=torch.from_numpy(row)[None], labels=labels_N[i : i + 1]) for i, row in enumerate(rows)
        ]
        expected = torch.stack([each.loss for each in losses]).mean()
    else:
        expected = plain(input_ids=ids_RxL, attention_mask=mask_RxL, labels=labels_N, **more).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    assert_same_gradients(head.model, plain)


def test_a_text_has_the_same_scores_among_longer_ones_even_where_padding_would_change_them(tokenizer) -> None:
    model = build(tokenizer, "fnet", SINGLE).eval()
    texts = ["A short one.", "The quick brown fox jumps over the lazy dog.", "A short dog.", "If the file does not."]
    for text, together in zip(texts, classify(model, tokenizer, texts), strict=True):
        alone = classify(model, tokenizer, [text])[0]
        assert [each.label for each in together] == [each.label for each in alone]
        assert [each.score for each in together] == pytest.approx([each.score for each in alone], rel=1e-6)


def test_rows_are_padded_to_the_longest_of_their_own_batch() -> None:
    rows = rows_for((50, 59, 47, 67, 59, 50, 62, 32))
    examples = examples_for(rows, np.zeros(8, np.int64))
    (group,) = ExampleCollator(examples, "rows", padded=True, multiple=1)(rows, np.arange(8), 0).packing.groups
    assert (group.rows, group.length) == (8, 67)
    (group,) = ExampleCollator(examples, "rows", padded=True, multiple=8)(rows, np.arange(8), 0).packing.groups
    assert group.length == 72


def test_a_batch_without_examples_has_no_loss_and_every_gradient(tokenizer) -> None:
    for kind in ("bert", "gpt2"):
        head = RowHead(build(tokenizer, kind, SINGLE), loss=ClassificationLoss(SINGLE))
        examples = examples_for(rows_for(), np.zeros(6, np.int64))
        batch = ExampleCollator(examples, "rows", padded=not head.padding_free, multiple=1)(
            [], np.zeros(0, np.int64), 0
        )
        loss = loss_sum(head, batch)
        loss.backward()
        assert (batch.target_count, loss.item()) == (0, 0.0)


def test_a_class_counts_the_less_the_more_of_it_there_is(tokenizer) -> None:
    values = ["a"] * 6 + ["b"] * 3
    column = Dataset.from_dict({"text": ["x"] * 9, "label": values})
    balanced, ids, _ = read_labels(column, {"": column}, Classification(class_weights="balanced"))
    assert balanced.weights is not None
    np.testing.assert_allclose(balanced.weights, [9 / (2 * 6), 9 / (2 * 3)])
    assert balanced.weights[ids].mean() == pytest.approx(1)
    model = build(tokenizer, "bert", balanced)
    rows = rows_for()
    examples = examples_for(rows, ids[3:])
    heads = [RowHead(model, loss=ClassificationLoss(labels)) for labels in (balanced, replace(balanced, weights=None))]
    batches = [
        ExampleCollator(examples, "rows", padded=False, multiple=1)([rows[i]], np.array([i]), 0) for i in range(6)
    ]
    for i, batch in enumerate(batches):
        weighed, plain = (loss_sum(head, batch).item() for head in heads)
        assert weighed == pytest.approx(balanced.weights[ids[3:][i]] * plain, rel=1e-5)


def test_smoothed_labels_are_those_of_torch_and_of_no_evaluation(tokenizer) -> None:
    rows, labels = rows_for(), np.array([0, 2, 1, 1, 0, 2])
    head = RowHead(build(tokenizer, "bert", SINGLE), loss=ClassificationLoss(SINGLE, smoothing=0.2))
    batch = ExampleCollator(examples_for(rows, labels), "rows", padded=False, multiple=1)(rows, np.arange(6), 0)
    logits = head.logits(batch.input_ids_T, batch.packing, batch.target_index_N)
    expected = torch.nn.functional.cross_entropy(logits, batch.target_ids_N, label_smoothing=0.2, reduction="sum")
    assert loss_sum(head, batch).item() == pytest.approx(expected.item(), rel=1e-5)


PAIRS = Dataset.from_dict(
    {"text": ["A short one.", "The quick brown fox."], "pair": ["Another.", "It jumps over the lazy dog. " * 5]}
)


def test_pairs_are_encoded_as_the_tokenizer_does(tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        examples = encode_pairs(PAIRS, tokenizer, np.array([0, 1]), max_length=32, name="documents")
        expected = tokenizer(PAIRS["text"][:], PAIRS["pair"][:], truncation=True, max_length=32)
        assert [examples[i].tolist() for i in range(2)] == expected["input_ids"]
        assert caplog.messages == ["1 of 2 documents have more than batch.max_length=32 tokens and are cut"]
    assert examples.type_ids is None  # this tokenizer's models are not told
    tokenizer = deepcopy(tokenizer)
    tokenizer.model_input_names = ["input_ids", "token_type_ids"]
    examples = encode_pairs(PAIRS, tokenizer, np.array([0, 1]), max_length=31, name="documents")
    expected = tokenizer(PAIRS["text"][:], PAIRS["pair"][:], truncation=True, max_length=31)
    assert [examples.token_type_ids(i).tolist() for i in range(2)] == expected["token_type_ids"]


def labelled(values: list[Any], feature: Any = None) -> Dataset:
    rows = {"text": [f"text {i}" for i in range(len(values))], "label": values}
    return Dataset.from_dict(rows, features=feature and Features({"text": Value("string"), "label": feature}))


NAMES = ClassLabel(names=["no", "yes", "maybe"])


@pytest.mark.parametrize(
    ("values", "feature", "known", "names", "ids"),
    [
        (["b", "a", "b"], None, {}, ("a", "b"), [1, 0, 1]),
        ([1, 0, 2], None, {}, ("0", "1", "2"), [1, 0, 2]),
        ([True, False], None, {}, ("False", "True"), [1, 0]),
        ([1, 0], NAMES, {}, ("no", "yes", "maybe"), [1, 0]),
        (["b", "a"], None, {"b": 0, "a": 1, "c": 2}, ("b", "a", "c"), [0, 1]),
        ([1, 0], NAMES, {"b": 0, "a": 1, "c": 2}, ("no", "yes", "maybe"), [1, 0]),
        ([1, 0], NAMES, {"maybe": 0, "no": 1, "yes": 2}, ("maybe", "no", "yes"), [2, 1]),
        ([1, 0], NAMES, {"other": 0, "maybe": 1, "no": 2, "yes": 3}, ("other", "maybe", "no", "yes"), [3, 2]),
        ([1, 0], NAMES, {"no": 0, "yes": 1}, ("no", "yes"), [1, 0]),
        ([1, 0], NAMES, {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, ("no", "yes", "maybe"), [1, 0]),
        ([2, 0], None, {"b": 0, "a": 1, "c": 2}, ("b", "a", "c"), [2, 0]),
        (["b", "a"], None, {"LABEL_0": 0, "LABEL_1": 1}, ("a", "b"), [1, 0]),
    ],
)
def test_classes_get_names_and_ids(values, feature, known, names, ids) -> None:
    column = labelled(values, feature)
    by_id = tuple(sorted(known, key=known.__getitem__))
    found, train, held_out = read_labels(column, {"": column}, Classification(), by_id)
    assert (found.problem, found.names) == ("single-label", names)
    assert train.tolist() == held_out.tolist() == ids


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        ([["b", "a"], [], ["c"]], None),
        ([[1, 0], [], [2]], None),
        ([[1, 0], [], [2]], List(NAMES)),
        ([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]], None),
    ],
)
def test_several_labels_become_zeros_and_ones(values, feature) -> None:
    column = labelled(values, feature)
    found, train, _ = read_labels(column, {"": column}, Classification())
    assert (found.problem, len(found.names)) == ("multi-label", 3)
    assert train.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("values", "feature", "ids"),
    [
        ([0, 1], ClassLabel(names=["yes", "no"]), [1, 0]),
        ([0, 1], None, [0, 1]),  # numbers alone are numbers of the training documents' names
        (["yes", "no"], None, [1, 0]),
    ],
)
def test_evaluation_documents_are_read_by_names_of_their_own(values, feature, ids) -> None:
    train, held_out = labelled([1, 0], NAMES), labelled(values, feature)
    assert read_labels(train, {"": held_out}, Classification())[2].tolist() == ids


def test_names_of_evaluation_documents_alone_explain_words_and_no_numbers() -> None:
    held_out = labelled([0, 1], ClassLabel(names=["yes", "no"]))
    for values, ids in ((["no", "yes"], [1, 0]), ([1, 0], [0, 1])):
        assert read_labels(labelled(values), {"": held_out}, Classification())[2].tolist() == ids


def test_numbers_with_a_decimal_point_are_a_regression() -> None:
    column = labelled([2.5, 0.0])
    found, train, _ = read_labels(column, {"": column}, Classification())
    assert (found.problem, train.tolist()) == ("regression", [2.5, 0.0])
    column = labelled([2, 0])
    assert read_labels(column, {"": column}, Classification(problem="regression"))[1].tolist() == [2.0, 0.0]
    column = labelled([1.0, 0.0])
    assert read_labels(column, {"": column}, Classification(problem="single-label"))[1].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("train_values", "eval_values", "settings", "message"),
    [
        (["a", "a"], ["a"], Classification(), "all training documents have the label 'a'"),
        (["a", "b"], ["a", "bb"], Classification(), r"row 1 .* no training document has 'bb': did you mean 'b'\?"),
        ([-1, -1], [1], Classification(), "every label of the training documents is -1.* kept secret"),
        ([0, 1], [-1], Classification(), "every label of the evaluation documents is -1.* kept secret"),
        ([[1, 0, 1], [1, 0, 1]], [[0, 1, 1]], Classification(), "all training documents have the labels '0', '2': "),
        ([[0, 1, 0, 1], [1]], [[0]], Classification(), r"row 0 .*\[0, 1, 0, 1\]: the list holds '0' twice. Write"),
        ([0, 1], [2], Classification(), "row 0 .* label 2: no training document has '2'"),
        (["a", "b"], ["a"], Classification(problem="regression"), "row 0 of the training .*'a': a regression needs"),
        ([0.5, 1.0], [1.0], Classification(problem="single-label"), "label 0.5: it is a number and .*regression"),
        (["a", "b"], ["a"], Classification(problem="multi-label"), "label 'a': it is not a list"),
        ([["a"], ["b"]], [["a"]], Classification(problem="single-label"), "is not a single label"),
        ([0.5, float("nan")], [1.0], Classification(), "row 1 of the training .* finite"),
    ],
)
def test_labels_that_make_no_problem_are_refused(train_values, eval_values, settings, message) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read_labels(labelled(train_values), {"": labelled(eval_values)}, settings)
    assert "\n" not in str(refused.value)


def test_figures_are_those_of_scikit_learn() -> None:
    logits = np.random.default_rng(1).normal(size=(50, 3))
    labels = np.random.default_rng(2).integers(0, 3, 50)
    found = compute_classification_figures(logits, labels)
    assert found["accuracy"] == (logits.argmax(1) == labels).mean()
    assert found["f1"] == metrics.f1_score(labels, logits.argmax(1), average="macro")
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item()
    assert found["eval_loss"] == pytest.approx(expected)
    two = compute_classification_figures(logits[:, :2], labels % 2)
    assert two["f1"] == metrics.f1_score(labels % 2, logits[:, :2].argmax(1))
    several = (np.random.default_rng(3).random((50, 3)) < 0.5).astype(np.float32)
    many = compute_classification_figures(logits, several)
    assert many["accuracy"] == ((logits > 0) == several).all(1).mean()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits), torch.tensor(several).double()
    )
    assert many["eval_loss"] == pytest.approx(expected.item())
    numbers = compute_classification_figures(logits[:, :1], logits[:, 0] * 3 + 1)
    assert numbers["pearson"] == pytest.approx(1)
    assert numbers["spearman"] == pytest.approx(1)
    assert numbers["mse"] == pytest.approx(((2 * logits[:, 0] + 1) ** 2).mean())
    still = compute_classification_figures(np.ones((4, 1)), np.arange(4.0))
    assert still["pearson"] == still["spearman"] == 0.0


COLOURS = ("red", "green", "blue")
SIZE = {
    "initializer_range": 0.2,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def write_colours(path: Path) -> str:
    """Texts that hold a colour, which is their label, and second texts that do not matter."""
    rows = []
    for i in range(96):
        colour = COLOURS[(i + i // 7) % 3]
        row = {"sentence": f"{'the ' * (i % 9)}{colour} fox", "other": "a dog " * (i % 4 + 1), "colour": colour}
        rows.append(json.dumps(row))
    path.write_text("\n".join(rows))
    return str(path)


def config_for(folder: Path, **run: Any) -> Config:
    return Config(
        data=Data(
            source=write_colours(folder / "colours.jsonl"),
            column="sentence",
            pair_column="other",
            label_column="colour",
            eval_fraction=0.25,
        ),
        tokens=Tokens(kind="wordpiece", vocab_size=300),
        model=Model(type="bert", config={**SIZE, "max_position_embeddings": 64, **NO_DROPOUT}),
        objective=Classification(),
        batch=Batch(examples=16, max_length=48),
        optim=Optim(lr=3e-3, warmup=0.1),
        run=Run(**{"max_steps": 60, "eval_every": 30, "save_every": 30, "precision": "fp32", **run}),
    )


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("classify")
    return folder / "out", train(config_for(folder, output_dir=str(folder / "out"), samples=("the red fox",))).figures


@pytest.mark.scorecard(11)
def test_a_classifier_learns_and_says_so(trained: tuple[Path, dict[str, float]], figure) -> None:
    folder, results = trained
    assert results["accuracy"] == 1.0
    assert results["f1"] == 1.0
    steps, evaluations = read_log(folder)
    assert steps[-1]["loss"] < 0.05
    assert [line["step"] for line in evaluations] == [30, 60]
    assert {"eval_loss", "accuracy", "f1", "matthews"} <= evaluations[-1].keys()
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    assert "the red fox → red" in (folder / "README.md").read_text()
    figure(f"classification: loss {steps[-1]['loss']:.3f}")


@pytest.mark.scorecard(28)
def test_what_it_saves_answers_in_transformers_pipeline(trained: tuple[Path, dict[str, float]]) -> None:
    for folder in (trained[0], trained[0] / "checkpoint-60"):
        model, tokenizer = load_classifier(folder)
        texts, pairs = ["the green fox", "the the the blue fox"], ["a dog", "a dog a dog"]
        expected = pipeline("text-classification", model=str(folder), top_k=None)(
            [{"text": text, "text_pair": pair} for text, pair in zip(texts, pairs, strict=True)]
        )
        for ours, theirs in zip(classify(model, tokenizer, texts, pairs), expected, strict=True):
            assert [each.label for each in ours] == [each["label"] for each in theirs]
            assert [each.score for each in ours] == pytest.approx([each["score"] for each in theirs], rel=1e-5)


def test_the_same_losses_and_figures_whatever_the_micro_batches_and_processes(tmp_path: Path) -> None:
    base = config_for(tmp_path, max_steps=12, eval_every=5, save_every=0)
    jobs = {}
    for name, processes, micro_tokens in (("whole", 1, 4096), ("cut", 1, 64), ("two", 2, 100)):
        run = replace(base.run, output_dir=str(tmp_path / name))
        jobs[name] = (replace(base, run=run, batch=replace(base.batch, micro_tokens=micro_tokens)), processes)
    finish_all(list(jobs.values()), tmp_path)
    steps, evaluations = read_log(tmp_path / "whole")
    for name in ("cut", "two"):
        others = read_log(tmp_path / name)
        for ours, theirs in zip(others[0] + others[1], steps + evaluations, strict=True):
            for key in {"loss", "grad_norm", "eval_loss", "accuracy", "f1"} & ours.keys():
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (name, ours["step"], key)


def test_a_trained_classifier_keeps_its_labels_or_gets_a_new_head(
    trained: tuple[Path, dict[str, float]], caplog: pytest.LogCaptureFixture
) -> None:
    folder = trained[0]
    assert read_model_labels(str(folder)) == ("blue", "green", "red")
    assert read_model_labels(None) == ()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    auto, two = AutoModelForSequenceClassification, Labels(problem="single-label", names=("a", "b"))
    model = load_model(Model(name=str(folder)), tokenizer, max_length=8, seed=0, auto=auto, fields=two.fields())
    assert model.classifier.weight.shape[0] == 2
    assert model.config.id2label == {0: "a", 1: "b"}
    assert (
        "trained for other labels (blue, green, red): classifier.bias, classifier.weight start at random" in caplog.text
    )
    wrong = Model(name=str(folder), config={"intermediate_size": 24})
    with pytest.raises(ValueError, match="another shape than its configuration says"):
        load_model(wrong, tokenizer, max_length=8, seed=0, auto=auto, fields=two.fields())


def test_blocks_are_no_examples_of_a_classification(tmp_path: Path) -> None:
    config = config_for(tmp_path, output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"batch\.layout blocks joins documents"):
        train(replace(config, batch=replace(config.batch, layout="blocks")))
    assert not (tmp_path / "out").exists()


def test_the_command_classifies_texts_pairs_and_files(trained: tuple[Path, dict[str, float]], run) -> None:
    folder = str(trained[0])
    model, tokenizer = load_classifier(folder)
    expected = classify(model, tokenizer, ["the red fox"], ["a dog"])[0]
    status, output, error = run("classify", folder, "the red fox", "--pair", "a dog", "--top-k", "2")
    assert (status, error) == (None, [])
    assert [line.split()[:2] for line in output] == [[f"{each.score:.1%}", each.label] for each in expected[:2]]
    assert output[0].endswith("the red fox | a dog")
    source = trained[0].parent / "colours.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    words = ("--file", str(source), "--column", "sentence", "--pair-column", "other", "--json")
    lines = [json.loads(line) for line in run("classify", folder, *words)[1]]
    assert [line["input"] for line in lines] == [row["sentence"] for row in rows]
    assert [line["pair"] for line in lines] == [row["other"] for row in rows]
    assert [line["labels"][0]["label"] for line in lines] == [row["colour"] for row in rows]
    assert len(run("classify", folder, stdin="the red fox\na blue one\n")[1]) == 2
    for wrong in (("x", "--file", str(source)), ("x", "--pair-column", "other"), ("--file", "none.jsonl")):
        status, output, error = run("classify", folder, *wrong)
        assert (status, output, len(error)) == (2, [], 1)
    for words, flag in (
        (("--column", "x"), "--column"),
        (("--column", "sentence", "--pair-column", "x"), "--pair-column"),
    ):
        assert run("classify", folder, "--file", str(source), *words)[2][0].endswith(f"Pass {flag}")


def test_the_command_evaluates_as_training_did_and_on_other_data(
    trained: tuple[Path, dict[str, float]], run, tmp_path: Path
) -> None:
    folder, results = trained
    figures = json.loads(run("evaluate", str(folder), "--json")[1][-1])
    assert figures == {name: results[name] for name in figures}
    checkpoint = folder / "checkpoint-60"  # the last one
    assert json.loads(run("evaluate", str(checkpoint), "--json")[1][-1]) == figures
    assert "give --data.source too" in run("evaluate", str(folder), "--data.eval-fraction", "0.1")[2][-1]
    source = write_colours(tmp_path / "more.jsonl")
    columns = ("--data.column", "sentence", "--data.pair-column", "other", "--data.label-column", "colour")
    status, output, _ = run("evaluate", str(folder), "--data.source", source, *columns)
    assert status is None
    assert {line.split()[0] for line in output} == {"eval_loss", "accuracy", "f1", "matthews"}
    one = tmp_path / "one.jsonl"  # of a single class: no problem for a model that knows its labels
    one.write_text(json.dumps({"sentence": "the red fox", "other": "a dog", "colour": "red"}))
    figures = json.loads(run("evaluate", str(folder), "--data.source", str(one), *columns, "--json")[1][-1])
    assert figures["accuracy"] == 1.0
    strange = tmp_path / "strange.jsonl"
    row = {"sentence": "the red fox", "other": "a dog"}
    for colours in (["pink"], ["pink", "red", "blue"], ["red", "pink", "green", "blue"], [7, 9]):
        strange.write_text("".join(json.dumps({**row, "colour": colour}) + "\n" for colour in colours))
        status, output, error = run("evaluate", str(folder), "--data.source", str(strange), *columns)
        assert (status, output) == (2, [])
        assert ("'pink'" if "pink" in colours else "'7', '9'") in error[-1]
        assert "(the model knows blue, green, red)" in error[-1]


def test_a_trained_classifier_is_evaluated_by_its_own_names_for_labels(trained, run, tmp_path: Path) -> None:
    names, columns = ["red", "blue"], ("--data.column", "sentence", "--data.pair-column", "other")
    features = Features({"sentence": Value("string"), "other": Value("string"), "label": ClassLabel(names=names)})
    rows = {"sentence": ["the red fox", "the blue fox"] * 3, "other": ["a dog"] * 6, "label": [0, 1] * 3}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    status, output, _ = run("evaluate", str(trained[0]), "--data.source", str(tmp_path / "saved"), *columns, "--json")
    assert (status, json.loads(output[-1])["accuracy"]) == (None, 1.0)


def saved(folder: Path, tokenizer, **fields: Any) -> str:
    """A classifier that minilm did not train."""
    size = {**SIZE, "max_position_embeddings": 64, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    BertForSequenceClassification(BertConfig(**size, **fields)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("fields", [{"problem_type": "regression"}, {}])
def test_a_regression_is_evaluated_as_one_where_all_numbers_are_whole(fields, tokenizer, tmp_path: Path) -> None:
    source = tmp_path / "scores.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {i}", "label": i % 4}) + "\n" for i in range(8)))
    model = saved(tmp_path / "model", tokenizer, num_labels=1, **fields)
    assert evaluate(model, Data(source=str(source))).keys() == {"eval_loss", "pearson", "spearman", "mse"}


def test_labels_of_a_model_without_names_are_taken_by_number_and_as_many(
    tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, figures = saved(tmp_path / "model", tokenizer, num_labels=3), []
    for name, feature in (("numbers", Value("int64")), ("names", NAMES)):
        labelled([0, 2, 1, 1], feature).save_to_disk(tmp_path / name)
        figures.append(evaluate(model, Data(source=str(tmp_path / name))))
    assert figures[0] == figures[1]
    pairs = "'no' is 'LABEL_0', 'yes' is 'LABEL_1', 'maybe' is 'LABEL_2'"
    warning = f"labels are matched with the checkpoint's by number: {pairs}"
    assert [warning in message for message in caplog.messages if "WARNING" in message] == [True]
    labelled([0, 1], ClassLabel(names=["no", "yes"])).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"not trained for: 'no', 'yes' \(the model knows LABEL_0, LABEL_1, LABEL_2\)"):
        evaluate(model, Data(source=str(tmp_path / "two")))
    assert not AcceleratorState._shared_state  # the next one may choose its precision
