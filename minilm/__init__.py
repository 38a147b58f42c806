"""minilm: train language models on the Hugging Face ecosystem with a loop that you own.

A run is one value, a `Config`; `train` makes of it a model that `from_pretrained` loads, and returns its figures:

    from minilm import Batch, Config, Data, Model, Run
    from minilm.train import train

    model = Model(type="bert", config={"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2})
    figures = train(Config(data=Data(source="my_text.txt"), model=model, batch=Batch(examples=16), run=Run(epochs=2)))
    print(figures["eval_loss"], figures["perplexity"])

What a configuration is made of is imported from here; `help(minilm.Data)` says what its fields mean, as a recipe's
`--help` does. What a run is made of is in modules, which import torch and so take seconds, in the order of a run:

    minilm.commands.recipe       run_recipe: a Config as a program, with a flag for each field
    minilm.train                 train; for a loop of your own train_step, load_steps, seed_dropout
    minilm.fork                  begin, start_recording, end: what a loop of your own begins and ends with
    minilm.objectives.objective  prepare (data and tokenizer), build (the model), objective_of (its head and evaluation)
    minilm.data.corpus           PreparedData and Examples, what `prepare` returns
    minilm.data.batch_plan       Plan: which examples make up step i, and how they are cut into micro-batches
    minilm.data.micro_batch      MicroBatch, on its way to the model, and its loss
    minilm.models.head           SparseHead: a model of transformers that gives the losses of a batch's targets
    minilm.optim.optimizer       build_optimizer, learning_rate
    minilm.runs.recorder         Recorder: log.jsonl and the progress bar
    minilm.runs.checkpoint       Saver, find_checkpoint: how a run is kept and found again
    minilm.models.inference      fill_mask, generate, classify: a trained model, used
    minilm.commands.evaluate     evaluate: a trained model, measured
"""

import ast
import contextlib
import inspect
from itertools import pairwise

from minilm.config import Batch, CausalLM, Classification, Config, Data, MaskedLM, Model, Optim, Run, Tokens, settings

__all__ = ["Batch", "CausalLM", "Classification", "Config", "Data", "MaskedLM", "Model", "Optim", "Run", "Tokens"]


def _explain() -> None:
    """Have `help` show the string under each field, which Python drops, as part of the constructor."""
    with contextlib.suppress(OSError):  # where the source is not there
        for owner in ast.parse(inspect.getsource(settings)).body:
            if isinstance(owner, ast.ClassDef) and owner.name in __all__:
                said = [
                    f"{ast.unparse(field.target)}: {' '.join(ast.literal_eval(text.value).split())}"
                    for field, text in pairwise(owner.body)
                    if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
                ]
                getattr(settings, owner.name).__init__.__doc__ = "\n".join(said) or None


_explain()
