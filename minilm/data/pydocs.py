"""The documentation inside CPython as a text corpus of about 2 MB of English. Nothing is downloaded or executed.

The documents are the docstrings of all modules, classes and functions of the standard library, parsed with `ast`, and
the topics of the language reference in `pydoc_data/topics.py`, without near-duplicates.
"""

import ast
import hashlib
import json
import logging
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from minilm.utils.cache import open_entry

log = logging.getLogger("minilm")

# The version of the corpus in the cache. Increase it when a change to the code changes the documents.
_VERSION = 2
# Folders to skip: installed and vendored packages, and tests.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "_vendor", "lib2to3"}
# Number of words in a shingle, a sequence of consecutive words.
_SHINGLE_WORDS = 8


def load_pydocs(eval_fraction: float = 0.05) -> tuple[list[str], list[str]]:
    """Return (training documents, evaluation documents) from this interpreter's own documentation.

    Whole modules are held out, up to `eval_fraction` of the UTF-8 bytes. Near-duplicates are removed from both parts
    together, so that evaluation documents do not repeat training documents. The result depends only on the Python
    installation and `eval_fraction`, and is cached.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(_find_python_files(root))
    stamp = [(path.relative_to(root).as_posix(), path.stat().st_size) for path in files]
    key = hashlib.sha256(json.dumps([_VERSION, sys.version, eval_fraction, stamp]).encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        log.info(f"collecting the documentation of {len(files):,} Python files …")
        documents = [(module, text) for path in files for module, text in _extract_documents(root, path)]
        train, held_out = _split_by_module(_drop_near_duplicates(documents), eval_fraction)
        content = json.dumps({"train": train, "eval": held_out}, ensure_ascii=False)
        (folder / "documents.json").write_text(content, encoding="utf-8")

    cached = open_entry(f"pydocs-{key}", build) / "documents.json"
    corpus = json.loads(cached.read_text(encoding="utf-8"))
    return corpus["train"], corpus["eval"]


def _find_python_files(root: Path) -> Iterator[Path]:
    """Yield the Python files below a folder, except those in skipped folders."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _extract_documents(root: Path, path: Path) -> Iterator[tuple[str, str]]:
    """Yield (module name, text) for each docstring in a source file, or for each topic of the language reference."""
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    try:
        with warnings.catch_warnings():
            # The library may contain invalid escapes.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        # Some files are templates and not Python.
        return
    if module == "pydoc_data.topics":
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    else:
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, owners)]
    for text in texts:
        text = text.strip()
        if len(text.split()) >= 3:
            yield module, text


def _drop_near_duplicates(documents: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Drop each document if at least half of its shingles occur in longer documents.

    The documents are checked from the longest to the shortest. If one quotes another, the quoted one is thus dropped.
    """
    earlier: set[int] = set()
    kept = []
    for index in sorted(range(len(documents)), key=lambda i: (-len(documents[i][1]), i)):
        words = documents[index][1].lower().split()
        spans = range(max(1, len(words) - _SHINGLE_WORDS + 1))
        shingles = {_hash(" ".join(words[start : start + _SHINGLE_WORDS])) for start in spans}
        if len(shingles & earlier) * 2 < len(shingles):
            kept.append(index)
        earlier |= shingles
    return [documents[index] for index in sorted(kept)]


def _split_by_module(documents: list[tuple[str, str]], eval_fraction: float) -> tuple[list[str], list[str]]:
    """Return (training documents, evaluation documents): modules in a fixed pseudo-random order are held out.

    They have at most `eval_fraction` of the bytes.
    """
    sizes: dict[str, int] = {}
    for module, text in documents:
        sizes[module] = sizes.get(module, 0) + len(text.encode())
    budget = int(sum(sizes.values()) * eval_fraction)
    held_out: set[str] = set()
    for module in sorted(sizes, key=_hash):
        # A module that is too large, such as the language reference, stays in training.
        if sizes[module] <= budget:
            held_out.add(module)
            budget -= sizes[module]
    train = [text for module, text in documents if module not in held_out]
    return train, [text for module, text in documents if module in held_out]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
