"""batch.micro_tokens=auto finds a number, which changes no result and which a resumed run keeps."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import minilm.runs.auto_micro_tokens
from minilm import Config, Data
from minilm.data.micro_batch import MicroBatch
from minilm.runs.auto_micro_tokens import choose_fastest, resolve_micro_tokens
from minilm.train import train
from tests.jobs import CONFIG, end_of, finish_all, write_text
from tests.laws.resume_everywhere import stopped_after

AUTO = replace(CONFIG, batch=replace(CONFIG.batch, examples=96, micro_tokens="auto"))


def into(folder: Path, config: Config, **run: Any) -> Config:
    text = write_text(folder.parent / "text.txt")
    run = {"output_dir": str(folder), "max_steps": 3, **run}
    return replace(config, data=Data(source=text, eval_fraction=0.1), run=replace(config.run, **run))


def read_micro_tokens(folder: Path) -> int:
    number: int = json.loads((folder / "run.json").read_text())["config"]["batch"]["micro_tokens"]
    return number


def test_the_smallest_of_the_nearly_fastest_sizes_is_taken() -> None:
    assert choose_fastest({512: 1.0, 1024: 0.8, 2048: 0.79, 4096: 0.9}) == 1024
    assert choose_fastest({512: 1.0}) == 512


def test_a_run_is_that_of_the_number_that_was_found(tmp_path: Path) -> None:
    auto, given = tmp_path / "auto", tmp_path / "given"
    train(into(auto, AUTO))
    number = read_micro_tokens(auto)
    assert number >= 512
    train(into(given, replace(AUTO, batch=replace(AUTO.batch, micro_tokens=number))))
    assert end_of(auto) == end_of(given)


def test_a_resumed_run_keeps_its_number(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    train(into(whole, CONFIG))
    half = stopped_after(1, whole, tmp_path / "half")
    train(into(half, replace(CONFIG, batch=replace(CONFIG.batch, micro_tokens="auto")), resume="latest"))
    assert read_micro_tokens(half) == CONFIG.batch.micro_tokens
    assert end_of(half) == end_of(whole)


# The first process is faster at 512 tokens, the second at 1,024, and by more.
PLANTED = """
import os
import minilm.runs.auto_micro_tokens
rank = int(os.environ["RANK"])
minilm.runs.auto_micro_tokens._try_sizes = lambda *_: {512: 1.0, 1024: 1.1} if rank == 0 else {512: 3.0, 1024: 1.0,
2048: 0.5}
"""


def test_processes_take_the_number_that_is_best_for_the_slowest(tmp_path: Path) -> None:
    finish_all([(into(tmp_path / "out", AUTO, max_steps=1), 2)], tmp_path, PLANTED)
    assert read_micro_tokens(tmp_path / "out") == 1024


class Head(torch.nn.Module):
    """Takes as long for a token as `seconds` says, by the tokens of the batch."""

    coupled_rows = 0

    def __init__(self, seconds: dict[int, float]) -> None:
        super().__init__()
        self.weight, self.seconds, self.seen = torch.nn.Parameter(torch.ones(())), seconds, list[int]()

    def forward(self, input_ids_T: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds[len(input_ids_T)] * len(input_ids_T))
        self.seen.append(len(input_ids_T))
        return self.weight.expand(3)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], tuple[Config, Head]]:
    """What is tried where a forward takes these seconds a token."""
    batch = type("Some", (), {"to": lambda self, device: self})

    def of(size: int) -> MicroBatch:
        some: Any = batch()
        some.input_ids_T = torch.zeros(size)
        return some

    monkeypatch.setattr(minilm.runs.auto_micro_tokens, "loss_sum", lambda head, batch: head(batch.input_ids_T).sum())

    def tried(seconds: dict[int, float]) -> tuple[Config, Head]:
        head: Any = Head(seconds)

        def first_step(config: Config) -> list[MicroBatch]:
            size = minilm.runs.auto_micro_tokens.micro_tokens_of(config)
            return [of(size)] * (2048 // size)

        return resolve_micro_tokens(AUTO, Accelerator(cpu=True), head, None, first_step), head

    return tried


def test_larger_sizes_are_tried_until_they_are_slower_or_the_step_is_whole(sizes: Any) -> None:
    config, head = sizes({512: 4e-5, 1024: 2e-5, 2048: 1e-5})
    assert config.batch.micro_tokens == 2048
    assert sorted(set(head.seen)) == [512, 1024, 2048]
    assert head.weight.grad is None
    config, head = sizes({512: 2e-5, 1024: 4e-5})
    assert config.batch.micro_tokens == 512
    assert sorted(set(head.seen)) == [512, 1024]


def test_a_pass_before_counts_if_the_loss_compares_examples(sizes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Head, "coupled_rows", 2, raising=False)
    # Without the forward pass before, which only a whole step can leave out, 512 would be as fast.
    config, head = sizes({512: 2e-5, 1024: 2e-5, 2048: 2e-5})
    assert config.batch.micro_tokens == 2048
    assert [head.seen.count(size) for size in (512, 1024, 2048)] == [6, 6, 3]


def test_sizes_that_would_not_fit_are_not_tried(sizes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([2**40, 0])
    monkeypatch.setattr(minilm.runs.auto_micro_tokens, "peak_memory", lambda device: next(held))
    config, head = sizes({512: 4e-5})
    assert config.batch.micro_tokens == 512
    assert set(head.seen) == {512}


def test_a_memory_that_is_too_small_for_any_size_is_refused(sizes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **options: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(minilm.runs.auto_micro_tokens, "_time_pass", full)
    with pytest.raises(ValueError, match=r"^batch\.micro_tokens=auto: 512 tokens do not fit into the memory.*\Z"):
        sizes({})


def test_a_sharded_run_takes_a_number() -> None:
    with pytest.raises(ValueError, match="does not work with sharding: give a number of tokens"):
        resolve_micro_tokens(AUTO, SimpleNamespace(is_fsdp2=True), None, None, None)  # type: ignore[arg-type]


def test_a_loop_of_ones_own_takes_a_number() -> None:
    with pytest.raises(ValueError, match=r"only in the loop of minilm\.train: give a number of tokens"):
        minilm.runs.auto_micro_tokens.micro_tokens_of(AUTO)
