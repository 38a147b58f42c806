"""Unusual checkpoints: odd configurations and trained weights give the plain model's losses and gradients.

The head of a model is built while its weights are new, as in `train`. Then the weights become like trained ones. A step
with rows of several lengths is compared with the plain model, which gets each row alone.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

import minilm.models.sparse_head
import minilm.runs.verify_head
from minilm.commands.evaluate import evaluate
from minilm.config import Batch, CausalLM, Config, Data, MaskedLM, Model, Optim, Run, Tokens
from minilm.config.command_line import parse_flags
from minilm.config.phases import Phase
from minilm.data.corpus import PreparedData
from minilm.models.attention import ATTENTION, packed_attention
from minilm.models.builtin_loss import check_builtin_loss
from minilm.models.chunked_loss import linear_cross_entropy
from minilm.models.head import Head
from minilm.models.sparse_head import SparseHead
from minilm.objectives.factory import build_network, build_objective
from minilm.runs.session import begin, start_recording
from minilm.runs.verify_head import verify_head
from minilm.train import train
from tests.jobs import WORDS, forget_other_tests, write_text
from tests.matrix import HEADS, LABELS, gradient_error, reference, tokenizer_for, types_of, update
from tests.reference import NO_EXAMPLES
from tests.tiny import tiny_config

pytestmark = pytest.mark.scorecard(31)

LONGEST = 200
LENGTHS: dict[str, tuple[int, ...]] = {
    "odd": (151, 77, 77, 33, 5, 1),
    "windows": (96, 96, 64, 32, 16, 16),
    "uneven": (160, 149, 31, 30, 2),
    "many": (*(150,) * 3, *(33,) * 4, *(7,) * 4),
}


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A checkpoint: its type, its head, and the fields of its configuration that differ from the default."""

    kind: str
    head: str = "causal"
    changed: dict[str, Any] = field(default_factory=dict)
    scale: float = 4.0
    """The factor by which the matrices grow in training."""


def build(situation: Situation, *, seed: int = 0) -> nn.Module:
    """Return the plain model with new weights."""
    tokenizer = tokenizer_for(situation.head, situation.kind)
    torch.manual_seed(seed)
    config = tiny_config(situation.kind, tokenizer)
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, 2 * LONGEST)
    for name, value in situation.changed.items():
        setattr(text, name, value)
    if situation.head == "classification":
        for name, value in LABELS.fields().items():
            setattr(config, name, value)
        text.pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    return build_objective(HEADS[situation.head].settings).auto.from_config(config)


def head_of(situation: Situation, network: Any) -> Head:
    """Return minilm's head of the model."""
    tokenizer = tokenizer_for(situation.head, situation.kind)
    prepared = PreparedData(tokenizer=tokenizer, train=NO_EXAMPLES, eval=NO_EXAMPLES, labels=LABELS)
    return build_objective(HEADS[situation.head].settings).head(network, prepared)


def train_weights(network: nn.Module, scale: float) -> None:
    """Make the weights look trained: larger matrices, and no vector of zeros or ones."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            constant = bool((parameter == parameter.flatten()[0]).all())
            parameter.mul_(scale if parameter.ndim > 1 else 1.0)
            parameter.add_(0.2 * torch.randn_like(parameter) * constant)


def differences(situation: Situation, lengths: tuple[int, ...]) -> tuple[float, float]:
    """Return the relative differences of the loss and the gradients from the plain model's."""
    network = build(situation).train()
    plain = deepcopy(network)
    head = head_of(situation, network).train()
    for model in (network, plain):
        train_weights(model, situation.scale)
    tokenizer, kind = tokenizer_for(situation.head, situation.kind), HEADS[situation.head]
    rows = [np.random.default_rng(n).integers(5, len(tokenizer), length) for n, length in enumerate(lengths)]
    if situation.head == "classification" and tokenizer.sep_token_id is not None:
        for row in rows:
            row[-1] = tokenizer.sep_token_id
    ids, examples = np.arange(len(rows)), replace(NO_EXAMPLES, labels=np.arange(len(rows)) % 3)
    layout = {"padded": not head.padding_free, "multiple": 1}
    batch = build_objective(kind.settings).collator(tokenizer, examples, seed=0, **layout)(rows, ids, 0)
    expected, gradients = reference(plain, kind.examples(batch))
    loss, ours = update(head, [batch])
    return abs(loss - expected) / expected, gradient_error(ours, gradients)


CAP = {"final_logit_softcapping": 300.0}
FULL = {"attention_chunk_size": None, "layer_types": ["full_attention"] * 4}
SITUATIONS = {
    "Longformer with a window of 32": Situation(
        kind="longformer", head="masked", changed={"attention_window": [32] * 2}
    ),
    "Longformer with a window of 8": Situation(kind="longformer", head="masked", changed={"attention_window": [8] * 2}),
    "Longformer with windows of two sizes": Situation(
        kind="longformer", head="masked", changed={"attention_window": [16, 64]}
    ),
    "Gemma 2 with a final cap that new logits do not reach": Situation(kind="gemma2", changed=CAP, scale=40.0),
    "Gemma 3 with such a cap": Situation(kind="gemma3_text", changed=CAP, scale=40.0),
    "nanochat with such a cap": Situation(kind="nanochat", changed=CAP, scale=40.0),
    "xLSTM with such a cap": Situation(kind="xlstm", changed={"output_logit_soft_cap": 300.0}, scale=40.0),
    "Gemma 2 without a final cap": Situation(kind="gemma2", changed={"final_logit_softcapping": None}),
    "Llama 4 without chunks, whose attention counts tokens": Situation(
        kind="llama4_text", changed={**FULL, "floor_scale": 16}
    ),
    "Llama 4 without chunks, where the count matters late": Situation(
        kind="llama4_text", changed={**FULL, "floor_scale": 512}
    ),
    "ESM that scales rows by their masks": Situation(kind="esm", head="masked", changed={"token_dropout": True}),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_losses_and_gradients_are_those_of_the_plain_model(situation: str, lengths: str) -> None:
    loss, gradient = differences(SITUATIONS[situation], LENGTHS[lengths])
    assert loss <= 1e-5
    assert gradient <= 1e-3


ROUTERS, ADVICE = "output_router_logits", r"--model\.config\.output-router-logits False"


def has_routers(kind: str) -> bool:
    """Return whether a configuration of this type can ask for a loss of routers."""
    if kind == "dots3_note":  # `dots3_note_text` is tested in its place
        return False
    try:
        return hasattr(AutoConfig.for_model(kind).get_text_config(), ROUTERS)
    except (StrictDataclassError, ValueError):  # the type has no default configuration
        return False


def own_loss(network: Any) -> float:
    """Return the loss of a row that the model itself computes."""
    ids_1xL = torch.randint(5, 300, (1, 31), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float(network.eval()(input_ids=ids_1xL, labels=ids_1xL).loss)


def test_types_whose_routers_would_add_to_the_loss_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    refused, kinds = set(), [kind for kind in types_of("causal") if has_routers(kind)]
    for kind in kinds:
        plain, asked = (build(Situation(kind=kind, changed={ROUTERS: value})) for value in (False, True))
        check_builtin_loss(plain)
        more = own_loss(asked) - own_loss(plain)
        if abs(more) > 1e-5:
            refused.add(kind)
            with pytest.raises(ValueError, match=ADVICE):
                check_builtin_loss(asked)
        else:
            check_builtin_loss(asked)
        assert getattr(asked.config.get_text_config(), ROUTERS) is True
        assert not [record for record in caplog.records if record.name == "minilm"], kind
    assert {"mixtral", "qwen2_moe", "olmoe", "jetmoe", "dbrx", "qwen3_5_moe", "gpt_oss"} <= refused
    assert {"llama4_text", "deepseek_v3"} <= {*kinds} - refused


@pytest.mark.parametrize(
    ("kind", "changed", "flag"),
    [
        ("mixtral", {ROUTERS: True, "router_aux_loss_coef": 0.0}, None),
        ("bamba", {"z_loss_coefficient": 0.1}, "--model.config.z-loss-coefficient 0.0"),
        ("prophetnet", {"eps": 0.1}, "--model.config.eps 0.0"),
        ("prophetnet", {}, "warning"),  # predicts the token after the next, too
        ("gpt2", {}, None),
        ("bart", {}, None),  # does not shift the labels by itself
    ],
)
def test_other_additions_to_the_loss_are_named(
    kind: str, changed: dict[str, Any], flag: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    network = build(Situation(kind=kind, changed=changed))
    if flag and flag.startswith("--"):
        with pytest.raises(ValueError, match=flag):
            check_builtin_loss(network)
        return
    check_builtin_loss(network)
    levels = [record.levelno for record in caplog.records if record.name == "minilm"]
    assert levels == [logging.WARNING] * (flag == "warning")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_5_moe"])
def test_the_advice_about_routers_works_for_a_checkpoint(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forget_other_tests()  # a run chooses its precision
    tokenizer = tokenizer_for("causal", kind)
    torch.manual_seed(0)
    config = tiny_config(kind, tokenizer)
    setattr(config.get_text_config(), ROUTERS, True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    if config.get_text_config() is not config:
        config.architectures = ["Qwen3_5MoeForCausalLM"]
        config.save_pretrained(
            tmp_path / "model"
        )  # such checkpoints hold the text model's configuration inside another
    tokenizer.save_pretrained(tmp_path / "model")
    asked = Config(
        data=Data(source=write_text(tmp_path / "text.txt"), eval_fraction=0.1),
        model=Model(name=str(tmp_path / "model")),
        objective=CausalLM(),
        batch=Batch(examples=4, max_length=24, micro_tokens=64),
        optim=Optim(),
        run=Run(output_dir=str(tmp_path / "out"), max_steps=2, precision="fp32"),
    )
    with pytest.raises(ValueError, match=ADVICE):
        train(asked)
    assert not (tmp_path / "out").exists()
    train(parse_flags(asked, "", ["--model.config.output-router-logits", "False"]))
    caplog.clear()
    figures = evaluate(tmp_path / "model", Data(source=asked.data.source))
    assert np.isfinite(figures["eval_loss"])
    assert ["cross entropy alone" in record.message for record in caplog.records].count(True) == 1


def run_of(folder: Path, name: str, **changed: Any) -> Config:
    """Return a run of a few steps on rows of words, some longer than the rows of trials."""
    words = WORDS.split()
    lines = [" ".join(words[i * j % len(words)] for j in range(1, 6 + i * 37 % 230)) for i in range(40)]
    (folder / "long.txt").write_text("\n".join(lines))
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return Config(
        data=Data(source=str(folder / "long.txt"), eval_fraction=0.3),
        tokens=Tokens(vocab_size=300),
        model=Model(type="bert", config={**small, "max_position_embeddings": 256}, **changed),
        objective=MaskedLM(rate=0.3),
        batch=Batch(examples=8, max_length=256, micro_tokens=600),
        run=Run(output_dir=str(folder / name), max_steps=3, precision="fp32", save_every=1, keep_last=3),
    )


def losses_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def wrong_where_rows_are_long(*states: Any, packing: Any = None, **words: Any) -> Any:
    """Attention that is right for the rows of trials, and wrong if a row of the batch is longer."""
    attended, weights = packed_attention(*states, packing=packing, **words)
    return attended * (-4.0 if packing is not None and packing.longest > 160 else 1.0), weights


@pytest.fixture
def wrong_attention() -> Iterator[None]:
    AttentionInterface.register(ATTENTION, wrong_where_rows_are_long)
    yield
    AttentionInterface.register(ATTENTION, packed_attention)


def test_a_shortcut_that_is_wrong_on_the_runs_own_rows_is_named_and_left_out(
    tmp_path: Path, wrong_attention: None, caplog: pytest.LogCaptureFixture
) -> None:
    train(run_of(tmp_path, "plain", attention="eager"))
    assert "shortcut" not in caplog.text
    config = run_of(tmp_path, "packed")
    train(config)
    assert "gives other losses or gradients than transformers by minilm's shortcut padding_free" in caplog.text
    assert losses_of(tmp_path / "packed") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-5)
    # A resumed run decides as it did at its start, though its weights have changed.
    whole = (tmp_path / "packed" / "model.safetensors").read_bytes()
    stopped = replace(config, run=replace(config.run, output_dir=str(tmp_path / "stopped"), max_steps=3))
    train(stopped)
    for name in ("all_results.json", "checkpoint-3"):
        path = tmp_path / "stopped" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(replace(stopped, run=replace(stopped.run, resume="latest")))
    assert (tmp_path / "stopped" / "model.safetensors").read_bytes() == whole
    assert caplog.text.count("shortcut padding_free") == 3


def test_the_rows_of_a_longer_phase_are_looked_at_before_the_first_step(
    tmp_path: Path, wrong_attention: None, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_of(tmp_path, "longer")
    longer = (Phase(start=2, max_length=256),)
    short = replace(config, batch=replace(config.batch, max_length=64), run=replace(config.run, phases=longer))
    train(short)
    assert caplog.text.count("shortcut padding_free") == 1
    train(replace(short, run=replace(short.run, phases=(), output_dir=str(tmp_path / "short"))))
    assert caplog.text.count("shortcut padding_free") == 1


def test_an_evaluation_and_a_fork_look_at_their_rows_too(
    tmp_path: Path, wrong_attention: None, caplog: pytest.LogCaptureFixture
) -> None:
    train(run_of(tmp_path, "plain", attention="eager"))
    config = run_of(tmp_path, "fork")
    with begin(config, "fork", checkpoints=False) as run:
        head = SparseHead(build_network(config, run.prepared))
        assert head.padding_free
        start_recording(run, head)
        assert not head.padding_free
    caplog.clear()
    figures = evaluate(tmp_path / "plain")
    assert "shortcut padding_free" in caplog.text
    expected = json.loads((tmp_path / "plain" / "all_results.json").read_text())
    assert figures["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


def test_only_the_wrong_shortcut_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = build(Situation(kind="bert", head="masked"))
    tokenizer = tokenizer_for("masked", "bert")
    rows = np.random.default_rng(0).integers(5, len(tokenizer), 2000)
    start = np.array([0, 100, 300, 450, 460])
    examples = replace(NO_EXAMPLES, ids=rows, start=start, stop=np.array([90, 270, 420, 457, 640]))
    prepared = PreparedData(tokenizer=tokenizer, train=examples, eval=examples)
    head = head_of(Situation(kind="bert", head="masked"), network)
    taken = head.shortcuts
    assert taken == ("fused", "short", "padding_free", "sparse")
    with monkeypatch.context() as patch:
        patch.setattr(minilm.runs.verify_head, "on_all_ranks", nullcontext)
        patch.setattr(minilm.runs.verify_head, "gather_object", lambda found: found)
        config, before = Config(objective=MaskedLM()), torch.get_rng_state()
        verify_head(config, head, prepared)
        assert head.shortcuts == taken
        assert torch.equal(torch.get_rng_state(), before)
        patch.setattr(
            minilm.models.sparse_head,
            "linear_cross_entropy",
            lambda hidden, *rest, **options: linear_cross_entropy(1.1 * hidden, *rest, **options),
        )
        verify_head(config, head, prepared)
    assert head.shortcuts == ("short", "padding_free", "sparse")


@pytest.mark.parametrize(
    ("changed", "shortest", "special", "refused"),
    [
        ({"token_dropout": True}, 1, False, True),
        ({"token_dropout": True}, 5, False, True),
        ({"token_dropout": True}, 40, False, False),
        ({"token_dropout": True}, 1, True, False),
        ({"token_dropout": False}, 1, False, False),
    ],
)
def test_esm_is_refused_where_all_of_a_row_may_be_masked(
    changed: dict[str, Any], shortest: int, special: bool, refused: bool
) -> None:
    situation = Situation(kind="esm", head="masked", changed=changed)
    tokenizer, network = tokenizer_for("masked", "esm"), build(situation)
    mask_1x1 = torch.full((1, 1), tokenizer.mask_token_id)
    plain = network(input_ids=mask_1x1).logits  # transformers' logits of a row that holds masks only
    assert bool(plain.isnan().any()) == changed["token_dropout"]
    end = [tokenizer.sep_token_id] * special
    start = np.array([0, 50])
    examples = replace(
        NO_EXAMPLES, ids=np.full(100, 7), start=start, stop=start + np.array([50, shortest]), suffix=np.array(end, int)
    )
    prepared = PreparedData(tokenizer=tokenizer, train=examples, eval=examples)
    objective = build_objective(MaskedLM())
    if refused:
        with pytest.raises(ValueError, match=r"--model\.config\.token-dropout False"):
            objective.head(network, prepared)
    else:
        objective.head(network, prepared)
