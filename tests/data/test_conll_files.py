"""CoNLL files: each sentence keeps its words and tags, and a line that is not clear is refused by its number."""

import gzip
import random
from pathlib import Path
from typing import Any

import pytest

from minilm.config import Data
from minilm.data.columns import Column
from minilm.data.documents import load_documents, load_row_tables
from minilm.data.rows import Row

# The layout of CoNLL-2003, with spaces: word, part of speech, chunk, entity.
CONLL_2003 = """-DOCSTART- -X- O O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter  NNP   B-NP B-PER
# # I-NP O


-DOCSTART- -X- O O

. . O O
"""
SENTENCES = [["EU", "rejects"], ["Peter", "#"], ["."]]
ENTITIES = [["B-ORG", "O"], ["B-PER", "O"], ["O"]]
SPEECH = [["NNP", "VBZ"], ["NNP", "#"], ["."]]
UNIVERSAL = "\n".join(
    "\t".join(line.split("|"))
    for line in (
        "# newdoc id = a",
        "# sent_id = 1",
        "# text = It works.",
        "1|It|it|PRON|PRP|_|2|nsubj|_|_",
        "2|works|work|VERB|VBZ|_|0|root|_|SpaceAfter=No",
        "",
        "# sent_id = 2",
        "1|#|#|SYM|#|_|0|root|_|_",
        "",
    )
)


def _read(path: Path, names: dict[str, str]) -> list[Row]:
    """Return all rows, with a cell for each role of `names`."""
    columns = [Column(role=role, name=name, kind="json") for role, name in names.items()]
    table, _ = load_row_tables(Data(source=str(path), eval_split="train"), 0, columns)
    return [row for batch in table.iter_batches() for row in batch]


def _write(folder: Path, content: str, name: str = "a.conll") -> Path:
    (folder / name).write_bytes(content.encode())
    return folder / name


TWO = {"tokens": "tokens", "tags": "ner_tags"}


@pytest.mark.parametrize("name", ["a.conll", "a.iob", "a.bio", "a.CONLL", "a.conll.gz"])
@pytest.mark.parametrize("form", ["spaces", "tabs", "windows", "macintosh", "no line end", "byte-order mark"])
def test_every_form_of_a_file_gives_the_same_sentences(tmp_path: Path, form: str, name: str) -> None:
    content = CONLL_2003.encode()
    if form == "tabs":
        content = "\n".join("\t".join(line.split()) for line in CONLL_2003.split("\n")).encode()
    content = content.replace(b"\n", b"\r\n" if form == "windows" else b"\r" if form == "macintosh" else b"\n")
    content = content.rstrip() if form == "no line end" else content
    content = b"\xef\xbb\xbf" + content if form == "byte-order mark" else content
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows = _read(tmp_path / name, {**TWO, "speech": "2", "last": "4", "first": "1"})
    for role, right in (("tokens", SENTENCES), ("first", SENTENCES), ("tags", ENTITIES), ("last", ENTITIES)):
        assert [row[role] for row in rows] == right
    assert [row["speech"] for row in rows] == SPEECH
    assert [row.where for row in rows] == [f"{tmp_path / name}, line {line}" for line in (3, 6, 12)]


def test_comments_of_conll_u_are_skipped(tmp_path: Path) -> None:
    rows = _read(_write(tmp_path, UNIVERSAL), {"tokens": "2", "tags": "4"})
    assert rows == [{"tokens": ["It", "works"], "tags": ["PRON", "VERB"]}, {"tokens": ["#"], "tags": ["SYM"]}]
    assert [row.where[-6:] for row in rows] == ["line 4", "line 8"]


def test_a_field_between_tabs_may_hold_spaces(tmp_path: Path) -> None:
    content = "New York\tB-LOC\n\xa0x \tO\n# 1\tO\n\t\n\u2028\tO\n"
    rows = _read(_write(tmp_path, content), TWO)
    assert rows == [
        {"tokens": ["New York", "\xa0x ", "# 1"], "tags": ["B-LOC", "O", "O"]},
        {"tokens": ["\u2028"], "tags": ["O"]},
    ]


def test_a_word_that_is_a_number_sign_is_not_a_comment(tmp_path: Path) -> None:
    assert _read(_write(tmp_path, "# O\n1 B-X\n\n# comment of four\n# I-X\n"), TWO) == [
        {"tokens": ["#", "1"], "tags": ["O", "B-X"]},
        {"tokens": ["#"], "tags": ["I-X"]},
    ]
    assert _read(_write(tmp_path, "a X\n# Y\n#b Z\n"), TWO) == [{"tokens": ["a", "#", "#b"], "tags": ["X", "Y", "Z"]}]
    assert _read(_write(tmp_path, "# id = 3\na b c d\n"), TWO) == [{"tokens": ["a"], "tags": ["d"]}]


def test_a_file_of_words_alone_has_no_tags(tmp_path: Path) -> None:
    path = _write(tmp_path, "one\ntwo\n\nthree\n")
    assert _read(path, {"tokens": "tokens"}) == [{"tokens": ["one", "two"]}, {"tokens": ["three"]}]
    with pytest.raises(ValueError, match=rf"^{path}: no column 'ner_tags'. There are: 1, tokens.\Z"):
        _read(path, TWO)


def test_labels_of_sentences_are_lists_of_names(tmp_path: Path) -> None:
    path = _write(tmp_path, CONLL_2003)
    columns = [Column(role="label", name="ner_tags", kind="label")]
    table, _ = load_row_tables(Data(source=str(path), eval_split="train", label_column="ner_tags"), 0, columns)
    assert [row["label"] for batch in table.iter_batches() for row in batch] == ENTITIES


REFUSED: dict[str, tuple[str, str]] = {
    "too few fields": ("a X O\n\nb O\n", ", line 3: 2 fields where line 1 has 3; write as many in every line, "),
    "too many fields": ("\na O\nNew York B\n", ", line 3: 3 fields where line 2 has 2; [^\n]* separated by spaces"),
    "spaces among tabs": ("a\tO\nb O\n", ", line 2: 1 field where line 1 has 2; [^\n]* separated by tabs"),
    "tabs among spaces": ("a O\nb\tO\n", ", line 2: 1 field where line 1 has 2; [^\n]* separated by spaces"),
    "an empty word": ("a\tO\n\tO\n", ", line 2: field 1 is empty; fill it in, or remove the line"),
    "an empty tag": ("a\tO\nb\t\n", ", line 2: field 2 is empty"),
    "a comment inside a sentence": ("a O\n# of three words\n", ", line 2: 4 fields where line 1 has 2"),
    "a comment or a word": ("a X Y\n\n# sent 3\nb X Y\n", ", line 3: the line may be a comment or the word #; remove"),
    "a multiword token": (
        UNIVERSAL.replace("1\tIt", "1-2\tIt\t_\t_\t_\t_\t_\t_\t_\t_\n1\tIt").replace("# text", "# 1-2 text", 1)
        + "1\tb\t_\t_\t_\t_\t_\t_\t_\t_\n2-3\tb\t_\t_\t_\t_\t_\t_\t_\t_\n",
        ", line 4: 1-2 is not a word",
    ),
    "an empty node": (
        UNIVERSAL + "1\tb\t_\t_\t_\t_\t_\t_\t_\t_\n1.1\tb\t_\t_\t_\t_\t_\t_\t_\t_\n",
        ", line 10: 1.1 is not a",
    ),
    "a missing column": ("a X\n", ": no column '3'. There are: 1, 2, ner_tags, tokens."),
    "no words": ("\n \n", ": it has no rows"),
    "only document starts": ("-DOCSTART- O\n\n", ": it has no rows"),
    "a byte-order mark inside": ("a O\n\ufeffb O\n", ", line 2: begins with a byte-order mark"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_line_that_is_not_clear_is_refused_by_its_number(tmp_path: Path, case: str) -> None:
    content, message = REFUSED[case]
    path = _write(tmp_path, content)
    names = {"third": "3"} if case == "a missing column" else TWO
    with pytest.raises(ValueError, match=rf"^{path}{message}[^\n]*\Z"):
        _read(path, names)


def test_a_text_that_is_a_list_of_words_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, CONLL_2003)
    with pytest.raises(ValueError, match=rf"^{path}: no column 'text'. There are: 1, 2, 3, 4, ner_tags, tokens. Pass"):
        load_documents(Data(source=str(path)), 0)
    with pytest.raises(
        ValueError, match=rf"^{path}, line 3: column 'tokens' holds list where text is expected; change"
    ):
        load_documents(Data(source=str(path), column="tokens"), 0)


def test_fields_are_as_random_words_were_written(tmp_path: Path) -> None:
    draw = random.Random(0)
    letters = [c for c in map(chr, range(33, 0x2100)) if not c.isspace() and c not in "\x85\ufeff"] + ["😀", "#", "-"]
    for number in range(60):
        columns, tab = draw.randint(2, 5), draw.random() < 0.5
        kinds = letters + ["\xa0"] * tab
        right: list[list[list[Any]]] = []
        lines = []
        for _ in range(draw.randint(1, 5)):
            words = [["".join(draw.choices(kinds, k=3)) for _ in range(columns)] for _ in range(draw.randint(1, 6))]
            right.append(words)
            lines += [("\t" if tab else " " * draw.randint(1, 3)).join(fields) for fields in words]
            lines += [""] * draw.randint(1, 2)
        rows = _read(_write(tmp_path, "\n".join(lines), f"{number}.conll"), {**TWO, "second": "2"})
        assert [row["tokens"] for row in rows] == [[word[0] for word in words] for words in right]
        assert [row["second"] for row in rows] == [[word[1] for word in words] for words in right]
        assert [row["tags"] for row in rows] == [[word[-1] for word in words] for words in right]
