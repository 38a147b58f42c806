"""Laws 1 and 2 across a change of settings: phases change at a step, and nothing else does."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from minilm import (
    CausalLM,
    Classification,
    Config,
    Data,
    MaskedLM,
    Model,
    MultipleChoice,
    Phase,
    QuestionAnswering,
    SentenceEmbedding,
    SupervisedFineTuning,
    TokenClassification,
)
from minilm.commands.evaluate import evaluate
from minilm.config import ObjectiveSettings
from minilm.distributed.flops import count_flops
from minilm.objectives.factory import build_network, build_objective, prepare_run
from minilm.runs.checkpoint import read_checkpoint
from minilm.runs.session import plan_batches
from minilm.train import train
from tests.jobs import CONFIG, STEPS, WORDS, end_of, finish_all, in_folder, without_dropout, write_text
from tests.launch import read_log
from tests.laws.resume_everywhere import stopped_after
from tests.own_objectives import Tagging

# Each phase of this run changes something else, and the epochs of the first settings have 27 steps.
PHASES = (
    Phase(start=0.2, examples=12),
    Phase(start=0.35, max_length=32),
    Phase(start=11, mask_rate=0.5),
    Phase(start=14, weights=(2.0, 0.5)),
    Phase(start=0.9, max_length=16, examples=6),
)
CHANGES = (4, 7, 11, 14, 18)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("text")
    sources = (write_text(folder / "a.txt"), write_text(folder / "b.txt"))
    Path(sources[1]).write_text(Path(sources[1]).read_text().replace("fox", "name").replace("quick", "error"))
    return replace(
        CONFIG,
        data=Data(source=sources, eval_fraction=0.1),
        objective=MaskedLM(rate=0.3, unit="span"),
        run=replace(CONFIG.run, phases=PHASES),
    )


@pytest.fixture(scope="module")
def reference(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("out") / "reference"
    train(in_folder(config, folder))
    return folder


def plain(config: Config, micro_tokens: int = 40, **batch: Any) -> Config:
    """Return the configuration without dropout, with micro-batches of another size."""
    return replace(without_dropout(config), batch=replace(config.batch, micro_tokens=micro_tokens, **batch))


def expect_the_same_updates(folders: Sequence[Path]) -> None:
    (expected, evaluations), *others = map(read_log, folders)
    assert len(expected) == STEPS
    for steps, held_out in others:
        for ours, theirs in zip((*steps, *held_out), (*expected, *evaluations), strict=True):
            for key in theirs.keys() & {"loss", "grad_norm", "eval_loss"}:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
            assert all(ours[key] == theirs[key] for key in theirs.keys() & {"step", "epoch", "lr", "tokens"})


@pytest.mark.parametrize("layout", ["documents", "blocks", "packed"])
def test_neither_processes_nor_micro_batches_change_an_update_of_any_phase(
    layout: str, config: Config, tmp_path: Path
) -> None:
    cuts = [(4096, 1), (24, 1), (40, 2)]
    folders = [tmp_path / f"{size}-{processes}" for size, processes in cuts]
    jobs = [
        (in_folder(plain(config, size, layout=layout), folder), processes)
        for (size, processes), folder in zip(cuts, folders, strict=True)
    ]
    finish_all(jobs, tmp_path)
    expect_the_same_updates(folders)


@pytest.mark.parametrize("step", [3, *CHANGES, 15])
def test_a_run_resumed_before_at_or_after_a_change_ends_the_same_to_the_bit(
    step: int, config: Config, reference: Path, tmp_path: Path
) -> None:
    folder = stopped_after(step, reference, tmp_path / "stopped")
    train(in_folder(config, folder, resume="latest"))
    assert end_of(folder) == end_of(reference)


def test_workers_do_not_change_a_phase(config: Config, reference: Path, tmp_path: Path) -> None:
    train(in_folder(replace(config, batch=replace(config.batch, workers=1)), tmp_path / "out"))
    assert end_of(tmp_path / "out") == end_of(reference)


def test_tokens_and_flops_are_those_of_the_steps_of_each_phase(config: Config, reference: Path) -> None:
    prepared = prepare_run(config)
    head = build_objective(config.objective).head(build_network(config, prepared), prepared)
    job: Any = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    session: Any = SimpleNamespace(config=config, prepared=prepared, accelerator=job)
    plan, cost = plan_batches(session, head), count_flops(head, config.batch.max_length)
    steps = [plan.step(index) for index in range(STEPS)]
    assert [line["tokens"] for line in read_log(reference)[0]] == np.cumsum([step.tokens for step in steps]).tolist()
    rates = [0.3 if index < CHANGES[2] else 0.5 for index in range(STEPS)]
    flops = sum(cost.step(step, rate) for step, rate in zip(steps, rates, strict=True))
    assert read_checkpoint(reference / f"checkpoint-{STEPS}").progress.flops == pytest.approx(flops, rel=1e-9)


def test_a_run_with_phases_is_evaluated_again(reference: Path, config: Config, tmp_path: Path) -> None:
    last = read_log(reference)[1][-1]
    AcceleratorState._reset_state(reset_partial_state=True)
    again = evaluate(reference)
    assert again["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-4)
    source = config.data.sources[0]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert evaluate(reference, Data(source=source))["eval_loss"] > 0


def test_the_log_shows_each_phase(config: Config, reference: Path, tmp_path: Path) -> None:
    steps, evaluations = read_log(reference)
    epochs = [line["epoch"] for line in steps]
    assert epochs == sorted(epochs)
    train(in_folder(config, tmp_path / "plain", phases=()))
    unchanged, held_out = read_log(tmp_path / "plain")
    same = [ours["loss"] == theirs["loss"] for ours, theirs in zip(steps, unchanged, strict=True)]
    assert same == [step < CHANGES[0] for step in range(STEPS)]
    # The evaluation is that of the configuration itself, in all phases.
    names = ("unigram_bits_per_byte",)
    assert [[line[name] for name in names] for line in evaluations] == [
        [line[name] for name in names] for line in held_out
    ]


# The trunk has no phase. Its steps before BRANCHING are those of each tail.
BRANCHING = 9
TAILS = {
    "longer examples": (Phase(start=10, max_length=32),),
    "from the checkpoint on": (Phase(start=BRANCHING, max_length=12),),
    "more examples": (Phase(start=10, examples=20),),
    "a mask rate": (Phase(start=10, mask_rate=0.1),),
    "a data mix": (Phase(start=12, weights=(0.5, 3.0)),),
    "several": (Phase(start=10, max_length=32, examples=4), Phase(start=15, weights=(1.0, 2.0), mask_rate=0.6)),
}


@pytest.fixture(scope="module")
def trunk(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trunk") / "out"
    train(in_folder(config, folder, phases=(Phase(start=11, max_length=20), Phase(start=19, examples=2))))
    return folder


@pytest.mark.parametrize("name", TAILS)
def test_trunk_and_tail_equal_the_whole_run_to_the_bit(name: str, config: Config, trunk: Path, tmp_path: Path) -> None:
    train(in_folder(config, tmp_path / "whole", phases=TAILS[name]))
    checkpoint = trunk / f"checkpoint-{BRANCHING}"
    train(in_folder(config, tmp_path / "tail", phases=TAILS[name], resume=str(checkpoint)))
    assert end_of(tmp_path / "tail") == end_of(tmp_path / "whole")
    losses = [[line["loss"] for line in read_log(folder)[0]] for folder in (trunk, tmp_path / "tail")]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("step", "phases", "says"),
    [
        (9, (Phase(start=8, max_length=32), *PHASES[2:4]), "step 5 had the batch.examples 12 and would have 8 "),
        (9, (PHASES[0], Phase(start=8, max_length=32)), "step 8 had the batch.max_length 32 and would have 24 "),
        (13, (*PHASES[:2], Phase(start=11, mask_rate=0.4)), r"step 12 had the mask rate 0\.5 and would have 0\.4 "),
        (16, PHASES[:3], r"step 15 had the data.weights \[2\.0, 0\.5\] and would have \[\] "),
    ],
)
def test_a_change_in_a_phase_that_has_begun_is_refused_and_names_the_step(
    step: int, phases: tuple[Phase, ...], says: str, config: Config, reference: Path, tmp_path: Path
) -> None:
    checkpoint = reference / f"checkpoint-{step}"
    with pytest.raises(ValueError, match=says) as caught:
        train(in_folder(config, tmp_path / "tail", phases=phases, resume=str(checkpoint)))
    assert "\n" not in str(caught.value)
    assert "run.phases was [" in str(caught.value)
    assert not (tmp_path / "tail").exists()


def test_a_longer_run_moves_the_phases_that_begin_at_a_share_of_the_steps(
    config: Config, reference: Path, tmp_path: Path
) -> None:
    steady = replace(config, optim=replace(config.optim, schedule="constant", warmup=2))
    train(in_folder(steady, tmp_path / "trunk", phases=(Phase(start=0.5, examples=4),)))
    longer = in_folder(steady, tmp_path / "tail", phases=(Phase(start=0.5, examples=4),), max_steps=2 * STEPS)
    with pytest.raises(ValueError, match=r"step 11 had the batch\.examples 4 and would have 8 "):
        train(replace(longer, run=replace(longer.run, resume=str(tmp_path / "trunk" / "checkpoint-11"))))
    train(replace(longer, run=replace(longer.run, resume=str(tmp_path / "trunk" / "checkpoint-10"))))
    train(in_folder(longer, tmp_path / "whole"))
    assert end_of(tmp_path / "tail") == end_of(tmp_path / "whole")


def write_classes(folder: Path) -> tuple[str, str]:
    paths = folder / "a.csv", folder / "b.csv"
    for number, path in enumerate(paths):
        words = Path(write_text(folder / "text.txt")).read_text().splitlines()
        rows = [f"{text},{['no', 'yes'][(index + number) % 2]}" for index, text in enumerate(words[:60])]
        path.write_text("\n".join(["text,label", *rows]))
    return str(paths[0]), str(paths[1])


@pytest.mark.parametrize("objective", [CausalLM(), Classification()], ids=["causal LM", "classification"])
@pytest.mark.parametrize("layout", ["documents", "packed"])
def test_every_objective_has_phases(
    objective: CausalLM | Classification, layout: str, config: Config, tmp_path: Path
) -> None:
    data, model = config.data, config.model
    if isinstance(objective, Classification):
        data = Data(source=write_classes(tmp_path), eval_fraction=0.1)
    else:
        model = Model(type="gpt2", config={"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32})
    phases = (Phase(start=2, max_length=32), Phase(start=4, weights=(2.0, 0.5), examples=4))
    run = replace(config.run, phases=phases, max_steps=6, output_dir=str(tmp_path / "whole"))
    batch = replace(config.batch, layout=layout)
    whole = replace(config, data=data, model=model, objective=objective, batch=batch, run=run)
    train(whole)
    folder = stopped_after(3, tmp_path / "whole", tmp_path / "resumed")
    train(in_folder(whole, folder, resume="latest"))
    assert end_of(folder) == end_of(tmp_path / "whole")


SENTENCES = [" ".join(WORDS.split()[number % 7 : number % 7 + 3 + number % 9]) for number in range(60)]
GPT2 = Model(type="gpt2", config={"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64})
# An objective, its model (None for the one of the other tests), its settings of the data, and its rows.
ROWS: dict[str, tuple[ObjectiveSettings, Model | None, dict[str, Any], list[dict[str, Any]]]] = {
    "sentence embedding": (
        SentenceEmbedding(),
        None,
        {"column": "a", "pair_column": "b"},
        [{"a": text, "b": text[::-1]} for text in SENTENCES],
    ),
    "tags": (
        TokenClassification(),
        None,
        {},
        [{"tokens": text.split(), "ner_tags": ["O"] * len(text.split())} for text in SENTENCES],
    ),
    "supervised fine-tuning": (
        SupervisedFineTuning(format="completion", too_long="cut"),
        GPT2,
        {},
        [{"prompt": text[:5], "completion": text[5:] + " end"} for text in SENTENCES],
    ),
    "question answering": (
        QuestionAnswering(stride=2),
        None,
        {},
        [
            {"question": "which", "context": text, "answers": {"text": [text[:5]], "answer_start": [0]}}
            for text in SENTENCES
        ],
    ),
    "multiple choice": (
        MultipleChoice(choices=("x", "y")),
        None,
        {"column": "first", "label_column": "z"},
        [{"first": text, "x": text, "y": text[::-1], "z": 0} for text in SENTENCES],
    ),
    "an own objective": (
        Tagging(),
        None,
        {},
        [{"words": text.split(), "tags": ["other"] * len(text.split())} for text in SENTENCES],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_objectives_of_rows_have_phases(name: str, config: Config, tmp_path: Path) -> None:
    objective, model, settings, rows = ROWS[name]
    phases = (Phase(start=1, max_length=32), Phase(start=2, weights=(2.0,), examples=4))
    run = replace(config.run, phases=phases, max_steps=3, output_dir=str(tmp_path / "whole"))
    whole = replace(config, data=Data(**settings), model=model or config.model, objective=objective, run=run)
    train(whole, documents=rows)
    folder = stopped_after(2, tmp_path / "whole", tmp_path / "resumed")
    train(in_folder(whole, folder, resume="latest"), documents=rows)
    assert end_of(folder) == end_of(tmp_path / "whole")


def test_labels_that_a_data_mix_leaves_out_are_refused(config: Config, tmp_path: Path) -> None:
    sources = write_classes(tmp_path)
    with Path(sources[1]).open("a") as file:
        file.write("\na rare class,maybe")
    run = replace(config.run, phases=(Phase(start=5, weights=(1.0, 0.1)),), output_dir=str(tmp_path / "out"))
    data = Data(source=sources, eval_source=sources[0], eval_split="train")
    with pytest.raises(ValueError, match="from step 5 on: the training documents have other labels"):
        train(replace(config, data=data, objective=Classification(), run=run))
    assert not (tmp_path / "out").exists()


def test_the_size_of_micro_batches_is_tried_with_the_longest_examples(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minilm.runs import auto_micro_tokens

    longest: list[int] = []

    def note(accelerator: object, head: object, batch: Any, *, again: float = 0.0) -> float:
        longest.append(max(batch.packing.lengths))
        return 1.0

    monkeypatch.setattr(auto_micro_tokens, "_time_pass", note)
    automatic = replace(config, batch=replace(config.batch, micro_tokens="auto", layout="blocks"))
    train(in_folder(automatic, tmp_path / "out", max_steps=2, phases=(Phase(start=1, max_length=32),)))
    assert longest[0] == 32
