"""Export a model alone: as safetensors, or as ONNX for runtimes without PyTorch.

Axes: N rows, T tokens.
"""

import importlib.util
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilm.commands.evaluate import infer_objective
from minilm.config import CausalLM, Classification, MaskedLM, SupervisedFineTuning, TokenClassification
from minilm.data.special_ids import count_embedding_rows
from minilm.models.inference import load_causal_lm, load_classifier, load_masked_lm
from minilm.models.inference_tags import load_token_classifier
from minilm.models.input_length import longest_input
from minilm.runs.checkpoint import WEIGHTS, is_checkpoint, read_checkpoint
from minilm.utils.atomic_files import replace_folder, sync_path

_LOADERS: dict[type, Callable[[Path], tuple[PreTrainedModel, PreTrainedTokenizerBase]]] = {
    MaskedLM: load_masked_lm,
    CausalLM: load_causal_lm,
    Classification: load_classifier,
    SupervisedFineTuning: load_causal_lm,
    TokenClassification: load_token_classifier,
}
_WEIGHTS = (WEIGHTS, "model-*-of-*.safetensors", f"{WEIGHTS}.index.json")
# Files that load a tokenizer, or say how the model is used.
_OTHER_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.jinja"),
    *("additional_chat_templates/*.jinja", "modules.json", "*_Pooling/config.json", "*_Normalize/config.json"),
    *("sentence_bert_config.json", "config_sentence_transformers.json"),
)
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Largest size of weights in bytes inside an ONNX file, which cannot hold 2 GiB. Larger weights get a separate file.
_LARGEST = 1.8e9
# Allowed difference between the logits of both models, relative to the largest logit if that is above 1.
_TOLERANCE = 1e-4


def export_model(source: str | Path, output: str | Path, kind: str) -> Path:
    """Write the model in the folder `source` to the folder `output`, as `safetensors` or `onnx`, and return `output`.

    The new folder has the weights, the configuration and the tokenizer. Safetensors are copied bit for bit. `output`
    appears only when all of it is on disk. Raise ValueError if `source` does not hold a complete model, if `output` is
    not empty, or if the ONNX model does not give the same logits.
    """
    folder, target = Path(source).expanduser(), Path(output).expanduser()
    check_model_folder(folder)
    check_new_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replace_folder(target) as temporary:
        if kind == "onnx":
            _write_onnx(folder, temporary / "model.onnx")
        else:
            _copy(folder, temporary, _WEIGHTS)
        copy_other_files(folder, temporary)
    return target


def check_model_folder(folder: Path) -> None:
    """Raise ValueError if the folder does not hold a complete model. The files of a checkpoint must have their hash."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} does not hold a model: there is no config.json. Did its run finish?")
    if not any(path.is_file() for pattern in _WEIGHTS for path in folder.glob(pattern)):
        raise ValueError(f"{folder} does not hold a model: there is no {WEIGHTS}")
    if is_checkpoint(folder):
        # Reading compares each file with its hash.
        read_checkpoint(folder)


def check_new_folder(target: Path) -> None:
    """Raise ValueError if the output folder of a command is not new or empty."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"--output {target} exists and is not an empty folder: give another one")


def copy_other_files(folder: Path, target: Path) -> None:
    """Copy the files of a model beside its weights: the configuration, the tokenizer and how the model is used."""
    _copy(folder, target, _OTHER_FILES)


def _copy(folder: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files that match these patterns."""
    files = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    for path in files:
        copy = target / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
        sync_path(copy)


class _Logits(nn.Module):
    """A model that takes tensors and returns the logits alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Return the logits. The arguments, in this order, are the inputs of the ONNX file."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits
        return logits


def _write_onnx(folder: Path, path: Path) -> None:
    """Write the model as ONNX for any number and length of texts, and check that it gives the same logits."""
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f'--format onnx needs {", ".join(missing)}: pip install "minilm[onnx]"')
    load = _LOADERS.get(type(infer_objective(str(folder))))
    if load is None:
        raise ValueError(
            "--format onnx writes masked and causal LMs, text and token classifiers: take --format safetensors"
        )
    model, tokenizer = load(folder)
    # Otherwise the keys and values of a causal LM would be outputs too.
    model.config.use_cache = False
    logits, longest = _Logits(model).eval(), longest_input(model) or 16
    example = _batch(model, tokenizer, 2, min(7, longest - 1))
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    # torch.onnx warns that torchvision is missing, which is not needed.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Parts of torch warn of other parts of torch.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                logits,
                kwargs=example,
                f=path,
                input_names=list(example),
                output_names=["logits"],
                dynamic_shapes={name: free for name in example},
                external_data=sum(p.numel() * p.element_size() for p in model.parameters()) > _LARGEST,
                dynamo=True,
                verbose=False,
            )
            gap = max(_gap(path, logits, _batch(model, tokenizer, 3, length)) for length in (3, min(12, longest)))
    except Exception as error:
        # The exporter raises all kinds of errors.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{folder}: {type(model).__name__} cannot be exported as ONNX: {reason}") from error
    if not gap <= _TOLERANCE:
        raise ValueError(
            f"{folder}: {type(model).__name__} cannot be exported as ONNX: the logits would differ by {gap:.1e}"
        )


def _batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int, length: int) -> dict[str, Tensor]:
    """Return inputs by name, each int64[N, T]. Each row has one token less than the row before, and more padding."""
    padding = tokenizer.pad_token_id or 0
    ids_NT = torch.arange(rows * length).view(rows, length) * 7 % (count_embedding_rows(tokenizer) - 1)
    # Skip the id of padding.
    ids_NT += ids_NT >= padding
    mask_NT = (torch.arange(length) < length - torch.arange(rows)[:, None]).long()
    batch = {"input_ids": torch.where(mask_NT == 1, ids_NT, padding), "attention_mask": mask_NT}
    if "token_type_ids" in tokenizer.model_input_names and getattr(model.config, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = (torch.arange(length) >= length // 2).long().expand(rows, length).contiguous()
    return batch


def _gap(path: Path, logits: nn.Module, batch: dict[str, Tensor]) -> float:
    """Return the largest difference between the logits of the ONNX file and those of the model.

    It is relative to the largest logit if that is above 1, else absolute. Positions of padding do not count.
    """
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
    with torch.inference_mode():
        expected = logits(**batch)
    gap, largest = (torch.from_numpy(found) - expected).abs(), expected.abs()
    if gap.ndim == 3:
        gap = gap[batch["attention_mask"] == 1]
    return float(gap.max() / largest.max().clamp(min=1))
