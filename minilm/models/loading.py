"""The model: any Hugging Face language model, loaded or built."""

import fnmatch
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from minilm.config import Model
from minilm.data.label_ids import format_names
from minilm.data.special_ids import count_embedding_rows
from minilm.models.attention import ATTENTION
from minilm.models.lora import add_lora
from minilm.models.new_head import find_label_parameters, start_anew
from minilm.models.new_model import build_model, change_configuration, configuration_of, head_name
from minilm.utils.hub import explain_loading_errors
from minilm.utils.validation import suggest_name

log = logging.getLogger("minilm")

_POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len")  # what configurations call their number


def load_model(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    auto: Any = AutoModelForMaskedLM,
    fields: Mapping[str, Any] | None = None,
    added: int = 0,
    new_labels: bool = False,
) -> PreTrainedModel:
    """The model in float32: `model.name`, or built from `model.type` and `model.config` with weights drawn by `seed`.

    `auto` is the class of transformers that knows the models with the head wanted, `fields` what the data decide in the
    model's configuration, `added` how many of the tokenizer's last tokens are new to the model that is loaded. With
    `new_labels` the part of a classifier's head that belongs to the checkpoint's labels starts at random. Raises
    ValueError when the name cannot be loaded, a configuration field does not exist, the vocabulary is larger than the
    embedding, the model has fewer positions than `max_length`, or `freeze`, `lora_targets`, `attention` or
    `gradient_checkpointing` do not fit the model.
    """
    torch.manual_seed(seed)  # new heads are random too
    fields = fields or {}
    random: list[str] = []
    if model.name is None:
        network = build_model(replace(model, config={**fields, **model.config}), tokenizer, auto)
    else:
        network, random = _load(model, model.name, auto, fields, new_labels=new_labels)
    _attend_in_full(network)
    rows, ids = vocabulary_size(network), count_embedding_rows(tokenizer)
    known = ids - added
    if known > rows:
        advice = _advice(model, tokenizer, added)
        without = [name for name, id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]) if id >= rows]
        raise ValueError(
            f"the tokenizer has ids up to {known - 1} and the model's embedding {rows} rows: "
            f"{format_names(without, 3)} ({type(tokenizer).__name__}) have none; {advice}"
        )
    if added and model.name is not None:
        _add_rows(network, known, ids)
    _check_forward(network)
    if head_name(auto) == "SequenceClassification" and tokenizer.pad_token_id is not None:
        _tell_padding(network, tokenizer.pad_token_id)
    _check_positions(max_length, longest_input(network))
    _check_rotary(max_length, network.config.get_text_config())
    if model.gradient_checkpointing:
        _checkpoint_gradients(network)
    _choose_attention(network, model.attention)
    _freeze(network, model.freeze)
    if model.lora_rank:
        if added:
            raise ValueError("model.lora_rank would leave the tokens of tokens.extend untrained: leave one of them out")
        add_lora(network, model, random, head_name(auto))
    return network


def _advice(model: Model, tokenizer: PreTrainedTokenizerBase, added: int) -> str:
    """What to do about a tokenizer with more ids than the embedding has rows."""
    if model.name is None:
        return "leave --model.config.vocab-size out, or raise it"
    if added or tokenizer.name_or_path == model.name:
        # A class such as Qwen2Tokenizer adds its own special tokens to any vocabulary.
        return (
            "they do not belong together; take the tokenizer that the model was trained with, or give the model rows "
            "for these with resize_token_embeddings"
        )
    return "they do not belong together; leave --tokens.name out to take the model's own"


def computes_again(network: PreTrainedModel) -> bool:
    """Whether layers are computed again on the way back, by gradient checkpointing."""
    return any(getattr(module, "gradient_checkpointing", False) for module in network.modules())


def _checkpoint_gradients(network: PreTrainedModel) -> None:
    if not network.supports_gradient_checkpointing:
        raise ValueError(f"{type(network).__name__} has no gradient checkpointing: leave it out")
    # Its name from transformers 5.23 on, and the one before.
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _attend_in_full(network: PreTrainedModel) -> None:
    """BigBird's attention is sparse until it sees a short row, and full from then on: make it so from the start."""
    if getattr(network.config, "attention_type", None) == "block_sparse":
        network.config.attention_type = "original_full"
        modules: list[Any] = [module for module in network.modules() if hasattr(module, "set_attention_type")]
        for module in modules:
            module.set_attention_type("original_full")
        log.warning("model.config.attention-type block_sparse is taken as original_full, which short rows need")


def _choose_attention(network: PreTrainedModel, name: str) -> None:
    """Take the attention of transformers by this name; `auto` leaves the choice to `minilm.models.head`."""
    if name == "auto":
        return
    known = [
        "auto",
        "eager",
        *(key for key in AttentionInterface().valid_keys() if "|" not in key and key != ATTENTION),
    ]
    if name not in known:
        raise ValueError(f"model.attention {suggest_name(name, known)}")
    try:
        network.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"model.attention {name} cannot be had with {type(network).__name__}: {said}") from error
    network.attention_is_chosen = True  # type: ignore[assignment]


def _freeze(network: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Take the parameters that match a pattern (of fnmatch) out of training; a tied one goes by any of its names."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matching = fnmatch.filter(parameters, pattern)
        if not matching:
            raise ValueError(f"model.freeze matches no parameter: {suggest_name(pattern, list(parameters))}")
        for name in matching:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"model.freeze {' '.join(patterns)} leaves nothing to train: name less")


def check_model(model: Model, *, max_length: int, auto: Any) -> None:
    """Raise ValueError for what `load_model` refuses by the configuration alone, for which no tokenizer is needed."""
    config = configuration_of(model, auto)
    try:
        change_configuration(config, model.config)
    except StrictDataclassError as error:
        raise ValueError(f"model.config: {' '.join(str(error).split())}") from error
    _check_positions(max_length, _stated_positions(config))


def _check_positions(max_length: int, positions: int | None) -> None:
    if positions is not None and max_length > positions:
        raise ValueError(f"batch.max_length={max_length} is more than the model's {positions} positions: lower it")


def _check_rotary(max_length: int, config: PretrainedConfig) -> None:
    """LongRoPE (Ding et al. 2024) in transformers turns all rows of a batch otherwise where one is long."""
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *rope.values()):  # some have one for each type of layer
        if isinstance(each, dict) and each.get("rope_type") == "longrope":
            usual = each["original_max_position_embeddings"]
            if max_length > usual:
                raise ValueError(
                    f"batch.max_length={max_length}: beside a row of more than {usual} tokens this model reads all "
                    f"rows otherwise (longrope), so that results would depend on the batch: lower it to {usual}"
                )


def _check_forward(network: PreTrainedModel) -> None:
    """Raise ValueError for a configuration of which a model can be built, and which cannot read a row."""
    config = network.config.get_text_config()
    end, known = getattr(config, "eos_token_id", None), vocabulary_size(network)
    row = [min(5, known - 1)] * 5
    ends = [id for id in (end if isinstance(end, list) else [end]) if id is not None and id < known]
    # BART reads the class of a row at its end token. A text without one is found with the texts
    # (minilm.models.agreement).
    if not ends and network.config.is_encoder_decoder:
        return
    try:
        with evaluating(network):
            network(input_ids=torch.tensor([[*row, ends[0] if ends else row[0]]]))
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{type(network).__name__} cannot read a row of {len(row) + 1} tokens as it is configured "
            f"({' '.join(str(error).split())}): change its settings with --model.config"
        ) from error


def _tell_padding(network: PreTrainedModel, padding: int) -> None:
    """Set `pad_token_id` of a built classifier that looks for a row's last token by it, as GPT-2's does.

    The embedding, which is there already, neither loses a row to it nor counts positions from it. Any other model keeps
    what its configuration says. `read_before_padding` of the model becomes the ids at the end of a row that move its
    last token, as they did not by the configuration that it came with.
    """
    configs = (network.config, network.config.get_text_config())  # Gemma 3 looks for it in the second
    before = [getattr(config, "pad_token_id", None) for config in configs]
    end = getattr(configs[1], "eos_token_id", None)
    ends = end if isinstance(end, list) else [end]
    word = min({*range(8)} - {padding, *before, *ends})
    known = vocabulary_size(network)
    last = next((id for id in ends if id is not None and id < known and id not in (padding, *before)), word)
    whole = torch.tensor([[word, word, last]])
    padded, mask = torch.tensor([[word, word, last], [word, last, padding]]), torch.tensor([[1, 1, 1], [1, 1, 0]])

    def read(**inputs: Tensor) -> Tensor | None:
        try:
            with evaluating(network):
                logits: Tensor = network(**inputs).logits
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return None
        return logits

    def tell(ids: Sequence[int | None]) -> tuple[Tensor | None, Tensor | None]:
        for config, id in zip(configs, ids, strict=True):
            config.pad_token_id = id
        return read(input_ids=whole), read(input_ids=padded, attention_mask=mask)

    (whole_before, padded_before), (whole_after, padded_after) = tell(before), tell([padding, padding])
    changes = padded_after is not None and (padded_before is None or not torch.equal(padded_before, padded_after))
    moves = whole_before is not None and whole_after is not None and not torch.equal(whole_before, whole_after)
    if not changes or moves:
        tell(before)
    elif before[1] != padding:
        network.read_before_padding = [id for id in (padding, before[1]) if id is not None]  # type: ignore[assignment]


def _load(
    model: Model, name: str, auto: Any, fields: Mapping[str, Any], *, new_labels: bool
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of its parameters that start at random."""
    config, refusal = configuration_of(model, auto), f"model {name!r} cannot be loaded"
    labels = [str(label) for label in (config.id2label or {}).values()]
    with explain_loading_errors(name, refusal):
        change_configuration(config, {**fields, **model.config})
        # float32 whatever the checkpoint's own type: the optimizer needs it, and autocast does the rest.
        network, report = auto.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            # transformers draws these parameters. Below, only those of a head for other labels may stay so.
            ignore_mismatched_sizes=True,
        )
    missing, random = set(report["missing_keys"]), {key for key, *_ in report["mismatched_keys"]}
    of_labels = find_label_parameters(network.config, auto) if fields and (random or new_labels) else set()
    for key, saved, configured in sorted(report["mismatched_keys"]):
        for_other_labels = key in of_labels and (new_labels or saved[0] == len(labels))
        if not for_other_labels or saved[1:] != configured[1:]:
            raise ValueError(
                f"{refusal}: its {key} has another shape than its configuration says ({[*saved]} and {[*configured]}): "
                "correct the field that decides it in config.json, such as id2label for the number of labels, or leave "
                "it out of --model.config"
            )
    if new_labels:
        start_anew(network, of_labels - missing - random)
        random |= of_labels - missing
    if random:
        parameters = ", ".join(sorted(random))
        log.warning(
            f"WARNING: {name} was trained for other labels ({format_names(labels)}): {parameters} start at random"
        )
    if missing:
        log.warning(
            f"{name} comes without {len(missing)} weights that a {head_name(auto)} model has, such as {min(missing)}: "
            f"they start at random. This is usual for a checkpoint that was not trained for {head_name(auto)}."
        )
    loaded: PreTrainedModel = network
    return loaded, sorted(missing | random)


def _add_rows(network: PreTrainedModel, known: int, size: int) -> None:
    """Make room for `size` tokens, in multiples of 64, and give all rows from `known` on the mean of those before.

    Hewitt (2021), "Initializing new word embeddings for pretrained language models". The logit of a mean is the mean of
    the logits, so that no new row is the likeliest before training; and those that no token has are never a target.
    """
    if size > vocabulary_size(network):
        network.resize_token_embeddings(size, pad_to_multiple_of=64, mean_resizing=False)
        head: Any = network.get_output_embeddings()
        if not network.config.tie_word_embeddings and getattr(head, "bias", None) is not None:
            head.bias = nn.Parameter(head.bias.detach().clone())  # transformers ties it to another, and saves but that
    with torch.no_grad():
        for layer in (network.get_input_embeddings(), network.get_output_embeddings()):
            for weight in layer.parameters() if layer is not None else ():
                weight[known:] = weight[:known].mean(0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients, for a moment, and without compiling anything for it."""
    training = model.training
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        model.train(training)
        for module in model.modules():
            if callable(rescale := getattr(module, "_rescale_layers", None)):  # RWKV's, divided for an evaluation
                rescale()


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` in place of the module's own, for a moment."""
    module.forward = forward  # on this object, in front of the method of its class
    try:
        yield
    finally:
        del module.forward


def left_out(module: nn.Module) -> AbstractContextManager[None]:
    """The module hands on what it is given, for a moment."""
    return replaced(module, lambda x: x)


def check_causal(network: PreTrainedModel, advice: str = "") -> None:
    """Raise ValueError when the logits of a token depend on the tokens after it, as BERT's do under a causal head.

    `advice` ends the message: what the caller's user can do.
    """
    ids_2xL = torch.ones(2, 6, dtype=torch.int64, device=next(network.parameters()).device)
    ids_2xL[1, -1] = 2
    with evaluating(network):
        logits_2xLxV = network(input_ids=ids_2xL).logits.float()
    first, second = logits_2xLxV[:, :-1]
    if (first - second).abs().max() > 1e-4 * logits_2xLxV.abs().max():
        raise ValueError(
            f"{type(network).__name__} sees the tokens after the one that it predicts, so that it is not a causal LM"
            f"{advice}"
        )


def find_embedding(network: PreTrainedModel) -> nn.Module | None:
    """Return the module that embeds the tokens; None for a model without one, as CANINE."""
    with suppress(NotImplementedError):
        embedding: nn.Module | None = network.get_input_embeddings()
        return embedding
    return None


def vocabulary_size(network: PreTrainedModel) -> int:
    """Rows of the embedding of the tokens, or what the configuration says of it."""
    embedding = find_embedding(network)
    if isinstance(embedding, nn.Embedding):
        return embedding.num_embeddings
    # Perceiver's inputs are latents, I-BERT's are quantized; CANINE has no table: it hashes any code point.
    return int(getattr(network.config.get_text_config(), "vocab_size", sys.maxunicode + 1))


def longest_input(network: PreTrainedModel) -> int | None:
    """The most tokens that the model's positions allow, or None where positions are not limited."""
    limits = [_stated_positions(network.config)]
    if (embedding := _position_embedding(network)) is not None:
        # ProphetNet, which has n-grams, looks one position further.
        limits.append(embedding.weight.shape[0] - position_offset(network) - hasattr(network.config, "ngram"))
    return min((limit for limit in limits if limit is not None), default=None)


def _stated_positions(config: PretrainedConfig) -> int | None:
    stated = [getattr(config.get_text_config(), name, None) for name in _POSITIONS]
    return min((limit for limit in stated if isinstance(limit, int) and limit > 0), default=None)


def position_offset(network: PreTrainedModel) -> int:
    """The position of a row's first token: RoBERTa and its relatives begin to count at `padding_idx + 1`."""
    embedding = _position_embedding(network)
    return 0 if embedding is None or embedding.padding_idx is None else embedding.padding_idx + 1


def _position_embedding(network: PreTrainedModel) -> Any:
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "weight") and hasattr(module, "padding_idx"):
            return module
    return None
