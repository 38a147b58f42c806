"""Compare minilm with sentence-transformers on sentence embeddings: tokens per second, memory and losses of a step.

    python benchmarks/embeddings.py MODEL pairs.jsonl

`pairs.jsonl` has the columns `anchor` and `positive`. A text that occurs twice is left out, since minilm does not take
it for a negative. A step has 1,024 pairs, and its loss is InfoNCE over all of them, with mean pooling and without
dropout. Both sides start from the same weights and take the same steps, with fused AdamW.

The rival is SentenceTransformerTrainer with CachedMultipleNegativesRankingLoss, which makes two passes over
mini-batches as minilm does. It runs with its default of 32 rows in a pass, and with 128 rows. `--attention` chooses its
attention. minilm takes 4,096 tokens in a pass, or the whole step at once, which needs no second pass but more memory.
Each side runs in its own process, and only one side works at a time. Results go to benchmarks/results, as JSON and as a
plot (`pip install -e ".[report]"`).
"""

import argparse
import json
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
from comparison import Contender, Rounds, Task, compare, run_minilm
from datasets import Dataset
from hf_trainer import MinilmRates, Turns, trainer_settings
from torch import Tensor, nn
from torch.utils.data import BatchSampler, SequentialSampler

from minilm.config import Batch, Config, Data, Model, Optim, SentenceEmbedding
from minilm.data.batch_plan import Plan
from minilm.objectives.factory import prepare_data

DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
EVALUATED = 64  # pairs that neither side trains on


def write_pairs(source: Path, folder: Path, limit: int | None = None) -> tuple[str, str]:
    """Write the pairs whose texts have not occurred before, and return the files for training and evaluation."""
    seen: set[str] = set()
    rows = []
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts = {row["anchor"].lower(), row["positive"].lower()}
        if len(texts) == 2 and not texts & seen:
            seen |= texts
            rows.append(json.dumps({"anchor": row["anchor"], "positive": row["positive"]}))
    rows = rows[:limit]
    paths = [folder / "train.jsonl", folder / "eval.jsonl"]
    for path, part in zip(paths, (rows[:-EVALUATED], rows[-EVALUATED:]), strict=True):
        path.write_text("\n".join(part) + "\n", encoding="utf-8")
    return str(paths[0]), str(paths[1])


def configure(model: str, train: str, held_out: str, examples: int) -> Config:
    """Return the configuration of both sides."""
    return Config(
        data=Data(source=train, eval_source=held_out, column="anchor", pair_column="positive"),
        model=Model(name=model, config=dict.fromkeys(DROPOUT, 0.0)),
        objective=SentenceEmbedding(),
        batch=Batch(examples=examples, max_length=128, micro_tokens=4096),
        optim=Optim(lr=2e-5, warmup=0, schedule="constant"),
    )


def order_pairs(config: Config, steps: int) -> Dataset:
    """Return the pairs of minilm's steps, in their order."""
    prepared, rows = prepare_data(config), Dataset.from_json(config.data.sources[0])
    size = config.batch.examples
    plan = Plan(
        prepared.train.lengths, examples=size, micro_tokens=size * config.batch.max_length, seed=config.run.seed
    )
    return rows.select([int(i) for step in range(steps) for i in plan.step(step).examples])


def count_places(lengths_R: Tensor, rows: int) -> int:
    """Return the tokens of mini-batches of this many rows, each padded to its longest row."""
    parts = torch.split(lengths_R, rows)
    return sum(len(part) * int(part.max()) for part in parts)


def run_sentence_transformers(task: Task, attention: str, *, rows: int = 32) -> None:
    """Run SentenceTransformerTrainer. `rows`: the size of a mini-batch of its cached loss."""
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    config, steps = task.config, task.steps

    class TurnTrainer(MinilmRates, SentenceTransformerTrainer):
        """Records each step."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            lengths = [inputs[name].sum(-1) for name in inputs if name.endswith("attention_mask")]
            loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
            turns.record(torch.cat(lengths), sum(count_places(column, rows) for column in lengths), loss)
            return loss

    def sample(dataset: Any, batch_size: int, drop_last: bool, **ignored: Any) -> Any:
        return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    encoder = Transformer(
        str(config.model.name), model_kwargs={"attn_implementation": attention}, max_seq_length=config.batch.max_length
    )
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension(), "mean")])
    turns = Turns(task, prepare_data(config))
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / SentenceEmbedding.temperature, mini_batch_size=rows)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            batch_sampler=sample,
            **trainer_settings(config, config.run.precision, steps),
        )
        trainer = TurnTrainer(
            model=model, args=arguments, train_dataset=order_pairs(config, steps), loss=loss, callbacks=[turns]
        )
        trainer.optim = config.optim
        trainer.train()


def find_contenders(config: Config, attention: str) -> list[Contender]:
    """Return minilm and its rivals. The second one has the defaults of sentence-transformers."""
    run = partial(run_sentence_transformers, attention=attention)
    batch = config.batch
    whole = replace(config, batch=replace(batch, micro_tokens=2 * batch.examples * batch.max_length))
    return [
        Contender(name=f"minilm, {batch.micro_tokens:,} tokens", config=config, run=run_minilm),
        Contender(name="sentence-transformers, 32 rows", config=config, run=run),
        Contender(name="sentence-transformers, 128 rows", config=config, run=partial(run, rows=128)),
        Contender(name="minilm, whole step", config=whole, run=run_minilm),
    ]


def compute_rows(contenders: Iterable[Contender], turns: list[list[Any]]) -> list[dict[str, Any]]:
    """Return the figures of each contender. A ratio is to the rival with its defaults."""
    return [
        {
            "label": contender.name,
            "ours": contender.name.startswith("minilm"),
            **report.compute_figures(own, turns[1]),
            "losses": [loss for turn in own for loss in turn.losses],
            "loss_difference": report.compute_loss_difference(own, turns[0]),
        }
        for contender, own in zip(contenders, turns, strict=True)
    ]


def print_rows(rows: list[dict[str, Any]], examples: int, attention: str) -> None:
    """Print the table."""
    apart = max(row["loss_difference"] for row in rows)
    print(f"\n{rows[0]['rounds']} steps of {examples:,} pairs; {attention} attention in sentence-transformers")
    print(f"the losses of a step differ by at most {apart:.1e}")
    print(report.COLUMNS_WITHOUT_MFU.replace("the first", "32 rows  "))
    for row in rows:
        print(report.line(row["label"], row))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of the model to start from")
    parser.add_argument("pairs", type=Path, metavar="PAIRS", help="file of pairs (.jsonl)")
    parser.add_argument("--examples", type=int, default=1024, metavar="N", help="pairs in a step (default: 1024)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="steps of each side (default: 5)")
    parser.add_argument("--attention", default="sdpa", metavar="NAME", help="the rival's attention (default: sdpa)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of both sides (default: fp32)")
    options = parser.parse_args()
    machine = report.describe_machine(options.precision)
    with tempfile.TemporaryDirectory() as folder:
        files = write_pairs(options.pairs, Path(folder))
        contenders = find_contenders(configure(options.model, *files, options.examples), options.attention)
        turns = compare(contenders, machine.precision, Rounds(count=options.rounds, warm_up=1))
    rows = compute_rows(contenders, turns)
    print_rows(rows, options.examples, options.attention)
    content = {"rows": rows, "examples": options.examples, "attention": options.attention}
    report.write("embeddings", machine, content, lambda figure: report.bars(figure.subplots(), rows), (8, 3))


if __name__ == "__main__":
    main()
