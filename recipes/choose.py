"""Fine-tune a model that chooses among several texts: BERT on SWAG, or your own questions and answers.

    accelerate launch recipes/choose.py
    accelerate launch recipes/choose.py --model.name FOLDER --data.source questions.jsonl \\
        --objective.choices choices
"""

from minilm.commands.recipe import run_recipe
from minilm.config import Batch, Config, Data, Model, MultipleChoice, Optim, Run

CONFIG = Config(
    data=Data(source="allenai/swag", config="regular", eval_split="validation"),
    model=Model(name="bert-base-uncased"),
    objective=MultipleChoice(),
    batch=Batch(examples=16, max_length=128),
    optim=Optim(lr=5e-5, warmup=0.1),
    run=Run(epochs=3.0),
)

if __name__ == "__main__":
    run_recipe(CONFIG, __doc__)
