"""Law 3: what a run saves is a plain Hugging Face model, to the bit, for a program that does not know minilm."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForMaskedLM

from minilm import Batch, Config, Data, Model, Run, Tokens
from minilm.runs.checkpoint import Progress
from minilm.runs.checkpoint_saver import CheckpointSaver
from minilm.train import train

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TYPES = {
    "bert": {**SIZES, "max_position_embeddings": 64},
    "roberta": {**SIZES, "max_position_embeddings": 66},
    "modernbert": {**SIZES, "layer_types": ["full_attention", "sliding_attention"]},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    "mpnet": SIZES,
}
IDS_BxL = torch.tensor([[2, 9, 30, 11, 4, 3], [2, 40, 4, 12, 50, 3]])
PLAIN = """
import sys, torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline
ids_BxL = torch.tensor(eval(sys.argv[1]))
found = {}
for folder in sys.argv[3:]:
    model = AutoModelForMaskedLM.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        logits_BxLxV = model(ids_BxL).logits
    fills = pipeline("fill-mask", model=folder, device="cpu")("Return a [MASK] of the names.")
    found[folder] = (logits_BxLxV, len(fills), AutoTokenizer.from_pretrained(folder)("A short one.")["input_ids"])
assert not any(name.startswith("minilm") for name in sys.modules)
torch.save(found, sys.argv[2])
"""


def logits(weights: dict[str, torch.Tensor], folder: Path) -> torch.Tensor:
    """What a model of the configuration in the folder gives with these weights."""
    model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(IDS_BxL).logits


@pytest.mark.scorecard(28)
def test_every_folder_and_checkpoint_loads_in_plain_transformers_with_the_same_logits(
    documents: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None]
) -> None:
    weights: dict[str, dict[str, torch.Tensor]] = {}  # as they were when each folder was written
    original = CheckpointSaver.save

    def save(self: CheckpointSaver, progress: Progress) -> None:
        copy = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        weights[str(self.folder / f"checkpoint-{progress.step}")] = weights[str(self.folder)] = copy
        original(self, progress)

    monkeypatch.setattr(CheckpointSaver, "save", save)
    (tmp_path / "text.txt").write_text("\n".join(documents["text"]))
    for kind, sizes in TYPES.items():
        config = Config(
            data=Data(source=str(tmp_path / "text.txt"), eval_fraction=0.2),
            tokens=Tokens(vocab_size=400),
            model=Model(type=kind, config=sizes),
            batch=Batch(examples=8, max_length=32),
            run=Run(max_steps=4, save_every=2, precision="fp32", output_dir=str(tmp_path / kind)),
        )
        train(config)
    command = [sys.executable, "-c", PLAIN, str(IDS_BxL.tolist()), str(tmp_path / "found.pt"), *weights]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "found.pt")
    assert len(found) == 3 * len(TYPES)
    for folder, (logits_BxLxV, fills, ids) in found.items():
        assert torch.equal(logits_BxLxV, logits(weights[folder], Path(folder))), folder
        assert fills == 5
        assert ids == found[str(tmp_path / "bert")][2]
    figure(f"{len(found)} folders of {', '.join(TYPES)}: logits bitwise equal, fill-mask pipeline works")
