"""Label columns as users have them, each with the classes, ids or numbers that minilm must read from it."""

import csv
import json
import logging
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    pipeline,
)

from minilm import Batch, Classification, Config, Data, Model, Optim, Run, Tokens
from minilm.commands.evaluate import evaluate
from minilm.data.documents import load_documents
from minilm.data.labels import check_model_labels, read_labels
from minilm.models.inference import classify
from minilm.models.loading import load_model
from minilm.models.model_config import read_model_labels
from minilm.objectives.factory import prepare_data
from minilm.train import train

pytestmark = pytest.mark.scorecard(31)

SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
NO_YES = ClassLabel(names=["no", "yes"])


def labelled(values: list[Any], feature: Any = None) -> Dataset:
    rows = {"text": [f"text {i}" for i in range(len(values))], "label": values}
    return Dataset.from_dict(rows, features=feature and Features({"text": Value("string"), "label": feature}))


def read(values: list[Any], feature: Any = None, known: tuple[str, ...] = (), **options: Any) -> Any:
    column = labelled(values, feature)
    problem = options.pop("problem", "auto")
    # A copy, because the same object twice means that a model is only evaluated.
    return read_labels(column, {"": labelled(values, feature)}, Classification(problem=problem), known, **options)


# situation: (values, type, the checkpoint's labels, expected names by id, expected ids)
CLASSES: dict[str, tuple[list[Any], Any, tuple[str, ...], tuple[str, ...], list[int]]] = {
    "numbers 0..n-1": ([2, 0, 1, 1], None, (), ("0", "1", "2"), [2, 0, 1, 1]),
    "stars 1 to 5": ([5, 1, 3, 2, 4], None, (), ("1", "2", "3", "4", "5"), [4, 0, 2, 1, 3]),
    "sentiment -1, 0, 1": ([1, -1, 0, -1], None, (), ("-1", "0", "1"), [2, 0, 1, 0]),
    "sentiment -1 and 1": ([1, -1, -1], None, (), ("-1", "1"), [1, 0, 0]),
    "numbers with gaps": ([10, 2, 33], None, (), ("2", "10", "33"), [1, 0, 2]),
    "large numbers": ([16225007011, 3], None, (), ("3", "16225007011"), [1, 0]),
    "negative numbers": ([-3, -20, 5], None, (), ("-20", "-3", "5"), [1, 0, 2]),
    "unsigned bytes": ([200, 7], Value("uint8"), (), ("7", "200"), [1, 0]),
    "numbers as text": (["10", "2", "1"], None, (), ("1", "2", "10"), [2, 1, 0]),
    "codes with a leading zero": (["10", "02", "01"], None, (), ("01", "02", "10"), [2, 1, 0]),
    "other digits": (["２", "1"], None, (), ("1", "２"), [1, 0]),
    "LABEL_0 and so on": (["LABEL_10", "LABEL_2", "LABEL_1"], None, (), ("LABEL_1", "LABEL_2", "LABEL_10"), [2, 1, 0]),
    "words": (["b", "a", "b"], None, (), ("a", "b"), [1, 0, 1]),
    "words with space": (["not good", " good"], None, (), (" good", "not good"), [1, 0]),
    "None and NaN as words": (["None", "NaN", "null"], None, (), ("NaN", "None", "null"), [1, 0, 2]),
    "truth values": ([True, False], None, (), ("False", "True"), [1, 0]),
    "a ClassLabel": ([1, 0], ClassLabel(names=["z", "a"]), (), ("z", "a"), [1, 0]),
    "a ClassLabel with a class that no row has": (
        [1, 0],
        ClassLabel(names=["z", "a", "b"]),
        (),
        ("z", "a", "b"),
        [1, 0],
    ),
    "names in the checkpoint's order": (["pos", "neg"], None, ("pos", "neg"), ("pos", "neg"), [0, 1]),
    "names in other case": (["neutral", "positive"], None, ("POSITIVE", "NEUTRAL"), ("POSITIVE", "NEUTRAL"), [1, 0]),
    "names with space around them": ([" yes", "no "], None, ("yes", "no"), ("yes", "no"), [0, 1]),
    "a ClassLabel in other order and case": ([0, 1], NO_YES, ("Yes", "No"), ("Yes", "No"), [1, 0]),
    "some of the checkpoint's names": (["c", "a"], None, ("a", "b", "c"), ("a", "b", "c"), [2, 0]),
    "label_1 for LABEL_1": (["label_1", "label_0"], None, ("LABEL_0", "LABEL_1"), ("LABEL_0", "LABEL_1"), [1, 0]),
    "numbers for LABEL_0": ([1, 0], None, ("LABEL_0", "LABEL_1"), ("LABEL_0", "LABEL_1"), [1, 0]),
    "numbers for names": ([2, 0], None, ("b", "a", "c"), ("b", "a", "c"), [2, 0]),
    "numbers that are names": ([1, 5], None, ("1", "2", "3", "4", "5"), ("1", "2", "3", "4", "5"), [0, 4]),
    "numbers that are names in another order": ([1, -1], None, ("1", "0", "-1"), ("1", "0", "-1"), [0, 2]),
}
NEW: dict[str, tuple[list[Any], Any, tuple[str, ...], tuple[str, ...], list[int]]] = {
    "other names, as many": (["b", "a"], None, ("x", "y"), ("a", "b"), [1, 0]),
    "words for LABEL_0": (["b", "a"], None, ("LABEL_0", "LABEL_1"), ("a", "b"), [1, 0]),
    "numbers from 0 for names from 1": ([0, 1], None, ("1", "2"), ("0", "1"), [0, 1]),
    "stars for names of stars": ([5, 1], None, ("1 star", "2 stars"), ("1", "5"), [1, 0]),
    "one name too many": (["a", "b", "c"], None, ("a", "b"), ("a", "b", "c"), [0, 1, 2]),
    "two names that the checkpoint has as one": (["Yes", "yes"], None, ("YES", "no"), ("Yes", "yes"), [0, 1]),
    "a ClassLabel of other names": ([1, 0], NO_YES, ("b", "a"), ("no", "yes"), [1, 0]),
}


@pytest.mark.parametrize("situation", CLASSES | NEW)
def test_classes_have_the_names_that_the_rows_have(situation: str) -> None:
    values, feature, known, names, ids = (CLASSES | NEW)[situation]
    labels, train_ids, eval_ids = read(values, feature, known)
    assert (labels.problem, labels.names) == ("single-label", names)
    assert train_ids.tolist() == eval_ids.tolist() == ids
    assert labels.same_as_checkpoint == bool(known and situation in CLASSES)


HOT = [[0, 1, 1], [0, 0, 0], [1, 0, 0]]
# situation: (values, type, options, expected names by id, expected zeros and ones, a part of the summary)
SEVERAL: dict[str, tuple[list[Any], Any, dict[str, Any], tuple[str, ...], list[list[int]], str]] = {
    "multi-hot floats": ([[float(x) for x in row] for row in HOT], None, {}, ("0", "1", "2"), HOT, "multi-hot lists"),
    "multi-hot integers": (HOT, None, {}, ("0", "1", "2"), HOT, "multi-hot lists"),
    "multi-hot truth values": ([[x == 1 for x in r] for r in HOT], None, {}, ("0", "1", "2"), HOT, "multi-hot lists"),
    "one-hot pairs": ([[0, 1], [1, 0]], None, {}, ("0", "1"), [[0, 1], [1, 0]], "multi-hot lists"),
    "multi-hot for a checkpoint": (HOT, None, {"known": ("x", "y", "z")}, ("x", "y", "z"), HOT, "multi-hot lists"),
    "lists of numbers": (
        [[2, 0], [], [1]],
        None,
        {},
        ("0", "1", "2"),
        [[1, 0, 1], [0] * 3, [0, 1, 0]],
        "lists of numbers",
    ),
    "lists of numbers from 1": (
        [[3, 1], [2, 1]],
        None,
        {},
        ("1", "2", "3"),
        [[1, 0, 1], [1, 1, 0]],
        "lists of numbers",
    ),
    "lists of one number": ([[0], [1]], None, {}, ("0", "1"), [[1, 0], [0, 1]], "lists of numbers"),
    "lists of names": (
        [["b", "a"], [], ["c"]],
        None,
        {},
        ("a", "b", "c"),
        [[1, 1, 0], [0] * 3, [0, 0, 1]],
        "lists of names",
    ),
    "lists of a ClassLabel": ([[1], [0, 1]], List(NO_YES), {}, ("no", "yes"), [[0, 1], [1, 1]], "lists of"),
    "cells with commas": (
        ["joy, anger", "joy", " ", "anger"],
        None,
        {"separator": ","},
        ("anger", "joy"),
        [[1, 1], [0, 1], [0, 0], [1, 0]],
        "lists of names",
    ),
    "multi-hot cells": (
        ["0 1 1", "1 0 0"],
        None,
        {"separator": " "},
        ("0", "1", "2"),
        [[0, 1, 1], [1, 0, 0]],
        "multi-hot",
    ),
    "names of a checkpoint in lists": (
        [["Joy"], ["anger", "joy"]],
        None,
        {"known": ("x", "joy", "Anger")},
        None,
        None,
        "differ only in case",
    ),
    "lists for a checkpoint": (
        [["JOY"], ["anger"]],
        None,
        {"known": ("joy", "Anger")},
        ("joy", "Anger"),
        [[1, 0], [0, 1]],
        "",
    ),
}


@pytest.mark.parametrize("situation", SEVERAL)
def test_lists_of_labels_are_read_in_one_way_and_the_summary_names_it(situation: str) -> None:
    values, feature, options, names, expected, part = SEVERAL[situation]
    labels, train_places, eval_places = read(values, feature, **options)
    assert labels.problem == "multi-label"
    assert part in " ".join(labels.summary)
    if names is not None:
        assert labels.names == names
        assert train_places.tolist() == eval_places.tolist() == expected


# situation: (values, type, problem, expected numbers, a part of the summary)
NUMBERS: dict[str, tuple[list[Any], Any, str, list[float], str]] = {
    "decimals": ([0.5, 4.5], None, "auto", [0.5, 4.5], "regression, train 0.5 to 4.5, mean 2.5; eval 0.5 to 4.5"),
    "the largest of float32": ([0.0, 2.0**128 - 2.0**104], None, "auto", [0, 2.0**128 - 2.0**104], "train 0 to 3.4"),
    "numbers with a plus as text": (["+1.5", "+2", "-3"], None, "regression", [1.5, 2, -3], "train -3 to 2"),
    "whole decimals": ([1.0, 3.0], None, "auto", [1, 3], "all numbers are whole. If they are classes"),
    "whole numbers -3 to 3": ([-3, 0, 3], None, "regression", [-3, 0, 3], "train -3 to 3, mean 0"),
    "numbers as text": (["-1.5", " 2", "1e1"], None, "regression", [-1.5, 2, 10], "train -1.5 to 10"),
    "a ClassLabel of numbers": ([0, 1], ClassLabel(names=["1", "5"]), "regression", [1, 5], "train 1 to 5"),
    "a ClassLabel of words": ([0, 1], NO_YES, "regression", [0, 1], "stand for classes, in the order of 'no', 'yes'"),
}


@pytest.mark.parametrize("situation", NUMBERS)
def test_a_regression_has_the_numbers_of_the_rows(situation: str) -> None:
    values, feature, problem, expected, part = NUMBERS[situation]
    labels, numbers, _ = read(values, feature, problem=problem)
    assert (labels.problem, labels.names, numbers.tolist()) == ("regression", ("LABEL_0",), expected)
    assert part in " ".join(labels.summary)


ONE_CLASS = labelled(["a", "a"])
# situation: (training documents, evaluation documents, options, a pattern in the error)
REFUSED: dict[str, tuple[Dataset, Dataset, dict[str, Any], str]] = {
    "a single class": (ONE_CLASS, labelled(["a"]), {}, "all training documents have the label 'a'"),
    "a single class to train and evaluate on": (ONE_CLASS, ONE_CLASS, {}, "all documents have the label 'a'"),
    "a part whose labels are all -1": (
        labelled([0, 1]),
        labelled([-1, -1]),
        {},
        "every label of the evaluation doc.* is -1",
    ),
    "no part with a label": (labelled([-1, -1]), labelled([-1]), {}, "every label of the training documents is -1"),
    "-1 of a ClassLabel": (labelled([0, 1, -1], NO_YES), labelled([0], NO_YES), {}, "row 2 of .* kept secret"),
    "-1 in the evaluation alone": (labelled([0, 1]), labelled([0, -1]), {}, "row 1 of the evaluation .* kept secret"),
    "a class of the evaluation alone": (
        labelled(["a", "b"]),
        labelled(["a", "c"]),
        {},
        "row 1 of the eval.*no training",
    ),
    "multi-hot of two lengths": (
        labelled([[1.0, 0.0], [1.0]]),
        labelled([[1.0, 0.0]]),
        {},
        "row 1 of .* 1 entries, but",
    ),
    "a multi-hot list with halves": (labelled([[1.0, 0.5]] * 2), labelled([[1.0, 0.0]]), {}, "holds a 0 or 1 for each"),
    "counts in lists": (labelled([[2, 2], [0, 1]]), labelled([[0, 1]]), {}, "row 0 of .*the list holds '2' twice"),
    "a decimal as a class": (
        labelled([0.5, 1.0]),
        labelled([1.0]),
        {"problem": "single-label"},
        "not a class; pass --obj",
    ),
    "a decimal comma": (
        labelled(["0,5", "1"]),
        labelled(["1"]),
        {"problem": "regression"},
        "row 0 .*'0,5': a regression",
    ),
    "truth values as numbers": (labelled([True, False]), labelled([True]), {"problem": "regression"}, "needs numbers"),
    "a separator of a ClassLabel": (
        labelled([0, 1], NO_YES),
        labelled([0], NO_YES),
        {"separator": ","},
        "not text to split",
    ),
    "a separator of whole numbers": (labelled([0, 1]), labelled([0]), {"separator": "|"}, "int64.*not text to split"),
    "a separator of numbers": (labelled([0.5, 1.0]), labelled([1.0]), {"separator": "|"}, "not text to split"),
    "a separator of truth values": (labelled([True, False]), labelled([True]), {"separator": "|"}, "not text to split"),
    "a separator of lists": (labelled([["a|b"], ["c"]]), labelled([["c"]]), {"separator": "|"}, "not text to split"),
    "a separator of whole numbers in the evaluation": (
        labelled(["0|1", "1"]),
        labelled([0, 1]),
        {"separator": "|"},
        "label column of the eval.*not text to split",
    ),
    "a decimal beyond float32": (labelled([0.5, 1e39]), labelled([0.5]), {}, "row 1 of the train.*1e.39: .*finite"),
    "a decimal beyond float32 to evaluate on": (labelled([0.5, 1.5]), labelled([-1e39]), {}, "row 0 of the eval.*fini"),
    "a decimal just beyond float32": (labelled([3.4028236e38]), labelled([0.5]), {}, "row 0 of .*finite"),
    "text beyond float32": (labelled(["1", "1e39"]), labelled(["1"]), {"problem": "regression"}, "row 1 of .*finite"),
    "text beyond float64": (labelled(["1", "-1e400"]), labelled(["1"]), {"problem": "regression"}, "row 1 of .*finite"),
    "a text of 400 digits": (labelled(["1", "9" * 400]), labelled(["1"]), {"problem": "regression"}, "row 1 .*finite"),
    "a ClassLabel beyond float32": (
        labelled([0, 1], ClassLabel(names=["1", "1e39"])),
        labelled([0], ClassLabel(names=["1", "1e39"])),
        {"problem": "regression"},
        "row 1 of .*finite",
    ),
    "-1 of a ClassLabel of numbers": (
        labelled([0, -1], ClassLabel(names=["1", "5"])),
        labelled([0], ClassLabel(names=["1", "5"])),
        {"problem": "regression"},
        "row 1 of .* kept secret",
    ),
    "a separator at the end": (
        labelled(["a,b", "a,"]),
        labelled(["a"]),
        {"separator": ","},
        "row 1 .* a part is empty",
    ),
    "a class where training has lists": (
        labelled([["a"], ["b"]]),
        labelled(["a"]),
        {},
        "row 0 of the eval.* not a list of labels",
    ),
}


@pytest.mark.parametrize("situation", REFUSED)
def test_labels_that_do_not_fit_a_problem_are_refused_in_one_line(situation: str) -> None:
    documents, held_out, options, pattern = REFUSED[situation]
    options = dict(options)
    chosen = Classification(problem=options.pop("problem", "auto"))
    with pytest.raises(ValueError, match=rf"^[^\n]*{pattern}[^\n]*\Z"):
        read_labels(documents, {"": held_out}, chosen, **options)


def test_minus_one_is_a_class_of_an_evaluation_where_training_has_it() -> None:
    labels, _, ids = read_labels(labelled([-1, 0, 1]), {"": labelled([-1, -1])}, Classification())
    assert (labels.names, ids.tolist()) == (("-1", "0", "1"), [0, 0])
    documents = labelled([-1, -1])
    labels, _, ids = read_labels(documents, {"": documents}, Classification(), ("-1", "0", "1"))
    check_model_labels(labels, ("-1", "0", "1"))
    assert ids.tolist() == [0, 0]


def test_each_evaluation_part_is_read_by_its_own_names() -> None:
    parts = {"a": labelled([0, 1], NO_YES), "b": labelled([0, 1], ClassLabel(names=["yes", "no"]))}
    assert read_labels(labelled([1, 0], NO_YES), parts, Classification())[2].tolist() == [0, 1, 1, 0]


# situation: (labels, a part of the summary)
SUMMARIES: dict[str, tuple[list[Any], str]] = {
    "names and counts": (
        ["b", "a", "b"],
        "labels in 'label': single-label, 2 classes: 'a' (1 train, 1 eval), 'b' (2 train, 2",
    ),
    "ten names of many": ([*range(25)], "'9' (1 train, 1 eval) and 15 more"),
    "whole numbers": ([1, 2, 3], "read as classes. To predict a number, pass --objective.problem regression"),
    "scores as text": (["0.5", "1.5", "2"], "numbers written as text, and are read as classes"),
    "several in a cell": (
        ["joy", "anger", "joy,anger"],
        "'joy,anger' is read as one class. If it lists several labels",
    ),
    "lists as text": (["['a']", "['a', 'b']"], """is read as one class. If it is a list"""),
    "case apart": (["Good", "good", "bad"], "'Good', 'good' differ only in case or spaces"),
    "free text": ([f"text {i}" for i in range(12)], "12 of the 12 classes have a single training example"),
}


@pytest.mark.parametrize("situation", SUMMARIES)
def test_the_summary_says_how_the_labels_were_read(situation: str) -> None:
    values, part = SUMMARIES[situation]
    assert part in "\n".join(read(values)[0].summary)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(str.strip)
COLUMNS = st.one_of(
    st.lists(NAMES, min_size=2, max_size=30),
    st.lists(st.integers(-(2**40), 2**40), min_size=2, max_size=30),
    st.lists(st.integers(-3, 5), min_size=2, max_size=30),
    st.lists(st.booleans(), min_size=2, max_size=30),
).filter(lambda column: len(set(column)) > 1)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(column=COLUMNS, order=st.randoms(use_true_random=False))
def test_ids_give_the_written_names_back_whatever_the_order_of_the_rows(column: list[Any], order: Any) -> None:
    labels, ids, _ = read(column)
    assert [labels.names[index] for index in ids] == [str(value) for value in column]
    assert sorted(set(ids.tolist())) == [*range(len(set(column)))]
    places = [*range(len(column))]
    order.shuffle(places)
    other, other_ids, _ = read([column[place] for place in places])
    assert (other.names, other_ids.tolist()) == (labels.names, [ids[place] for place in places])
    config = BertConfig(**labels.fields()).to_dict()
    again = BertConfig(**json.loads(json.dumps(config)))
    assert (tuple(again.id2label[i] for i in range(len(labels.names))), again.num_labels) == (
        labels.names,
        len(set(column)),
    )
    # The names of a checkpoint are kept, whatever the order of its ids.
    known = tuple(reversed(labels.names))
    kept, kept_ids, _ = read(column, known=known)
    assert kept.same_as_checkpoint
    assert [known[index] for index in kept_ids] == [str(value) for value in column]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(rows=st.lists(st.lists(st.sampled_from("abcde"), unique=True), min_size=2, max_size=20))
def test_lists_and_cells_that_list_labels_mean_the_same(rows: list[list[str]]) -> None:
    if len({frozenset(row) for row in rows}) < 2:
        return
    labels, places, _ = read(rows, List(Value("string")))
    cells, cell_places, _ = read([" ; ".join(row) for row in rows], separator=";")
    assert (labels.names, places.tolist()) == (cells.names, cell_places.tolist())
    for row, hot in zip(rows, places, strict=True):
        assert {labels.names[place] for place in hot.nonzero()[0]} == set(row)
    if len(labels.names) > 1:
        assert read(places.tolist())[1].tolist() == places.tolist()


def saved(folder: Path, tokenizer: Any, kind: Any = BertForSequenceClassification, **fields: Any) -> str:
    """Save a checkpoint with random weights, without the help of minilm, and return its folder."""
    size = {**SIZE, "max_position_embeddings": 64, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(7)
    kind(BertConfig(**size, **fields)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def names(*labels: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


def load(name: str, tokenizer: Any, values: list[Any]) -> Any:
    labels, _, _ = read(values, known=read_model_labels(name))
    fields, auto = labels.fields(), AutoModelForSequenceClassification
    return load_model(
        Model(name=name),
        tokenizer,
        max_length=16,
        seed=1,
        auto=auto,
        fields=fields,
        new_labels=not labels.same_as_checkpoint,
    )


def test_a_head_of_other_labels_starts_at_random_and_a_head_of_the_same_labels_is_kept(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = saved(tmp_path / "model", tokenizer, **names("NEUTRAL", "POSITIVE"))
    before = AutoModelForSequenceClassification.from_pretrained(name).state_dict()
    kept = load(name, tokenizer, ["positive", "neutral"])
    assert kept.config.id2label == {0: "NEUTRAL", 1: "POSITIVE"}
    assert all(torch.equal(weight, before[key]) for key, weight in kept.state_dict().items())
    assert "other labels" not in caplog.text
    new = load(name, tokenizer, ["good", "bad"])
    assert new.config.id2label == {0: "bad", 1: "good"}
    changed = {key for key, weight in new.state_dict().items() if not torch.equal(weight, before[key])}
    assert changed == {"classifier.weight"}  # the bias is zero in both
    assert (
        "was trained for other labels (NEUTRAL, POSITIVE): classifier.bias, classifier.weight start at" in caplog.text
    )
    again = load(name, tokenizer, ["good", "bad"])
    assert torch.equal(again.classifier.weight, new.classifier.weight)


def test_the_head_of_a_tagger_is_not_used_for_a_classifier(tokenizer: Any, tmp_path: Path) -> None:
    name = saved(tmp_path / "model", tokenizer, BertForTokenClassification, **names("a", "b"))
    before = BertForTokenClassification.from_pretrained(name).classifier.weight
    assert read_model_labels(name) == ()
    assert not torch.equal(load(name, tokenizer, ["a", "b"]).classifier.weight, before)


def test_the_labels_of_a_checkpoint_are_those_of_its_pipeline(tokenizer: Any, tmp_path: Path) -> None:
    name = saved(tmp_path / "model", tokenizer, **names("b", "a"))
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    del config["label2id"]
    path.write_text(json.dumps(config))
    answered = {row["label"] for row in pipeline("text-classification", model=name, top_k=None)("a text")[0]}
    assert set(read_model_labels(name)) == answered == {"a", "b"}
    assert read_model_labels(name) == ("b", "a")


def rows_in(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


BLANK = ["a text", "", "another", " ", "the last"]


@pytest.mark.parametrize("kind", ["jsonl", "txt", "stdin"])
def test_classify_keeps_every_row_and_prints_its_number(kind: str, tokenizer: Any, tmp_path: Path, run: Any) -> None:
    name = saved(tmp_path / "model", tokenizer, **names("b", "a", "c"))
    (tmp_path / "rows.txt").write_text("\n".join(BLANK) + "\n")
    rows_in(tmp_path / "rows.jsonl", [{"text": text} for text in BLANK])
    words = () if kind == "stdin" else ("--file", str(tmp_path / f"rows.{kind}"))
    stdin = "\n".join(BLANK) + "\n" if kind == "stdin" else ""
    lines = [json.loads(line) for line in run("classify", name, *words, "--json", stdin=stdin)[1]]
    expected = pipeline("text-classification", model=name)(BLANK)
    assert [line["input"] for line in lines] == BLANK
    assert [line["labels"][0]["label"] for line in lines] == [row["label"] for row in expected]
    assert [line["row"] for line in lines] == [0, 1, 2, 3, 4]
    plain = run("classify", name, *words, stdin=stdin)[1]
    assert len(plain) == 5
    assert [line.split()[0] for line in plain] == ["0", "1", "2", "3", "4"]


def test_the_output_of_texts_on_the_command_line_has_no_numbers(tokenizer: Any, tmp_path: Path, run: Any) -> None:
    name = saved(tmp_path / "model", tokenizer, **names("b", "a", "c"))
    assert "row" not in json.loads(run("classify", name, "a text", "--json")[1][0])
    assert run("classify", name, "a text")[1][0].split()[1] in ("b", "a", "c")
    mixed = [json.loads(line) for line in run("classify", name, "a text", "-", "--json", stdin="\nmore\n")[1]]
    assert [(line["row"], line["input"]) for line in mixed] == [(0, "a text"), (1, ""), (2, "more")]


@pytest.mark.parametrize("command", ["classify", "fill-mask", "generate"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--file", "FILE", "--column", "foo"), "--column foo: a .txt file has no columns; leave it out"),
        (("--column", "foo"), "--column describes the rows of --file: give --file too, or leave --column out"),
        (("a text", "--column", "text"), "--column describes the rows of --file"),
        (("a text", "--delimiter", ";"), "--delimiter describes the rows of --file"),
    ],
)
def test_a_flag_about_a_file_is_not_ignored(
    command: str, words: tuple[str, ...], message: str, tmp_path: Path, run: Any
) -> None:
    (tmp_path / "rows.txt").write_text("a text\n")
    words = tuple(word.replace("FILE", str(tmp_path / "rows.txt")) for word in words)
    status, output, error = run(command, "nowhere", *words, stdin="a text\n")
    assert (status, output, len(error)) == (2, [], 1)
    assert message in error[0]


def test_a_second_text_needs_a_file_with_columns(tmp_path: Path, run: Any) -> None:
    (tmp_path / "rows.txt").write_text("a text\n")
    status, output, error = run("classify", "nowhere", "--file", str(tmp_path / "rows.txt"), "--pair-column", "foo")
    assert (status, output, len(error)) == (2, [], 1)
    assert error == ["error: --pair-column foo: a .txt file has no columns; leave it out"]


def test_a_text_without_tokens_has_no_label_and_keeps_its_place(tokenizer: Any, tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(saved(tmp_path / "model", tokenizer)).eval()
    plain = type(tokenizer).from_pretrained(tmp_path / "model")
    plain.backend_tokenizer.post_processor = processors.Sequence([])
    answers = classify(model, plain, ["a text", "", "another"])
    assert [len(labels) for labels in answers] == [2, 0, 2]


def test_fill_mask_and_generate_keep_blank_rows(tokenizer: Any, tmp_path: Path, run: Any) -> None:
    masked = saved(tmp_path / "masked", tokenizer, BertForMaskedLM)
    mask = tokenizer.mask_token
    file = rows_in(tmp_path / "rows.jsonl", [{"text": text} for text in (f"a {mask}", "", f"{mask} and {mask}")])
    lines = [json.loads(line) for line in run("fill-mask", masked, "--file", file, "--json")[1]]
    assert [(line["row"], line["mask"], len(line["fills"])) for line in lines] == [
        (0, 0, 5),
        (1, None, 0),
        (2, 0, 5),
        (2, 1, 5),
    ]
    piped = run("fill-mask", masked, "--json", stdin=f"a {mask}\n\n{mask} and {mask}\n")[1]
    assert [json.loads(line) for line in piped] == lines
    plain = [line for line in run("fill-mask", masked, "--file", file, "--top-k", "1")[1] if line]
    assert [line.split()[0] for line in plain] == ["0", "1", "2", "2"]
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=len(tokenizer))).save_pretrained(
        tmp_path / "causal"
    )
    tokenizer.save_pretrained(tmp_path / "causal")
    file = rows_in(tmp_path / "more.jsonl", [{"text": text} for text in ("a text", "", "another")])
    words = ("--file", file, "--max-new-tokens", "1")
    lines = [json.loads(line) for line in run("generate", str(tmp_path / "causal"), *words, "--json")[1]]
    assert [(line["row"], line["input"]) for line in lines] == [(0, "a text"), (1, ""), (2, "another")]
    stdin = "a text\n\nanother\n"
    piped = run("generate", str(tmp_path / "causal"), *words[2:], "--json", stdin=stdin)[1]
    assert [json.loads(line) for line in piped] == lines
    plain = run("generate", str(tmp_path / "causal"), *words[2:], stdin=stdin)[1]
    assert plain[0].startswith("0  a text")


def test_a_warning_counts_unknown_tokens_once(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, run: Any
) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=len(tokenizer)))
    model.save_pretrained(tmp_path / "causal")
    tokenizer = deepcopy(tokenizer)
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(tokenizer("q", add_special_tokens=False)["input_ids"][0])
    tokenizer.save_pretrained(tmp_path / "causal")
    with caplog.at_level(logging.WARNING, logger="minilm"):
        assert run("generate", str(tmp_path / "causal"), "qqq", "--max-new-tokens", "1")[0] is None
    assert sum("unknown to the model's tokenizer" in message for message in caplog.messages) == 1


def test_stars_are_trained_evaluated_and_answered_by_their_numbers(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, run: Any
) -> None:
    words = ("bad", "poor", "fair", "good", "great")
    rows = [{"text": f"it is {words[i % 5]} {'a' * (i % 4)}", "stars": i % 5 + 1, "sentence2": "x"} for i in range(100)]
    source = rows_in(tmp_path / "stars.jsonl", rows)
    config = Config(
        data=Data(source=source, label_column="stars", eval_fraction=0.2),
        model=Model(name=saved(tmp_path / "model", tokenizer, initializer_range=0.2)),
        objective=Classification(),
        batch=Batch(examples=20, max_length=32),
        optim=Optim(lr=1e-2),
        run=Run(max_steps=60, output_dir=str(tmp_path / "out"), precision="fp32", samples=("it is great",)),
    )
    with caplog.at_level(logging.INFO, logger="minilm"):
        results = train(config).figures
    assert results["accuracy"] == 1.0
    out = str(tmp_path / "out")
    lines = [
        message for message in caplog.messages if message.startswith("labels in 'stars': single-label, 5 classes: '1'")
    ]
    assert len(lines) == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["labels"][0] == lines[0]
    assert AutoConfig.from_pretrained(out).id2label == {i: str(i + 1) for i in range(5)}
    answers = pipeline("text-classification", model=out)([row["text"] for row in rows])
    assert [answer["label"] for answer in answers] == [str(row["stars"]) for row in rows]
    assert "it is great → 5" in (tmp_path / "out" / "README.md").read_text()
    caplog.clear()
    few = rows_in(tmp_path / "few.jsonl", [row for row in rows if row["stars"] == 4])
    assert evaluate(out, Data(source=few, label_column="stars"))["accuracy"] == 1.0
    strange = rows_in(tmp_path / "strange.jsonl", [{**row, "stars": row["stars"] - 1} for row in rows])
    with pytest.raises(ValueError, match=r"not trained for: '0' \(the model knows 1, 2, 3, 4, 5\)"):
        evaluate(out, Data(source=strange, label_column="stars"))


def test_evaluate_reports_a_second_text_once(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = saved(tmp_path / "model", tokenizer, **names("a", "b"))
    row = {"sentence1": "a text " * 30, "sentence2": "another", "label": "a"}
    source = rows_in(tmp_path / "rows.jsonl", [row, {**row, "label": "b"}])
    evaluate(name, Data(source=source, column="sentence1"))
    assert sum("the column sentence2 is not read" in message for message in caplog.messages) == 1
    assert [message for message in caplog.messages if "tokens and are cut" in message] == [
        "2 of 2 documents have more than batch.max_length=64 tokens and are cut"
    ]


def test_the_configuration_does_not_override_what_the_labels_decide(tokenizer: Any, tmp_path: Path) -> None:
    source = rows_in(tmp_path / "rows.jsonl", [{"text": f"a text {i}", "label": i % 3} for i in range(12)])
    for field, value in (("label2id", ["a"]), ("problem_type", "regression"), ("id2label", ["a", "b", "c"])):
        model = Model(type="bert", config={**SIZE, field: value})
        with pytest.raises(ValueError, match=rf"^model\.config\.{field}: the labels of the data decide it"):
            train(Config(data=Data(source=source), model=model, objective=Classification(), run=Run(precision="fp32")))


def test_a_permuted_checkpoint_keeps_its_classes(tokenizer: Any, tmp_path: Path, run: Any) -> None:
    rows = [{"text": f"it is {'good' if i % 2 else 'bad'} {'a' * (i % 4)}", "label": i % 2} for i in range(40)]
    for row in rows:
        row["label"] = ("negative", "positive")[row["label"]]
    source = rows_in(tmp_path / "rows.jsonl", rows)
    first = Config(
        data=Data(source=source, eval_source=source),
        model=Model(name=saved(tmp_path / "model", tokenizer, initializer_range=0.2, **names("POSITIVE", "NEGATIVE"))),
        objective=Classification(),
        batch=Batch(examples=20, max_length=32),
        optim=Optim(lr=1e-2),
        run=Run(max_steps=30, output_dir=str(tmp_path / "out"), precision="fp32"),
    )
    assert train(first).figures["accuracy"] == 1.0
    answers = pipeline("text-classification", model=str(tmp_path / "out"))([row["text"] for row in rows])
    assert [answer["label"] for answer in answers] == [row["label"].upper() for row in rows]
    # A step with a tiny learning rate leaves the trained head as it is, so each class must still be in its place.
    model, optim = Model(name=str(tmp_path / "out")), Optim(lr=1e-9)
    again = replace(
        first, model=model, optim=optim, run=replace(first.run, max_steps=1, output_dir=str(tmp_path / "2"))
    )
    assert train(again).figures["accuracy"] == 1.0


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_file_whose_cells_list_labels_is_read_to_its_end(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    cells = ["joy,anger", "joy", "", "anger", "1.50", "01,joy"] * 4
    rows = [{"text": f"a text {i}", "label": cell} for i, cell in enumerate(cells)]
    source = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        rows_in(source, rows)
    else:
        with source.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    data = Data(source=str(source), eval_source=str(source), label_separator=",")
    config = Config(
        data=data,
        model=Model(type="bert", config={**SIZE, "max_position_embeddings": 64}),
        tokens=Tokens(kind="wordpiece", vocab_size=300),
        objective=Classification(),
        batch=Batch(examples=24, max_length=16),
        run=Run(max_steps=1, output_dir=str(tmp_path / "out"), precision="fp32"),
    )
    prepared = prepare_data(config)
    assert prepared.labels is not None
    assert prepared.labels.names == ("01", "1.50", "anger", "joy")
    written = [{name for name in cell.split(",") if name} for cell in cells]
    assert prepared.train.labels is not None
    read = [{prepared.labels.names[i] for i in row.nonzero()[0]} for row in prepared.train.labels]
    assert read == written
    assert "4 documents have none" in " ".join(prepared.labels.summary)
    train(config)
    saved_config = AutoConfig.from_pretrained(tmp_path / "out")
    assert saved_config.problem_type == "multi_label_classification"
    assert evaluate(str(tmp_path / "out"), data).keys() == {"eval_loss", "accuracy", "f1", "f1_macro"}


def test_without_a_separator_a_blank_cell_is_refused(tmp_path: Path) -> None:
    source = rows_in(tmp_path / "rows.jsonl", [{"text": "a", "label": "joy"}, {"text": "b", "label": " "}])
    with pytest.raises(ValueError, match="holds no label"):
        load_documents(Data(source=source, eval_source=source), seed=0, labels=True)
