"""The matrices that a model's weights are made of, against the code of transformers and the symmetries of attention."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from minilm import Model
from minilm.models.lora import add_lora
from minilm.optim.optimizer import find_no_decay_parameters
from minilm.optim.weight_matrices import MatrixLayout, find_matrices
from minilm.optim.weight_usage import WeightUsageTracer

# A size of each kind that is not the same as another one.
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
GQA = {"num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
MOE = {"num_local_experts": 4, "head_dim": 8, **GQA}
Sizes = tuple[int, ...]
# By name: type, fields, and for each fused parameter whether it is transposed, its groups and the sizes of its parts,
# as the modelling code of transformers splits it.
FUSED: dict[str, tuple[str, dict[str, Any], dict[str, tuple[bool, int, Sizes]]]] = {
    "ModernBERT": ("modernbert", SIZES, {"attn.Wqkv": (False, 1, (32,) * 3), "mlp.Wi": (False, 1, (40, 40))}),
    "GPT-2": ("gpt2", GPT2, {"c_attn": (True, 1, (32,) * 3)}),
    "OpenAI GPT": ("openai-gpt", GPT2, {"c_attn": (True, 1, (32,) * 3)}),
    "Phi-3": ("phi3", SIZES | GQA, {"qkv_proj": (False, 1, (32, 16, 16)), "gate_up_proj": (False, 1, (40, 40))}),
    "GLM": ("glm", SIZES | GQA | {"head_dim": 8}, {"gate_up_proj": (False, 1, (40, 40))}),
    "GPT-NeoX": ("gpt_neox", SIZES, {"query_key_value": (False, 4, (8, 8, 8))}),
    "BLOOM": ("bloom", BLOOM, {"query_key_value": (False, 4, (8, 8, 8))}),
    "Falcon": ("falcon", SIZES, {"query_key_value": (False, 1, (32, 8, 8))}),
    "Falcon with all heads": ("falcon", SIZES | {"multi_query": False}, {"query_key_value": (False, 4, (8, 8, 8))}),
    "Falcon 40B": (
        "falcon",
        SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"query_key_value": (False, 2, (16, 8, 8))},
    ),
    "StarCoder": ("gpt_bigcode", GPT2, {"c_attn": (False, 1, (32, 8, 8))}),
    "StarCoder with all heads": ("gpt_bigcode", GPT2 | {"multi_query": False}, {"c_attn": (False, 4, (8, 8, 8))}),
    "CodeGen": ("codegen", GPT2 | {"rotary_dim": 8}, {"qkv_proj": (False, 4, (8, 8, 8))}),
    "MPT": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}, {"Wqkv": (False, 1, (32,) * 3)}),
    "DeBERTa": ("deberta", SIZES, {"in_proj": (False, 4, (8, 8, 8))}),
    "GPT-OSS": (
        "gpt_oss",
        SIZES | MOE | {"layer_types": ["full_attention", "sliding_attention"]},
        {"experts.gate_up_proj": (True, 40, (1, 1))},
    ),
    "Mixtral": ("mixtral", SIZES | MOE, {"experts.gate_up_proj": (False, 1, (40, 40))}),
}
# Types whose parameters inside the layers hold one matrix each.
SINGLE = {
    "bert": SIZES,
    "albert": SIZES | {"embedding_size": 16},
    "llama": SIZES | GQA,
    "qwen2": SIZES | GQA,
    "qwen3": SIZES | GQA | {"head_dim": 8},
    "gptj": GPT2 | {"rotary_dim": 4},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "olmo2": SIZES | GQA,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40},
    "stablelm": SIZES | GQA | {"partial_rotary_factor": 0.25},
}
SMALL = {"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(kind: str, fields: dict[str, Any]) -> PreTrainedModel:
    """A random model of the type, for masked language modelling where it has that head."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SMALL | fields))
    try:
        return AutoModelForMaskedLM.from_config(config).eval()
    except ValueError:
        return AutoModelForCausalLM.from_config(config).eval()


def layouts_of(model: PreTrainedModel) -> tuple[dict[str, MatrixLayout], str]:
    """The layouts by the names of their parameters."""
    layouts, unknown = find_matrices(model, find_no_decay_parameters(model))
    return {name.removesuffix(".weight"): layouts[p] for name, p in model.named_parameters() if p in layouts}, unknown


@pytest.mark.parametrize("name", FUSED)
def test_fused_projections_are_split_as_the_model_splits_them(name):
    kind, fields, expected = FUSED[name]
    layouts, unknown = layouts_of(build(kind, fields))
    assert unknown == ""
    seen = set()
    for parameter, layout in layouts.items():
        end = next((end for end in expected if parameter.endswith(end)), None)
        seen.add(end)
        if end is None:
            assert (layout.groups, len(layout.sizes)) == (1, 1), parameter
        else:
            assert (layout.transposed, layout.groups, layout.sizes) == expected[end], parameter
    assert set(expected) < seen


@pytest.mark.parametrize("kind", SINGLE)
def test_separate_projections_are_not_split(kind):
    model = build(kind, SINGLE[kind])
    layouts, unknown = layouts_of(model)
    assert unknown == ""
    assert {(layout.transposed, layout.groups, len(layout.sizes)) for layout in layouts.values()} == {(False, 1, 1)}
    inside = [name for name, p in model.base_model.named_parameters() if p.ndim == 2 and ".embed" not in f".{name}"]
    outside = ("wte", "embedding_hidden_mapping_in", "pooler.dense", "wpe")
    assert len(layouts) == len([name for name in inside if not name.removesuffix(".weight").endswith(outside)])


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in FUSED if name not in ("GLM", "GPT-OSS", "Mixtral", "DeBERTa")])
def test_query_key_and_value_keep_the_symmetries_of_attention(name):
    """With the query doubled and the key halved the logits stay; with the value doubled and the output halved too."""
    kind, fields, expected = FUSED[name]
    model = build(kind, fields).double()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.zero_() if float(parameter.abs().max()) < 1 else parameter.fill_(1.0)  # no biases
    ids = torch.arange(3, 19)[None]
    before = model(input_ids=ids).logits
    layouts, _ = layouts_of(model)
    end = next(iter(expected))
    fused = {name: layout for name, layout in layouts.items() if name.endswith(end)}
    parts = [layout.split(model.get_parameter(f"{name}.weight")) for name, layout in fused.items()]
    # CodeGen stores the query, the value and the key.
    query, key, value = (0, 2, 1) if kind == "codegen" else (0, 1, 2)
    for views in parts:
        views[query].mul_(2)
        views[key].div_(2)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-9, atol=1e-9)
    for views in parts:
        views[value].mul_(2)
    assert not torch.allclose(model(input_ids=ids).logits, before, rtol=1e-6, atol=1e-6)
    # The only other matrix in the module of attention is that of its output.
    modules = {name.rpartition(".")[0] for name in fused}
    for output in [name for name in layouts if name.rpartition(".")[0] in modules and name not in fused]:
        model.get_parameter(f"{output}.weight").div_(2)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "fused", "behind"), [("ModernBERT", "Wi", "Wo"), ("GLM", "gate_up_proj", "down_proj")]
)
def test_the_ungated_part_of_a_gated_mlp_is_linear(name, fused, behind):
    kind, fields, _ = FUSED[name]
    model = build(kind, fields).double()
    ids = torch.arange(3, 19)[None]
    before = model(input_ids=ids).logits
    layouts, _ = layouts_of(model)
    for parameter, layout in layouts.items():
        if parameter.endswith(fused):
            # Both apply the activation to the first part.
            layout.split(model.get_parameter(f"{parameter}.weight"))[1].mul_(2)
            model.get_parameter(f"{parameter.removesuffix(fused)}{behind}.weight").div_(2)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-9, atol=1e-9)


class Toy(nn.Module):
    """A weight of 12 outputs and 6 inputs, used by a function of x and the weight."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(*(shape or (12, 6))))


def trace(use: Any, *shape: int) -> tuple[bool | None, int, Sizes, str]:
    """Whether the weight is transposed, its groups, the sizes of its parts, and the problem."""
    toy = Toy(*shape)
    with torch.no_grad(), WeightUsageTracer([toy.weight]) as flow:
        output = use(torch.randn(2, 5, 6), toy.weight)
    flow.finish(output)
    usage = flow.usages[toy.weight]
    groups, sizes = usage.find_pattern()
    return usage.transposed, groups, sizes, usage.problem


def attend(*parts: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*parts)


def rotate(x: Tensor) -> Tensor:
    """The first half of the features as pairs (i, i + 2), the others as they are, which joins nothing by itself."""
    turned, rest = x.split((4, x.shape[-1] - 4), -1)
    first, second = turned.chunk(2, -1)
    return torch.cat((turned * 0.6 + torch.cat((-second, first), -1) * 0.8, rest), -1)


def rotate_complex(x: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * (0.6 + 0.8j)).flatten(-2)


USES: dict[str, tuple[Any, tuple[bool, int, Sizes]]] = {
    "one": (lambda x, w: F.linear(x, w).softmax(-1), (False, 1, (12,))),
    "returned": (lambda x, w: F.linear(x, w), (False, 1, (12,))),
    "three": (lambda x, w: attend(*F.linear(x, w).chunk(3, -1)), (False, 1, (4, 4, 4))),
    "by head": (lambda x, w: attend(*F.linear(x, w).view(2, 5, 2, 6).chunk(3, -1)), (False, 2, (2, 2, 2))),
    "unequal": (lambda x, w: [y.softmax(-1) for y in F.linear(x, w).split((7, 5), -1)], (False, 1, (7, 5))),
    "gated": (lambda x, w: F.silu(F.linear(x, w)[..., :6]) * F.linear(x, w)[..., 6:], (False, 1, (6, 6))),
    "glu": (lambda x, w: F.glu(F.linear(x, w)), (False, 1, (6, 6))),
    "every other": (lambda x, w: F.linear(x, w)[..., ::2].sigmoid() * F.linear(x, w)[..., 1::2], (False, 6, (1, 1))),
    "sliced weight": (lambda x, w: attend(*(F.linear(x, part) for part in w.chunk(3))), (False, 1, (4, 4, 4))),
    "rotary": (lambda x, w: rotate(F.linear(x, w)) @ x.new_ones(12, 3), (False, 1, (12,))),
    "complex rotary": (lambda x, w: rotate_complex(F.linear(x, w)) @ x.new_ones(12, 3), (False, 1, (12,))),
    "normed heads": (
        lambda x, w: attend(*(F.layer_norm(h, (2,)) for h in F.linear(x, w).view(2, 5, 2, 6).chunk(3, -1))),
        (False, 2, (2, 2, 2)),
    ),
    "normed before the split": (
        lambda x, w: attend(*F.rms_norm(F.linear(x, w).view(2, 5, 6, 2), (2,)).flatten(2).chunk(3, -1)),
        (False, 1, (4, 4, 4)),
    ),
    "shape": (
        lambda x, w: attend(*(F.linear(x, w) + torch.zeros_like(F.linear(x, w))).chunk(3, -1)),
        (False, 1, (4, 4, 4)),
    ),
    "gathered": (lambda x, w: attend(*F.linear(x, w)[..., [*range(11, -1, -1)]].chunk(3, -1)), (False, 1, (4, 4, 4))),
    "padded": (lambda x, w: attend(*F.pad(F.linear(x, w), (4, 4)).chunk(5, -1)[1:4]), (False, 1, (4, 4, 4))),
    "strided": (
        lambda x, w: attend(*F.linear(x, w).as_strided((3, 2, 5, 4), (4, 60, 12, 1))),
        (False, 1, (4, 4, 4)),
    ),
    "depthwise convolution": (
        lambda x, w: attend(*F.conv1d(F.linear(x, w).mT, x.new_ones(12, 1, 3), groups=12).mT.chunk(3, -1)),
        (False, 1, (4, 4, 4)),
    ),
    "full convolution": (
        lambda x, w: attend(*F.conv1d(F.linear(x, w).mT, x.new_ones(12, 12, 3)).mT.chunk(3, -1)),
        (False, 1, (12,)),
    ),
    "added": (lambda x, w: (F.linear(x, w)[..., :6] + F.linear(x, w)[..., 6:]).softmax(-1), (False, 1, (12,))),
    "transposed": (lambda x, w: attend(*(x @ w).chunk(3, -1)), (True, 1, (4, 4, 4))),
    "on the left": (lambda x, w: attend(*(w @ x[0].mT)[None].mT.chunk(3, -1)), (False, 1, (4, 4, 4))),
    "experts": (lambda x, w: [F.glu(F.linear(x, expert)) for expert in w], (False, 1, (6, 6))),
}
SHAPES = {"transposed": (6, 12), "experts": (3, 12, 6)}


@pytest.mark.parametrize("name", USES)
def test_outputs_that_are_used_together_are_one_part(name):
    use, expected = USES[name]
    assert trace(use, *SHAPES.get(name, ())) == (*expected, "")


APART = "its inputs are used apart"


@pytest.mark.parametrize(
    ("use", "problem"),
    [
        (lambda x, w: F.linear(x, w[:, :1].expand(12, 6)), APART),
        (lambda x, w: F.linear(x, w[:1].expand(12, 6)), APART),
        (lambda x, w: F.linear(F.linear(x, w[:6]), w[:6].mT), APART),
        (lambda x, w: x, "a short forward does not use it"),
        (lambda x, w: F.linear(x, w[:7]).sum(), "a short forward does not use all of it"),
        (lambda x, w: F.linear(x, w.exp()), "it is used by aten.exp"),
        (lambda x, w: F.embedding(torch.arange(3), w), "it is used by aten.embedding"),
        (lambda x, w: F.linear(x[..., :3], w[:, :3]) + F.linear(x[..., 3:], w[:, 3:]), APART),
        (lambda x, w: F.linear(x, w).softmax(-1) @ w, APART),
        (lambda x, w: x.flatten()[:8] @ w.view(8, 9), APART),
        (lambda x, w: torch.linalg.qr(F.linear(x, w)).Q, "its outputs are used by aten.linalg_qr"),
        (lambda x, w: attend(*F.linear(x, w)[..., [*range(1, 12), 0]].chunk(3, -1)), "regular order"),
    ],
)
def test_what_is_not_known_is_said_and_never_guessed(use, problem):
    *_, said = trace(use)
    assert problem in said


def test_a_layout_parts_a_tensor_into_views():
    layout = MatrixLayout(transposed=True, groups=2, sizes=(1, 2))
    tensor = torch.arange(24).view(4, 6)
    first, second = layout.split(tensor)
    assert first.flatten(0, 1).tolist() == tensor.T[[0, 3]].tolist()
    assert second.flatten(0, 1).tolist() == tensor.T[[1, 2, 4, 5]].tolist()
    second.zero_()
    assert tensor.T.count_nonzero(1).tolist() == [3, 0, 0, 4, 0, 0]


def test_only_trained_matrices_inside_the_layers_count():
    model = build("bert", SIZES)
    model.bert.encoder.layer[0].requires_grad_(False)
    names = set(layouts_of(model)[0])
    parts = "attention.self.query attention.self.key attention.self.value attention.output.dense intermediate.dense"
    assert names == {f"bert.encoder.layer.1.{part}" for part in [*parts.split(), "output.dense"]}


def test_a_parameter_that_is_no_matrix_stays_unknown_and_is_named():
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 1}
    layouts, unknown = layouts_of(build("falcon_mamba", fields))
    mixer = "2 x backbone.layers.*.mixer"
    assert unknown == f"{mixer}.A_log (it is used by aten.exp), {mixer}.x_proj.weight (some of its parts are vectors)"
    assert {name.rpartition(".")[2] for name in layouts} == {"in_proj", "out_proj"}


def adapted(kind: str, fields: dict[str, Any], **model: Any) -> PreTrainedModel:
    network = build(kind, fields)
    add_lora(network, Model(name="base", lora_rank=2, **model), [], "CausalLM")
    return network


def test_the_second_matrix_of_lora_is_split_as_its_base_is():
    layouts, unknown = layouts_of(adapted("gpt_neox", SIZES, lora_targets=("query_key_value", "dense")))
    assert unknown == ""
    ends: dict[str, set[tuple[int, Sizes]]] = {}
    for name, layout in layouts.items():
        ends.setdefault(".".join(name.split(".")[-3:-1]), set()).add((layout.groups, layout.sizes))
    assert ends == {
        "query_key_value.lora_A": {(1, (2,))},
        "query_key_value.lora_B": {(4, (8, 8, 8))},
        "dense.lora_A": {(1, (2,))},
        "dense.lora_B": {(1, (32,))},
    }


def test_a_model_that_cannot_read_a_row_of_ids_is_refused():
    size = {"num_latents": 4, "d_latents": 8, "d_model": 8, "num_self_attends_per_block": 1, "num_blocks": 1}
    with pytest.raises(ValueError, match=r"^Perceiver\w+ cannot read a short row of ids .*: take optim.name adamw$"):
        layouts_of(build("perceiver", size))
