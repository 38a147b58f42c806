"""The scores of an answer to a question: exact match and F1, as SQuAD defines them."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_answer(predicted: str, answers: Sequence[str]) -> tuple[float, float]:
    """Return exact match and F1 of a predicted answer, 0 to 1, as the script of SQuAD 2.0 defines them.

    Each is the best over the annotated answers. Case, punctuation, articles and white space do not count. An empty text
    stands for no answer (Rajpurkar et al. 2018, section 5).
    """
    words = _split_words(predicted)
    golds = [gold for gold in map(_split_words, answers) if gold] or [[]]
    return max(float(words == gold) for gold in golds), max(_compute_overlap(words, gold) for gold in golds)


def _split_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _compute_overlap(words: list[str], gold: list[str]) -> float:
    """Return the harmonic mean of precision and recall of the words."""
    if not words or not gold:
        return float(words == gold)
    common = (Counter(words) & Counter(gold)).total()
    return 2 * common / (len(words) + len(gold))
