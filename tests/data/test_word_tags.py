"""Words and their tags: what a row must hold, and the schemes of spans."""

import random
from typing import Any

import pytest
from seqeval.metrics.sequence_labeling import get_entities

from minilm.data.rows import Row
from minilm.data.word_tags import find_scheme, read_tags, sort_tags

WHERE = "rows.jsonl, line 7"


def make_row(words: Any, tags: Any) -> Row:
    return Row({"word_list": words, "label": tags}, WHERE)


@pytest.mark.parametrize(
    ("words", "tags", "message"),
    [
        ("Ada ran", ["O", "O"], "'Ada ran' stands where a list of words is expected: .* pass another --data.column"),
        (None, ["O"], "None stands where a list of words is expected"),
        ([], [], "the list of words is empty: remove the row"),
        (["Ada", " \u00a0"], ["O", "O"], r"word 2 is ' \\xa0' where visible text is expected"),
        (["Ada", ""], ["O", "O"], "word 2 is '' where visible"),
        ([7], ["O"], "word 1 is 7 where visible text"),
        ([["Ada"]], ["O"], r"word 1 is \['Ada'\] where visible text"),
        (["Ada"], "O", "'O' stands where a list with a tag for each word is expected: .* another --data.label-column"),
        (["Ada", "ran"], ["O"], "2 words have 1 tags: write one for each word"),
        (["Ada", "ran"], ["O", None], r"word 2 \('ran'\): the tag is None: write a name or a whole number"),
        (["Ada"], [" "], "the tag is ' ': write a name"),
        (["Ada"], [True], "the tag is True: write a name"),
        (["Ada"], [1.0], "the tag is 1.0: write a name"),
        (["Ada"], [["O"]], r"the tag is \['O'\]: write a name"),
        (["Ada"], [-100], "the tag is -100: give every word a tag. Numbers such as -100 stand for the parts of a word"),
        (["Ada", "ran"], [0, 2], r"word 2 \('ran'\): the tag is 2, but only 0 to 1 have names"),
        (
            ["Ada"],
            ["I-PER"],
            r"word 1 \('Ada'\): the tag I-PER stands at the beginning of the row, but in IOB2 a span b",
        ),
        (["a", "b"], ["O", "I-PER"], r"word 2 \('b'\): the tag I-PER stands after O, .* --objective.scheme iob1 if"),
        (["a", "b"], ["B-LOC", "I-PER"], "I-PER stands after B-LOC, but in IOB2 a span begins with B-PER: correct the"),
        (["a", "b", "c"], ["B-LOC", "I-LOC", "I-PER"], "I-PER stands after I-LOC"),
    ],
)
def test_a_wrong_row_is_refused_by_its_place(words: Any, tags: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{WHERE}.*{message}") as error:
        read_tags(make_row(words, tags), ("O", "B-PER"), "iob2")
    assert "\n" not in str(error.value)


def test_numbers_have_the_names_of_classes_or_are_names() -> None:
    assert read_tags(make_row(["a", "b"], [1, 0]), ("O", "B-PER"), "iob2") == ["B-PER", "O"]
    assert read_tags(make_row(["a", "b"], [7, 0]), (), "plain") == ["7", "0"]
    # The fields of CoNLL files are text.
    assert read_tags(make_row(["a", "b"], ["1", "0"]), ("O", "B-PER"), "iob2") == ["B-PER", "O"]
    assert read_tags(make_row(["a", "b"], ["1", "0"]), ("1", "0"), "plain") == ["1", "0"]


def test_iob1_has_the_same_spans_after_it_is_turned_into_iob2() -> None:
    draw = random.Random(0)
    for _ in range(300):
        tags = draw.choices(["O", "B-A", "I-A", "I-B", "B-B"], k=draw.randint(1, 12))
        row = make_row(["word"] * len(tags), tags)
        result = read_tags(row, (), "iob1")
        # seqeval's reading of tags covers both schemes.
        assert get_entities(result) == get_entities(tags)
        assert read_tags(make_row(["word"] * len(tags), result), (), "iob2") == result


@pytest.mark.parametrize(
    ("scheme", "tags", "expected"),
    [
        ("auto", {"O", "B-NP", "I-NP"}, "iob2"),
        ("auto", {"B-NP"}, "iob2"),
        ("auto", {"O", "I-NP"}, "iob2"),
        ("auto", {"O"}, "plain"),
        ("auto", {"NOUN", "VERB", "O"}, "plain"),
        ("auto", {"0", "1"}, "plain"),
        ("auto", {"B-NP", "NOUN"}, "plain"),
        ("plain", {"O", "B-NP"}, "plain"),
        ("iob1", {"O", "B-NP"}, "iob1"),
    ],
)
def test_the_scheme_of_tags(scheme: str, tags: set[str], expected: str) -> None:
    assert find_scheme(scheme, tags) == expected


@pytest.mark.parametrize(
    ("scheme", "tags", "message"),
    [
        (
            "auto",
            {"O", "B-A", "I-A", "E-A", "S-A"},
            "the tag 'E-A' is not one of IOB2, which transformers reads: write",
        ),
        ("auto", {"O", "B-A", "I-A", "L-A", "U-A"}, "the tag 'L-A' is not one of IOB2"),
        ("iob2", {"O", "NN"}, "objective.scheme iob2: the tag 'NN' is neither O nor of the form B-x or I-x"),
        ("iob1", {"o"}, "objective.scheme iob1: the tag 'o' is neither O"),
    ],
)
def test_tags_that_do_not_fit_the_scheme_are_refused(scheme: str, tags: set[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_scheme(scheme, tags)


def test_the_order_of_tags() -> None:
    spans = {"I-NP", "B-VP", "B-NP", "I-VP", "O", "I-LST"}
    assert sort_tags(spans, "iob2") == ["O", "B-LST", "I-LST", "B-NP", "I-NP", "B-VP", "I-VP"]
    assert sort_tags({"B-NP"}, "iob2") == ["O", "B-NP", "I-NP"]
    assert sort_tags({"VERB", "O", "NOUN", "B"}, "plain") == ["O", "B", "NOUN", "VERB"]
    assert sort_tags({"10", "9", "0"}, "plain") == ["0", "9", "10"]
