"""Train a character-level causal LM from scratch, with the size and the number of tokens of nanoGPT's CPU example.

    curl -O https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    accelerate launch recipes/clm_shakespeare.py

Any other file of plain text works too (`--data.source FILE`). The last tenth of the text is held out. On tiny
Shakespeare the held-out loss ends below 1.60, after 2,000 steps of 768 characters. nanoGPT's README has 1.88 for the
same size and steps.
"""

from minilm import Batch, CausalLM, Config, Data, Model, Optim, Run, Tokens
from minilm.commands.recipe import run_recipe

CONFIG = Config(
    data=Data(source="input.txt", document="file", eval_fraction=0.1),
    tokens=Tokens(kind="characters"),
    model=Model(
        type="gpt2",
        config={
            "n_layer": 4,
            "n_head": 4,
            "n_embd": 128,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    objective=CausalLM(),
    batch=Batch(examples=12, max_length=64, layout="blocks"),
    optim=Optim(name="muon", muon_momentum=0.9, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, warmup=100),
    run=Run(max_steps=2000, eval_every=500, samples=("ROMEO:",)),
)

if __name__ == "__main__":
    run_recipe(CONFIG, __doc__)
