"""Attention inside each row of a packed batch (`minilm.data.packing`).

In half precision on GPUs, one kernel computes all rows: FlashAttention (Dao 2023) or, for short rows,
`minilm.models.short_row_attention`. Otherwise each group of rows is computed separately: short rows on a CPU by plain
matrix products, long rows with a window in chunks (`minilm.models.windowed_attention`), and others by torch's kernel.

Axes: T tokens of the batch, R rows and L length of a group, A heads, D size of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from minilm.data.packing import SHORT_ROW_TOKENS, Packing, RowGroup
from minilm.models.dropout import fast_dropout
from minilm.models.windowed_attention import chunk_bias, chunk_size, gather_chunk_contexts, split_into_chunks

if torch.version.cuda is not None:  # these imports take more than half a second
    from torch.nn.attention.varlen import varlen_attn

    from minilm.models import short_row_attention as short_rows

ATTENTION = "minilm_packed"  # the name under which transformers knows `packed_attention`
# On a CPU, plain products compute rows of up to this many tokens in bf16, and of up to SHORT_ROW_TOKENS otherwise. They
# are a tenth faster for longer rows too, but take 1.4 times the memory.
_SHORT_BF16_ROW_TOKENS = 512
# Arguments that do not change the result. `packed_attention` refuses all other unknown arguments.
_IGNORED_ARGUMENTS = {
    *("position_ids", "cache_position", "use_cache", "past_key_values", "deterministic", "return_dict"),
    *("output_attentions", "output_hidden_states", "token_type_ids"),
}


def packed_attention(
    module: nn.Module,
    query_1xAxTxD: Tensor,
    key_1xAxTxD: Tensor,
    value_1xAxTxD: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention inside each row of a packed batch, 1 x T x A x D. An attention function for transformers.

    packing: the rows of the batch. Without it, the result is that of transformers' scaled dot product attention.
    sliding_window: a token sees the tokens that are fewer than this number away.
    is_causal: whether a token sees only itself and earlier tokens. None: as the module says.

    Several heads may share one key and value (grouped query attention, Ainslie et al. 2023). A token after the last row
    attends only to itself. Raises ValueError for an unknown argument, such as sinks or a cap on the scores.
    """
    if packing is None:
        return sdpa_attention_forward(
            module,
            query_1xAxTxD,
            key_1xAxTxD,
            value_1xAxTxD,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            is_causal=is_causal,
            **kwargs,
        )
    if unknown := [name for name, value in kwargs.items() if value is not None and name not in _IGNORED_ARGUMENTS]:
        raise ValueError(f"minilm's attention does not support {', '.join(unknown)}: pass --model.attention eager")
    states = [x.squeeze(0).transpose(0, 1) for x in (query_1xAxTxD, key_1xAxTxD, value_1xAxTxD)]
    # Under autocast, rotary embeddings and norms return queries and keys in float32. Values are in half precision.
    states = [x.to(value_1xAxTxD.dtype) for x in states]
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    shared = states[0].shape[1] // states[1].shape[1]
    states[1:] = [x if shared == 1 else x.repeat_interleave(shared, dim=1) for x in states[1:]]
    # FlashAttention needs queries, keys and values of one width. DeepSeek's values are narrower than its queries.
    if states[2].shape[-1] == states[0].shape[-1] and _flash_attention_fits(states[0], dropout):
        attended_TxAxD = _attend_at_once(packing, states, causal, sliding_window, scaling)
    else:
        attended_TxAxD = _attend_in_groups(packing, states, causal, sliding_window, scaling, dropout)
    return attended_TxAxD[None], None


def _flash_attention_fits(query_TxAxD: Tensor, dropout: float) -> bool:
    """Return whether FlashAttention can compute this.

    It needs an Ampere GPU or newer, half precision, no dropout, and a head size of at most 256 that 8 divides.
    """
    return (
        query_TxAxD.device.type == "cuda"
        and query_TxAxD.dtype in (torch.float16, torch.bfloat16)
        and query_TxAxD.shape[-1] % 8 == 0
        and query_TxAxD.shape[-1] <= 256
        and dropout == 0
        and _has_flash_attention(query_TxAxD.device)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_flash_attention(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _attend_at_once(
    packing: Packing, states: Sequence[Tensor], causal: bool, window: int | None, scaling: float | None
) -> Tensor:
    """Return the attention of all rows by one kernel, T x A x D.

    states: queries, keys and values, each T x A x D.
    """
    near = -1 if window is None else window - 1
    query_TxAxD, key_TxAxD, value_TxAxD = (x if x.stride(-1) == 1 else x.contiguous() for x in states)
    if packing.longest <= SHORT_ROW_TOKENS and query_TxAxD.shape[-1] in short_rows.HEAD_SIZES:
        scaling = query_TxAxD.shape[-1] ** -0.5 if scaling is None else scaling
        reach = SHORT_ROW_TOKENS if window is None else near
        short: Tensor = short_rows.attend_short_rows(
            *(query_TxAxD, key_TxAxD, value_TxAxD),
            *(packing.position_T, packing.tiles_B1),
            *(reach, causal, scaling),
        )
        return short
    attended: Any = varlen_attn(
        query_TxAxD,
        key_TxAxD,
        value_TxAxD,
        cu_seq_q=packing.bounds_R1,
        cu_seq_k=packing.bounds_R1,
        max_q=packing.longest,
        max_k=packing.longest,
        scale=scaling,
        window_size=(near, 0 if causal else near),
    )
    attended_TxAxD: Tensor = attended
    return attended_TxAxD


# The groups differ from batch to batch, and torch would compile this function for each of them.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_in_groups(
    packing: Packing,
    states: Sequence[Tensor],
    causal: bool,
    window: int | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """Return the same as `_attend_at_once`, computed for one group of rows at a time."""
    sizes, parts = [group.stop - group.start for group in packing.groups], []
    if alone := states[0].shape[0] - sum(sizes):
        sizes.append(alone)
    # The gradient of a slice is as long as the whole batch. The gradients of torch.split are as short as the parts.
    split = [torch.split(x_TxAxD, sizes) if len(sizes) > 1 else (x_TxAxD,) for x_TxAxD in states]
    for group, *own in zip(packing.groups, *split, strict=False):
        query, key, value = (group.pad_by_head(x_TxAxD) for x_TxAxD in own)
        parts.append(group.unpad_by_head(_attend(group, query, key, value, causal, window, scaling, dropout)))
    if alone:
        # A token that attends only to itself gets its own value.
        parts.append(split[2][-1])
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _attend(
    group: RowGroup,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    window: int | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """Return softmax(query key^T scaling + bias) value, R x A x L x D, where the bias keeps the group's rows apart."""
    size = chunk_size(window, group)
    if size is None and not _products_are_faster(group, query):
        whole = group.owner_RL is None and (window is None or window >= group.length)
        # Without a bias, the kernel skips the scores of later tokens.
        plain = causal and whole
        bias = None if plain else group.attention_bias(window, query, causal=causal)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout, is_causal=plain, scale=scaling
        )
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if size is not None and window is not None:
        query, length = split_into_chunks(query, size), query.shape[2]
        key, value = (gather_chunk_contexts(x, size, window, causal=causal) for x in (key, value))
        scores = query @ key.transpose(-1, -2)
        bias = chunk_bias(group, size, window, scores, causal=causal)
        return (_weights(scores, bias, dropout).to(value.dtype) @ value).flatten(2, 3)[:, :, :length]
    scores = query @ key.transpose(-1, -2)
    return _weights(scores, group.attention_bias(window, scores, causal=causal), dropout).to(value.dtype) @ value


def _products_are_faster(group: RowGroup, query: Tensor) -> bool:
    """Return whether plain matrix products are faster than torch's kernel, above all in backward."""
    return query.device.type == "cpu" and group.length <= (
        _SHORT_BF16_ROW_TOKENS if query.dtype == torch.bfloat16 else SHORT_ROW_TOKENS
    )


def _weights(scores: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Return softmax(scores + bias) after dropout. The scores are overwritten."""
    if bias is not None:
        scores = scores.add_(bias)
    # Autocast would copy the scores to fp32, but the bf16 kernel computes in fp32 anyway.
    with torch.autocast("cpu", enabled=False):
        weights = scores.softmax(-1)
    return fast_dropout(weights, dropout, training=dropout > 0)


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
