"""Supervised fine-tuning beside transformers' own loss, from rows to a folder that answers chats."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

from minilm import Batch, Config, Data, Model, Optim, Run, SupervisedFineTuning, Tokens
from minilm.commands.evaluate import evaluate
from minilm.data.tokenizer_training import train_tokenizer
from minilm.objectives.factory import prepare_data
from minilm.train import train
from tests.conftest import Run as RunCommand

CHATS = [
    [
        {"role": "user", "content": f"How many dogs are {number} and one?"},
        {"role": "assistant", "content": f"There are {number + 1}."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because " + "one and " * (number % 5) + "one."},
    ]
    for number in range(40)
]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model, whose tokenizer has no chat template."""
    folder = tmp_path_factory.mktemp(request.param)
    texts = [message["content"] for chat in CHATS for message in chat]
    tokenizer = train_tokenizer(Dataset.from_dict({"text": texts}), "bpe", 400, causal=True)
    torch.manual_seed(0)
    rows = len(tokenizer)
    small = {"vocab_size": rows, "bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    llama = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = (
        GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **small))
        if request.param == "gpt2"
        else LlamaForCausalLM(LlamaConfig(**llama, max_position_embeddings=128, **small))
    )
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return str(folder)


def configure(source: str, checkpoint: str, out: Path, **objective: Any) -> Config:
    return Config(
        data=Data(source=source, eval_fraction=0.2),
        model=Model(name=checkpoint),
        objective=SupervisedFineTuning(**{"template": "chatml", **objective}),
        batch=Batch(examples=8, max_length=128),
        optim=Optim(lr=1e-2),
        run=Run(max_steps=40, save_every=0, precision="fp32", output_dir=str(out)),
    )


def test_a_base_model_learns_to_answer(checkpoint: str, tmp_path: Path, run: RunCommand) -> None:
    source = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    config = configure(source, checkpoint, tmp_path / "out")
    result = train(config)
    tokenizer, model = AutoTokenizer.from_pretrained(result.folder), AutoModelForCausalLM.from_pretrained(result.folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    # The evaluation is the mean loss of the answers' tokens, as transformers computes it for each row alone.
    prepared = prepare_data(config)
    total, count = 0.0, 0
    for number in range(len(prepared.eval)):
        ids = prepared.eval[number].tolist()
        text = tokenizer.decode(ids)
        # Turns of the assistant are found by hand in the text of ChatML.
        labels, writes = [-100] * len(ids), False
        for place, id in enumerate(ids):
            head = tokenizer.decode(ids[:place])
            writes = head.rpartition("<|im_start|>")[2].startswith("assistant\n") and not head.endswith("<|im_end|>")
            writes = writes and "<|im_end|>" not in head.rpartition("<|im_start|>")[2]
            labels[place] = id if writes else -100
        assert text.count("assistant") == 2
        assert labels.count(end) == 2
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        losses = F.cross_entropy(logits[:-1], torch.tensor(labels[1:]), reduction="sum", ignore_index=-100)
        total, count = total + float(losses), count + len(ids) - labels.count(-100)
    assert result.figures["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert result.figures["perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-5)
    assert evaluate(result.folder)["eval_loss"] == pytest.approx(total / count, rel=1e-5)

    # The folder answers chats, and stops at the end of its answer.
    (answer,) = pipeline("text-generation", model=str(result.folder), device="cpu")(
        [CHATS[0][:1]], do_sample=False, max_new_tokens=30
    )
    reply = answer[0]["generated_text"][-1]["content"]
    assert reply.startswith("There are")
    assert reply.endswith(".")
    assert "<|im_start|>" not in reply
    question = CHATS[0][0]["content"]
    for words in (["--chat", question], [question, "--chat"]):
        status, lines, errors = run("generate", str(result.folder), *words, "--temperature", "0")
        assert (status, lines) == (None, reply.splitlines()), errors
    ids = tokenizer.apply_chat_template(CHATS[0][:1], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]).endswith("<|im_start|>assistant\n")


def test_a_tokenizer_without_a_template_is_refused(checkpoint: str, tmp_path: Path) -> None:
    source = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    with pytest.raises(ValueError, match=r"has no chat template.*--objective.template chatml"):
        prepare_data(configure(source, checkpoint, tmp_path / "out", template=None))


def test_lora_leaves_no_token_of_a_template_untrained(checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    source = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    config = configure(source, checkpoint, tmp_path / "out")
    config = replace(config, model=Model(name=checkpoint, lora_rank=2), run=replace(config.run, max_steps=2))
    with pytest.raises(
        ValueError, match=r"the embeddings of 2 new tokens untrained.*--objective.template chatml; plain"
    ):
        train(config)
    result = train(replace(config, objective=SupervisedFineTuning(template="plain")))
    assert result.figures["steps"] == 2


def decode_targets(config: Config) -> list[tuple[str, str]]:
    """The text of each training and evaluation example, and that of its targets."""
    prepared = prepare_data(config)
    results = []
    for examples in (prepared.train, prepared.eval):
        for number in range(len(examples)):
            targets = examples.targets_of_tokens(number)
            decode = prepared.tokenizer.decode
            results.append((decode(examples[number]), decode(targets[targets != -100])))
    return sorted(results)


def test_prompts_and_completions(checkpoint: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"One and {n} are", "completion": f" {n + 1}."} for n in range(20)]
    config = configure(write(tmp_path / "p.jsonl", rows), checkpoint, tmp_path, format="completion", template=None)
    end = prepare_data(config).tokenizer.eos_token
    pairs = [(f"{row['prompt']}{row['completion']}{end}", f"{row['completion']}{end}") for row in rows]
    assert decode_targets(config) == sorted(pairs)
    other = [{"question": row["prompt"], "answer": row["completion"]} for row in rows]
    source = write(tmp_path / "q.jsonl", other)
    data = Data(source=source, eval_fraction=0.2, column="question", pair_column="answer")
    assert decode_targets(replace(config, data=data)) == sorted(pairs)
    everything = SupervisedFineTuning(format="completion", targets="all")
    whole = decode_targets(replace(config, objective=everything))
    first = prepare_data(config).tokenizer
    for text, targets in whole:
        assert first.decode(first(text)["input_ids"][1:]) == targets


def test_texts(checkpoint: str, tmp_path: Path) -> None:
    rows = [{"text": f"There are {n} dogs."} for n in range(20)]
    config = configure(write(tmp_path / "t.jsonl", rows), checkpoint, tmp_path, format="text", template=None)
    tokenizer = prepare_data(config).tokenizer
    for text, targets in decode_targets(config):
        assert text.endswith(f" dogs.{tokenizer.eos_token}")
        assert targets == tokenizer.decode(tokenizer(text)["input_ids"][1:])


def test_a_token_across_the_boundary_is_counted(
    checkpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": "One and " if n < 3 else "One and", "completion": "one." if n < 3 else " one."} for n in range(20)
    ]
    source = write(tmp_path / "p.jsonl", rows)
    config = configure(source, checkpoint, tmp_path, format="completion", template=None)
    config = replace(config, data=Data(source=source, eval_source=source))
    with caplog.at_level(logging.WARNING, "minilm"):
        prepare_data(config)
        prepare_data(config)  # from the cache
    lines = [line for line in caplog.messages if "have a token with the end of the prompt" in line]
    assert len(lines) == 2
    assert all(line.startswith("documents: 3 rows have") for line in lines)


LONG = "one and " * 30


def long_rows(where: int) -> list[Any]:
    """Rows of which one is too long by what the user (0) or the assistant (1) says."""
    rows = [{"messages": chat[:2]} for chat in CHATS[:20]]
    long = [dict(message) for message in CHATS[0][:2]]
    long[where]["content"] += LONG
    return [*rows[:6], {"messages": long}, *rows[6:]]


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("too_long", ["refuse", "cut", "drop"])
def test_long_rows(
    too_long: str, where: int, checkpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path / "chats.jsonl", long_rows(where))
    config = configure(source, checkpoint, tmp_path, too_long=too_long)
    config = replace(config, data=Data(source=source, eval_source=source), batch=Batch(examples=4, max_length=64))
    if too_long == "refuse":
        message = r"chats.jsonl, line 7: the row has \d+ tokens, more than batch.max_length=64: raise it, or pass"
        with pytest.raises(ValueError, match=message):
            prepare_data(config)
        return
    with caplog.at_level(logging.WARNING, "minilm"):
        prepared = prepare_data(config)
    kept = too_long == "cut" and where == 1
    assert len(prepared.train) == 20 + kept
    assert all((prepared.train.targets_of_tokens(number) != -100).any() for number in range(len(prepared.train)))
    (line,) = [line for line in caplog.messages if "rows are" in line]
    expected = "documents: 1 rows are cut to batch.max_length=64 tokens" if kept else "documents: 1 rows are left out"
    assert line.startswith(expected)
    if kept:
        assert max(prepared.train.lengths) == 64


def test_rows_without_an_answer_are_refused(checkpoint: str, tmp_path: Path) -> None:
    chats = [*CHATS[:4], CHATS[4][:1], *CHATS[5:]]
    source = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    config = configure(source, checkpoint, tmp_path)
    with pytest.raises(ValueError, match=r"chats.jsonl, line 5: there is nothing to predict.*--objective.targets all"):
        prepare_data(config)
    assert len(prepare_data(replace(config, objective=SupervisedFineTuning(template="chatml", targets="all"))).train)


@pytest.mark.parametrize(
    ("rows", "objective", "data", "message"),
    [
        ([{"chat": CHATS[0]}] * 9, {}, {}, r"no column 'messages'.*--data.column"),
        ([{"prompt": "a", "completion": "b"}] * 9, {}, {"pair_column": "completion"}, r"--objective.format completion"),
        ([{"prompt": "a", "completion": " "}] * 20, {"format": "completion"}, {}, r"line \d+: the completion holds no"),
    ],
)
def test_wrong_columns_are_refused(
    rows: list[Any],
    objective: dict[str, Any],
    data: dict[str, Any],
    message: str,
    checkpoint: str,
    tmp_path: Path,
) -> None:
    source = write(tmp_path / "rows.jsonl", rows)
    config = configure(source, checkpoint, tmp_path, **{"template": None, **objective})
    with pytest.raises(ValueError, match=message):
        prepare_data(replace(config, data=Data(source=source, **data)))


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"objective.template must be one of chatml, .* not chatlm"):
        SupervisedFineTuning(template="chatlm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"objective.template writes messages"):
        SupervisedFineTuning(format="text", template="chatml")


def test_a_new_model_knows_the_tokens_of_the_template(tmp_path: Path) -> None:
    source = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    config = configure(source, "", tmp_path / "out")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = replace(config, tokens=Tokens(vocab_size=400), model=Model(type="llama", config=shape))
    result = train(replace(config, run=replace(config.run, max_steps=2)))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(result.folder), AutoTokenizer.from_pretrained(result.folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end < model.config.vocab_size
    assert end in model.generation_config.eos_token_id
