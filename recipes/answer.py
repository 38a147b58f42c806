"""Fine-tune a model that finds the answer to a question in a text: BERT on SQuAD, SQuAD 2.0, or your own questions.

accelerate launch recipes/answer.py
accelerate launch recipes/answer.py --data.source rajpurkar/squad_v2 --data.eval-split validation \\
        --objective.no-answer
accelerate launch recipes/answer.py --model.name FOLDER --data.source train-v1.1.json --data.eval-source dev-v1.1.json
"""

from minilm.commands.recipe import run_recipe
from minilm.config import Batch, Config, Data, Model, Optim, QuestionAnswering, Run

CONFIG = Config(
    data=Data(source="rajpurkar/squad", eval_split="validation"),
    model=Model(name="bert-base-uncased"),
    objective=QuestionAnswering(),
    batch=Batch(examples=32, max_length=384, micro_tokens=8192),
    optim=Optim(lr=3e-5, warmup=0.1),
    run=Run(epochs=2.0),
)

if __name__ == "__main__":
    run_recipe(CONFIG, __doc__)
