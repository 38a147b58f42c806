"""Remarks about rows in the log, fields that only `examples` reads, and ids of classes in two sources."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoModelForTokenClassification

import minilm
from minilm import Batch, Config, Data, Example, Model, Remark, Tokens
from minilm.objectives.factory import build_network, prepare_data


class Letters(minilm.Objective):
    """Is a letter an a?"""

    auto = AutoModelForTokenClassification

    def columns(self, data: Data) -> dict[str, str]:
        return {"letters": "text", "tags": "tags"}

    def fields(self, rows: Any, config: Config) -> dict[str, Any]:
        return {"id2label": {0: "other", 1: "a"}, "_wanted": "a"}

    def examples(self, rows: Any, tokenizer: Any, fields: Mapping[str, Any]) -> Any:
        for row in rows:
            if row["letters"] == "z":
                yield Remark("rows are only a z", 2)
            targets = [int(letter == fields["_wanted"]) for letter in row["letters"]]
            yield Example(ids=[5 + target for target in targets], targets=targets)


def config_of(place: Path, lines: list[str], eval_lines: list[str]) -> Config:
    for name, texts in (("train", lines), ("dev", eval_lines)):
        rows = [{"text": text, "tags": [0]} for text in texts]
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return Config(
        data=Data(source=str(place / "train.jsonl"), eval_source=str(place / "dev.jsonl")),
        tokens=Tokens(vocab_size=300),
        model=Model(type="bert", config=size),
        objective=Letters(),
        batch=Batch(max_length=8),
    )


def test_remarks_are_one_line_also_when_the_examples_come_from_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path, ["abc", "z", "a", "z"], ["ab"])
    logging.getLogger("minilm").propagate = True
    for _ in range(2):
        caplog.clear()
        prepare_data(config)
        assert [m for m in caplog.messages if "only a z" in m] == ["training documents: 4 rows are only a z"]


def test_fields_for_the_examples_alone_are_not_in_the_configuration(tmp_path: Path) -> None:
    config = config_of(tmp_path, ["abc", "b"], ["ab"])
    prepared = prepare_data(config)
    assert [prepared.train.targets_of_tokens(i).tolist() for i in range(2)] == [[1, 0, 0], [0]]
    assert build_network(config, prepared).config.id2label == {0: "other", 1: "a"}
    assert not hasattr(build_network(config, prepared).config, "_wanted")


def test_evaluation_rows_whose_class_ids_mean_something_else_are_refused(tmp_path: Path) -> None:
    def write(name: str, names: list[str]) -> str:
        features = Features({"text": Value("string"), "tags": List(ClassLabel(names=names))})
        Dataset.from_dict({"text": ["ab", "a"], "tags": [[0, 1], [1]]}, features=features).to_parquet(tmp_path / name)
        return str(tmp_path / name)

    config = config_of(tmp_path, ["ab"], ["ab"])
    data = Data(source=write("train.parquet", ["O", "B"]), eval_source=write("dev.parquet", ["B", "O"]))
    with pytest.raises(ValueError, match=r"class ids of O, B in .*train.parquet, class ids of B, O in .*dev.parquet"):
        prepare_data(replace(config, data=data))
    same = replace(data, eval_source=write("same.parquet", ["O", "B"]))
    assert len(prepare_data(replace(config, data=same)).eval) == 2
