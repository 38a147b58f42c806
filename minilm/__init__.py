"""minilm: train language models on the Hugging Face ecosystem with a loop that you own.

from minilm import Config, Data, train
train(Config(data=Data(source="pydocs")))
"""

from typing import TYPE_CHECKING, Any

from minilm.config import Batch, Config, Data, MaskedLM, Model, Optim, Run, Tokens

if TYPE_CHECKING:
    from minilm.train import train, train_step

__all__ = ["Batch", "Config", "Data", "MaskedLM", "Model", "Optim", "Run", "Tokens", "train", "train_step"]


def __getattr__(name: str) -> Any:
    """`train` and `train_step` on first use: importing torch takes seconds that `--help` must not wait for."""
    if name in ("train", "train_step"):
        from minilm import train as module

        return getattr(module, name)
    raise AttributeError(f"module 'minilm' has no attribute {name!r}")
