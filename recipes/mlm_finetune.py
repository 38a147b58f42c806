"""Fine-tune a masked LM on your own text: DistilRoBERTa on ELI5 by default, as in Hugging Face's tutorial.

    accelerate launch recipes/mlm_finetune.py
    accelerate launch recipes/mlm_finetune.py --model.name FOLDER --data.source my_text.txt --run.output-dir out/mine

minilm joins all documents and cuts them into blocks of 128 tokens. The model predicts 15% of the tokens. The default
model and data come from the hub.
"""

from minilm import Batch, Config, Data, MaskedLM, Model, Optim, Run
from minilm.commands.recipe import run_recipe

CONFIG = Config(
    data=Data(source="dany0407/eli5_category", split="train[:5000]", column="answers.text", eval_fraction=0.2),
    model=Model(name="distilbert/distilroberta-base"),
    objective=MaskedLM(rate=0.15),
    batch=Batch(examples=8, max_length=128, layout="blocks"),
    optim=Optim(lr=2e-5, weight_decay=0.01, warmup=0, schedule="linear"),
    run=Run(epochs=3),
)

if __name__ == "__main__":
    run_recipe(CONFIG, __doc__)
