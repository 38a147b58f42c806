"""Shards of MDS and tars: the bytes of the library that writes them, and reading from a row on."""

import hashlib
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from minilm.config import Data
from minilm.data import mds_files
from minilm.data.columns import Column
from minilm.data.json_files import JsonParser
from minilm.data.shards import open_pools
from minilm.data.tables import FileTable
from minilm.data.tokenize_source import tokenize
from tests.file_writers import write_index, write_mds, write_tar, write_tar_of_texts

TEXT = Column(role="text", name="text")
TEXTS = [f"row {number}" for number in range(2500)]
SHARD = write_mds([{"text": text} for text in TEXTS], {"text": "str"})
FILES = {"a.mds": SHARD, "a.tar": write_tar_of_texts(TEXTS)}


def test_the_tests_write_the_bytes_of_the_library_that_writes_mds() -> None:
    rows = [
        {"text": f"Row {n}, naïve “x”." + " more" * n, "label": n, "meta": {"a": ["x", str(n)]}, "score": n / 2}
        for n in range(3)
    ]
    columns = {"text": "str", "label": "int", "meta": "json", "score": "float32"}
    shard = write_mds(rows, columns, hashes=["sha1"], size_limit=500)
    # MDSWriter of mosaicml-streaming 0.13.0 states this hash in its index for these rows.
    assert hashlib.sha1(shard).hexdigest() == "398a7b6614e07d8434fea37cebf96e8a804d7e64"


def _read_rest(path: Path, start: int) -> tuple[list[tuple[int, int]], list[str]]:
    """Return the places and the texts of the rows from a number on."""
    batches, places = FileTable([str(path)], Data(source=str(path))).iter_rest(0, [TEXT], (start, 0))
    found, texts = list[tuple[int, int]](), list[str]()
    for batch in batches:
        found += places.pop(batch.places)
        texts += batch.cells[0]
    return found, texts


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("start", [0, 1, 999, 1000, 1001, 2499, 2500])
def test_a_file_is_read_from_a_row_on(tmp_path: Path, name: str, start: int) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    places, texts = _read_rest(tmp_path / name, start)
    assert places == [(row, 0) for row in range(start, 2500)]
    assert texts == TEXTS[start:]


@pytest.mark.parametrize("size", ["1e999", "null", '"a"', "[]", "-1"])
def test_numbers_that_cannot_be_sizes_are_refused_in_one_line(tmp_path: Path, size: str) -> None:
    path, index = tmp_path / "a.mds", tmp_path / "index.json"
    path.write_bytes(SHARD)
    index.write_text(re.sub(r'"bytes": \d+', f'"bytes": {size}', write_index({"a.mds": SHARD})))
    with pytest.raises(ValueError, match=r"^[^\n]*(index\.json|a\.mds)[^\n]*copy [^\n]*again\Z"):
        FileTable([str(path)], Data(source=str(path)))
    index.unlink()
    shard = write_mds([{"text": "a"}], {"text": "str"}, column_sizes=["SIZE"])
    path.write_bytes(shard.replace(b'"SIZE"', size.encode().ljust(6)))
    if size not in ("null", "[]"):
        with pytest.raises(ValueError, match=r"^[^\n]*a\.mds: not a shard of MDS, or cut off; copy it again\Z"):
            _read_rest(path, 0)


def test_rows_of_a_shard_before_the_first_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.mds"
    path.write_bytes(SHARD.replace(b"row 17", b"\xff\xff\xff\xff\xff\xff", 1))
    assert _read_rest(path, 18)[1] == TEXTS[18:]
    with pytest.raises(ValueError, match=r"a\.mds, row 17: the text is not UTF-8"):
        _read_rest(path, 16)


def test_a_column_that_is_not_read_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, decoded = mds_files._decode, set[str]()

    def watch(content: bytes, encoding: str, parser: JsonParser, where: str) -> Any:
        decoded.add(encoding)
        return decode(content, encoding, parser, where)

    monkeypatch.setattr(mds_files, "_decode", watch)
    (tmp_path / "a.mds").write_bytes(write_mds([{"text": "a", "n": 1}], {"text": "str", "n": "int"}))
    assert _read_rest(tmp_path / "a.mds", 0)[1] == ["a"]
    assert decoded == {"str"}


def test_reading_a_tar_of_many_files_holds_a_part_of_them_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(write_tar_of_texts(["x"] * 16_000))
    tracemalloc.start()
    count = len(_read_rest(path, 15_000)[1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1000
    # tarfile's list of the files takes 8 MiB.
    assert peak < 4 * 2**20


def test_the_columns_of_a_file_are_those_of_its_first_row(tmp_path: Path) -> None:
    (tmp_path / "a.mds").write_bytes(write_mds([], {"text": "str", "n": "int"}))
    (tmp_path / "a.tar").write_bytes(write_tar([("1.txt", "a"), ("1.cls", "3"), ("2.png", b"\xff")]))
    (tmp_path / "b.tar").write_bytes(write_tar([]))
    names = {"a.mds": ["n", "text"], "a.tar": ["txt", "cls"], "b.tar": []}
    for name, right in names.items():
        path = str(tmp_path / name)
        assert FileTable([path], Data(source=path)).read_column_names([TEXT]) == right


def test_a_folder_of_mds_is_tokenised_and_streamed_by_shards(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    parts = {"text": TEXTS[:1200], "more": TEXTS[1200:]}
    for folder in ("mds", "tar", "txt"):
        (tmp_path / folder).mkdir()
    shards = {}
    for number, texts in enumerate(parts.values()):
        shards[f"shard.0000{number}.mds"] = write_mds([{"text": text} for text in texts], {"text": "str"})
        (tmp_path / "tar" / f"{number}.tar").write_bytes(write_tar_of_texts(texts))
        (tmp_path / "txt" / f"{number}.txt").write_text("\n".join(texts))
    for name, shard in shards.items():
        (tmp_path / "mds" / name).write_bytes(shard)
    (tmp_path / "mds" / "index.json").write_text(write_index(shards))
    found = []
    for folder in ("txt", "mds", "tar"):
        data = Data(source=str(tmp_path / folder), streaming=True)
        (pool,) = open_pools(data, {}, weighted=False) or ()
        assert len(pool.shards) == 2
        output = tmp_path / f"tokens of {folder}"
        tokenize(data, str(tmp_path / "tokenizer"), output)
        pieces = sorted(output.glob("tokens-*/*.*"))
        found.append([(path.relative_to(output), path.read_bytes()) for path in pieces])
    assert len(found[0]) >= 8
    assert found[0] == found[1] == found[2]
