"""Pretrain a small ModernBERT on the documentation inside Python itself: offline, from scratch, in minutes.

    accelerate launch recipes/mlm_pydocs.py

In November 2026 it took 3 min 20 s from launch to end on two cores of an Intel Xeon (AMX, bf16). At the masked tokens
of modules that training did not see, it reached 1.15 bits per byte, and 1.14 and 1.15 with two other seeds. A model
that knows only the frequencies of the tokens has 3.04.
"""

from minilm import Batch, Config, Data, MaskedLM, Model, Optim, Run, Tokens
from minilm.commands.recipe import run_recipe

CONFIG = Config(
    data=Data(source="pydocs"),
    tokens=Tokens(vocab_size=2048),
    model=Model(
        type="modernbert",
        config={
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 256,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "local_attention": 4,
            "max_position_embeddings": 512,
        },
    ),
    objective=MaskedLM(rate=0.4, eval_rate=0.15),
    batch=Batch(examples=16, max_length=128, layout="blocks"),
    optim=Optim(name="muon", lr=5e-3, betas=(0.9, 0.98), warmup=115, weight_decay=0.1),
    run=Run(
        max_steps=2300,
        eval_every=500,
        samples=(
            "Return a [MASK] of all the keys in the dictionary.",
            "If the file does not exist, a FileNotFoundError [MASK] raised.",
            "The second [MASK] specifies the maximum number of bytes to read.",
        ),
    ),
)

if __name__ == "__main__":
    run_recipe(CONFIG, __doc__)
