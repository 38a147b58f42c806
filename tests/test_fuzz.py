"""Whatever is in a file or a field: it is read, or refused with a ValueError of one line that names it."""

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from minilm.config import Config, Data
from minilm.config.serialization import from_dict, read_run_config, to_dict
from minilm.data.documents import load_documents
from tests.file_writers import write_mds, write_tar_of_texts

QUICK = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
# What files of text are made of, so that more than the first byte is read of many of them.
WORDS = (
    '{"text": "a b"}\n',
    '{"text": ',
    "null",
    "null\n",
    *'[]{}\n\r,\t"a\0-',
    "text",
    "é",
    "1e999",
    "\\ud800",
    "PAR1",
)
PIECES = st.sampled_from([*(word.encode() for word in WORDS), b"\xef\xbb\xbf", b"\xff"])
CONTENT = st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=12).map(b"".join))
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
JSON = st.recursive(
    SCALAR,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)
GROUPS = to_dict(Config())
FIELDS = [(group, name) for group, values in GROUPS.items() for name in values]


def parquet() -> bytes:
    file = io.BytesIO()
    pandas.DataFrame({"text": [f"document {i}" for i in range(40)]}).to_parquet(file, row_group_size=20)
    return file.getvalue()


TEXTS = [f"document {i}" for i in range(40)]
SHARD, TAR = write_mds([{"text": text} for text in TEXTS], {"text": "str"}), write_tar_of_texts(TEXTS)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with some bytes changed, or cut off."""
    content = bytearray(whole)
    for place in draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])


def outcome(work: Callable[[], Any]) -> tuple[Any, str]:
    """What `work` returns, or the message of its ValueError, which is one line."""
    try:
        return work(), ""
    except ValueError as error:
        message = str(error)
    assert message
    assert "\n" not in message
    return None, message


def check_file(name: str, content: bytes) -> None:
    """Documents of this content are read or refused by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        parts, message = outcome(lambda: load_documents(Data(source=str(path), eval_fraction=0.5), seed=0))
        texts = [*parts[0]["text"], *parts[1][""]["text"]] if parts else []
    assert name in message if message else texts and all(isinstance(text, str) and text.strip() for text in texts)


@pytest.mark.scorecard(30)
@pytest.mark.parametrize("ending", [".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt.gz", ".mds", ".tar"])
@given(content=CONTENT)
@example(content=b"null\n")  # at the beginning, it crashes pyarrow
@example(content=b'[null, {"text": "a"}]')
@settings(QUICK, max_examples=12)
def test_a_file_of_any_bytes_is_read_or_refused_by_its_name(ending: str, content: bytes) -> None:
    check_file(f"documents{ending}", content)


@pytest.mark.scorecard(30)
@given(content=damaged(parquet()))
@settings(QUICK, max_examples=30)
def test_a_damaged_file_of_parquet_is_read_or_refused_by_its_name(content: bytes) -> None:
    check_file("documents.parquet", content)


@pytest.mark.scorecard(30)
@given(content=damaged(SHARD))
@settings(QUICK, max_examples=30)
def test_a_damaged_shard_of_mds_is_read_or_refused_by_its_name(content: bytes) -> None:
    check_file("documents.mds", content)


@pytest.mark.scorecard(30)
@given(content=damaged(TAR))
@settings(QUICK, max_examples=30)
def test_a_damaged_tar_is_read_or_refused_by_its_name(content: bytes) -> None:
    check_file("documents.tar", content)


@given(field=st.sampled_from(FIELDS), value=JSON)
@settings(QUICK, max_examples=200)
def test_a_field_of_any_value_makes_a_configuration_that_survives_json_or_is_refused_by_its_name(
    field: tuple[str, str], value: Any
) -> None:
    group, name = field
    config, message = outcome(lambda: from_dict({group: {name: value}}))
    assert name in message if message else from_dict(json.loads(json.dumps(to_dict(config)))) == config


@given(tree=st.one_of(JSON, st.dictionaries(st.sampled_from([*GROUPS, "other"]), JSON, max_size=3)))
@settings(QUICK, max_examples=200)
def test_a_tree_of_any_shape_makes_a_configuration_or_is_refused(tree: Any) -> None:
    config, message = outcome(lambda: from_dict(tree))
    assert message or isinstance(config, Config)


@given(
    content=st.one_of(CONTENT, st.one_of(JSON, st.fixed_dictionaries({"config": JSON})).map(json.dumps).map(str.encode))
)
@settings(QUICK, max_examples=200)
def test_a_run_file_of_any_content_is_read_or_refused_by_its_name(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.json")
        path.write_bytes(content)
        config, message = outcome(lambda: read_run_config(str(path)))
    assert str(path) in message if message else isinstance(config, Config)
