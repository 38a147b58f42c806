"""The settings of a run, and their two written forms: flags on the command line, and `run.json`.

`settings`, `objective_settings` and `phases` hold every setting with its default and its help, which `field_help`
reads. `command_line` reads flags, and `serialization` reads and writes JSON. If a user types a flag of another program,
`foreign_flags` names minilm's. None of these modules imports torch. Import the classes from the package:
`from minilm.config import Config`.
"""

from minilm.config.objective_settings import (
    CausalLM,
    Classification,
    MaskedLM,
    MultipleChoice,
    ObjectiveSettings,
    QuestionAnswering,
    SentenceEmbedding,
    SupervisedFineTuning,
    TokenClassification,
)
from minilm.config.phases import Phase
from minilm.config.settings import Batch, Config, ConfigValue, Data, Model, Optim, Run, Tokens
from minilm.utils.local_files import IN_MEMORY_EVAL_SOURCE, IN_MEMORY_SOURCE

__all__ = [
    "IN_MEMORY_EVAL_SOURCE",
    "IN_MEMORY_SOURCE",
    "Batch",
    "CausalLM",
    "Classification",
    "Config",
    "ConfigValue",
    "Data",
    "MaskedLM",
    "Model",
    "MultipleChoice",
    "ObjectiveSettings",
    "Optim",
    "Phase",
    "QuestionAnswering",
    "Run",
    "SentenceEmbedding",
    "SupervisedFineTuning",
    "TokenClassification",
    "Tokens",
]
