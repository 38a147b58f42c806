"""Compare minilm with TRL on supervised fine-tuning of chats: tokens per second, memory and the loss of each step.

    pip install trl
    python benchmarks/chats.py chats.jsonl

`chats.jsonl` has a column `messages`. A tokenizer of 8,192 tokens is trained on the chats. Its chat template has the
tags `{% generation %}` of transformers, which say what the assistant writes. Two models with random weights, 6 layers
and a width of 384 are trained, without dropout: a GPT-2 with the 50,257 tokens that it has on the hub, and a Llama with
32,000. Both sides get the same model, tokenizer, hyper-parameters and fused AdamW. A step has 8 chats, and its loss is
the mean over the assistant's tokens.

The rival is SFTTrainer with `assistant_only_loss`. It runs with its defaults, which recompute each layer in backward
(gradient checkpointing). It also runs without that, once without padding (`padding_free`), and once with
`group_by_length`, which makes other batches. `--attention` chooses its attention. minilm takes at most 2,048 tokens in
a forward pass. Each side runs in its own process, and only one side works at a time. The time does not include the
encoding of the chats. Results go to benchmarks/results, as JSON and as a plot (`pip install -e ".[report]"`).
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
from comparison import Contender, Rounds, Task, compare, run_minilm
from datasets import Dataset
from hf_trainer import MinilmRates, Turns, trainer_settings
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from minilm.config import Batch, Config, Data, Model, Optim, SupervisedFineTuning
from minilm.data.batch_plan import Plan
from minilm.data.tokenizer_training import train_tokenizer
from minilm.objectives.factory import build_network, prepare_data

TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else -%}
{{ message['content'] + '<|im_end|>' }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 384,
        "n_layer": 6,
        "n_head": 6,
        "n_positions": 512,
        "vocab_size": 50257,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "max_position_embeddings": 512,
        "vocab_size": 32000,
    },
}
HELD_OUT = 64  # chats that neither side trains on
MINILM = "minilm"


def write_chats(source: Path, folder: Path, *, vocabulary: int, longest: int) -> tuple[str, str]:
    """Write a tokenizer with a chat template, and the chats of at most `longest` tokens.

    Return the files of the chats for training and for the evaluation.
    """
    chats = [json.loads(line)["messages"] for line in source.read_text(encoding="utf-8").splitlines()]
    texts = [message["content"] for messages in chats for message in messages]
    tokenizer = train_tokenizer(Dataset.from_dict({"text": texts}), "bpe", vocabulary, causal=True)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    encoded: Any = tokenizer.apply_chat_template(chats, return_dict=True)
    fitting = [chat for chat, ids in zip(chats, encoded["input_ids"], strict=True) if len(ids) <= longest]
    paths = [folder / "train.jsonl", folder / "eval.jsonl"]
    for path, part in zip(paths, (fitting[:-HELD_OUT], fitting[-HELD_OUT:]), strict=True):
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in part), encoding="utf-8")
    return str(paths[0]), str(paths[1])


def write_model(kind: str, size: dict[str, Any], tokenizer: Path, folder: Path) -> str:
    """Write a model of this kind and size with random weights, and the tokenizer. Return the folder."""
    own = AutoTokenizer.from_pretrained(tokenizer)
    ends = {"bos_token_id": own.bos_token_id, "eos_token_id": own.eos_token_id}
    torch.manual_seed(0)
    for part in (AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **size, **ends)), own):
        part.save_pretrained(folder)
    return str(folder)


def configure(model: str, train: str, held_out: str, examples: int) -> Config:
    """Return the configuration of both sides."""
    return Config(
        data=Data(source=train, eval_source=held_out),
        model=Model(name=model),
        objective=SupervisedFineTuning(),
        batch=Batch(examples=examples, max_length=512, micro_tokens=2048),
        optim=Optim(lr=1e-4, warmup=0, schedule="constant"),
    )


def order_chats(config: Config, steps: int) -> Dataset:
    """Return the chats of minilm's steps, in their order."""
    prepared, rows = prepare_data(config), Dataset.from_json(config.data.sources[0])
    size = config.batch.examples
    plan = Plan(
        prepared.train.lengths, examples=size, micro_tokens=size * config.batch.max_length, seed=config.run.seed
    )
    return rows.select([int(i) for step in range(steps) for i in plan.step(step).examples])


def find_lengths(inputs: dict[str, Tensor]) -> Tensor:
    """Return the number of tokens of each chat in a batch of SFTTrainer."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum(-1)
    starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0]
    return torch.diff(starts, append=starts.new_tensor([inputs["position_ids"].shape[1]]))


def run_trl(
    task: Task, attention: str, *, checkpointing: bool = False, padding_free: bool = False, grouping: str = ""
) -> None:
    """Run SFTTrainer. `grouping`: its sampling strategy; by default it takes minilm's chats in their order."""
    from trl import SFTConfig, SFTTrainer

    config, steps = task.config, task.steps
    prepared = prepare_data(config)

    class TurnTrainer(MinilmRates, SFTTrainer):  # type: ignore[misc]
        """Records each step, and keeps the order of the rows unless they are grouped."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return super()._get_train_sampler(train_dataset) if grouping else SequentialSampler(train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            lengths, places = find_lengths(inputs), inputs["input_ids"].numel()
            loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
            turns.record(lengths, places, loss)
            return loss

    turns = Turns(task, prepared)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            assistant_only_loss=True,
            # Without padding, TRL cuts no chat. All chats fit.
            max_length=None if padding_free else config.batch.max_length,
            padding_free=padding_free,
            gradient_checkpointing=checkpointing,
            train_sampling_strategy=grouping or "random",
            **trainer_settings(config, config.run.precision, steps),
        )
        trainer = TurnTrainer(
            model=build_network(config, prepared),
            args=arguments,
            train_dataset=Dataset.from_json(config.data.sources[0]) if grouping else order_chats(config, steps),
            processing_class=AutoTokenizer.from_pretrained(config.model.name),
            callbacks=[turns],
        )
        trainer.optim = config.optim
        trainer.train()


def find_contenders(config: Config, attention: str) -> list[Contender]:
    """Return minilm and its rivals. The first one has the defaults of TRL."""
    settings: dict[str, dict[str, Any]] = {
        "TRL": {"checkpointing": True},
        "TRL, padding_free": {"padding_free": True},
        "TRL, group_by_length": {"grouping": "group_by_length"},
    }
    rivals = [
        Contender(name=name, config=config, run=partial(run_trl, attention=attention, **own))
        for name, own in settings.items()
    ]
    return [*rivals, Contender(name=MINILM, config=config, run=run_minilm)]


def compute_rows(kind: str, contenders: list[Contender], turns: list[list[Any]]) -> list[dict[str, Any]]:
    """Return the figures of each contender. A ratio is to TRL with its defaults."""
    return [
        {
            "model": kind,
            "name": contender.name,
            "label": f"{contender.name} ({kind})",
            "ours": contender.name == MINILM,
            **report.compute_figures(own, turns[0]),
            "losses": [loss for turn in own for loss in turn.losses],
            # Grouped by length, TRL has other batches.
            "loss_difference": None if "group" in contender.name else report.compute_loss_difference(own, turns[-1]),
        }
        for contender, own in zip(contenders, turns, strict=True)
    ]


def print_rows(kind: str, rows: list[dict[str, Any]], examples: int) -> None:
    """Print the table of one model."""
    apart = max(row["loss_difference"] for row in rows if row["loss_difference"] is not None)
    print(f"\n{kind}: {rows[0]['rounds']} steps of {examples}; losses of TRL and minilm differ by at most {apart:.1e}")
    print(report.COLUMNS_WITHOUT_MFU)
    for row in rows:
        print(report.line(row["name"], row))
    fastest = max((row for row in rows if not row["ours"]), key=lambda row: row["tokens_per_second"])
    times = rows[-1]["tokens_per_second"] / fastest["tokens_per_second"]
    print(f"minilm is {times:.2f} times as fast as {fastest['name']}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("chats", type=Path, metavar="CHATS", help="file of chats (.jsonl)")
    parser.add_argument("--model", choices=[*MODELS], help="run only this model")
    parser.add_argument("--examples", type=int, default=8, metavar="N", help="chats in a step (default: 8)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="steps of each side (default: 7)")
    parser.add_argument("--attention", default="sdpa", metavar="NAME", help="the rival's attention (default: sdpa)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of both sides (default: fp32)")
    options = parser.parse_args()
    machine, rows = report.describe_machine(options.precision), []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = write_chats(options.chats, folder, vocabulary=8192, longest=512)
        for kind in [options.model] if options.model else MODELS:
            model = write_model(kind, MODELS[kind], folder, folder / kind)
            contenders = find_contenders(configure(model, *files, options.examples), options.attention)
            turns = compare(contenders, machine.precision, Rounds(count=options.rounds, warm_up=1))
            own = compute_rows(kind, contenders, turns)
            print_rows(kind, own, options.examples)
            rows += own
    content = {"rows": rows, "examples": options.examples, "attention": options.attention}
    report.write("chats", machine, content, lambda figure: report.bars(figure.subplots(), rows), (8, 5))


if __name__ == "__main__":
    main()
