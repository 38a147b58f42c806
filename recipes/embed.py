"""Train sentence embeddings: MiniLM on pairs of questions that mean the same, or on your own pairs.

    accelerate launch recipes/embed.py
    accelerate launch recipes/embed.py --data.source pairs.jsonl --data.column anchor --data.pair-column positive
    accelerate launch recipes/embed.py --data.source sts.jsonl --data.column sentence1 --data.pair-column sentence2 \\
        --data.score-column score
"""

from minilm.commands.recipe import run_recipe
from minilm.config import Batch, Config, Data, Model, Optim, Run, SentenceEmbedding

CONFIG = Config(
    data=Data(source="sentence-transformers/quora-duplicates", config="pair", column="anchor", pair_column="positive"),
    model=Model(name="nreimers/MiniLM-L6-H384-uncased"),
    objective=SentenceEmbedding(),
    batch=Batch(examples=128, max_length=128),
    optim=Optim(lr=2e-5, warmup=0.1),
    run=Run(epochs=1.0),
)

if __name__ == "__main__":
    run_recipe(CONFIG, __doc__)
