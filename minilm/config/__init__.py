"""The settings of a run and their two written forms, the command line and `run.json`. Nothing here imports torch.

`groups` has every setting with its default and its help. `parsing` reads flags and `run.json`. `foreign_flags` answers
flags of other programs. Import the classes from the package: `from minilm.config import Config`.
"""

from minilm.config.groups import (
    Batch,
    CausalLM,
    Classification,
    Config,
    Data,
    MaskedLM,
    Model,
    Optim,
    Run,
    Tokens,
    Value,
    lower_is_better,
)

__all__ = [
    "Batch",
    "CausalLM",
    "Classification",
    "Config",
    "Data",
    "MaskedLM",
    "Model",
    "Optim",
    "Run",
    "Tokens",
    "Value",
    "lower_is_better",
]
