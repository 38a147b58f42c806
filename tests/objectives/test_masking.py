"""Masks of words and spans: their statistics in three languages and kinds of tokens, and what they depend on."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from minilm.config import MaskedLM
from minilm.data.batch_plan import Plan
from minilm.data.corpus import Examples, encode
from minilm.data.micro_batch import MicroBatch
from minilm.data.tokenizer_training import train_tokenizer
from minilm.objectives.factory import build_objective
from minilm.objectives.masking import MaskedLMCollator, _draw_spans, _mix
from minilm.train import load_steps
from tests.languages import LANGUAGES

KINDS = {"bpe": 350, "wordpiece": 300, "unigram": 300}
UNITS = ["word", "span"]
EPOCHS = 50


@pytest.fixture(scope="module")
def prepared() -> Callable[[str, str], tuple[PreTrainedTokenizerBase, Examples]]:
    """The tokenizer of this kind and forty documents in this language, cut into rows of at most 40 tokens."""
    known: dict[tuple[str, str], tuple[PreTrainedTokenizerBase, Examples]] = {}

    def prepare(kind: str, language: str) -> tuple[PreTrainedTokenizerBase, Examples]:
        if (kind, language) not in known:
            sentences = LANGUAGES[language]
            texts = [" ".join(sentences[(i + j) % 4] for j in range(1 + i % 3)) for i in range(40)]
            documents = Dataset.from_dict({"text": texts})
            tokenizer = train_tokenizer(documents, kind, KINDS[kind])
            known[kind, language] = tokenizer, encode(documents, tokenizer, max_length=40, words=True)
        return known[kind, language]

    return prepare


def _collator(
    tokenizer: PreTrainedTokenizerBase, examples: Examples, seed: int = 0, **fields: object
) -> MaskedLMCollator:
    return build_objective(MaskedLM(**fields)).collator(tokenizer, examples, seed=seed, padded=False, multiple=1)


def _batch(collator: MaskedLMCollator, examples: Examples, ids: NDArray[np.int64], epoch: int) -> MicroBatch:
    return collator([examples[int(i)] for i in ids], ids, epoch)


def _chosen(batch: MicroBatch) -> NDArray[np.bool_]:
    chosen_T = np.zeros(len(batch.input_ids_T), bool)
    chosen_T[batch.target_index_N.numpy()] = True
    return chosen_T


def _original(batch: MicroBatch) -> NDArray[np.int64]:
    return batch.input_ids_T.index_copy(0, batch.target_index_N, batch.target_ids_N).numpy()


def _z(excess: list[float]) -> float:
    """Return the sum of independent deviations from their means, divided by its estimated standard deviation."""
    return sum(excess) / math.sqrt(sum(x * x for x in excess))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_whole_words_are_chosen_at_the_rate_and_split_as_asked(
    prepared: Callable[[str, str], tuple[PreTrainedTokenizerBase, Examples]], kind: str, language: str, unit: str
) -> None:
    tokenizer, examples = prepared(kind, language)
    collator = _collator(tokenizer, examples, unit=unit, rate=0.2, masked=0.6, replaced=0.3)
    ids = np.arange(len(examples))
    starts = np.concatenate([examples.word_starts(int(i)) for i in ids])
    row_T = np.repeat(ids, examples.lengths)
    by_chance = 0.3 / len(collator.replacements)
    rates, splits = [], []
    for epoch in range(EPOCHS):
        batch = _batch(collator, examples, ids, epoch)
        chosen_T, original_T = _chosen(batch), _original(batch)
        ordinary_T = ~np.isin(original_T, tokenizer.all_special_ids)
        assert not (chosen_T & ~ordinary_T).any()
        inside_T = ordinary_T & ~starts & np.concatenate(([False], ordinary_T[:-1]))
        assert (chosen_T == np.roll(chosen_T, 1))[inside_T].all()
        new_T, mask_id = batch.input_ids_T.numpy(), tokenizer.mask_token_id
        rates += [*np.bincount(row_T, chosen_T - 0.2 * ordinary_T)]
        masked_T, replaced_T = new_T == mask_id, (new_T != mask_id) & (new_T != original_T)
        shares = ((masked_T, 0.6), (replaced_T, 0.3 - by_chance))
        splits += [
            [np.bincount(row_T, chosen_T & fate_T) - share * np.bincount(row_T, chosen_T) for fate_T, share in shares]
        ]
    assert abs(_z(rates)) < 4
    for fates in np.array(splits).swapaxes(0, 1):
        assert abs(_z(fates.ravel().tolist())) < 4


@pytest.mark.parametrize("unit", UNITS)
def test_a_span_has_one_fate_and_a_word_one_for_each_token(
    prepared: Callable[[str, str], tuple[PreTrainedTokenizerBase, Examples]], unit: str
) -> None:
    tokenizer, examples = prepared("bpe", "english")
    collator = _collator(tokenizer, examples, unit=unit, rate=0.03, masked=0.5, replaced=0)
    ids, same, other = np.arange(len(examples)), 0, 0
    for epoch in range(100):
        batch = _batch(collator, examples, ids, epoch)
        at_N, masked_N = batch.target_index_N.numpy(), (batch.input_ids_T[batch.target_index_N] == 4).numpy()
        neighbours = np.diff(at_N) == 1
        same += int((neighbours & (masked_N[1:] == masked_N[:-1])).sum())
        other += int((neighbours & (masked_N[1:] != masked_N[:-1])).sum())
    assert same + other > 2000
    share = other / (same + other)  # two spans can touch
    assert share < 0.01 if unit == "span" else 0.45 < share < 0.55


def test_no_span_goes_over_a_special_token(
    prepared: Callable[[str, str], tuple[PreTrainedTokenizerBase, Examples]],
) -> None:
    tokenizer, _ = prepared("bpe", "english")
    documents = Dataset.from_dict({"text": LANGUAGES["english"] * 20})
    blocks = encode(documents, tokenizer, max_length=400, layout="blocks", words=True)
    collator = _collator(tokenizer, blocks, unit="span", rate=0.9)
    batch = _batch(collator, blocks, np.arange(len(blocks)), 0)
    ids_T = _original(batch)
    chosen_T, fate_T = collator._choose(
        ids_T, _mix(np.arange(len(ids_T), dtype=np.uint64)), np.arange(len(blocks)), 0.9
    )
    at_S = np.flatnonzero(ids_T[1:-1] == tokenizer.sep_token_id) + 1
    assert len(at_S) > 70
    assert (chosen_T[at_S - 1] & chosen_T[at_S + 1]).sum() > 40
    assert (fate_T[at_S - 1] != fate_T[at_S + 1]).all()
    assert not _chosen(batch)[at_S].any()


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.6, 1.0])
def test_spans_have_the_lengths_of_spanbert_and_cover_every_place_alike(rate: float) -> None:
    """Joshi et al. 2020, section 3.1 and figure 2."""
    words = 400_000
    hash_W = _mix(np.arange(words, dtype=np.uint64))
    breaks_W = np.zeros(words, bool)
    breaks_W[0] = True
    chosen_W, span_W = _draw_spans(hash_W, breaks_W, rate)
    edges = np.flatnonzero(np.concatenate(([True], (np.diff(span_W) != 0) | (np.diff(chosen_W) != 0), [True])))
    lengths = np.diff(edges)[chosen_W[edges[:-1]]][1:-1]
    shares = 0.2 * 0.8 ** np.arange(10) / (1 - 0.8**10)
    counts = np.bincount(lengths, minlength=11)[1:]
    assert len(counts) == 10
    chi_square = ((counts - len(lengths) * shares) ** 2 / (len(lengths) * shares)).sum()
    assert abs(chi_square - 9) < 4 * math.sqrt(2 * 9)
    assert abs(lengths.mean() - 3.797) < 4 * lengths.std() / math.sqrt(len(lengths))
    breaks_W[::20] = True
    chosen_RxW = _draw_spans(hash_W, breaks_W, rate)[0].reshape(-1, 20)
    error = math.sqrt(rate * (1 - rate) / len(chosen_RxW)) + 1e-12
    assert (abs(chosen_RxW.mean(0) - rate) < 4 * error).all()


@pytest.mark.parametrize("unit", UNITS)
def test_masks_of_units_do_not_depend_on_the_rest_of_the_batch_but_on_seed_epoch_and_example(
    prepared: Callable[[str, str], tuple[PreTrainedTokenizerBase, Examples]], unit: str
) -> None:
    tokenizer, examples = prepared("bpe", "japanese")
    ids = np.arange(len(examples))

    def fates(micro_batch: int, order: NDArray[np.int64], seed: int = 5, epoch: int = 2) -> list[list[int]]:
        collator, found = _collator(tokenizer, examples, seed=seed, unit=unit, rate=0.3), {}
        for part in np.split(order, range(micro_batch, len(order), micro_batch)):
            inputs_T = _batch(collator, examples, part, epoch).input_ids_T.numpy()
            for i, own in zip(part, np.split(inputs_T, np.cumsum(examples.lengths[part])[:-1]), strict=True):
                found[int(i)] = own.tolist()
        return [found[int(i)] for i in ids]

    alone = fates(1, ids)
    for micro_batch in (len(ids), 7):
        assert fates(micro_batch, np.random.default_rng(0).permutation(ids)) == alone
    for other in (fates(1, ids, seed=6), fates(1, ids, epoch=3)):
        assert sum(a == b for a, b in zip(alone, other, strict=True)) < len(ids) / 5
    texts = [tuple(examples[int(i)]) for i in ids]
    twins = [(i, texts.index(text)) for i, text in enumerate(texts) if texts.index(text) < i]
    assert sum(alone[i] == alone[j] for i, j in twins) < len(twins) / 5


@pytest.mark.parametrize("unit", ["token", *UNITS])
def test_the_rate_changes_linearly_over_the_run(
    prepared: Callable[[str, str], tuple[PreTrainedTokenizerBase, Examples]], unit: str
) -> None:
    tokenizer, examples = prepared("wordpiece", "korean")
    collator = _collator(tokenizer, examples, unit=unit, rate=0.4, final_rate=0.1)
    assert [collator.rate(progress) for progress in (0, 0.5, 1)] == pytest.approx([0.4, 0.25, 0.1])
    ids = np.arange(len(examples))
    rows = [examples[int(i)] for i in ids]
    ordinary = sum(int((~np.isin(row, tokenizer.all_special_ids)).sum()) for row in rows)
    for progress in (0.0, 0.5, 1.0):
        targets = [collator(rows, ids, epoch, progress).target_count for epoch in range(30)]
        rate = collator.rate(progress)
        assert abs(_z([count - rate * ordinary for count in targets])) < 4
    assert _collator(tokenizer, examples, unit=unit, rate=0.3).rate(0.7) == 0.3


@pytest.mark.parametrize("workers", [0, 1])
def test_the_rate_of_a_step_is_the_same_wherever_the_run_begins(
    prepared: Callable[[str, str], tuple[PreTrainedTokenizerBase, Examples]], workers: int
) -> None:
    tokenizer, examples = prepared("bpe", "english")
    collator = _collator(tokenizer, examples, rate=0.9, final_rate=0.1)
    plan, accelerator = Plan(examples.lengths, examples=16, micro_tokens=400), Accelerator(cpu=True)

    def batches(first: int, workers: int) -> list[MicroBatch]:
        return [
            batch
            for _, part in load_steps(plan, examples, collator, accelerator, range(first, 8), workers)
            for batch in part
        ]

    whole, rest = batches(0, 0), batches(5, workers)
    assert all(map(torch.equal, *([batch.input_ids_T for batch in end] for end in (rest, whole[-len(rest) :]))))
    shares = [batch.target_count / len(batch.input_ids_T) for batch in whole]
    assert shares[0] > 0.7
    assert shares[-1] < 0.3


def test_evaluation_knows_nothing_of_what_training_chooses(
    prepared: Callable[[str, str], tuple[PreTrainedTokenizerBase, Examples]],
) -> None:
    tokenizer, examples = prepared("unigram", "english")
    ids = np.arange(len(examples))

    def evaluation(**fields: object) -> MicroBatch:
        return _batch(
            build_objective(MaskedLM(**fields)).collator(tokenizer, examples, seed=None, padded=False, multiple=1),
            examples,
            ids,
            0,
        )

    reference = evaluation()
    for fields in (
        {"unit": "word"},
        {"unit": "span"},
        {"rate": 0.5, "final_rate": 0.2},
        {"masked": 0.1, "replaced": 0.5},
    ):
        assert torch.equal(evaluation(**fields).input_ids_T, reference.input_ids_T)
    assert evaluation(eval_rate=0.4).target_count > 2 * reference.target_count
