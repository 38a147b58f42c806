"""The optimizer's groups for every type of model, against depths by parameter names and Trainer's weight decay."""

import contextlib
import re
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel, Trainer, XLMConfig, XLMWithLMHeadModel

from minilm import Optim
from minilm.objectives.factory import build_objective
from minilm.optim.optimizer import build_optimizer, compute_layer_scales
from minilm.optim.parameter_depth import parameter_depths
from tests.matrix import HEADS, tokenizer_for, types_of
from tests.tiny import tiny_config

pytestmark = pytest.mark.scorecard(31)

# The name of a list of blocks, then the block's number.
BLOCK = re.compile(
    r"^(?P<stack>.*?)(?:^|\.)(?:layers?|block|blocks|h|attentions|ffns|layer_norm[12]|self_attends|cross_attn_layers)"
    r"\.(?P<number>\d+)\."
)
FUNNEL = re.compile(r"^(?P<stack>.*\.blocks\.\d+)\.(?P<number>\d+)\.")
# Parts of a model for other inputs than text, whose blocks a text does not use.
OTHER = re.compile(r"vision|visual|audio|image|multi_modal|connector|patch_embed")
# Names of parameters before the blocks: embeddings, and tables and projections that make the layers' inputs.
BEFORE = re.compile(
    r"(?<!r)(?<!un)emb|wte|wpe|\.shared\.|\.w\.weight|rel_pos|relative_attention_bias|per_layer_|altup_projections|HashBucket"
    r"|perceiver\.encoder\.cross_attention|input_hidden_states|hash_tok"
)
# Parameters after the last block whose names match BEFORE or look like those of other norms.
AFTER = re.compile(
    r"(lfm2|lfm3|lfm2_moe)/.*embedding_norm|decoding_cross_attention|output_position_encodings|embedding_decoder"
    r"|bigbird_pegasus/.*decoder\.layernorm_embedding|emb_layer_norm_after|entity_predictions"
)
# Parameters between two stacks: the norm of an encoder, CANINE's convolutions and BLT's projections.
BETWEEN = re.compile(
    r"encoder\.(final_)?(layer_?norm|norm)\.|text_model\.norm\.|chars_to_molecules|canine\.(projection|pooler)"
    r"|bigbird_pegasus/.*encoder\.layernorm_embedding|local_encoder\.patch_embedding_projection|patcher\.(norm|lm_head)"
)
# Parts of stacks' names, in the order of the stacks.
ORDER = (
    "patcher",
    "initial_char",
    "encoder",
    "global_transformer",
    "decoder",
    "final_char",
)
REFUSED = {"albert", "hrm_text", "gemma4_unified_assistant"}
# Models that no head can train, because they cannot read a row of ids alone.
UNREADABLE = {
    "token-classification": {"bros"},
    "question-answering": {"longformer", "lxmert"},
    "multiple-choice": {"longformer"},
}


def models(head: str) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the name and a tiny model of each type that has the head and can be built here."""
    objective = build_objective(HEADS[head].settings)
    for kind in types_of(head):
        torch.manual_seed(0)
        try:
            decoder = head == "causal" and hasattr(AutoConfig.for_model(kind), "is_decoder")
            config = tiny_config(kind, tokenizer_for(head, kind), decoder=decoder)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                network = objective.auto.from_config(config)
        except Exception:  # a library is missing, or the type has no small configuration
            continue
        yield kind, network


def named_block(name: str) -> tuple[str, int] | None:
    """Return the stack and the number of the block that the name tells; None outside all blocks."""
    match = FUNNEL.match(name) or BLOCK.match(name)
    return None if match is None or OTHER.search(name) else (match["stack"], int(match["number"]))


def rank(stack: str) -> tuple[int, str]:
    """Return a key that sorts encoders before decoders. Funnel's encoder has three parts."""
    places = [place for place, part in enumerate(ORDER) if part in stack]
    return (places[0] if places else 1, stack)


def wrong_depths(kind: str, network: PreTrainedModel) -> list[str]:
    """Return the parameters whose depth is not the one that their name tells."""
    depths = parameter_depths(network)
    named = {name: named_block(name) for name, _ in network.named_parameters()}
    blocks = sorted({block for block in named.values() if block}, key=lambda block: (rank(block[0]), block[1]))
    count, several = len(blocks), len({stack for stack, _ in blocks}) > 1
    wrong, words = [], None
    # A head may share the embedding of words. CANINE has several embeddings.
    with contextlib.suppress(NotImplementedError):
        words = getattr(network.get_input_embeddings(), "weight", None)
    for name, parameter in network.named_parameters():
        if OTHER.search(name):
            continue
        depth, block, label = depths.get(parameter), named[name], f"{kind}/{name}"
        if block is not None:
            right = depth == count - blocks.index(block)
        elif several and BETWEEN.search(label):
            right = depth is not None and 0 < depth < count
        elif AFTER.search(label) or not (BEFORE.search(name) or parameter is words):
            right = depth in (0, None)
        else:
            right = depth in (count + 1, None)
        if not right:
            wrong.append(f"{label}: {depth} of {count}")
    return wrong


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_of_every_type_has_the_depth_that_its_name_tells(head: str, figure) -> None:
    wrong, tried, refused = [], 0, dict[str, str]()
    for kind, network in models(head):
        try:
            wrong += wrong_depths(kind, network)
            tried += 1
        except ValueError as error:
            refused[kind] = str(error)
    figure(f"layer decay, {head}: {tried} types by name, {len(refused)} refused")
    assert not wrong, "\n".join(wrong)
    assert refused.keys() <= REFUSED | UNREADABLE.get(head, set())
    assert all(line.endswith("leave optim.layer_decay at 1") and "\n" not in line for line in refused.values())
    assert tried + len(refused) > 0.9 * len(types_of(head))


def test_two_models_that_share_embeddings_each_have_their_layers() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = XLMConfig(vocab_size=40, emb_dim=16, n_layers=3, n_heads=2, max_position_embeddings=16)
            self.first, self.second = XLMWithLMHeadModel(config), XLMWithLMHeadModel(config)
            self.second.transformer.embeddings = self.first.transformer.embeddings

    scales = {
        name: compute_layer_scales(model, 0.5)[parameter]
        for model in [Both()]
        for name, parameter in model.named_parameters()
    }
    for part in ("first", "second"):
        assert scales[f"{part}.transformer.ffns.2.lin1.weight"] == 0.5
        assert scales[f"{part}.transformer.ffns.0.lin1.weight"] == 0.125
        assert scales[f"{part}.transformer.position_embeddings.weight"] == 0.0625
        assert scales[f"{part}.pred_layer.proj.bias"] == 1.0
    assert scales["first.transformer.embeddings.weight"] == 0.0625


# Types whose groups differ from Trainer's for the second reason in the docstring of `find_no_decay_parameters`.
AROUND = {"roberta-prelayernorm", "dbrx", "axk2", "inkling2_text", "inkling2_loop_text"}


@pytest.mark.parametrize("head", HEADS)
def test_weight_decay_is_for_the_same_parameters_as_trainers(head: str, figure) -> None:
    wrong, same, vectors, around = [], 0, set(), set()
    for kind, network in models(head):
        theirs = set(Trainer.get_decay_parameter_names(None, network))
        groups = build_optimizer(network, Optim(weight_decay=0.1)).param_groups
        ours = {parameter for group in groups if group["weight_decay"] for parameter in group["params"]}
        differing = {n: p for n, p in network.named_parameters() if (n in theirs) != (p in ours) and p.requires_grad}
        same += not differing
        for name, parameter in differing.items():
            if name in theirs and parameter.ndim < 2:
                vectors.add(kind)
            elif name not in theirs and kind in AROUND and parameter.ndim >= 2 and "bias" not in name.split(".")[-1]:
                around.add(kind)
            else:
                wrong.append(f"{kind}/{name}")
    figure(
        f"weight decay, {head}: {same} types as Trainer, {len(vectors)} but for vectors, {len(around)} by a name around"
    )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("gpt_oss", ("gate_up_proj_bias", "down_proj_bias")),
        ("xlnet", ("r_w_bias", "r_r_bias", "r_s_bias")),
        ("t5", ("relative_attention_bias.weight",)),
        ("mpnet", ("relative_attention_bias.weight",)),
        ("convbert", ("key_conv_attn_layer.bias",)),
        ("funnel", ("r_w_bias", "r_r_bias", "r_s_bias")),
        ("mamba", ("norm_f.weight", "D")),
        ("cohere", ("norm.weight",)),
    ],
)
def test_biases_and_norms_of_any_shape_do_not_decay(kind: str, names: tuple[str, ...]) -> None:
    head = next(head for head in ("causal", "masked", "classification") if kind in types_of(head))
    network = build_objective(HEADS[head].settings).auto.from_config(tiny_config(kind, tokenizer_for(head, kind)))
    groups = build_optimizer(network, Optim(weight_decay=0.1)).param_groups
    decayed = {parameter for group in groups if group["weight_decay"] for parameter in group["params"]}
    chosen = [p for n, p in network.named_parameters() if any(n == name or n.endswith(f".{name}") for name in names)]
    assert chosen
    assert not decayed & set(chosen)
    assert network.get_input_embeddings().weight in decayed
