"""The settings of a run, and their two written forms: flags on the command line, and `run.json`.

`settings` holds every setting with its default and its help. `command_line` reads flags, and `serialization` reads and
writes JSON. `foreign_flags` answers flags of other programs. None of them imports torch. Import the classes from the
package: `from minilm.config import Config`.
"""

from minilm.config.settings import (
    Batch,
    CausalLM,
    Classification,
    Config,
    ConfigValue,
    Data,
    MaskedLM,
    Model,
    Optim,
    Run,
    Tokens,
)

__all__ = [
    "Batch",
    "CausalLM",
    "Classification",
    "Config",
    "ConfigValue",
    "Data",
    "MaskedLM",
    "Model",
    "Optim",
    "Run",
    "Tokens",
]
