"""The golden run: 30 steps whose losses are kept in golden.json. Rewrite the file with: python -m tests.laws.golden"""

import json
import tempfile
from pathlib import Path

from minilm import Batch, Config, Data, MaskedLM, Model, Optim, Run, Tokens
from minilm.train import train
from tests.launch import read_log

FILE = Path(__file__).with_name("golden.json")
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CONFIG = Config(
    tokens=Tokens(vocab_size=320),
    model=Model(
        type="roberta",
        config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 66,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
    objective=MaskedLM(rate=0.15),
    batch=Batch(examples=8, max_length=64, micro_tokens=128),
    optim=Optim(lr=3e-3, schedule="cosine"),
    run=Run(max_steps=30, precision="fp32"),
)


def golden_losses() -> list[float]:
    """The loss of each step on documents that count, written out in words."""
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder, "counting.txt"), Path(folder, "out")
        numbers = (range(start, start + 3 + start % 20) for start in range(0, 600, 7))
        text.write_text("\n".join(" ".join(" ".join(WORDS[int(d)] for d in str(n)) for n in ns) for ns in numbers))
        run = Run(max_steps=30, precision="fp32", output_dir=str(out))
        train(Config(**{**vars(CONFIG), "data": Data(source=str(text)), "run": run}))
        return [line["loss"] for line in read_log(out)[0]]


if __name__ == "__main__":
    FILE.write_text(json.dumps([round(loss, 6) for loss in golden_losses()]) + "\n")
