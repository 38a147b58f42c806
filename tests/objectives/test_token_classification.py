"""Token classification: transformers' own loss, seqeval's figures over split rows, and the names and ids of tags."""

import json
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from seqeval import metrics as seqeval
from sklearn import metrics
from torch.nn import functional as F
from transformers import AutoModelForTokenClassification, AutoTokenizer

from minilm import Config, Data, Model, TokenClassification, Tokens
from minilm.commands.evaluate import evaluate
from minilm.data.micro_batch import target_losses
from minilm.data.tokenizer_training import train_tokenizer
from minilm.objectives.factory import build_network, build_objective, prepare_data
from minilm.train import train
from tests.objectives.test_question_answering import (
    MODELS,
    build_config,
    compute_losses_with_teacher,
    write_jsonl,
)

FIGURES = ("precision", "recall", "f1", "accuracy")
PLACES, COLOURS = ("harbour", "tower", "stone"), ("old", "new")
OTHERS = ("the", "near", "of", "3-4", "(and)", "Ünder")
NAMES = ("O", "B-COL", "I-COL", "B-LOC", "I-LOC")


def make_rows(count: int, seed: int, *, longest: int = 30) -> list[dict[str, Any]]:
    """Return rows in which runs of places and of colours are spans."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.choices([*PLACES, *COLOURS, *OTHERS], k=draw.randint(1, longest))
        kinds = ["LOC" if word in PLACES else "COL" if word in COLOURS else "" for word in words]
        before = ["", *kinds]
        tags = [
            f"{'I' if kind == last else 'B'}-{kind}" if kind else "O" for last, kind in zip(before, kinds, strict=False)
        ]
        rows.append({"tokens": words, "ner_tags": tags})
    return rows


def make_config(source: str, folder: Path, model: str = "bert", **objective: Any) -> Config:
    return build_config(TokenClassification(**objective), source, folder, model, max_length=32)


@pytest.mark.parametrize("model", MODELS)
def test_the_loss_is_that_of_transformers(model: str, tmp_path: Path) -> None:
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", make_rows(30, 0)), tmp_path, model)
    prepared = prepare_data(config)
    objective = build_objective(config.objective)
    head = objective.head(build_network(config, prepared), prepared).eval()
    plain = build_network(config, prepared).eval()
    examples = prepared.train
    assert (examples.type_ids is not None) == (model != "distilbert")
    ids = np.arange(len(examples))
    collator = objective.collator(prepared.tokenizer, examples, seed=0, padded=not head.padding_free, multiple=1)
    with torch.inference_mode():
        losses = target_losses(head, collator([examples[int(i)] for i in ids], ids, epoch=0))
    first = 0
    for i in map(int, ids):
        targets = torch.from_numpy(examples.targets_of_tokens(i))[None]
        inputs = {"input_ids": torch.from_numpy(examples[i])[None], "labels": targets}
        if examples.type_ids is not None:
            inputs["token_type_ids"] = torch.from_numpy(examples.token_type_ids(i))[None]
        with torch.inference_mode():
            expected = float(plain(**inputs).loss)
        count = int((targets != -100).sum())
        own = losses[first : first + count]
        first += count
        assert float(own.mean()) == pytest.approx(expected, abs=1e-6, rel=1e-6)
    assert first == len(losses)


def tag_by_hand(folder: str, rows: list[dict[str, Any]], max_length: int) -> tuple[list[list[str]], float]:
    """Return the predicted tags of each row and the mean loss, by plain transformers.

    The words go in one after the other, as many as fit. They are cut where minilm cuts them.
    """
    model, tokenizer = (
        AutoModelForTokenClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    predictions, losses = [], []
    for row in rows:
        text = " ".join(row["tokens"])
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        starts = np.cumsum([0, *(len(word) + 1 for word in row["tokens"])])[:-1].tolist()
        # A token belongs to the word in which it begins, with the space before it.
        firsts = [
            next(i for i, (start, _) in enumerate(encoded["offset_mapping"]) if start >= max(0, at - 1))
            for at in starts
        ]
        ends = [*firsts[1:], len(encoded["input_ids"])]
        tags: list[str] = []
        word = 0
        while word < len(firsts):
            left, room = ends[-1] - firsts[word], max_length - 2
            size = -(-left // -(-left // room))
            stop = max([n for n in range(word, len(ends)) if ends[n] - firsts[word] <= size], default=word) + 1
            ids = encoded["input_ids"][firsts[word] : ends[stop - 1]]
            ids_1xL = torch.tensor([[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]])
            with torch.inference_mode():
                logits_LxC = model(input_ids=ids_1xL).logits[0]
            own = logits_LxC[[1 + firsts[n] - firsts[word] for n in range(word, stop)]]
            tags += [model.config.id2label[index] for index in own.argmax(1).tolist()]
            targets = torch.tensor([model.config.label2id[tag] for tag in row["ner_tags"][word:stop]])
            losses += F.cross_entropy(own, targets, reduction="none").tolist()
            word = stop
        predictions.append(tags)
    return predictions, float(np.mean(losses))


def score(rows: list[dict[str, Any]], predictions: list[list[str]]) -> dict[str, float]:
    expected = [row["ner_tags"] for row in rows]
    names = {"precision": seqeval.precision_score, "recall": seqeval.recall_score, "f1": seqeval.f1_score}
    figures = {name: float(compute(expected, predictions, zero_division=0)) for name, compute in names.items()}
    return {**figures, "accuracy": float(seqeval.accuracy_score(expected, predictions))}


def test_a_run_has_the_figures_of_seqeval_over_whole_rows(tmp_path: Path) -> None:
    # Many rows are longer than 32 tokens, so that cuts fall into spans.
    parts = {name: make_rows(count, count, longest=60) for name, count in (("train", 200), ("near", 30), ("far", 20))}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(tmp_path / "data")
    config = make_config(str(tmp_path / "data"), tmp_path)
    config = replace(config, data=replace(config.data, eval_split="near+far"), run=replace(config.run, max_steps=25))
    result = train(config)
    assert len(prepare_data(config).eval) > 50 + 20
    for part, rows in (("", parts["near"] + parts["far"]), ("_near", parts["near"]), ("_far", parts["far"])):
        predictions, loss = tag_by_hand(str(result.folder), rows, 32)
        expected = score(rows, predictions)
        assert {name: result.figures[f"{name}{part}"] for name in FIGURES} == pytest.approx(expected)
        assert result.figures[f"eval_loss{part}"] == pytest.approx(loss, rel=1e-5)
        assert 0.1 < expected["f1"] < expected["accuracy"] < 1
        # Cutting rows in two changes the count of spans: the figures are those of whole rows.
        halves = [
            half for row in rows for half in ({"ner_tags": row["ner_tags"][:9]}, {"ner_tags": row["ner_tags"][9:]})
        ]
        pieces = [half for tags in predictions for half in (tags[:9], tags[9:])]
        assert score(halves, pieces)["f1"] != expected["f1"]
    model = AutoModelForTokenClassification.from_pretrained(result.folder)
    assert tuple(model.config.id2label.values()) == NAMES
    assert model.config.label2id == {name: index for index, name in enumerate(NAMES)}
    assert set(FIGURES) | {"eval_loss"} <= json.loads((Path(result.folder) / "all_results.json").read_text()).keys()
    again = evaluate(result.folder)
    assert {name: again[name] for name in FIGURES} == {name: result.figures[name] for name in FIGURES}
    # Other data, with a part of the tags.
    few = [row for row in parts["near"] if "B-COL" not in row["ner_tags"]][:4] or [
        {"tokens": ["the"], "ner_tags": ["O"]}
    ]
    other = evaluate(result.folder, Data(source=write_jsonl(tmp_path / "few.jsonl", few)))
    assert {name: other[name] for name in FIGURES} == pytest.approx(
        score(few, tag_by_hand(str(result.folder), few, 32)[0])
    )


def test_plain_tags_have_means_over_the_tags(tmp_path: Path) -> None:
    rows = [
        {"w": row["tokens"], "pos": [tag.strip("BIO-") or "X" for tag in row["ner_tags"]]} for row in make_rows(120, 3)
    ]
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path)
    held_out = rows[:20]
    data = Data(
        source=str(tmp_path / "rows.jsonl"),
        eval_source=write_jsonl(tmp_path / "held.jsonl", held_out),
        column="w",
        label_column="pos",
    )
    result = train(replace(config, data=data, run=replace(config.run, max_steps=12)))
    as_tags = [{"tokens": row["w"], "ner_tags": row["pos"]} for row in held_out]
    predictions, _ = tag_by_hand(str(result.folder), as_tags, 32)
    sides = [tag for row in held_out for tag in row["pos"]], [tag for tags in predictions for tag in tags]
    means = metrics.precision_recall_fscore_support(*sides, average="macro", zero_division=0)[:3]
    expected = {**dict(zip(FIGURES, means, strict=False)), "accuracy": metrics.accuracy_score(*sides)}
    assert {name: result.figures[name] for name in FIGURES} == pytest.approx(expected)
    assert expected["f1"] != expected["accuracy"]
    assert result.model.config.id2label == {0: "COL", 1: "LOC", 2: "X"}


def test_spans_that_are_never_predicted_have_figures_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    objective = replace(build_objective(TokenClassification()), tags=NAMES)  # type: ignore[call-arg]
    targets, logits = torch.tensor([1, 2, 0]), torch.eye(5)[[0, 0, 0]]
    assert objective.metrics_with_notes(logits, targets, [3]) == {
        "precision": 0,
        "recall": 0,
        "f1": 0,
        "accuracy": pytest.approx(1 / 3),
    }
    assert not recwarn.list


def test_the_card_shows_samples_and_the_pipeline(tmp_path: Path) -> None:
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", make_rows(200, 9)), tmp_path)
    run = replace(config.run, max_steps=150, samples=("the old harbour", "the"))
    folder = Path(train(replace(config, run=run)).folder)
    card = (folder / "README.md").read_text()
    usage = card.partition("```python\n")[2].partition("```")[0].replace('model="out"', f'model="{folder}"')
    names: dict[str, Any] = {}
    exec(usage, names)
    found = names["model"]("the old harbour")
    assert [(each["entity_group"], each["end"]) for each in found] == [("COL", 7), ("LOC", 15)]
    assert (
        ", ".join(
            f"{word} ({each['entity_group']} {each['score']:.2f})"
            for word, each in zip(("old", "harbour"), found, strict=True)
        )
        in card
    )
    assert "only O" in card


def test_the_loss_with_a_teacher(tmp_path: Path) -> None:
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", make_rows(30, 0)), tmp_path)
    prepared, _, losses, models = compute_losses_with_teacher(config, 12)
    examples = prepared.train
    expected: list[float] = []
    for i in range(12):
        targets = torch.from_numpy(examples.targets_of_tokens(i))
        with torch.inference_mode():
            ours, theirs = (model(torch.from_numpy(examples[i])[None]).logits[0][targets != -100] for model in models)
        hard = F.cross_entropy(ours, targets[targets != -100], reduction="none")
        soft = F.kl_div((ours / 2).log_softmax(1), (theirs / 2).softmax(1), reduction="none").sum(1)
        expected += (0.7 * hard + 0.3 * 4 * soft).tolist()
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def save_with_classes(path: Path, rows: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    """Write rows as a dataset whose tags are numbers with names, in the given order."""
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=[*names]))})
    numbered = [{**row, "ner_tags": [names.index(tag) for tag in row["ner_tags"]]} for row in rows]
    Dataset.from_list(numbered, features=features).save_to_disk(path)
    return str(path)


def find_targets(config: Config) -> list[str]:
    """Return the name of each target of the training examples, in their order."""
    prepared = prepare_data(config)
    targets = np.concatenate([prepared.train.targets_of_tokens(i) for i in range(len(prepared.train))])
    return [prepared.fields["id2label"][index] for index in targets if index >= 0]


def test_every_way_to_write_tags_has_the_same_targets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = make_rows(20, 5)
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path)
    config = replace(config, data=replace(config.data, eval_split="train"))
    names = find_targets(config)
    assert names == [tag for row in rows for tag in row["ner_tags"]]
    # CoNLL files, with another column between the words and their tags.
    lines = ["\n".join(f"{word} NN {tag}" for word, tag in zip(*row.values(), strict=True)) for row in rows]
    (tmp_path / "rows.conll").write_text("\n\n".join(lines))
    assert find_targets(replace(config, data=replace(config.data, source=str(tmp_path / "rows.conll")))) == names
    # Numbers with names keep their ids.
    order = ("B-LOC", "I-LOC", "O", "I-COL", "B-COL")
    classes = replace(config, data=replace(config.data, source=save_with_classes(tmp_path / "classes", rows, order)))
    assert find_targets(classes) == names
    assert prepare_data(classes).fields["id2label"] == dict(enumerate(order))
    # A checkpoint with these tags keeps its ids, whether the data have names, other numbers with names, or its numbers.
    folder = str(train(replace(classes, run=replace(classes.run, max_steps=1))).folder)
    weight = AutoModelForTokenClassification.from_pretrained(folder).classifier.weight
    numbers = [{**row, "ner_tags": [order.index(tag) for tag in row["ner_tags"]]} for row in rows]
    sources = {
        "names": str(tmp_path / "rows.jsonl"),
        "classes": save_with_classes(tmp_path / "others", rows, NAMES),
        "numbers": write_jsonl(tmp_path / "numbers.jsonl", numbers),
    }
    for kind, source in sources.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            tuned = replace(config, data=replace(config.data, source=source), model=Model(name=folder), tokens=Tokens())
            assert find_targets(tuned) == names
            prepared = prepare_data(tuned)
            assert prepared.fields["id2label"] == dict(enumerate(order))
            assert torch.equal(build_network(tuned, prepared).classifier.weight, weight)  # type: ignore[union-attr]
        assert ("read as those of the model: 0 is B-LOC, 1 is I-LOC" in caplog.text) == (kind == "numbers")
        assert "start at random" not in caplog.text
    # Numbers without names are names themselves.
    unnamed = replace(config, data=replace(config.data, source=sources["numbers"]))
    assert find_targets(unnamed) == [str(order.index(tag)) for tag in names]
    assert prepare_data(unnamed).fields["id2label"] == {index: str(index) for index in range(5)}


def test_iob1_is_turned_into_iob2_if_the_user_says_so(tmp_path: Path) -> None:
    rows = make_rows(20, 6)
    # In IOB1, every span of these rows begins with I-x, because no two of one kind touch.
    iob1 = [{**row, "ner_tags": [tag.replace("B-", "I-") for tag in row["ner_tags"]]} for row in rows]
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", iob1), tmp_path, scheme="iob1")
    config = replace(config, data=replace(config.data, eval_split="train"))
    assert find_targets(config) == [tag for row in rows for tag in row["ner_tags"]]
    with pytest.raises(
        ValueError, match=r"rows.jsonl, line 1, word \d+ .* pass --objective.scheme iob1 if the tags are"
    ):
        prepare_data(replace(config, objective=TokenClassification()))
    classes = save_with_classes(tmp_path / "classes", iob1, ("I-LOC", "O", "I-COL"))
    config = replace(config, data=replace(config.data, source=classes))
    assert prepare_data(config).fields["id2label"] == dict(enumerate(("I-LOC", "O", "I-COL", "B-COL", "B-LOC")))
    assert find_targets(config) == [tag for row in rows for tag in row["ner_tags"]]


GOOD = {"tokens": ["Ada", "ran"], "ner_tags": ["B-PER", "O"]}


def test_tags_that_only_the_evaluation_has_are_refused_by_name(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [GOOD] * 5)
    held_out = [GOOD, {"tokens": ["Ada", "in", "Rome"], "ner_tags": ["B-PER", "O", "B-LOC"]}]
    config = make_config(source, tmp_path)
    data = Data(source=source, eval_source=write_jsonl(tmp_path / "held.jsonl", held_out))
    with pytest.raises(
        ValueError, match=r"held.jsonl, line 2, word 3 \('Rome'\): the training rows .* 'B-LOC'"
    ) as error:
        prepare_data(replace(config, data=data))
    assert "\n" not in str(error.value)
    # I-PER may be missing in the training rows by chance.
    held_out[1]["ner_tags"] = ["B-PER", "I-PER", "O"]
    write_jsonl(tmp_path / "held.jsonl", held_out)
    prepared = prepare_data(replace(config, data=data))
    assert prepared.fields["id2label"] == {0: "O", 1: "B-PER", 2: "I-PER"}


def test_another_model_or_other_tags_are_not_evaluated_with_a_random_head(tmp_path: Path) -> None:
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", [GOOD] * 10), tmp_path)
    folder = train(replace(config, run=replace(config.run, max_steps=1))).folder
    other = write_jsonl(tmp_path / "other.jsonl", [{"tokens": ["Rome"], "ner_tags": ["B-LOC"]}])
    with pytest.raises(
        ValueError, match="the data have the labels 'O', 'B-LOC', 'I-LOC', but the model was trained for 'O'"
    ):
        evaluate(folder, Data(source=other))


def test_a_checkpoint_with_other_tags_gets_a_new_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", [GOOD] * 10), tmp_path)
    folder = str(train(replace(config, run=replace(config.run, max_steps=1))).folder)
    other = write_jsonl(tmp_path / "other.jsonl", [{"tokens": ["Rome", "fell"], "ner_tags": ["B-LOC", "O"]}] * 10)
    tuned = replace(config, data=replace(config.data, source=other), model=Model(name=folder), tokens=Tokens())
    prepared = prepare_data(tuned)
    model = build_network(tuned, prepared)
    assert [*model.config.id2label.values()] == ["O", "B-LOC", "I-LOC"]
    assert (
        "was trained for other labels (O, B-PER, I-PER): classifier.bias, classifier.weight start at random"
        in caplog.text
    )


def test_what_is_lost_or_split_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"tokens": ["Ada"] * 40, "ner_tags": ["B-PER"] * 40},
        {"tokens": ["a" * 3, "1" * 200, "b"], "ner_tags": ["O", "B-PER", "O"]},
        *[GOOD] * 8,
    ]
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path)
    config = replace(config, data=replace(config.data, eval_split="train"))
    assert find_targets(config) == [tag for row in rows for tag in row["ner_tags"]]
    assert "documents: 2 rows have more than batch.max_length=32 tokens and are split between words" in caplog.text
    assert "documents: 1 words alone have more than batch.max_length=32 tokens and lose their ends" in caplog.text
    assert "have no token" not in caplog.text


def save_wordpiece(folder: Path) -> str:
    texts = [" ".join(row["tokens"]) for row in make_rows(50, 7)]
    train_tokenizer(Dataset.from_dict({"text": texts}), "wordpiece", 300).save_pretrained(folder)
    return str(folder)


def test_words_without_a_token_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"tokens": ["the", "\u200b", "old"], "ner_tags": ["O", "B-LOC", "B-COL"]},
        {"tokens": ["\u200b"], "ner_tags": ["O"]},
    ]
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", [*rows, *make_rows(8, 0)]), tmp_path)
    # BERT's normalizer removes control characters.
    tokenizer = AutoTokenizer.from_pretrained(save_wordpiece(tmp_path / "wordpiece"))
    assert tokenizer("\u200b")["input_ids"] == tokenizer("")["input_ids"]
    config = replace(
        config, tokens=Tokens(name=str(tmp_path / "wordpiece")), data=replace(config.data, eval_split="train")
    )
    tags = find_targets(config)
    assert tags[:2] == ["O", "B-COL"]
    assert len(tags) == 2 + sum(len(row["tokens"]) for row in make_rows(8, 0))
    assert "documents: 2 words have no token, so that their tags are not used" in caplog.text
    figures = train(replace(config, run=replace(config.run, max_steps=1))).figures
    assert 0 <= figures["f1"] <= figures["accuracy"] <= 1


def test_a_tokenizer_learns_from_the_words_joined_by_spaces(tmp_path: Path) -> None:
    rows = make_rows(40, 8)
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path)
    tokenizer = prepare_data(replace(config, tokens=Tokens(vocab_size=320))).tokenizer
    assert len(tokenizer.tokenize("the harbour")) == 2
    assert "B-" not in str(tokenizer.get_vocab().keys())
