"""Fine-tune a model that tags words: BERT on the names of persons, organisations and places, or on your own tags.

    accelerate launch recipes/tag.py
    accelerate launch recipes/tag.py --data.source eng.train.conll --objective.scheme iob1
    accelerate launch recipes/tag.py --model.name FOLDER --data.source rows.jsonl --data.column tokens \\
        --data.label-column ner_tags
"""

from minilm.commands.recipe import run_recipe
from minilm.config import Batch, Config, Data, Model, Optim, Run, TokenClassification

CONFIG = Config(
    data=Data(source="unimelb-nlp/wikiann", config="en", eval_split="validation"),
    model=Model(name="bert-base-cased"),
    objective=TokenClassification(),
    batch=Batch(examples=16, max_length=256),
    optim=Optim(lr=5e-5, warmup=0.1),
    run=Run(epochs=3.0),
)

if __name__ == "__main__":
    run_recipe(CONFIG, __doc__)
