"""The model: any Hugging Face language model, loaded or built, made to compute only what the loss needs.

Axes: T tokens of a batch, R rows, L padded length, H hidden size, N targets, V vocabulary.
"""

import inspect
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
from minilm.packing import ATTENTION, Packing, pack

log = logging.getLogger("minilm")


_PROBE = 160  # tokens of the longest row on which a shortcut is tried: more than the usual window of local attention
# First and last module of what follows attention in a layer; between the two, each token is by itself.
_AFTER_ATTENTION = (
    ("attention.output", "output"),  # BERT and its many relatives
    ("mlp_norm", "mlp"),  # ModernBERT
    ("sa_layer_norm", "output_layer_norm"),  # DistilBERT
    ("attention.LayerNorm", "output"),  # MPNet
)


class SparseHead(nn.Module):
    """Logits of a language model at the target positions of a packed batch, and little work besides.

    Three shortcuts, none of which changes a logit. Each is tried at construction on a small random batch against the
    model as it came, and left out where the logits are not the same:

    - `sparse`: the head runs on the targets alone, which a hook on `model.base_model` gathers;
    - `padding_free`: rows lie one after the other without padding, and attention keeps them apart (`minilm.packing`);
    - `short`: what follows attention in the last layer runs on the targets alone.

    `reason` says why a model keeps its full head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.sparse = self.padding_free = self.short = False
        self._target_index: Tensor | None = None
        self._shape: torch.Size | None = None
        self._offset = _position_offset(model)
        takes = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in takes
        self._always: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        with _evaluating(model):
            expected_NxV = self._probe()
            self.reason = self._try_sparse(expected_NxV)
            self._try_padding_free(expected_NxV)
            self._try_short(expected_NxV)
        if not self.sparse:
            log.warning(f"{type(model).__name__} keeps its full head: {self.reason}")

    def forward(self, input_ids_T: Tensor, packing: Packing, target_index_N: Tensor) -> Tensor:
        """Logits, N x V, of the targets, which are at `target_index_N` among the T tokens."""
        inputs: dict[str, Any]
        if self.padding_free:
            # transformers hands a mask of four axes on as it is; packed_attention has no use for one.
            mask = torch.empty(1, 1, 1, 1, device=input_ids_T.device)
            inputs = {"input_ids": input_ids_T[None], "attention_mask": mask, "packing": packing}
            if self._takes_positions:
                inputs["position_ids"] = packing.position_T[None] + self._offset
        else:
            (group,) = packing.groups
            inputs = {"input_ids": group.pad(input_ids_T), "attention_mask": None}
            if group.place_T is not None:
                real_RxL = group.real(input_ids_T.device)
                padding = self.model.config.pad_token_id or 0
                inputs = {
                    "input_ids": inputs["input_ids"].masked_fill(~real_RxL, padding),
                    "attention_mask": real_RxL.long(),
                }
                target_index_N = group.place_T[target_index_N]
        self._target_index = target_index_N if self.sparse else None
        try:
            logits_RxLxV: Tensor = self.model(**inputs, **self._always).logits
        finally:
            self._target_index = self._shape = None
        return logits_RxLxV[0] if self.sparse else logits_RxLxV.flatten(0, 1)[target_index_N]

    def _probe(self) -> Tensor:
        """Logits of the small random batch as things are, N x V."""
        model = self.model
        device = next(model.parameters()).device
        longest = min(_PROBE, longest_input(model) or _PROBE)
        lengths = [longest, longest - longest // 8, 6]
        generator = torch.Generator().manual_seed(0)
        vocabulary, padding = model.config.vocab_size, model.config.pad_token_id
        input_ids_T = torch.randint(0, vocabulary, (sum(lengths),), generator=generator)
        input_ids_T[input_ids_T == padding] = 0 if padding else 1
        input_ids_T = input_ids_T.to(device)
        packing = pack(lengths, grouped=self.padding_free).map(lambda tensor: tensor.to(device))
        target_index_N = torch.tensor([1, longest - 1, longest, sum(lengths) - 8, sum(lengths) - 2], device=device)
        logits_NxV: Tensor = self(input_ids_T, packing, target_index_N)
        return logits_NxV

    def _differs(self, expected_NxV: Tensor) -> str:
        """Why the probe's logits are not the expected ones; empty when they are."""
        try:
            logits_NxV = self._probe()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"its head does not take single positions ({type(error).__name__}: {error})"
        scale = expected_NxV.abs().max()
        if logits_NxV.shape != expected_NxV.shape or not (logits_NxV - expected_NxV).abs().max() <= 1e-4 * scale:
            return "its head mixes positions"
        return ""

    def _try_sparse(self, expected_NxV: Tensor) -> str:
        if self.model.base_model is self.model:
            return "the model has no separate base model"
        self.model.base_model.register_forward_hook(self._gather)
        self.sparse = True
        reason = self._differs(expected_NxV)
        self.sparse = reason == ""
        return reason

    def _try_padding_free(self, expected_NxV: Tensor) -> None:
        if not self.model._supports_attention_backend:
            return
        original = self.model.config._attn_implementation
        self.model.set_attn_implementation(ATTENTION)
        self.padding_free = True
        if self._differs(expected_NxV):
            self.padding_free = False
            self.model.set_attn_implementation(original)

    def _try_short(self, expected_NxV: Tensor) -> None:
        layers = [m for m in self.model.base_model.modules() if isinstance(m, nn.ModuleList)]
        layers = [m for m in layers if len(m) == self.model.config.num_hidden_layers]
        if not self.sparse or not layers:
            return
        for names in _AFTER_ATTENTION:
            try:
                first, last = (layers[0][-1].get_submodule(name) for name in names)
            except AttributeError:
                continue
            handles = (first.register_forward_pre_hook(self._narrow), last.register_forward_hook(self._widen))
            self.short = True
            if not self._differs(expected_NxV):
                return
            self.short = False
            for handle in handles:
                handle.remove()

    def _gather(self, module: nn.Module, inputs: object, output: Any) -> Any:
        if self._target_index is not None:
            hidden_RxLxH = output.last_hidden_state
            output.last_hidden_state = hidden_RxLxH.flatten(0, 1)[self._target_index][None]
        return output

    def _narrow(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """Before the first module: only the targets go in. Where most tokens are targets, all of them do."""
        index, shape = self._target_index, inputs[0].shape
        if index is None or 2 * len(index) > shape[0] * shape[1]:
            return None
        self._shape = shape
        return tuple(hidden_RxLxH.flatten(0, 1)[index][None] for hidden_RxLxH in inputs)

    def _widen(self, module: nn.Module, inputs: object, output_1xNxH: Tensor) -> Any:
        """After the last one: each target back to its place, zeros elsewhere."""
        if self._shape is None or self._target_index is None:
            return None
        (rows, length, width), self._shape = self._shape, None
        hidden_RLxH = output_1xNxH.new_zeros(rows * length, width).index_copy(0, self._target_index, output_1xNxH[0])
        return hidden_RLxH.view(rows, length, width)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def freeze_unused(head: SparseHead) -> None:
    """Freeze the parameters that the logits do not depend on (poolers, for one): DDP would wait for their gradients."""
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    device = trained[0].device
    ids_T = torch.full((8,), head.model.config.vocab_size - 1, device=device)
    packing = pack([8]).map(lambda tensor: tensor.to(device))
    total = head(ids_T, packing, torch.zeros(1, dtype=torch.int64, device=device)).sum()
    gradients = torch.autograd.grad(total, trained, allow_unused=True)
    for parameter in [p for p, gradient in zip(trained, gradients, strict=True) if gradient is None]:
        parameter.requires_grad_(False)


def load_model(
    model: Model, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int, auto: Any = AutoModelForMaskedLM
) -> PreTrainedModel:
    """The model in float32: `model.name`, or built from `model.type` and `model.config` with weights drawn by `seed`.

    `auto` is the class of transformers that knows the models with the head wanted. Raises ValueError when the name
    cannot be loaded, a configuration field does not exist, the vocabulary is larger than the embedding, or the model
    has fewer positions than `max_length`.
    """
    torch.manual_seed(seed)  # new heads are random too
    network = _build(model, tokenizer, auto) if model.name is None else _load(model, model.name, auto)
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


def _build(model: Model, tokenizer: PreTrainedTokenizerBase, auto: Any) -> PreTrainedModel:
    try:
        default = AutoConfig.for_model(model.type)
    except ValueError:
        raise ValueError(f"model.type {closest(model.type, _types(auto))}") from None
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
    if type(config) not in auto._model_mapping:
        raise ValueError(f"model.type {model.type} has no {_head(auto)} head; these have: {', '.join(_types(auto))}")
    network: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    return network


def _check_fields(name: str, asked: Iterable[str], config: PretrainedConfig) -> None:
    known = {**config.to_dict(), **config.attribute_map}
    for field in asked:
        if field not in known:
            raise ValueError(f"model.config: {name} has no field {closest(field, list(known))}")


def _types(auto: Any) -> list[str]:
    return sorted({config.model_type for config in auto._model_mapping})


def _head(auto: Any) -> str:
    """MaskedLM, CausalLM, …"""
    return str(auto.__name__).removeprefix("AutoModelFor")


def _load(model: Model, name: str, auto: Any) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(name)
        _check_fields(name, model.config, config)
        for field, value in model.config.items():
            setattr(config, field, value)
        with quiet_transformers():
            # float32 whatever the checkpoint's own type: the optimizer needs it, and autocast does the rest.
            network, report = auto.from_pretrained(
                name, config=config, dtype=torch.float32, output_loading_info=True, use_safetensors=True
            )
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"model {name!r} cannot be loaded: {' '.join(str(error).split())}") from error
    if missing := sorted(report["missing_keys"]):
        log.warning(
            f"{name} comes without {len(missing)} weights that a {_head(auto)} model has, such as {missing[0]}: they "
            f"start at random. This is usual for a checkpoint that was not trained for {_head(auto)}."
        )
    loaded: PreTrainedModel = network
    return loaded


def check_causal(network: PreTrainedModel) -> None:
    """Raise ValueError when the logits of a token depend on the tokens after it, as BERT's do under a causal head."""
    ids_2xL = torch.ones(2, 6, dtype=torch.int64, device=next(network.parameters()).device)
    ids_2xL[1, -1] = 2
    with _evaluating(network):
        logits_2xLxV = network(input_ids=ids_2xL).logits.float()
    first, second = logits_2xLxV[:, :-1]
    if (first - second).abs().max() > 1e-4 * logits_2xLxV.abs().max():
        raise ValueError(
            f"{type(network).__name__} sees the tokens after the one that it predicts, so that it is no causal LM; "
            "where the model can be made one, pass --model.config.is-decoder True"
        )


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
    """The most tokens that the model's positions allow, or None where positions are not limited."""
    if (embedding := _position_embedding(network)) is not None:
        return embedding.num_embeddings - _position_offset(network)
    limit = getattr(network.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _position_offset(network: PreTrainedModel) -> int:
    """The position of a row's first token: RoBERTa and its relatives begin to count at `padding_idx + 1`."""
    embedding = _position_embedding(network)
    return 0 if embedding is None or embedding.padding_idx is None else embedding.padding_idx + 1


def _position_embedding(network: PreTrainedModel) -> nn.Embedding | None:
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module
    return None
