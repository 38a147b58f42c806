"""Python's own documentation as a corpus: not executed, split by module, without near-duplicates, cached."""

import ast
import json
import os
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest

from minilm.data.pydocs import load_pydocs

Corpus = tuple[list[str], list[str]]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """The documentation of this interpreter."""
    return load_pydocs(0.05)


def _bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[at : at + 8]) for at in range(max(1, len(words) - 7))}


def test_a_twentieth_of_the_bytes_is_held_out(corpus: Corpus) -> None:
    train, held_out = corpus
    assert 0.045 < _bytes(held_out) / _bytes(train + held_out) <= 0.05
    assert _bytes(train + held_out) > 1_000_000


def test_no_document_repeats_half_of_longer_documents(corpus: Corpus) -> None:
    documents = [*corpus[0], *corpus[1]]
    longest: dict[tuple[str, ...], int] = {}  # shingle -> words of the longest document that has it
    longest_first = sorted(documents, key=len, reverse=True)
    for text in longest_first:
        for shingle in _shingles(text):
            longest.setdefault(shingle, len(text))
    repeated = [
        sum(longest[shingle] > len(text) for shingle in own) / len(own)
        for text in documents
        if (own := _shingles(text))
    ]
    assert max(repeated) < 0.5
    assert len({" ".join(text.lower().split()) for text in documents}) == len(documents)


def test_documents_are_clean_and_have_three_words(corpus: Corpus) -> None:
    for text in [*corpus[0], *corpus[1]]:
        assert text == text.strip()
        assert len(text.split()) >= 3


def _words(name: str, count: int = 12) -> str:
    return " ".join(f"{name}_{number}" for number in range(count))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a standard library with thirty modules of five docstrings, and use a cache of its own."""
    root = tmp_path / "stdlib"
    for module in range(30):
        functions = "".join(f"def f{i}():\n    '''{_words(f'm{module}_f{i}')}'''\n" for i in range(5))
        (root / f"package{module % 3}").mkdir(parents=True, exist_ok=True)
        (root / f"package{module % 3}" / f"m{module}.py").write_text(functions)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def test_whole_modules_are_held_out(library: Path) -> None:
    train, held_out = load_pydocs(0.3)
    modules = [{text.split("_")[0] for text in part} for part in (train, held_out)]
    assert not modules[0] & modules[1]
    assert len(modules[0] | modules[1]) == 30
    assert (len(train), len(held_out)) == (21 * 5, 9 * 5)


def test_nothing_is_executed_and_broken_files_are_skipped(library: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    act = f"open({str(mark)!r}, 'w').close()\nraise SystemExit('executed')\n"
    (library / "evil.py").write_text(f'"""Text of an evil module."""\n{act}class A:\n    """Text of class A."""\n')
    (library / "syntax.py").write_text('"""Never to be seen."""\ndef :\n')
    (library / "null.py").write_bytes(b'"""Never to be seen."""\0')
    (library / "bytes.py").write_bytes(b'"""Never to be seen: \xff."""')
    (library / "escape.py").write_text('"""A wrong \\d escape."""')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, held_out = load_pydocs(0.05)
    texts = train + held_out
    assert {"Text of an evil module.", "Text of class A.", "A wrong \\d escape."} <= set(texts)
    assert not any("Never to be seen" in text for text in texts)
    assert not mark.exists()
    assert "evil" not in sys.modules


def test_the_documents_are_docstrings_and_topics_and_nothing_else(library: Path) -> None:
    for folder in ("site-packages", "test", "_vendor", "pydoc_data"):
        (library / folder).mkdir()
        (library / folder / "x.py").write_text(f'"""Docstring in {folder} folder."""')
    (library / "pydoc_data" / "topics.py").write_text("topics = {'if': 'The if statement.', 'while': 'Too short'}")
    (library / "code.py").write_text('x = "Just any string."\nasync def f():\n    """\n    Text of\n    f.\n    """\n')
    (library / "notes.txt").write_text('"""Not even Python."""')
    texts = {text for part in load_pydocs(0.05) for text in part if not text.startswith("m")}
    assert texts == {"Docstring in pydoc_data folder.", "The if statement.", "Text of\nf."}


def test_of_two_similar_docstrings_the_longer_stays(library: Path) -> None:
    long, other = _words("long", 40), _words("other", 40)
    half = " ".join(long.split()[:20] + other.split()[:10])  # 13 of its 23 shingles are long's, and 3 of other's
    (library / "a.py").write_text(f'"""{half}"""\ndef f():\n    """{long}"""')
    (library / "b.py").write_text(f'"""{long.upper()}"""\ndef f():\n    """{other}"""')
    texts = [text for part in load_pydocs(0.05) for text in part if not text.startswith("m")]
    assert sorted(texts) == [long, other]


def test_a_second_call_parses_nothing_unless_a_file_changed(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, parse, parsed = load_pydocs(0.3), ast.parse, []
    monkeypatch.setattr(ast, "parse", lambda *args: (parsed.append(args), parse(*args))[1])
    assert load_pydocs(0.3) == first
    assert not parsed
    assert load_pydocs(0.1) != first
    (library / "new.py").write_text('"""A new text appears."""')
    assert any("A new text appears." in part for part in load_pydocs(0.3))


def test_the_corpus_does_not_depend_on_the_process(library: Path, tmp_path: Path) -> None:
    code = f"import sysconfig; sysconfig.get_paths = lambda: {{'stdlib': {str(library)!r}}}; "
    code += "import json; from minilm.data.pydocs import load_pydocs; print(json.dumps(load_pydocs(0.3)))"
    # Each process has its own random seed for hashes of strings.
    environment = {**os.environ, "PYTHONHASHSEED": "1", "HF_HOME": str(tmp_path / "other cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [*load_pydocs(0.3)]
