"""Question answering: transformers' own loss, the figures of SQuAD, and rows that are refused by their place."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedModel

from minilm import Batch, Config, Data, Model, Optim, QuestionAnswering, Run, Tokens
from minilm.commands.evaluate import evaluate
from minilm.config import ObjectiveSettings
from minilm.data.corpus import PreparedData
from minilm.data.micro_batch import target_losses
from minilm.data.tokenizer_training import train_tokenizer
from minilm.models.head import Head
from minilm.models.inference_answers import find_answers, find_best_spans
from minilm.objectives.answer_scores import score_answer
from minilm.objectives.distillation import add_teacher
from minilm.objectives.factory import build_network, build_objective, prepare_data
from minilm.train import train
from tests.conftest import Run as Command

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
MODELS: dict[str, dict[str, Any]] = {
    "bert": {**SIZE, **NO_DROPOUT, "max_position_embeddings": 64},
    "roberta": {**SIZE, **NO_DROPOUT, "max_position_embeddings": 66},
    "electra": {**SIZE, **NO_DROPOUT, "max_position_embeddings": 64, "embedding_size": 16},
    "deberta-v2": {**SIZE, **NO_DROPOUT, "max_position_embeddings": 64, "type_vocab_size": 2},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48, "dropout": 0.0, "initializer_range": 0.2},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0},
}
FILLERS = (
    "the",
    "a",
    "",
    "old",
    "new",
    "harbour,",
    "tower;",
    "near",
    "of",
    "in",
    "with",
    "stone",
    "(and)",
    "3-4",
    "Ünder",
)


def make_rows(count: int, seed: int, *, no_answer: bool = False) -> list[dict[str, Any]]:
    """Return rows whose answer is the number after the word "code", which is missing in some rows if so wished."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        before, after = (" ".join(draw.choices(FILLERS, k=draw.randint(0, 40))) for _ in range(2))
        code = "".join(draw.choices("123456789", k=draw.randint(1, 4)))
        missing = no_answer and number % 3 == 0
        context = f"{before} {'word' if missing else 'code'} {code}. {after}"
        start = len(before) + 6
        answers = {"text": [code, f"{code}."], "answer_start": [start, start]}
        question = " ".join(["What is the code?", *draw.choices(FILLERS, k=number % 4)])
        answers = {"text": [], "answer_start": []} if missing else answers
        rows.append({"question": question, "context": context, "answers": answers})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_squad(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as SQuAD does, two questions on each context."""
    paragraphs = [
        {
            "context": row["context"],
            "qas": [
                {
                    "id": f"{number}-{copy}",
                    "question": row["question"],
                    "answers": [
                        {"text": text, "answer_start": start}
                        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
                    ],
                    "is_impossible": not row["answers"]["text"],
                }
                for copy in range(2)
            ],
        }
        for number, row in enumerate(rows)
    ]
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "All", "paragraphs": paragraphs}]}))
    return str(path)


def save_tokenizer(folder: Path, kind: str = "bpe") -> str:
    """Write a tokenizer that gives token types, and return its folder."""
    texts = [row[role] for row in make_rows(60, 5) for role in ("question", "context")]
    tokenizer = train_tokenizer(Dataset.from_dict({"text": texts}), kind, 320)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    tokenizer.save_pretrained(folder)
    return str(folder)


def build_config(
    objective: ObjectiveSettings, source: str, folder: Path, model: str = "bert", max_length: int = 48
) -> Config:
    """Return the configuration of a run of four steps with one of `MODELS`."""
    return Config(
        data=Data(source=source, eval_fraction=0.2),
        tokens=Tokens(name=save_tokenizer(folder / "tokenizer")),
        model=Model(type=model, config=MODELS[model]),
        objective=objective,
        batch=Batch(examples=8, max_length=max_length, micro_tokens=300),
        optim=Optim(lr=3e-3),
        run=Run(max_steps=4, precision="fp32", save_every=0, output_dir=str(folder / "out")),
    )


def compute_losses_with_teacher(config: Config, count: int) -> tuple[PreparedData, Head, Tensor, list[PreTrainedModel]]:
    """Train a teacher, and return the losses of the first examples for another model that learns from it.

    The result is the data, the head whose losses these are, the losses, and its network and the teacher by themselves.
    """
    teacher = str(train(config).folder)
    settings: Any = replace(
        config.objective,  # type: ignore[arg-type]
        teacher=teacher,
        teacher_weight=0.3,
        teacher_temperature=2.0,
    )
    config = replace(config, objective=settings, run=replace(config.run, seed=1))
    prepared, objective = prepare_data(config), build_objective(config.objective)
    head = objective.head(build_network(config, prepared), prepared).train()
    add_teacher(head, config, objective, prepared)
    examples, ids = prepared.train, np.arange(count)
    collator = objective.collator(prepared.tokenizer, examples, seed=0, padded=not head.padding_free, multiple=1)
    losses = target_losses(head, collator([examples[int(i)] for i in ids], ids, epoch=0))
    networks = [build_network(config, prepared).eval(), objective.auto.from_pretrained(teacher)]
    return prepared, head, losses, networks


def make_config(source: str, folder: Path, model: str = "bert", **objective: Any) -> Config:
    return build_config(QuestionAnswering(stride=10, **objective), source, folder, model)


@pytest.mark.parametrize("model", MODELS)
def test_the_loss_is_that_of_transformers(model: str, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", make_rows(30, 0, no_answer=True))
    config = make_config(source, tmp_path, model, no_answer=True)
    prepared = prepare_data(config)
    objective = build_objective(config.objective)
    head = objective.head(build_network(config, prepared), prepared).eval()
    plain = build_network(config, prepared).eval()
    examples = prepared.train
    ids = np.arange(len(examples))
    collator = objective.collator(prepared.tokenizer, examples, seed=0, padded=not head.padding_free, multiple=1)
    batch = collator([examples[int(i)] for i in ids], ids, epoch=0)
    with torch.inference_mode():
        losses = head(batch.input_ids_T, batch.packing, batch.target_index_N, batch.target_ids_N, batch.type_ids_T)
    assert len(examples) > 30
    assert (examples.type_ids is not None) == (model != "distilbert")
    for i in map(int, ids):
        inputs = {"input_ids": torch.from_numpy(examples[i])[None]}
        if examples.type_ids is not None:
            inputs["token_type_ids"] = torch.from_numpy(examples.token_type_ids(i))[None]
            assert 0 < int(inputs["token_type_ids"].sum()) < len(examples[i])
        assert examples.labels is not None
        start, end = torch.tensor(examples.labels[i])[:, None]
        with torch.inference_mode():
            expected = float(plain(**inputs, start_positions=start, end_positions=end).loss)
        assert float(losses[i]) == pytest.approx(expected, abs=1e-6, rel=1e-6)


def score_by_hand(
    folder: str, rows: list[dict[str, Any]], *, no_answer: bool, threshold: float = 0.0
) -> dict[str, float]:
    """Return the figures by plain transformers, with every span of every window compared in a loop."""
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    scores = []
    for row in rows:
        encoded = tokenizer(
            row["question"],
            row["context"],
            truncation="only_second",
            max_length=48,
            stride=10,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        spans, nulls = [], []
        for number, ids in enumerate(encoded["input_ids"]):
            types = torch.tensor([encoded["token_type_ids"][number]])
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids]), token_type_ids=types)
            start, end = (x[0].log_softmax(0).tolist() for x in (logits.start_logits, logits.end_logits))
            nulls.append(start[0] + end[0])
            own = [place for place, text in enumerate(encoded.sequence_ids(number)) if text == 1]
            offsets = encoded["offset_mapping"][number]
            # Tokens of white space begin and end no answer.
            own = [place for place in own if row["context"][slice(*offsets[place])].strip()]
            for first in own:
                for last in (place for place in own if first <= place < first + 30):
                    spans.append((start[first] + end[last], offsets[first][0], offsets[last][1]))
        score, begin, stop = max(spans)
        null = no_answer and min(nulls) - score > threshold
        scores.append(score_answer("" if null else row["context"][begin:stop], row["answers"]["text"]))
    exact, f1 = zip(*scores, strict=True)
    return {"exact_match": 100 * sum(exact) / len(rows), "f1": 100 * sum(f1) / len(rows)}


def test_a_run_on_files_of_squad_learns_and_has_the_figures_of_plain_transformers(tmp_path: Path) -> None:
    source = write_squad(tmp_path / "train.json", make_rows(300, 1))
    held_out = make_rows(25, 2)
    config = make_config(source, tmp_path)
    data = Data(source=source, eval_source=write_squad(tmp_path / "dev.json", held_out))
    result = train(replace(config, data=data, run=replace(config.run, max_steps=300)))
    figures = {name: result.figures[name] for name in ("exact_match", "f1")}
    expected = score_by_hand(str(result.folder), [row for row in held_out for _ in range(2)], no_answer=False)
    assert figures == pytest.approx(expected)
    assert 50 < figures["exact_match"] <= figures["f1"] <= 100
    again = evaluate(result.folder)
    assert {name: again[name] for name in figures} == pytest.approx(figures)
    other = evaluate(result.folder, Data(source=write_jsonl(tmp_path / "other.jsonl", held_out)))
    assert {name: other[name] for name in figures} == pytest.approx(figures)
    assert json.loads((Path(result.folder) / "all_results.json").read_text())["exact_match"] == figures["exact_match"]


def test_the_loss_with_a_teacher_compares_the_places_of_each_window(tmp_path: Path) -> None:
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", make_rows(30, 0)), tmp_path)
    prepared, head, losses, (plain, expert) = compute_losses_with_teacher(config, 12)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    examples = prepared.train
    for i in range(12):
        types = torch.from_numpy(examples.token_type_ids(i))[None]
        assert examples.labels is not None
        start, end = torch.tensor(examples.labels[i])[:, None]
        inputs = {"input_ids": torch.from_numpy(examples[i])[None], "token_type_ids": types}
        with torch.inference_mode():
            ours, theirs = plain(**inputs, start_positions=start, end_positions=end), expert(**inputs)
        soft = [
            4
            * F.kl_div(
                (getattr(ours, side) / 2).log_softmax(1), (getattr(theirs, side) / 2).softmax(1), reduction="sum"
            )
            for side in ("start_logits", "end_logits")
        ]
        expected = 0.7 * float(ours.loss) + 0.3 * float(sum(soft)) / 2
        assert float(losses[i]) == pytest.approx(expected, rel=1e-5)
    assert all(bool(p.grad.isfinite().all()) for p in head.parameters() if p.grad is not None)


def test_several_parts_without_answers_have_the_figures_of_plain_transformers(tmp_path: Path) -> None:
    parts = {
        name: make_rows(count, count, no_answer=True) for name, count in (("train", 240), ("near", 14), ("far", 9))
    }
    DatasetDict({name: Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(tmp_path / "data")
    figures = {}
    for threshold in (0.0, -3.0):
        config = make_config(
            str(tmp_path / "data"), tmp_path / str(threshold), no_answer=True, null_threshold=threshold
        )
        config = replace(config, data=Data(source=str(tmp_path / "data"), eval_split="near+far"))
        result = train(replace(config, run=replace(config.run, max_steps=150)))
        for part, rows in (("", parts["near"] + parts["far"]), ("_near", parts["near"]), ("_far", parts["far"])):
            expected = score_by_hand(str(result.folder), rows, no_answer=True, threshold=threshold)
            own = {name: result.figures[f"{name}{part}"] for name in expected}
            assert own == pytest.approx(expected)
        figures[threshold] = result.figures["f1"]
    assert figures[0.0] != figures[-3.0]


# The values are worked out by hand from the rules of SQuAD's script.
@pytest.mark.parametrize(
    ("predicted", "answers", "expected"),
    [
        ("the Nile", ["Nile"], (1, 1)),
        ("Nile.", ["  nile"], (1, 1)),
        ("the Nile river", ["Nile"], (0, 2 / 3)),
        ("Nile", ["Po", "a Nile delta"], (0, 2 / 3)),
        ("cat cat dog", ["cat dog dog"], (0, 2 / 3)),
        ("U.S.", ["us"], (1, 1)),
        ("theatre", ["the atre"], (0, 0)),
        ("well-known", ["wellknown"], (1, 1)),
        ("", [], (1, 1)),
        ("", ["Nile"], (0, 0)),
        ("Nile", [], (0, 0)),
        ("the", ["a"], (1, 1)),
        ("Nile", ["the", "Nile"], (1, 1)),
        ("", ["the", "Nile"], (0, 0)),
        ("\u00dcber", ["\u00fcber"], (1, 1)),
    ],
)
def test_scores_of_an_answer(predicted: str, answers: list[str], expected: tuple[float, float]) -> None:
    assert score_answer(predicted, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "null", "space", "expected"),
    [
        ({}, 5.0, 0.0, 100.0),
        ({"no_answer": True}, 1.0, 0.0, 100.0),
        ({"no_answer": True}, 5.0, 0.0, 0.0),
        ({"no_answer": True, "null_threshold": 9.0}, 5.0, 0.0, 100.0),
        # A token of white space begins and ends no answer.
        ({}, 0.0, 9.0, 100.0),
    ],
)
def test_the_figures_of_given_logits(settings: dict[str, Any], null: float, space: float, expected: float) -> None:
    note = {"context": "a  b", "answers": ["b"], "first": 1, "null": 0, "offsets": [[0, 1], [1, 2], [2, 3], [3, 4]]}
    logits = torch.tensor([[[null, null], [0.0, 0.0], [space, space], [space, space], [3.0, 3.0]]])
    figures = build_objective(QuestionAnswering(**settings)).metrics_with_notes(logits, torch.zeros(1, 2), [note])
    assert figures == {"exact_match": expected, "f1": expected}


def test_the_best_spans_are_those_of_a_loop() -> None:
    torch.manual_seed(0)
    for length, longest in ((1, 30), (7, 3), (40, 30), (9, 1)):
        logits = torch.randn(length, 2)
        visible = [place % 4 != 2 for place in range(length)]
        every = [
            (float(logits[first, 0] + logits[last, 1]), first, last)
            for first in range(length)
            for last in range(first, min(length, first + longest))
            if visible[first] and visible[last]
        ]
        expected = sorted(every, reverse=True)[:5]
        assert find_best_spans(logits, visible, longest, count=5) == expected


GOOD = {"question": "Who?", "context": "Anna and Bob.", "answers": {"text": ["Bob"], "answer_start": [9]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"answers": {"text": ["Bob"], "answer_start": [8]}},
            "the answer 'Bob' does not stand at character 8 .*at 9.: c",
        ),
        (
            {"answers": {"text": ["Eve"], "answer_start": [9]}},
            "'Eve' does not stand at character 9 .*the context does not contain it",
        ),
        ({"answers": {"text": ["Bob"], "answer_start": [-4]}}, "does not stand at character -4"),
        ({"answers": {"text": ["Anna", "B"], "answer_start": [0, 8]}}, "the answer 'B' does not stand at character 8"),
        (
            {"answers": {"text": ["Bob"], "answer_start": ["9"]}},
            "has the text 'Bob' and the start '9': give a text and a",
        ),
        ({"answers": {"text": ["Bob"], "answer_start": [True]}}, "has the text 'Bob' and the start True"),
        ({"answers": {"text": [" "], "answer_start": [4]}}, "has the text ' ' and the start 4"),
        (
            {"answers": {"text": ["Bob"], "answer_start": [9, 9]}},
            "the answers have 1 texts, but another number of starts",
        ),
        ({"answers": [{"text": "Bob"}]}, "has the text 'Bob' and the start None"),
        ({"answers": "Bob"}, "the answers are 'Bob': write them as"),
        ({"answers": None}, "the answers are None: write them as"),
        (
            {"answers": {"text": [], "answer_start": []}},
            "no answer: pass --objective.no-answer if that is right, or else",
        ),
        ({"answers": []}, "no answer: pass --objective.no-answer"),
        ({"question": " "}, "column 'question' holds no text"),
        ({"question": " ", "context": "  "}, "column 'question' holds no text"),
        ({"context": 7}, "column 'context' holds int where text is expected; .* --data.pair-column"),
        ({"question": "Who? " * 40}, "the question has .* tokens, which leaves 0 of 48 for the context"),
        (
            {"context": "x " * 40 + "1 " * 20, "answers": {"text": ["1 " * 20], "answer_start": [80]}},
            "the answer has .* tokens, and every window cuts it: raise objective.stride or batch.max_length",
        ),
    ],
)
def test_a_wrong_row_is_refused_by_its_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [GOOD] * 3 + [{**GOOD, **change}] + [GOOD] * 6)
    config = make_config(source, tmp_path)
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 4: .*{message}") as error:
        prepare_data(config)
    assert "\n" not in str(error.value)


def test_other_names_of_columns_and_lists_of_answers(tmp_path: Path) -> None:
    rows = make_rows(20, 3)
    lists = [
        {"q": row["question"], "c": row["context"], "a": [{"text": text, "answer_start": start, "id": 1}]}
        for row in rows
        for text, start in [(row["answers"]["text"][0], row["answers"]["answer_start"][0])]
    ]
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path)
    data = Data(
        source=write_jsonl(tmp_path / "lists.jsonl", lists),
        column="q",
        pair_column="c",
        label_column="a",
        eval_fraction=0.2,
    )
    usual, other = prepare_data(config).train, prepare_data(replace(config, data=data)).train
    assert usual.labels is not None
    assert other.labels is not None
    assert usual.labels.tolist() == other.labels.tolist()
    # In each window with the answer, the tokens between the targets are the answer.
    tokenizer = AutoTokenizer.from_pretrained(config.tokens.name or "")
    texts = {str(tokenizer.decode(usual[i][start : end + 1])).strip() for i, (start, end) in enumerate(usual.labels)}
    assert texts <= {row["answers"]["text"][0] for row in rows} | {tokenizer.cls_token}
    assert len(texts) > 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": -1}, "objective.stride must be 0 or more"),
        ({"max_answer": 0}, "objective.max_answer must be at least 1"),
        ({"null_threshold": 1.0}, "objective.null_threshold has no effect without objective.no_answer"),
        ({"null_threshold": float("nan"), "no_answer": True}, "objective.null_threshold must be a finite number"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuestionAnswering(**settings)


def test_the_command_answers_as_plain_transformers_does(tmp_path: Path, run: Command) -> None:
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", make_rows(30, 4)), tmp_path)
    folder = str(train(config).folder)
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    question, context = "What is the code?", "the  new harbour \n code 371. (and) Ünder ß"
    encoded = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0].tolist()
    with torch.inference_mode():
        output = model(**encoded)
    starts, ends = (x[0].softmax(0).tolist() for x in (output.start_logits, output.end_logits))
    own = [place for place, text in enumerate(encoded.sequence_ids(0)) if text == 1]
    own = [place for place in own if context[slice(*offsets[place])].strip()]
    spans = sorted(
        (
            (starts[first] * ends[last], offsets[first][0], offsets[last][1])
            for first in own
            for last in own
            if first <= last < first + 30
        ),
        reverse=True,
    )[:3]
    null = starts[0] * ends[0]
    (answers,) = find_answers(model, tokenizer, question, [context], top_k=3)
    assert [answer.score for answer in answers] == pytest.approx([score for score, _, _ in spans])
    for answer, (_, start, stop) in zip(answers, spans, strict=True):
        assert answer.text == context[start:stop].strip() == context[answer.start : answer.stop]
    status, lines, _ = run("answer", folder, "--question", question, "--top-k", "2", context, "--json")
    assert status is None
    fields = json.loads(lines[0])
    assert fields["question"] == question
    assert [answer["text"] for answer in fields["answers"]] == [answer.text for answer in answers[:2]]
    (ranked,) = find_answers(model, tokenizer, question, [context], top_k=10**6, no_answer=True)
    assert [answer.score for answer in ranked if answer.text == ""] == pytest.approx([null])
    assert [answer.score for answer in ranked] == sorted((answer.score for answer in ranked), reverse=True)
    (short,) = find_answers(model, tokenizer, question, [context], top_k=10**6, max_answer=1)
    assert len(short) == len({tuple(offsets[place]) for place in own})
    # Long contexts are read in windows, and each span counts once.
    words = "new " * 300 + "code 12"
    (long,) = find_answers(model, tokenizer, question, [words], top_k=10**6, max_answer=1)
    places = tokenizer(words, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert len(long) == len([1 for start, stop in places if words[start:stop].strip()])
    assert len({(answer.start, answer.stop) for answer in long}) == len(long)


def test_the_command_prints_a_line_for_each_text(tmp_path: Path, run: Command) -> None:
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", make_rows(30, 4)), tmp_path, no_answer=True)
    folder = str(train(config).folder)
    status, lines, _ = run("answer", folder, "--question", "What?", stdin="code 1\n\nof code 2\n")
    assert status is None
    assert len(lines) == 3
    assert lines[1] == "1       -  -"
    assert lines[0].startswith("0  ")
    options = ("--question", "What?", "--no-answer", "--top-k", "99")
    assert "(no answer)" in "".join(run("answer", folder, *options, "x")[1])
    status, _, errors = run("answer", folder, "x")
    assert status == 2
    assert "--question" in errors[-1]
    status, _, errors = run("classify", folder, "x")
    assert "use: minilm answer" in errors[-1]
