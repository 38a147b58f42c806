"""`minilm replay` and `data.exclude_loss`: the run whose loss never had these documents, to the bit."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm import Batch, CausalLM, Classification, Config, Data, MaskedLM, Model, SentenceEmbedding
from minilm.commands.replay import plan_replay, read_documents
from minilm.data.batch_plan import Plan
from minilm.data.excluded_documents import ExcludingCollator, find_first_use
from minilm.data.micro_batch import target_losses
from minilm.objectives.factory import build_network, build_objective, prepare_data
from minilm.runs.session import plan_steps
from minilm.train import train, train_step
from minilm.utils.number_ranges import format_ranges, parse_ranges
from tests.jobs import CONFIG, config_in, end_of, finish_all
from tests.launch import read_log
from tests.own_objectives import BUILT_IN, COLUMNS, MODELS, write_rows

LAYOUTS: dict[str, dict[str, Any]] = {
    "blocks": {"batch": Batch(examples=4, max_length=24, micro_tokens=60, layout="blocks")},
    "padded": {"model": Model(type="mpnet", config=MODELS["padded"].config)},
    "packed": {"batch": Batch(examples=3, max_length=24, micro_tokens=60, layout="packed")},
}
FIRST_STEP = 2


def build(place: Path, layout: str) -> Config:
    config = config_in(place, steps=6, save_every=2)
    run = replace(config.run, eval_every=6, keep_last=9, output_dir=str(place / layout))
    return replace(config, objective=MaskedLM(rate=0.5), run=run, **LAYOUTS[layout])


def build_classifier(place: Path, processes: int = 1) -> Config:
    """A classifier of texts of which each is one word, with its label, many times."""
    lines = [f'{{"text": "{["fox", "dog", "cat", "red"][n % 4]} number {n}", "label": {n % 3}}}' for n in range(80)]
    (place / "rows.jsonl").write_text("\n".join(lines))
    config = config_in(place, steps=6, save_every=2)
    return replace(
        config,
        data=Data(source=str(place / "rows.jsonl"), eval_fraction=0.2),
        objective=Classification(),
        run=replace(config.run, eval_every=6, keep_last=9, output_dir=str(place / f"classes-{processes}")),
    )


def find_late_documents(config: Config) -> str:
    """Return the numbers of two long documents that are first read in step `FIRST_STEP` or later."""
    prepared = prepare_data(config)
    examples, bounds = prepared.train, prepared.train.document_bounds
    assert bounds is not None
    rows = config.batch.max_length if config.batch.layout == "packed" else None
    plan = Plan(
        examples.lengths, examples=config.batch.examples, micro_tokens=60, row_tokens=rows, seed=config.run.seed
    )
    read = [
        {
            document
            for number in plan.examples_of(step)
            for document in range(len(bounds) - 1)
            if bounds[document] < examples.stop[number] and examples.start[number] < bounds[document + 1]
        }
        for step in range(6)
    ]
    late = set.union(*read[FIRST_STEP:4]) - set.union(*read[:FIRST_STEP])
    assert len(late) > 1
    return format_ranges(sorted(late, key=lambda document: bounds[document] - bounds[document + 1])[:2])


def without(config: Config, documents: str, folder: Path) -> Config:
    data, run = replace(config.data, exclude_loss=documents), replace(config.run, output_dir=str(folder))
    return replace(config, data=data, run=run)


@pytest.mark.parametrize("layout", [*LAYOUTS, "classifier"])
def test_a_replay_is_the_run_whose_loss_never_had_the_documents(layout: str, tmp_path: Path) -> None:
    config = build_classifier(tmp_path) if layout == "classifier" else build(tmp_path, layout)
    train(config)
    documents = find_late_documents(config)
    folder = Path(config.run.output_dir or "")
    replay = plan_replay(folder, documents, ["--run.output-dir", str(tmp_path / "replay")])
    assert replay.start == 2
    assert replay.first_step > FIRST_STEP
    train(replay.config)
    train(without(config, documents, tmp_path / "whole"))
    assert end_of(tmp_path / "replay") == end_of(tmp_path / "whole")
    ours, others = ([line["loss"] for line in read_log(path)[0]] for path in (folder, tmp_path / "replay"))
    first = replay.first_step - 1
    assert ours[:first] == others[:first]
    assert ours[first:] != others[first:]


def test_a_replay_on_two_processes_is_that_run_too(tmp_path: Path) -> None:
    config = build_classifier(tmp_path, processes=2)
    documents = find_late_documents(config)
    whole, replay = (without(config, documents, tmp_path / name) for name in ("whole", "replay"))
    finish_all([(config, 2), (whole, 2)], tmp_path)
    folder = Path(config.run.output_dir or "")
    with pytest.raises(ValueError, match=r"was trained on 2 process\(es\), and the order of sums depends on that"):
        plan_replay(folder, documents, [])
    finish_all([(replace(replay, run=replace(replay.run, resume=str(folder / "checkpoint-2"))), 2)], tmp_path)
    assert end_of(tmp_path / "replay") == end_of(tmp_path / "whole")


def test_the_command_prints_what_the_documents_contributed(tmp_path: Path, run: Any) -> None:
    config = build(tmp_path, "blocks")
    train(config)
    folder = tmp_path / "blocks"
    documents = find_late_documents(config)
    status, lines, error = run("replay", str(folder), "--without", documents)
    assert status is None, error
    (figure,) = [line for line in lines if line.startswith("eval_loss: ")]
    first, second = (read_log(path)[1][-1]["eval_loss"] for path in (folder, tmp_path / "blocks-without"))
    assert figure.startswith(f"eval_loss: {first:.6g} with the documents, {second:.6g} without: ")
    assert lines[-1] == "These have still seen the documents: the tokenizer, which was trained on them."
    assert f"branching from {folder}/checkpoint-2" in error
    status, _, error = run("replay", str(folder), "--without", "0", "--optim.lr", "1")
    assert (status, error[-1]) == (2, "error: optim.lr: a replay has the settings of its run; leave it out")
    status, _, error = run("replay", str(folder), "--without", "98-99", "--run.output-dir", str(tmp_path / "x"))
    assert status == 2
    assert error[-1] == "error: data.exclude_loss: there is no training document 99: their numbers are 0 to 98"
    (folder / "all_results.json").unlink()
    status, _, error = run("replay", str(folder), "--without", "0")
    assert status == 2
    assert error[-1].endswith("is not the folder of a finished run, with which a replay could be compared")


def test_a_resume_may_exclude_only_documents_that_no_step_has_read(tmp_path: Path) -> None:
    config = build(tmp_path, "blocks")
    train(config)
    documents = find_late_documents(config)
    replay = plan_replay(tmp_path / "blocks", documents, [])
    late = without(config, documents, tmp_path / "late")
    late = replace(late, run=replace(late.run, resume=str(tmp_path / "blocks" / "checkpoint-4")))
    says = rf"step {replay.first_step} reads the training document \d+, and data\.exclude_loss was null, is "
    with pytest.raises(ValueError, match=says):
        train(late)
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("objective", [MaskedLM(rate=0.9), CausalLM()], ids=["masked", "causal"])
@pytest.mark.parametrize("layout", ["documents", "blocks"])
def test_exactly_the_targets_in_the_documents_are_left_out(layout: Any, objective: Any, tmp_path: Path) -> None:
    config = config_in(tmp_path, steps=3)
    batch = Batch(examples=4, max_length=24, micro_tokens=60, layout=layout)
    config = replace(config, objective=objective, batch=batch)
    prepared = prepare_data(config)
    examples, bounds = prepared.train, prepared.train.document_bounds
    assert bounds is not None
    inner = build_objective(objective).collator(prepared.tokenizer, examples, seed=0, padded=False, multiple=1)
    documents = parse_ranges("3,7-9,20,98")
    collator = ExcludingCollator(inner, examples, documents)
    offset = 1 if isinstance(objective, CausalLM) else 0
    left = 0
    for ids in np.array_split(np.arange(len(examples)), 9):
        rows = [examples[int(i)] for i in ids]
        plain, batch = (make(rows, ids, 0, 0.0) for make in (inner, collator))
        places = [(i, p) for i, row in zip(ids, rows, strict=True) for p in range(len(row))]
        kept = []
        for index in plain.target_index_N.tolist():
            example, place = places[index + offset]
            id = examples.start[example] + place - len(examples.prefix)
            (document,) = [d for d in range(len(bounds) - 1) if bounds[d] <= id < bounds[d + 1]]
            kept.append(document not in {3, 7, 8, 9, 20, 98})
        assert batch.target_index_N.tolist() == plain.target_index_N[kept].tolist()
        assert batch.target_ids_N.tolist() == plain.target_ids_N[kept].tolist()
        assert batch.target_count == sum(kept)
        assert torch.equal(batch.input_ids_T, plain.input_ids_T)
        left += len(kept) - sum(kept)
    assert left > 20


def test_the_loss_of_a_step_is_the_mean_over_the_other_targets(tmp_path: Path) -> None:
    config = build_classifier(tmp_path)
    prepared = prepare_data(config)
    objective = build_objective(config.objective)
    head = objective.head(build_network(config, prepared), prepared).eval()
    inner = objective.collator(prepared.tokenizer, prepared.train, seed=0, padded=False, multiple=1)
    collator = ExcludingCollator(inner, prepared.train, parse_ranges("1,4-5"))
    parts = [np.array([0, 1, 2]), np.array([4, 5, 6])]
    batches = [
        [make([prepared.train[int(i)] for i in ids], ids, 0, 0.0) for ids in parts] for make in (inner, collator)
    ]
    assert [batch.target_count for batch in batches[1]] == [2, 1]
    with torch.no_grad():
        losses = torch.cat([target_losses(head, batch) for batch in batches[0]])
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(head)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.0)
    result = train_step(accelerator, model, accelerator.prepare(optimizer), batches[1], lr=0.0, max_grad_norm=0.0)
    torch.testing.assert_close(result.loss, losses[[0, 2, 5]].mean())
    expected = accelerator.prepare(torch.optim.SGD(head.parameters(), lr=0.0))
    others = [inner([prepared.train[i] for i in (0, 2, 6)], np.array([0, 2, 6]), 0, 0.0)]
    alone = train_step(accelerator, model, expected, others, lr=0.0, max_grad_norm=0.0)
    torch.testing.assert_close(result.grad_norm, alone.grad_norm)
    # A step without any other target changes nothing.
    nothing = [
        ExcludingCollator(inner, prepared.train, parse_ranges("0-60"))([prepared.train[0]], np.array([0]), 0, 0.0)
    ]
    result = train_step(accelerator, model, expected, nothing, lr=0.0, max_grad_norm=0.0)
    assert (float(result.loss), float(result.grad_norm)) == (0.0, 0.0)


def test_a_row_that_gives_several_examples_is_one_document(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    config = Config(
        data=Data(source=source, eval_fraction=0.2, exclude_loss="2", **COLUMNS.get("answers", {})),
        tokens=CONFIG.tokens,
        model=MODELS["packed"],
        objective=BUILT_IN["answers"],
        batch=Batch(examples=10, max_length=32),
    )
    prepared = prepare_data(config)
    examples, bounds = prepared.train, prepared.train.document_bounds
    assert bounds is not None
    assert len(bounds) - 1 == 192 < len(examples)
    texts = [*build_objective(config.objective).training_texts(config)]
    assert len(texts) == 192
    counts = np.histogram(examples.start, bounds)[0]
    assert counts.sum() == len(examples)
    assert counts[np.argmax([len(text) for text in texts])] > 1


def test_a_loss_that_compares_examples_is_refused(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    config = Config(
        data=Data(source=source, eval_fraction=0.2, exclude_loss="2", **COLUMNS["triplets"]),
        tokens=CONFIG.tokens,
        model=MODELS["packed"],
        objective=SentenceEmbedding(),
        batch=Batch(examples=10, max_length=32),
        run=replace(CONFIG.run, output_dir=str(tmp_path / "out")),
    )
    with pytest.raises(ValueError, match=r"^data\.exclude_loss: the loss compares the examples of a step, so that the"):
        train(config)
    assert not (tmp_path / "out").exists()


def test_documents_are_numbers_or_a_file_of_numbers_or_of_texts(tmp_path: Path) -> None:
    config = config_in(tmp_path, steps=3)
    texts = [*build_objective(config.objective).training_texts(config)]
    same = [number for number, text in enumerate(texts) if text == texts[5]]
    assert read_documents(config, "3,17,40-42") == {3, 17, 40, 41, 42}
    (tmp_path / "numbers").write_text("3\n17,40-42\n\n")
    assert read_documents(config, str(tmp_path / "numbers")) == {3, 17, 40, 41, 42}
    (tmp_path / "texts").write_text(f"{texts[5]}\n{texts[9]}\n")
    assert read_documents(config, str(tmp_path / "texts")) >= {*same, 9}
    (tmp_path / "texts").write_text(f"{texts[5]}\n{texts[9]} and more\n")
    with pytest.raises(ValueError, match="texts, line 2: no training document has this text"):
        read_documents(config, str(tmp_path / "texts"))
    with pytest.raises(
        ValueError, match="--without: '3-' is not a list of numbers and ranges such as 3,17,40-45, and no"
    ):
        read_documents(config, "3-")


def test_a_list_of_numbers_may_be_longer_than_a_name_of_a_file(tmp_path: Path) -> None:
    numbers = {*range(0, 2000, 2)}
    assert read_documents(config_in(tmp_path, steps=3), format_ranges(numbers)) == numbers


def test_a_text_with_another_line_separator_is_one_text(tmp_path: Path) -> None:
    rows = [{"text": f"fox{mark}dog {n}"} for n, mark in enumerate(["\u2028", "\x0c", "\x85", " "] * 20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = replace(config_in(tmp_path, steps=3), data=Data(source=str(tmp_path / "rows.jsonl"), eval_fraction=0.2))
    texts = [*build_objective(config.objective).training_texts(config)]
    (tmp_path / "texts").write_text("\n".join(texts[:8]), encoding="utf-8")
    assert read_documents(config, str(tmp_path / "texts")) == {*range(8)}


def test_a_file_in_another_encoding_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    path.write_bytes("3\ncafé\n".encode("latin-1"))
    with pytest.raises(ValueError, match=f"^{path}, line 2: not UTF-8; convert the file$"):
        read_documents(config_in(tmp_path, steps=3), str(path))


@pytest.mark.parametrize("text", ["", "x", "5-3", "1,,2", "-1", "1-2-3", "²"])
def test_what_is_not_a_list_of_numbers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"data\.exclude_loss: .* is not a list of numbers and ranges such as"):
        Data(exclude_loss=text)


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_say_the_numbers_back(numbers: set[int]) -> None:
    ranges = parse_ranges(format_ranges(numbers))
    assert [number for part in ranges for number in part] == sorted(numbers)
    assert all(after.start > before.stop for before, after in pairwise(ranges))
    assert parse_ranges(",".join(map(str, numbers))) == ranges


@given(documents=st.sets(st.integers(0, 98), min_size=1, max_size=3), layout=st.sampled_from(["documents", "blocks"]))
@settings(max_examples=20, deadline=None)
def test_the_first_use_is_the_first_step_with_a_token_of_a_document(
    documents: set[int], layout: Any, text: Path
) -> None:
    config = replace(config_in(text, steps=3), batch=Batch(examples=4, max_length=24, layout=layout))
    prepared = prepare_data(config)
    examples, bounds = prepared.train, prepared.train.document_bounds
    assert bounds is not None
    plan = plan_steps(config, prepared, processes=1, padded=False, multiple=1)
    found = find_first_use(plan, prepared, parse_ranges(format_ranges(documents)), range(40))
    tokens = {int(id): d for d in documents for id in range(bounds[d], bounds[d + 1])}
    for step in range(40):
        ids = [id for i in plan.examples_of(step) for id in range(examples.start[i], examples.stop[i])]
        if used := {tokens[id] for id in ids if id in tokens}:
            assert found is not None
            assert found[0] == step
            assert found[1] in used
            return
    assert found is None


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")
