"""Small checkpoints for the tests that write and read them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from minilm.config import Config, Run
from minilm.runs.checkpoint import Progress
from minilm.runs.checkpoint_saver import CheckpointSaver

IDS_BxL = torch.tensor([[2, 9, 30, 11, 4, 3], [2, 40, 4, 12, 50, 3]])
WEIGHTS, MOMENTS, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "training.json", "manifest.json"
LISTED = ["config.json", WEIGHTS, MOMENTS, "tokenizer.json", "tokenizer_config.json", STATE]
INPUTS = {
    "training examples": {"examples": 3, "tokens": 15, "fingerprint": "abc"},
    "training examples of the phases": [],
    "evaluation examples": {"examples": 1, "tokens": 5, "fingerprint": "def", "parts": {}},
    "tokenizer": "ghi",
    "model configuration": {"hidden_act": "gelu"},
    "generation configuration": {},
    "weights before training": {"trained": "jkl", "frozen": "mno"},
    "versions": {"torch": "2.13.0"},
    "machine": {"processes": 1},
}


def network(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> BertForMaskedLM:
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **size)).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS_BxL).logits


def trained(model: PreTrainedModel, labels: torch.Tensor = IDS_BxL) -> torch.optim.Optimizer:
    """An optimizer after one update, so that it has moments."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model(IDS_BxL, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def saver_in(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, main: bool = True, keep_last: int = 2, save_every: int = 1
) -> CheckpointSaver:
    model = network(tokenizer)
    config = Config(run=Run(save_every=save_every, keep_last=keep_last))
    return CheckpointSaver(folder, model, trained(model), tokenizer, config, INPUTS, main=main)


def save(saver: CheckpointSaver, step: int, figure: float | None = None) -> None:
    saver.save(Progress(step=step, figure=figure))
    saver.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def rewrite_manifest(folder: Path, listed: list[str] = LISTED) -> None:
    (folder / MANIFEST).write_text(json.dumps({name: facts(folder / name) for name in listed}))
