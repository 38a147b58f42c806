"""Examples carry notes to the figures of an evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import minilm
from minilm import Batch, Config, Data, Example, Model, Run, Tokens
from minilm.objectives.factory import prepare_data
from minilm.train import train

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


class Noting(minilm.Objective):
    """Two examples for each text, of which each notes the text, its length and its own number."""

    auto = AutoModelForSequenceClassification
    outputs = "rows"
    figures = ("characters", "first")

    def examples(self, rows: Any, tokenizer: Any, fields: Mapping[str, Any]) -> Iterator[Example]:
        for row in rows:
            ids = tokenizer(row["text"])["input_ids"]
            for number in range(2):
                yield Example(ids=ids, target=number, note={"text": row["text"], "ends": [len(row["text"]), number]})

    def metrics_with_notes(self, outputs: Tensor, targets: Tensor, notes: Sequence[Any]) -> Mapping[str, float]:
        assert len(outputs) == len(notes)
        assert [note["ends"][1] for note in notes] == targets.tolist()
        return {"characters": sum(note["ends"][0] for note in notes), "first": float(notes[0]["text"])}


class Odd(Noting):
    def examples(self, rows: Any, tokenizer: Any, fields: Mapping[str, Any]) -> Iterator[Example]:
        for example in super().examples(rows, tokenizer, fields):
            yield Example(ids=example.ids, target=example.target, note={1, 2})


def config(folder: Path, objective: minilm.Objective, texts: Mapping[str, Sequence[str]]) -> Config:
    parts_of_all: Any = {name: Dataset.from_dict({"text": part}) for name, part in texts.items()}
    DatasetDict(parts_of_all).save_to_disk(folder / "data")
    parts = [name for name in texts if name != "train"]
    return Config(
        data=Data(source=str(folder / "data"), eval_split="+".join(parts)),
        tokens=Tokens(vocab_size=300),
        model=Model(type="bert", config=SIZE),
        objective=objective,
        batch=Batch(examples=4, max_length=32),
        run=Run(max_steps=1, precision="fp32", output_dir=str(folder / "out")),
    )


def test_the_figures_of_each_part_get_the_notes_of_its_examples_in_their_order(tmp_path: Path) -> None:
    numbers = [str(100**k + k) for k in range(8)]
    settings = config(tmp_path, Noting(), {"train": ["a b c"] * 6, "near": numbers[:3], "far": numbers[3:]})
    prepared = prepare_data(settings)
    assert prepared.train.notes is None
    assert prepared.eval.notes is not None
    assert [*prepared.eval.notes] == [{"text": n, "ends": [len(n), i]} for n in numbers for i in range(2)]
    assert [*prepared.eval.notes[3:5]] == [prepared.eval.notes[3], prepared.eval.notes[4]]
    figures = train(settings).figures
    for name, part in (("", numbers), ("_near", numbers[:3]), ("_far", numbers[3:])):
        assert figures[f"characters{name}"] == 2 * sum(map(len, part))
        assert figures[f"first{name}"] == float(part[0])


def test_a_note_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path, Odd(), {"train": ["a b"], "dev": ["c"]})
    with pytest.raises(ValueError, match=r"evaluation documents, .*, row 0: a note is not made of JSON"):
        prepare_data(settings)
