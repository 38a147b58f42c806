"""A tiny configuration of any type of model that transformers can build, found by the names of the fields."""

import re
from typing import Any

from transformers import AutoConfig, PretrainedConfig

# What a field is cut down to, by the first pattern that its whole name matches. A field that is smaller stays as it is.
_SIZES = (
    (r".*(qk_rope|qk_nope|v|linear_key|linear_value|index|swa|global|linear|kv|mamba|nope|rope)_head_dim", 8),
    (r"head_dim|d_head|d_kv|dim_head|kv_channels|attention_head_size|mamba_d_head|mamba_headdim|rotary_dim", 8),
    (r".*(num_key_value_heads|num_kv_heads|num_query_groups)", 2),
    (r".*(attention_heads|n_heads?|num_heads|key_heads|value_heads|linear_num_heads)", 4),
    (
        r".*(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|d_inner|dim_ff|dff|hidden_dim|feed_forward_size|mlp_dim)",
        48,
    ),
    (r"(.*_)?(hidden_size|d_model|n_embd|dim|emb_dim|embedding_size|embedding_dim|hidden_dimension)", 32),
    (
        r"(input|output)_embedding_size|word_embed_proj_dim|lru_width|hidden_size_.*|.*_(hidden|embed|emb)_(dim|size)",
        32,
    ),
    (r".*lora_rank|.*_rank|time_step_rank", 8),
    (r"(n_|num_)(.*_)?(hidden_|encoder_|decoder_|global_)?layers|n_layer|(en|de)coder_layers|depth|num_blocks", 2),
    (r"(.*_)?(num|n)_(.*_)?experts|n_routed_experts|zero_expert_num|moe_num_experts", 4),
    (r"num_experts_per_(tok|token)|moe_k|moe_topk|top_k_experts", 2),
    (r"n_groups?|topk_group|num_expert_group|o_groups", 1),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|.*_max_length|max_(source|target)_positions|context_length",
        64,
    ),
    (r"sliding_window(_size)?|attention_window_size|window_size|local_attention|attention_chunk_size", 8),
    (r".*chunk_size|block_size|.*chunk_length", 16),
    (r".*state_size|mamba_d_state", 8),
    (r".*ngram_vocab_size_base|encoder_hash_byte_group_vocab|.*vocab(ulary)?_size|vocab_size_per_layer_input", 400),
)


_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 1,
}
# What else a type needs.
OWN: dict[str, dict[str, Any]] = {
    "esmc": {"num_key_value_heads": 4},
    # At the default scale of the weights, almost nothing of the input reaches the pooler.
    "mobilebert": {"intra_bottleneck_size": 32, "initializer_range": 0.2},
    "neomme": {"head_dim": 16},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "mamba2": {"num_heads": 8},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
    "longcat_flash": {"qk_head_dim": 16},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 2},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        "layer_types": ["full_attention", "full_attention"],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_assistant": {"num_kv_shared_layers": 0},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "t5": {"decoder_start_token_id": 0},
    "zamba": {"num_hidden_layers": 8, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48},
    "mistral4": {"head_dim": 16, "qk_head_dim": 16},
    "perceiver": {"d_latents": 32, "num_latents": 8},
}


def tiny_fields(config: PretrainedConfig, own: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """The fields to change in a configuration of this class to have it tiny and without dropout."""
    layers = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or [0]
    needed = max(2, max(layers.index(kind) for kind in layers) + 1)
    fields: dict[str, Any] = {}
    if {"kv_lora_rank", "q_lora_rank"} & config.to_dict().keys():  # latent attention has no groups of heads
        own = {"num_key_value_heads": 4, **own}
    for name, value in config.to_dict().items():
        if name in config.sub_configs:
            inner = getattr(config, name)
            if isinstance(inner, PretrainedConfig):
                fields[name] = tiny_fields(inner, own.get(name, {}), ids)
        elif isinstance(value, float) and re.search("drop|jitter", name):
            fields[name] = 0.0
        elif name in ids:
            fields[name] = ids[name]
        elif isinstance(value, int) and not isinstance(value, bool) and not name.endswith("_id"):
            size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), value)
            if size < value:
                fields[name] = min(value, needed) if size == 2 and "layer" in name else size
    return {**fields, **{name: value for name, value in own.items() if name not in config.sub_configs}}


def tiny_config(kind: str, tokenizer: Any, *, decoder: bool = False) -> PretrainedConfig:
    """A tiny configuration of this type, with the vocabulary and the special tokens of the tokenizer.

    `decoder`: of the types that are encoders unless told, a decoder.
    """
    ids = {
        f"{role}_token_id": getattr(tokenizer, f"{role}_token_id")
        for role in ("pad", "bos", "eos", "cls", "sep", "mask")
    }
    for name, stand_in in (("bos_token_id", "cls_token_id"), ("eos_token_id", "sep_token_id")):
        ids[name] = ids[stand_in] if ids[name] is None else ids[name]
    ids = {name: id for name, id in ids.items() if id is not None}
    # Llama's tagger has dropout unless its configuration has this field, which it does not have by default.
    own = {"classifier_dropout": 0.0, **OWN.get(kind, {}), **({"is_decoder": True} if decoder else {})}
    return AutoConfig.for_model(
        kind, **tiny_fields(AutoConfig.for_model(kind), own, {**ids, "vocab_size": len(tokenizer)})
    )
