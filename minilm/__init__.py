"""minilm: train language models on the Hugging Face ecosystem with a loop that you own.

from minilm import Config, Data
from minilm.train import train

train(Config(data=Data(source="pydocs")))
"""

from minilm.config import Batch, CausalLM, Classification, Config, Data, MaskedLM, Model, Optim, Run, Tokens

__all__ = ["Batch", "CausalLM", "Classification", "Config", "Data", "MaskedLM", "Model", "Optim", "Run", "Tokens"]
