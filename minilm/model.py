"""The model: any Hugging Face masked LM, loaded or built, behind a head that works only where there is a target.

Axes: B rows, L padded length, H hidden size, N targets, V vocabulary.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from minilm.config import Model, closest

log = logging.getLogger("minilm")


class SparseHead(nn.Module):
    """Logits of a language model at the target positions only.

    The transformer's last hidden state is reduced from B x L to the N targets before the head runs, by a hook on
    `model.base_model`; the head works on each position alone, so the logits are those of the full head, at a seventh of
    its cost when 15% of the tokens are targets. Whether a head really works so is tried on a small input at
    construction: `sparse` tells, and `reason` says why a model keeps its full head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._target_index: Tensor | None = None
        if model.base_model is model:
            self.reason = "the model has no separate base model"
        else:
            model.base_model.register_forward_hook(self._gather)
            self.reason = _difference(self)
        self.sparse = self.reason == ""
        if not self.sparse:
            log.warning(f"{type(model).__name__} keeps its full head: {self.reason}")

    def forward(self, input_ids_BxL: Tensor, attention_mask_BxL: Tensor | None, target_index_N: Tensor) -> Tensor:
        """Logits, N x V, at flat positions `target_index_N` of B x L."""
        if not self.sparse:
            logits_BxLxV: Tensor = self.model(input_ids=input_ids_BxL, attention_mask=attention_mask_BxL).logits
            return logits_BxLxV.flatten(0, 1)[target_index_N]
        self._target_index = target_index_N
        try:
            logits_1xNxV: Tensor = self.model(input_ids=input_ids_BxL, attention_mask=attention_mask_BxL).logits
        finally:
            self._target_index = None
        return logits_1xNxV[0]

    def _gather(self, module: nn.Module, inputs: object, output: Any) -> Any:
        if self._target_index is not None:
            hidden_BxLxH = output.last_hidden_state
            output.last_hidden_state = hidden_BxLxH.flatten(0, 1)[self._target_index][None]
        return output


def _difference(head: SparseHead) -> str:
    """Why the sparse logits of a small random input are not those of the full head; empty when they are."""
    model, training = head.model, head.model.training
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    input_ids_BxL = torch.randint(5, model.config.vocab_size, (2, 8), generator=generator).to(device)
    target_index_N = torch.tensor([1, 6, 13], device=device)
    model.eval()
    try:
        with torch.no_grad():
            head.sparse = False
            full_NxV = head(input_ids_BxL, None, target_index_N)
            head.sparse = True
            sparse_NxV = head(input_ids_BxL, None, target_index_N)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        return f"its head does not take single positions ({type(error).__name__}: {error})"
    finally:
        model.train(training)
    if full_NxV.shape != sparse_NxV.shape or not torch.allclose(full_NxV, sparse_NxV, rtol=1e-4, atol=1e-5):
        return "its head mixes positions"
    return ""


def freeze_unused(head: SparseHead) -> None:
    """Freeze the parameters that the logits do not depend on (poolers, for one): DDP would wait for their gradients."""
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    device = trained[0].device
    ids_1xL = torch.full((1, 8), head.model.config.vocab_size - 1, device=device)
    total = head(ids_1xL, None, torch.zeros(1, dtype=torch.int64, device=device)).sum()
    gradients = torch.autograd.grad(total, trained, allow_unused=True)
    for parameter in [p for p, gradient in zip(trained, gradients, strict=True) if gradient is None]:
        parameter.requires_grad_(False)


def load_model(model: Model, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int) -> PreTrainedModel:
    """The model in float32: `model.name`, or built from `model.type` and `model.config` with weights drawn by `seed`.

    Raises ValueError when the name cannot be loaded, a configuration field does not exist, the vocabulary is larger
    than the embedding, or the model has fewer positions than `max_length`.
    """
    torch.manual_seed(seed)  # new heads are random too
    network = _build(model, tokenizer) if model.name is None else _load(model, model.name)
    rows = network.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's embedding {rows} rows: they do not belong "
            "together; leave --tokens.name out to take the model's own"
        )
    positions = longest_input(network)
    if positions is not None and max_length > positions:
        raise ValueError(f"batch.max_length={max_length} is more than the model's {positions} positions")
    return network


def _build(model: Model, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    try:
        default = AutoConfig.for_model(model.type)
    except ValueError:
        raise ValueError(f"model.type {closest(model.type, _masked_lm_types())}") from None
    _check_fields(model.type, model.config, default)
    special = {
        f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos", "cls", "sep")
    }
    # A tokenizer with [CLS] and [SEP] begins and ends its texts with them.
    for name, stand_in in (("bos_token_id", "cls_token_id"), ("eos_token_id", "sep_token_id")):
        if special[name] is None:
            special[name] = special[stand_in]
    fields = {name: index for name, index in special.items() if name in default.to_dict()}
    try:
        config = AutoConfig.for_model(model.type, **{"vocab_size": len(tokenizer), **fields, **model.config})
    except StrictDataclassError as error:
        raise ValueError(f"model.config: {' '.join(str(error).split())}") from error
    if type(config) not in AutoModelForMaskedLM._model_mapping:
        raise ValueError(f"model.type {model.type} has no masked-LM head; these have: {', '.join(_masked_lm_types())}")
    network: PreTrainedModel = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
    return network


def _check_fields(name: str, asked: Iterable[str], config: PretrainedConfig) -> None:
    known = {**config.to_dict(), **config.attribute_map}
    for field in asked:
        if field not in known:
            raise ValueError(f"model.config: {name} has no field {closest(field, list(known))}")


def _masked_lm_types() -> list[str]:
    return sorted({config.model_type for config in AutoModelForMaskedLM._model_mapping})


def _load(model: Model, name: str) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(name)
        _check_fields(name, model.config, config)
        for field, value in model.config.items():
            setattr(config, field, value)
        with quiet_transformers():
            # float32 whatever the checkpoint's own type: the optimizer needs it, and autocast does the rest.
            network, report = AutoModelForMaskedLM.from_pretrained(
                name, config=config, dtype=torch.float32, output_loading_info=True, use_safetensors=True
            )
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"model {name!r} cannot be loaded: {' '.join(str(error).split())}") from error
    if missing := sorted(report["missing_keys"]):
        log.warning(f"{name} has no weights for {', '.join(missing)}: they start at random")
    loaded: PreTrainedModel = network
    return loaded


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers without its progress bars and tables: what matters of them is said in a line of our own."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def longest_input(network: PreTrainedModel) -> int | None:
    """The most tokens that the model's positions allow, or None where positions are not limited.

    RoBERTa and its relatives begin to count at `padding_idx + 1`, so that some of their positions are never used.
    """
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - unused
    limit = getattr(network.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
