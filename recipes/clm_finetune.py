"""Fine-tune a causal LM on your own text: DistilGPT2 on ELI5 by default, as in Hugging Face's tutorial.

    accelerate launch recipes/clm_finetune.py
    accelerate launch recipes/clm_finetune.py --model.name FOLDER --data.source my_text.txt --run.output-dir out/mine

minilm joins all documents, each with an end-of-text token, and cuts them into blocks of 128 tokens. The default model
and data come from the hub.
"""

from minilm import Batch, CausalLM, Config, Data, Model, Optim, Run
from minilm.commands.recipe import run_recipe

CONFIG = Config(
    data=Data(source="dany0407/eli5_category", split="train[:5000]", column="answers.text", eval_fraction=0.2),
    model=Model(name="distilbert/distilgpt2"),
    objective=CausalLM(),
    batch=Batch(examples=8, max_length=128, layout="blocks"),
    optim=Optim(lr=2e-5, weight_decay=0.01, warmup=0, schedule="linear"),
    run=Run(epochs=3),
)

if __name__ == "__main__":
    run_recipe(CONFIG, __doc__)
