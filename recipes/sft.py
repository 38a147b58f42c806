"""Fine-tune a causal LM on chats: Qwen2.5 on Capybara by default, with the loss on the assistant's tokens alone.

    accelerate launch recipes/sft.py
    accelerate launch recipes/sft.py --model.name FOLDER --data.source chats.jsonl --run.output-dir out/mine
    accelerate launch recipes/sft.py --data.source pairs.csv --objective.format completion

Each row has a column `messages`: [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]. The
tokenizer's chat template writes it as text; --objective.template chatml is for a base model without one. Chats of more
than 1,024 tokens are cut, and a line of the log counts them. The default model and data come from the hub.
"""

from minilm import Batch, Config, Data, Model, Optim, Run, SupervisedFineTuning
from minilm.commands.recipe import run_recipe

CONFIG = Config(
    data=Data(source="trl-lib/Capybara", eval_fraction=0.02),
    model=Model(name="Qwen/Qwen2.5-0.5B"),
    objective=SupervisedFineTuning(too_long="cut"),
    batch=Batch(examples=16, max_length=1024),
    optim=Optim(lr=2e-5, schedule="cosine", warmup=0.03),
    run=Run(epochs=1),
)

if __name__ == "__main__":
    run_recipe(CONFIG, __doc__)
