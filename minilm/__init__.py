"""minilm: train language models on the Hugging Face ecosystem with a loop that you own.

A `Config` describes a run. `train` runs it, writes a model that `from_pretrained` loads, and returns the result:

    from minilm import Batch, Config, Data, Model, Run
    from minilm.train import train

    model = Model(type="bert", config={"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2})
    result = train(Config(data=Data(source="my_text.txt"), model=model, batch=Batch(examples=16), run=Run(epochs=2)))
    print(result.figures["eval_loss"], result.figures["perplexity"])

Import `Config` and its groups of settings from `minilm`. `help(minilm.Data)` explains the fields of a group, as the
`--help` of a recipe does. Import everything else from its module, which takes seconds because it imports torch. These
are the main modules, in the order in which a run uses them:

    minilm.commands.recipe        run_recipe: run a Config as a program with a flag for each field
    minilm.train                  train; for a loop of your own, train_step, load_steps and seed_dropout
    minilm.runs.session           begin, start_recording, save_networks: beginning and end of a loop of your own
    minilm.objectives.objective   Objective, the base class of an objective of your own (also minilm.Objective)
    minilm.objectives.factory     prepare_data, build_network (the model), build_objective (its head and evaluation)
    minilm.data.corpus            PreparedData and its Examples: the token ids on disk
    minilm.data.batch_plan        Plan: the examples of each step, and how it is cut into micro-batches
    minilm.data.micro_batch       MicroBatch: the token ids and targets of one forward pass
    minilm.models.sparse_head     SparseHead: a model of transformers that computes logits only at the targets
    minilm.optim.optimizer        build_optimizer
    minilm.optim.schedule         learning_rate
    minilm.runs.recorder          Recorder: log.jsonl and the progress bar
    minilm.runs.checkpoint        find_checkpoint, read_checkpoint: find a checkpoint and check its files
    minilm.runs.checkpoint_saver  CheckpointSaver: write a checkpoint
    minilm.models.inference       fill_mask, generate, classify: use a trained model
    minilm.commands.evaluate      evaluate: measure a trained model
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from minilm.config import (
    Batch,
    CausalLM,
    Classification,
    Config,
    Data,
    MaskedLM,
    Model,
    MultipleChoice,
    Optim,
    Phase,
    QuestionAnswering,
    Run,
    SentenceEmbedding,
    SupervisedFineTuning,
    TokenClassification,
    Tokens,
)
from minilm.config.field_help import attach_field_help
from minilm.utils.openmp import limit_spinning

if TYPE_CHECKING:
    from minilm.data.example import Example as Example
    from minilm.data.example import Remark as Remark
    from minilm.objectives.objective import Objective as Objective

__all__ = [
    "Batch",
    "CausalLM",
    "Classification",
    "Config",
    "Data",
    "MaskedLM",
    "Model",
    "MultipleChoice",
    "Optim",
    "Phase",
    "QuestionAnswering",
    "Run",
    "SentenceEmbedding",
    "SupervisedFineTuning",
    "TokenClassification",
    "Tokens",
]

# These import torch, which takes seconds, so that they are imported when they are first used.
_LAZY = {
    "Example": "minilm.data.example",
    "Objective": "minilm.objectives.objective",
    "Remark": "minilm.data.example",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'minilm' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


attach_field_help()
limit_spinning(os.environ)
