"""A corpus loses no token, and no text is encoded twice."""

import copy
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import minilm.data.corpus
from minilm.data.array_file import ArrayFile
from minilm.data.corpus import Examples, encode
from minilm.data.tokenizer_training import train_tokenizer


def _plain(tokenizer: PreTrainedTokenizerBase, documents: Dataset) -> list[list[int]]:
    return tokenizer([*documents["text"]], add_special_tokens=False)["input_ids"]


def _joined(parts: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


def _middles(examples: Examples) -> list[list[int]]:
    """The examples without the special token at either end."""
    return [examples[i][1:-1].tolist() for i in range(len(examples))]


@pytest.mark.parametrize("max_length", [8, 17, 512])
def test_split_drops_no_token_and_cuts_into_the_fewest_nearly_equal_pieces(
    documents: Dataset, each_tokenizer: PreTrainedTokenizerBase, max_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minilm.data.corpus, "_CHUNK_DOCUMENTS", 7)
    examples = encode(documents, each_tokenizer, max_length=max_length)
    rows = [examples[i].tolist() for i in range(len(examples))]
    assert examples.lengths.tolist() == [len(row) for row in rows]
    assert all((row[0], row[-1]) == (each_tokenizer.cls_token_id, each_tokenizer.sep_token_id) for row in rows)
    pieces = iter(_middles(examples))
    for ids in _plain(each_tokenizer, documents):
        own = [next(pieces) for _ in range(-(-len(ids) // (max_length - 2)))]
        sizes = [len(piece) for piece in own]
        assert _joined(own) == ids
        assert max(sizes) <= max_length - 2
        assert max(sizes) - min(sizes) <= 1
    assert next(pieces, None) is None


@pytest.mark.parametrize("max_length", [8, 17, 512])
def test_truncation_is_that_of_transformers(
    documents: Dataset, each_tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    examples = encode(documents, each_tokenizer, max_length=max_length, overflow="truncate")
    reference = each_tokenizer([*documents["text"]], truncation=True, max_length=max_length)["input_ids"]
    assert [examples[i].tolist() for i in range(len(examples))] == reference


@pytest.mark.parametrize("max_length", [8, 17, 512])
def test_blocks_are_the_joined_documents_cut_into_full_rows(
    documents: Dataset, each_tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    examples = encode(documents, each_tokenizer, max_length=max_length, layout="blocks")
    joined = _joined([*ids, each_tokenizer.sep_token_id] for ids in _plain(each_tokenizer, documents))
    assert _joined(_middles(examples)) == joined
    assert set(examples.lengths[:-1]) == {max_length}
    assert 2 < examples.lengths[-1] <= max_length


@pytest.mark.parametrize("layout", ["documents", "blocks"])
def test_counts_include_the_separators_between_documents(
    documents: Dataset, each_tokenizer: PreTrainedTokenizerBase, layout: str
) -> None:
    counts = encode(documents, each_tokenizer, max_length=17, layout=layout).count_ids(len(each_tokenizer))
    expected = np.bincount(_joined(_plain(each_tokenizer, documents)), minlength=len(each_tokenizer))
    expected[each_tokenizer.sep_token_id] += len(documents) if layout == "blocks" else 0
    assert counts.tolist() == expected.tolist()


@pytest.mark.parametrize("layout", ["documents", "blocks"])
def test_ids_are_encoded_once_for_each_content(
    layout: str, tokenizer: PreTrainedTokenizerBase, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, write = [], minilm.data.corpus._write_corpus

    def spy(folder: Path, documents: Dataset, *rest: object) -> None:
        encoded.extend(documents["text"])
        write(folder, documents, *rest)

    monkeypatch.setattr(minilm.data.corpus, "_write_corpus", spy)

    def rows(texts: list[str], max_length: int) -> list[list[int]]:
        encoded.clear()
        return _middles(encode(Dataset.from_dict({"text": texts}), tokenizer, max_length=max_length, layout=layout))

    texts = ["one document", "an other"]
    first = rows(texts, 64)
    assert encoded == texts
    assert rows(texts, 64) == first
    rows(texts, 32)
    assert encoded == []
    for changed in (["one document", "an othex"], ["one documentan", " other"], ["an other", "one document"]):
        assert rows(changed, 64) != first
        assert encoded == changed
    assert all(not file.name.startswith(".") for file in cache.iterdir())


def test_each_tokenizer_has_its_own_cache_entry(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, cache: Path
) -> None:
    for other in (tokenizer, train_tokenizer(documents, "bpe", 300)):
        assert _joined(_middles(encode(documents, other, max_length=512))) == _joined(_plain(other, documents))


def test_the_cache_distinguishes_whether_special_tokens_are_split(
    tokenizer: PreTrainedTokenizerBase, cache: Path
) -> None:
    documents, other = Dataset.from_dict({"text": ["A [MASK]."]}), copy.deepcopy(tokenizer)
    other.split_special_tokens = True
    whole, split = (encode(documents, each, max_length=32) for each in (tokenizer, other))
    assert tokenizer.mask_token_id in whole[0]
    assert tokenizer.mask_token_id not in split[0]


@pytest.mark.parametrize(("size", "kind"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_ids_are_read_from_disk_in_the_smallest_type_that_holds_them(size: int, kind: type, cache: Path) -> None:
    backend = Tokenizer(models.WordLevel({str(number): number for number in range(size - 1)} | {"a": size - 1}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    examples = encode(Dataset.from_dict({"text": ["5 a 65534", "7"]}), tokenizer, max_length=8)
    assert isinstance(examples.ids, ArrayFile)
    assert examples.ids.dtype == kind
    assert [examples[i].tolist() for i in range(2)] == [[5, size - 1, 65534], [7]]
    assert examples[0].dtype == np.int64


@pytest.mark.parametrize("overflow", ["split", "truncate"])
def test_empty_documents_are_skipped_and_a_corpus_without_others_is_refused(
    wordpiece: PreTrainedTokenizerBase, overflow: str
) -> None:
    documents = Dataset.from_dict({"text": ["\x01", "a file", "\x02"]})
    examples = encode(documents, wordpiece, max_length=8, overflow=overflow)
    assert len(examples) == 1
    with pytest.raises(ValueError, match=r"^the training documents hold no token [^\n]*\Z"):
        encode(
            Dataset.from_dict({"text": ["\x01", "\x02"]}),
            wordpiece,
            max_length=8,
            overflow=overflow,
            name="training documents",
        )
