"""Multiple choice: transformers' own loss, columns of every kind, and rows that are refused by their place."""

import csv
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch.nn import functional as F
from transformers import AutoModelForMultipleChoice, AutoTokenizer

from minilm import Config, Data, MultipleChoice
from minilm.commands.evaluate import evaluate
from minilm.objectives.factory import build_network, build_objective, prepare_data
from minilm.train import train
from tests.objectives.test_question_answering import (
    MODELS,
    build_config,
    compute_losses_with_teacher,
    write_jsonl,
)

WORDS = ("harbour", "tower", "old", "new", "stone", "wood", "near", "code", "with", "3-4", "What")


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of SWAG whose right ending is the one with the word "code"."""
    draw = random.Random(seed)
    others = [word for word in WORDS if word != "code"]
    rows = []
    for _ in range(count):
        endings = [" ".join(draw.choices(others, k=draw.randint(1, 6))) for _ in range(4)]
        label = draw.randrange(4)
        endings[label] += " code"
        texts = {"sent1": " ".join(draw.choices(others, k=4)), "sent2": draw.choice(others)}
        rows.append({**texts, **{f"ending{i}": ending for i, ending in enumerate(endings)}, "label": label})
    return rows


def make_questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Return questions with two to four choices."""
    rows = []
    for number, row in enumerate(make_rows(count, seed)):
        choices = [row[f"ending{i}"] for i in range(4)]
        wrong = [choice for i, choice in enumerate(choices) if i != row["label"]]
        kept = [choices[row["label"]], *wrong[: 1 + number % 3]]
        answers: list[Any] = [0, kept[0], "A", "0"]
        rows.append({"question": row["sent1"], "choices": kept, "answer": answers[number % 4]})
    return rows


def make_config(source: str, folder: Path, model: str = "bert", **objective: Any) -> Config:
    return build_config(MultipleChoice(**objective), source, folder, model)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["swag", "questions"])
def test_rows_and_loss_are_those_of_transformers(model: str, kind: str, tmp_path: Path) -> None:
    swag = kind == "swag"
    rows = make_rows(20, 0) if swag else make_questions(20, 0)
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path, model)
    config = replace(config, data=replace(config.data, eval_split="train"))
    if not swag:
        config = replace(config, objective=MultipleChoice(choices=("choices",)))
    prepared = prepare_data(config)
    objective = build_objective(config.objective)
    head = objective.head(build_network(config, prepared), prepared).eval()
    plain = build_network(config, prepared).eval()
    assert (prepared.train.type_ids is not None) == (model != "distilbert")
    ids = np.arange(len(rows))
    collator = objective.collator(prepared.tokenizer, prepared.train, seed=0, padded=not head.padding_free, multiple=1)
    batch = collator([prepared.train[int(i)] for i in ids], ids, epoch=0)
    with torch.inference_mode():
        losses = head(batch.input_ids_T, batch.packing, batch.target_index_N, batch.target_ids_N, batch.type_ids_T)
    for row, loss in zip(rows, losses, strict=True):
        choices = [f"{row['sent2']} {row[f'ending{i}']}" for i in range(4)] if swag else row["choices"]
        first = [row["sent1" if swag else "question"]] * len(choices)
        logits = []
        # One choice at a time, since padding changes some models' logits.
        for pair in zip(first, choices, strict=True):
            encoded = prepared.tokenizer(*pair, return_tensors="pt")
            if model == "distilbert":
                encoded.pop("token_type_ids", None)
            with torch.inference_mode():
                logits.append(plain(**{name: value[None] for name, value in encoded.items()}).logits[0, 0])
        expected = -torch.stack(logits).log_softmax(0)[row["label"] if swag else 0]
        assert float(loss) == pytest.approx(float(expected), abs=1e-6, rel=1e-6)
    if swag:
        # Choices of one length need no padding, so that transformers' own loss can be asked.
        texts = [f"old {word}" for word in ("new", "wood", "code")]
        encoded = prepared.tokenizer(["stone"] * 3, texts, return_tensors="pt", padding=True)
        if model != "distilbert":
            inputs = {name: value[None] for name, value in encoded.items()}
            with torch.inference_mode():
                theirs = plain(**inputs, labels=torch.tensor([2]))
            ours = objective.loss(theirs.logits[..., None], torch.tensor([2]))
            assert float(ours) == pytest.approx(float(theirs.loss), abs=1e-6)


def test_a_run_learns_and_its_accuracy_is_that_of_plain_transformers(tmp_path: Path) -> None:
    held_out = make_rows(40, 2)
    config = make_config(write_jsonl(tmp_path / "train.jsonl", make_rows(200, 1)), tmp_path)
    data = Data(source=config.data.source, eval_source=write_jsonl(tmp_path / "dev.jsonl", held_out))
    result = train(replace(config, data=data, run=replace(config.run, max_steps=60)))
    model = AutoModelForMultipleChoice.from_pretrained(result.folder)
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    right = 0
    for row in held_out:
        choices = [f"{row['sent2']} {row[f'ending{i}']}" for i in range(4)]
        encoded = tokenizer([row["sent1"]] * 4, choices, return_tensors="pt", padding=True)
        with torch.inference_mode():
            logits = model(**{name: value[None] for name, value in encoded.items()}).logits
        right += int(logits.argmax()) == row["label"]
    assert result.figures["accuracy"] == right / 40 > 0.6
    again = evaluate(result.folder)
    assert again["accuracy"] == result.figures["accuracy"]
    (Path(result.folder) / "run.json").unlink()
    assert evaluate(result.folder, Data(source=str(tmp_path / "dev.jsonl")))["accuracy"] == right / 40


def test_the_loss_with_a_teacher_compares_the_choices_of_each_question(tmp_path: Path) -> None:
    rows = make_questions(24, 0)
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path, choices=("choices",))
    config = replace(config, data=replace(config.data, eval_split="train"))
    # The questions have more tokens than the model has positions, but no choice does.
    config = replace(config, model=replace(config.model, config={**MODELS["bert"], "max_position_embeddings": 48}))
    prepared, head, losses, models = compute_losses_with_teacher(config, 24)
    assert prepared.train.lengths.max() > 48
    losses.sum().backward()  # type: ignore[no-untyped-call]
    for row, loss in zip(rows, losses, strict=True):
        first = [row["question"]] * len(row["choices"])
        encoded = prepared.tokenizer(first, row["choices"], return_tensors="pt", padding=True)
        inputs = {name: value[None] for name, value in encoded.items()}
        with torch.inference_mode():
            ours, theirs = (model(**inputs).logits[0] for model in models)
        soft = 4 * F.kl_div((ours / 2).log_softmax(0), (theirs / 2).softmax(0), reduction="sum")
        expected = 0.7 * -ours.log_softmax(0)[0] + 0.3 * soft
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert all(bool(p.grad.isfinite().all()) for p in head.parameters() if p.grad is not None)


def test_files_of_each_kind_give_the_same_examples(tmp_path: Path) -> None:
    rows = make_rows(20, 3)
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path)
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    features = Features({**dict.fromkeys(rows[0], Value("string")), "label": ClassLabel(names=["0", "1", "2", "3"])})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    renamed = [
        {{"sent1": "a", "sent2": "b", "label": "c"}.get(name, name): cell for name, cell in row.items()} for row in rows
    ]
    lists = [
        {
            "context": row["sent1"],
            "question": row["sent2"],
            "c": [row[f"ending{i}"] for i in range(4)],
            "answer": row["label"],
        }
        for row in rows
    ]
    others: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "rows.csv": ({}, {}),
        "rows.parquet": ({}, {}),
        "renamed.jsonl": ({"column": "a", "pair_column": "b", "label_column": "c"}, {}),
        "lists.jsonl": ({"column": "context", "pair_column": "question"}, {"choices": ("c",)}),
    }
    write_jsonl(tmp_path / "renamed.jsonl", renamed)
    write_jsonl(tmp_path / "lists.jsonl", lists)
    expected = prepare_data(config)
    for name, (columns, objective) in others.items():
        data = replace(config.data, source=str(tmp_path / name), **columns)
        other = prepare_data(replace(config, data=data, objective=MultipleChoice(**objective)))
        assert other.train.fingerprint == expected.train.fingerprint, name
        assert other.eval.fingerprint == expected.eval.fingerprint, name


GOOD = {"question": "Who?", "choices": ["Anna", "Bob", "2"], "answer": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, "the answer 3 is none of the choices: give the number of the right choice, from 0 to 2"),
        ({"answer": -1}, "the answer -1 is none of the choices"),
        ({"answer": True}, "the answer True is none of the choices"),
        ({"answer": "anna"}, "the answer 'anna' is none of the choices"),
        ({"answer": None}, "the answer None is none of the choices"),
        ({"answer": 1.0}, "the answer 1.0 is none of the choices"),
        ({"answer": "D"}, "the answer 'D' is none of the choices"),
        ({"answer": "0", "choices": ["1", "0"]}, "the answer '0' may be the text, the number or the letter of several"),
        ({"answer": "A", "choices": ["B", "A"]}, "the answer 'A' may be the text, the number or the letter of several"),
        ({"answer": "Bob", "choices": ["Bob", "Bob"]}, "the answer 'Bob' may be the text"),
        ({"choices": ["Anna"]}, "the column 'choices' holds .'Anna'. where a list of two or more choices is expected"),
        ({"choices": "Anna"}, "the column 'choices' holds 'Anna' where a list of two or more"),
        ({"choices": ["Anna", 3]}, "choice 1 is 3 where text is expected"),
        ({"choices": ["Anna", " "]}, "choice 1 is ' ' where text is expected"),
        ({"question": " "}, "column 'question' holds no text"),
    ],
)
def test_a_wrong_row_is_refused_by_its_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [GOOD] * 3 + [{**GOOD, **change}] + [GOOD] * 6)
    config = make_config(source, tmp_path, choices=("choices",))
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 4: .*{message}") as error:
        prepare_data(config)
    assert "\n" not in str(error.value)


def test_a_text_that_is_a_number_of_no_other_choice_is_read(tmp_path: Path) -> None:
    rows = [{**GOOD, "answer": answer} for answer in ("2", 2, "Anna", "B", "1")]
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path, choices=("choices",))
    examples = prepare_data(replace(config, data=replace(config.data, eval_split="train"))).train
    assert examples.labels is not None
    assert examples.labels.tolist() == [2, 2, 0, 1, 1]


def test_choices_that_are_cut_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = make_rows(20, 4)
    rows[3]["sent1"] = rows[7]["sent1"] = " ".join(WORDS * 9)
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path)
    with caplog.at_level(logging.WARNING, "minilm"):
        prepare_data(replace(config, data=replace(config.data, eval_split="train")))
    assert "documents: 8 choices have more than batch.max_length=48 tokens and are cut" in caplog.text


def test_columns_of_choices_must_differ() -> None:
    for choices in ((), ("a", "a")):
        with pytest.raises(ValueError, match=r"objective\.choices must name different columns"):
            MultipleChoice(choices=choices)
