"""Fine-tune a sequence classifier: BERT on MRPC (are two sentences paraphrases?), any GLUE task, or your own labels.

    accelerate launch recipes/classify.py
    accelerate launch recipes/classify.py --data.source nyu-mll/glue --data.config sst2
    accelerate launch recipes/classify.py --model.name FOLDER --data.source train.tsv --data.eval-source dev.tsv \\
        --data.column sentence1 --data.pair-column sentence2 --data.label-column label
"""

from minilm.commands.recipe import run_recipe
from minilm.config import Batch, Classification, Config, Data, Model, Optim, Run

CONFIG = Config(
    data=Data(source="nyu-mll/glue", config="mrpc"),
    model=Model(name="bert-base-uncased"),
    objective=Classification(),
    batch=Batch(examples=32, max_length=128),
    optim=Optim(lr=2e-5, warmup=0.06),
    run=Run(epochs=3.0),
)

if __name__ == "__main__":
    run_recipe(CONFIG, __doc__)
