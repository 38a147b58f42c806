"""The words of a row and their tags, and the schemes by which tags mark spans of words.

IOB2 (Ratnaparkhi 1998, Tjong Kim Sang and Veenstra 1999): B-x begins a span of the kind x, I-x continues it, and O
stands outside of spans. IOB1 (Ramshaw and Marcus 1995): a span begins with I-x, or with B-x if it directly follows
another span of its kind.
"""

import re
from collections.abc import Collection, Sequence

from minilm.data.rows import Row

OUTSIDE = "O"
_IOB_TAG = re.compile(r"O|[BI]-.+")
# IOBES and BILOU also mark the last word of a span and the spans of one word.
_OTHER_TAG = re.compile(r"O|[BIESLU]-.+")


def read_words(row: Row) -> list[str]:
    """Return the words of a row, its cell `word_list`. Raise ValueError if it is not a list of visible texts."""
    words = row["word_list"]
    if not isinstance(words, list):
        raise ValueError(
            f"{row.where}: {repr(words)[:60]} stands where a list of words is expected: write the words as a list, or "
            "pass another --data.column"
        )
    if not words:
        raise ValueError(f"{row.where}: the list of words is empty: remove the row")
    for number, word in enumerate(words, 1):
        if not isinstance(word, str) or not word.strip():
            raise ValueError(
                f"{row.where}: word {number} is {repr(word)[:60]} where visible text is expected: correct the row"
            )
    return words


def read_tags(row: Row, class_names: Sequence[str], scheme: str) -> list[str]:
    """Return the name of the tag of each word. The cell `label` has the tags as names or as numbers.

    class_names: the names of the numbers. Without them, the name of a number is the number.
    scheme: `iob1` turns tags of IOB1 into those of IOB2. `iob2` checks them.

    Raise ValueError that names the word if a tag is neither a name nor a number with a name, or does not fit the
    scheme, and if there is another number of tags than of words.
    """
    words, cell = read_words(row), row["label"]
    if not isinstance(cell, list):
        raise ValueError(
            f"{row.where}: {repr(cell)[:60]} stands where a list with a tag for each word is expected: write the tags "
            "as a list, or pass another --data.label-column"
        )
    if len(cell) != len(words):
        raise ValueError(f"{row.where}: {len(words)} words have {len(cell)} tags: write one for each word")
    tags = [_name_tag(row, number, tag, class_names) for number, tag in enumerate(cell, 1)]
    if scheme == "iob1":
        return [_start_span(tag, before) for before, tag in zip([OUTSIDE, *tags], tags, strict=False)]
    if scheme == "iob2":
        _check_iob2(row, words, tags)
    return tags


def _name_tag(row: Row, number: int, tag: object, class_names: Sequence[str]) -> str:
    """Return the name of the tag of a word, which is given by its number in the row, from 1."""
    where = f"{row.where}, word {number} ({row['word_list'][number - 1]!r})"
    if isinstance(tag, str) and tag.strip():
        # The fields of a CoNLL file are text, also if they are numbers.
        is_id = bool(class_names) and tag not in class_names and tag.isdecimal()
        if not is_id:
            return tag
        tag = int(tag)
    if not isinstance(tag, int) or isinstance(tag, bool):
        raise ValueError(f"{where}: the tag is {tag!r}: write a name or a whole number")
    if tag < 0:
        raise ValueError(
            f"{where}: the tag is {tag}: give every word a tag. Numbers such as -100 stand for the parts of a word, "
            "which minilm makes itself"
        )
    if class_names and tag >= len(class_names):
        raise ValueError(f"{where}: the tag is {tag}, but only 0 to {len(class_names) - 1} have names")
    return class_names[tag] if class_names else str(tag)


def _start_span(tag: str, before: str) -> str:
    """Return a tag of IOB1 as IOB2 writes it. `before` is the tag of the word before, in either scheme."""
    return f"B-{tag[2:]}" if tag.startswith("I-") and tag[2:] != before[2:] else tag


def _check_iob2(row: Row, words: Sequence[str], tags: Sequence[str]) -> None:
    for number, (before, tag) in enumerate(zip([OUTSIDE, *tags], tags, strict=False)):
        if tag.startswith("I-") and tag[2:] != before[2:]:
            after = f"after {before}" if number else "at the beginning of the row"
            raise ValueError(
                f"{row.where}, word {number + 1} ({words[number]!r}): the tag {tag} stands {after}, but in IOB2 a span "
                f"begins with B-{tag[2:]}: correct the tag; pass --objective.scheme iob1 if the tags are IOB1, or "
                "plain if they mark no spans"
            )


def find_scheme(scheme: str, tags: Collection[str]) -> str:
    """Return `iob2`, `iob1` or `plain` for tags of the objective's `scheme`, which may be `auto`.

    Raise ValueError for tags that the scheme does not have, and for `auto` if they seem to be IOBES or BILOU.
    """
    others = sorted(tag for tag in tags if not _IOB_TAG.fullmatch(tag))
    if scheme == "auto":
        if any(tag.startswith("B-") for tag in tags) and others and all(map(_OTHER_TAG.fullmatch, tags)):
            raise ValueError(
                f"the tag {others[0]!r} is not one of IOB2, which transformers reads: write B-x and I-x for all words "
                "of spans, or pass --objective.scheme plain to count words instead of spans"
            )
        return "plain" if others or {*tags} == {OUTSIDE} else "iob2"
    if scheme != "plain" and others:
        raise ValueError(
            f"objective.scheme {scheme}: the tag {others[0]!r} is neither O nor of the form B-x or I-x: correct it, or "
            "pass --objective.scheme plain"
        )
    return scheme


def sort_tags(tags: Collection[str], scheme: str) -> list[str]:
    """Return the names of tags in the order of their ids: O first, then the others by their kinds.

    Tags of spans are completed: for each kind x there are B-x and I-x, since the rows may lack one of them by chance.
    """
    if scheme == "plain":
        whole_numbers = all(map(str.isdecimal, tags))
        return sorted(tags, key=lambda tag: (tag != OUTSIDE, int(tag) if whole_numbers else 0, tag))
    kinds = sorted({tag[2:] for tag in tags if tag != OUTSIDE})
    return [OUTSIDE, *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]
