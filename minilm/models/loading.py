"""Load a model of transformers from a checkpoint, or build one with random weights, and prepare it for training."""

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AttentionInterface, AutoModel, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import Model
from minilm.data.label_ids import format_names
from minilm.data.special_ids import count_embedding_rows
from minilm.models.attention import ATTENTION
from minilm.models.classifier_padding import set_classifier_padding
from minilm.models.embeddings import extend_embedding, vocabulary_size
from minilm.models.forward_checks import check_forward
from minilm.models.input_length import check_position_limit, check_rotary_scaling, longest_input, read_position_limit
from minilm.models.label_parameters import find_label_parameters, reinitialize_parameters
from minilm.models.lora import add_lora
from minilm.models.model_config import head_name, resolve_configuration, set_fields
from minilm.models.new_model import build_model
from minilm.utils.hub import explain_loading_errors
from minilm.utils.validation import suggest_name

log = logging.getLogger("minilm")


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
    """Return the model in float32: the checkpoint `model.name`, or a new one of `model.type` and `model.config`.

    max_length: the number of tokens in the longest row.
    seed: decides the random weights of a new model or a new head.
    auto: the class of transformers that loads models with the wanted head, such as AutoModelForMaskedLM.
    fields: fields of the model's configuration that the data decide, such as the labels.
    added: how many of the tokenizer's last tokens are new to the checkpoint.
    new_labels: whether the data have other labels than the checkpoint. The part of its head that depends on the labels
    then starts at random.

    Raises ValueError if the name cannot be loaded, a field of the configuration does not exist, the tokenizer has more
    tokens than the embedding, the model has fewer positions than `max_length`, or `freeze`, `lora_targets`, `attention`
    or `gradient_checkpointing` do not fit the model.
    """
    torch.manual_seed(seed)  # for new heads too
    fields = fields or {}
    random: list[str] = []
    if model.name is None:
        network = build_model(replace(model, config={**fields, **model.config}), tokenizer, auto)
    else:
        network, random = _load_checkpoint(model, model.name, auto, fields, new_labels=new_labels)
    _use_full_attention(network)
    rows, ids = vocabulary_size(network), count_embedding_rows(tokenizer)
    known = ids - added
    if known > rows:
        advice = _advise_on_vocabulary(model, tokenizer, added)
        without = [name for name, id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]) if id >= rows]
        raise ValueError(
            f"the tokenizer has ids up to {known - 1} and the model's embedding {rows} rows: "
            f"{format_names(without, 3)} ({type(tokenizer).__name__}) have none; {advice}"
        )
    if added and model.name is not None:
        extend_embedding(network, trained_rows=known, rows=ids)
    check_forward(network)
    if head_name(auto) == "SequenceClassification" and tokenizer.pad_token_id is not None:
        set_classifier_padding(network, tokenizer.pad_token_id)
    check_position_limit(max_length, longest_input(network))
    check_rotary_scaling(max_length, network.config.get_text_config())
    if model.gradient_checkpointing:
        _enable_gradient_checkpointing(network)
    _set_attention(network, model.attention)
    _freeze(network, model.freeze)
    if model.lora_rank:
        if added:
            raise ValueError(
                f"model.lora_rank would leave the embeddings of {added} new tokens untrained: leave it out, or leave "
                "out what adds them (--tokens.extend, or a template such as --objective.template chatml; plain adds "
                "none)"
            )
        add_lora(network, model, random, head_name(auto))
    return network


def check_model(model: Model, *, max_length: int, auto: Any) -> None:
    """Raise ValueError for errors that `load_model` would find in the configuration alone, without a tokenizer."""
    config = resolve_configuration(model, auto)
    try:
        set_fields(config, model.config)
    except StrictDataclassError as error:
        raise ValueError(f"model.config: {' '.join(str(error).split())}") from error
    check_position_limit(max_length, read_position_limit(config))


def _load_checkpoint(
    model: Model, name: str, auto: Any, fields: Mapping[str, Any], *, new_labels: bool
) -> tuple[PreTrainedModel, list[str]]:
    """Return the model, and the names of its parameters that start at random."""
    config, refusal = resolve_configuration(model, auto), f"model {name!r} cannot be loaded"
    labels = [str(label) for label in (config.id2label or {}).values()]
    if head_name(auto) == "QuestionAnswering" and config.num_labels != 2:
        log.info(f"{name} has {len(labels)} labels ({format_names(labels)}), which question answering does not use")
        # BERT's head would have one output for each label.
        config.num_labels = 2
    with explain_loading_errors(name, refusal):
        set_fields(config, {**fields, **model.config})
        network, report = auto.from_pretrained(
            name,
            config=config,
            # The optimizer needs float32, whatever the checkpoint holds. Autocast computes in half precision.
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            # transformers draws parameters of another shape at random. The check below allows this only for those that
            # depend on the labels.
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
        reinitialize_parameters(network, of_labels - missing - random)
        random |= of_labels - missing
    if random:
        parameters = ", ".join(sorted(random))
        log.warning(
            f"WARNING: {name} was trained for other labels ({format_names(labels)}): {parameters} start at random"
        )
    if auto is AutoModel and missing and all(key.startswith("pooler.") for key in missing):
        log.info(f"{name} comes without a pooler, which embeddings do not use: it starts at random and is not trained")
        missing = set()
    if missing:
        log.warning(
            f"{name} comes without {len(missing)} weights of {type(network).__name__}, such as {min(missing)}: they "
            "start at random. This is usual for a checkpoint that was trained for another task."
        )
    loaded: PreTrainedModel = network
    return loaded, sorted(missing | random)


def _use_full_attention(network: PreTrainedModel) -> None:
    """Let BigBird use full attention from the start. It would otherwise switch to it at the first short row."""
    if getattr(network.config, "attention_type", None) == "block_sparse":
        network.config.attention_type = "original_full"
        modules: list[Any] = [module for module in network.modules() if hasattr(module, "set_attention_type")]
        for module in modules:
            module.set_attention_type("original_full")
        log.warning("the model uses attention-type original_full instead of block_sparse, which cannot read short rows")


def _advise_on_vocabulary(model: Model, tokenizer: PreTrainedTokenizerBase, added: int) -> str:
    """Return what the user can do about a tokenizer with more ids than the embedding has rows."""
    if model.name is None:
        return "leave --model.config.vocab-size out, or raise it"
    if added or tokenizer.name_or_path == model.name:
        # A class such as Qwen2Tokenizer adds its own special tokens to any vocabulary.
        return (
            "they do not belong together; take the tokenizer that the model was trained with, or give the model rows "
            "for these with resize_token_embeddings"
        )
    return "they do not belong together; leave --tokens.name out to take the model's own"


def _enable_gradient_checkpointing(network: PreTrainedModel) -> None:
    if not network.supports_gradient_checkpointing:
        raise ValueError(
            f"{type(network).__name__} has no gradient checkpointing: leave model.gradient_checkpointing out"
        )
    # transformers 5.23 renamed the method.
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _set_attention(network: PreTrainedModel, name: str) -> None:
    """Use the attention that transformers knows by this name. With `auto`, `minilm.models.head` chooses later."""
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
        reason = " ".join(str(error).split())
        raise ValueError(f"{type(network).__name__} cannot use model.attention {name}: {reason}") from error
    network.attention_is_chosen = True  # type: ignore[assignment]


def _freeze(network: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Freeze the parameters that match a pattern of fnmatch. Any name of a tied parameter can match."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matching = fnmatch.filter(parameters, pattern)
        if not matching:
            raise ValueError(f"model.freeze matches no parameter: {suggest_name(pattern, list(parameters))}")
        for name in matching:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"model.freeze {' '.join(patterns)} leaves nothing to train: name fewer parameters")
