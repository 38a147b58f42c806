"""Unigram vocabularies (Kudo 2018, section 3.2), the same from run to run.

The trainer of the tokenizers library sums in an order that differs from run to run, and where pieces are equally good,
as they often are in a small corpus, it then keeps others.
"""

import itertools
import math
from collections import Counter

import numpy as np
from tokenizers import Tokenizer, models

_LONGEST = 16  # characters of a piece
_SEEDS = 10  # pieces to begin with for each one wanted
_KEPT = 0.75  # share of the pieces that a round keeps


def learn_pieces(words: Counter[str], size: int) -> list[tuple[str, float]]:
    """The `size` pieces that spell the words, counted by how often they occur, with their log probabilities.

    It begins with the frequent parts of words. Each round spells all words in the likeliest way, sets the probabilities
    by what was used, and drops a quarter of the pieces: those whose loss makes the words the least unlikely. Where
    Kudo weighs all spellings of a word, the likeliest one stands for them here. Single characters stay, but for the
    rarest where there are more than `size` of them.
    """
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    kept = sorted(letters, key=lambda letter: (-letters[letter], letter))[:size]
    parts = _parts(words, set(kept))
    longer = sorted(parts, key=lambda part: (-parts[part] * len(part), part))[: _SEEDS * size]
    weights = {letter: float(letters[letter]) for letter in kept} | {
        part: float(parts[part] * len(part)) for part in longer
    }
    spelt = list(words)
    while True:
        scores = _spell(spelt, words, _log_share(weights))
        if len(scores) <= size:
            return sorted(scores.items(), key=lambda piece: (-piece[1], piece[0]))
        losses = {
            piece: math.exp(score) * (score - _without(piece, scores))
            for piece, score in scores.items()
            if len(piece) > 1
        }
        room = max(size, int(_KEPT * len(scores))) - len(kept)
        best = sorted(losses, key=lambda piece: -losses[piece])[:room]
        weights = {piece: math.exp(scores[piece]) for piece in [*kept, *best]}


def _parts(words: Counter[str], letters: set[str]) -> Counter[str]:
    """How often the words have each part of at least two `letters`; parts that occur but once are left out."""
    found: Counter[str] = Counter()
    shorter = letters
    for length in range(2, _LONGEST + 1):
        level: Counter[str] = Counter()
        for word, count in words.items():
            for at in range(len(word) - length + 1):
                if word[at : at + length - 1] in shorter and word[at + 1 : at + length] in shorter:
                    level[word[at : at + length]] += count
        shorter = {part for part, count in level.items() if count > 1}
        found.update({part: level[part] for part in shorter})
    return found


def _log_share(weights: dict[str, float]) -> dict[str, float]:
    total = math.log(math.fsum(weights.values()))
    return {piece: math.log(weight) - total for piece, weight in weights.items()}


def _spell(spelt: list[str], words: Counter[str], scores: dict[str, float]) -> dict[str, float]:
    """The log share of each piece in the likeliest spelling of the words; a piece without use counts as half a one."""
    unknown = min(scores.values())
    model = models.Unigram([("", unknown), *scores.items()], 0, byte_fallback=False)
    encodings = Tokenizer(model).encode_batch_fast(spelt, add_special_tokens=False)
    counts = np.repeat([words[word] for word in spelt], [len(encoding) for encoding in encodings])
    ids = np.fromiter(itertools.chain.from_iterable(encoding.ids for encoding in encodings), np.int64)
    used = np.bincount(ids, counts, minlength=len(scores) + 1)[1:]
    return _log_share(dict(zip(scores, np.maximum(used, 0.5).tolist(), strict=True)))


def _without(piece: str, scores: dict[str, float]) -> float:
    """The log probability of the likeliest way to spell a piece by others."""
    best = [0.0]
    for stop in range(1, len(piece) + 1):
        ways = ((start, scores.get(piece[start:stop])) for start in range(stop) if stop - start < len(piece))
        best.append(max(best[start] + score for start, score in ways if score is not None))
    return best[-1]
