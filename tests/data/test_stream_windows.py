"""Windows: each holds the documents that its number says, whatever the format, the process and the order of calls."""

import errno
import gzip
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import minilm.data.stream_windows
import minilm.data.window_encoder
from minilm.config import Data
from minilm.data.batch_plan import Plan
from minilm.data.corpus import ExampleForm, encode
from minilm.data.held_out import hash_texts, is_held_out
from minilm.data.shards import TextShard, open_pools
from minilm.data.stream_batches import WindowReader
from minilm.data.stream_windows import EncodingCancelledError, StreamWindows
from minilm.data.streaming import stream_documents
from minilm.data.window_encoder import _encoders, describe_windows, encode_ahead, end_starved_encoders, open_windows
from minilm.data.window_index import WindowIndex, restore_index
from minilm.utils.cache import CacheError, get_cache_folder
from tests.fake_hub import replace_hub
from tests.file_writers import write_mds, write_tar_of_texts

# Three files of different sizes, with blank lines and letters of several bytes.
FILES = [
    [f"File {file}, document {i}, naïve and “quoted”." + " More words." * (i * file % 5) for i in range(size)]
    for file, size in enumerate((40, 7, 90))
]
_seeds = count(1000)


def _jsonl(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"n": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def _parquet(texts: Sequence[str]) -> bytes:
    file = io.BytesIO()
    Dataset.from_dict({"text": [*texts]}).to_parquet(file, batch_size=16)
    return file.getvalue()


FORMATS = {
    "txt": lambda texts: ("\n" + "\r\n".join(texts)).encode("utf-8-sig"),
    "jsonl": _jsonl,
    "parquet": _parquet,
    "json": lambda texts: json.dumps([{"text": text} for text in texts], indent=1).encode(),
    "line.json": lambda texts: json.dumps([{"text": text} for text in ("", *texts)]).encode(),
    "mds": lambda texts: write_mds([{"text": text} for text in texts], {"text": "str"}),
    "mds.gz": lambda texts: gzip.compress(write_mds([{"text": text} for text in texts], {"text": "str"})),
    "tar": write_tar_of_texts,
    "tar.gz": lambda texts: gzip.compress(write_tar_of_texts(["", *texts])),
    "csv": lambda texts: ("n,text\n" + "".join(f'1,"{text}"\n' for text in texts)).encode(),
}


def _write(folder: Path, ending: str) -> tuple[str, ...]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.{ending}" for number in range(len(FILES))]
    for path, texts in zip(paths, FILES, strict=True):
        path.write_bytes(FORMATS[ending](texts))
    return tuple(map(str, paths))


def _open(data: Data, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> StreamWindows:
    """Return windows of which no earlier test has put one into the cache."""
    data = replace(data, streaming=True, eval_fraction=0.2)
    stream, _ = stream_documents(data)
    pools = open_pools(data, stream.revisions, weighted=bool(data.weights))
    assert pools is not None
    form = ExampleForm.of(tokenizer, max_length=24, layout="documents", overflow="split", causal=False)
    defaults: dict[str, Any] = {"form": form, "words": True, "tokens": 300, "seed": next(_seeds), "held_out": 0.2}
    return StreamWindows(
        data=data,
        pools=pools,
        revisions=stream.revisions,
        identity=stream.identity,
        tokenizer=tokenizer,
        examples=4,
        row_tokens=None,
        **defaults | settings,
    )


def _texts(windows: StreamWindows, number: int) -> list[str]:
    """Return the documents of a window, decoded."""
    examples = windows.open(number)
    offsets = np.load(windows._entry(number) / "offsets.npy")
    return [windows.tokenizer.decode(examples.ids[a:b].tolist()) for a, b in pairwise(offsets)]


def _training_texts(tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """Return the documents of each file that are not held out, as `_texts` gives them."""
    kept = [[text for text, held in zip(t, is_held_out(hash_texts(t), 0.2), strict=True) if not held] for t in FILES]
    return [[tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) for text in texts] for texts in kept]


@pytest.fixture
def _small_windows_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have small windows encoded ahead of time too."""
    monkeypatch.setattr(minilm.data.window_encoder, "_LEAST_TOKENS", 0)


@pytest.fixture
def windows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> StreamWindows:
    return _open(Data(source=_write(tmp_path, "txt")), tokenizer)


def test_the_windows_of_a_pass_hold_each_training_document_once(windows: StreamWindows) -> None:
    found, files = list[list[str]](), _training_texts(windows.tokenizer)
    while windows.start_of(len(found)).pools[0].passes == 0:
        found.append(_texts(windows, len(found)))
    texts = [text for window in found for text in window]
    assert len(found) > 3
    assert sorted(texts) == sorted(text for file in files for text in file)
    for number in range(len(found) - 1):
        assert len(windows.open(number).ids) >= 300
    # The documents of a file keep their order.
    assert [text for text in texts if text in files[2]] == files[2]
    again = list[str]()
    number = len(found)
    while windows.start_of(number).pools[0].passes == 1:
        again += _texts(windows, number)
        number += 1
    assert sorted(again) == sorted(texts)


def test_the_order_of_the_files_depends_on_the_seed_and_the_pass(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = _write(tmp_path, "txt")
    seeds = [_open(Data(source=source), tokenizer) for _ in range(6)]
    orders = [[tuple(one._order(one.pools[0], number)) for number in range(6)] for one in seeds]
    assert all(len({*order}) > 1 for order in orders)
    assert len({order[0] for order in orders}) > 1


@pytest.mark.parametrize("layout", ["documents", "blocks"])
def test_a_stream_of_one_window_is_the_corpus_of_today(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, layout: str
) -> None:
    data = Data(source=_write(tmp_path, "txt"), streaming=True, eval_fraction=0.2)
    shape: dict[str, Any] = {"max_length": 24, "layout": layout, "overflow": "split", "causal": layout == "blocks"}
    windows = _open(data, tokenizer, tokens=10**6, form=ExampleForm.of(tokenizer, **shape))
    assert windows.is_one_window
    ours, corpus = windows.open(0), encode(stream_documents(data)[0], tokenizer, **shape, words=True)
    for name in ("ids", "start", "stop", "is_word_start"):
        assert np.array_equal(getattr(ours, name)[:], getattr(corpus, name)[:]), name


def test_more_documents_than_a_window_are_not_one_window(windows: StreamWindows) -> None:
    assert not windows.is_one_window


@pytest.mark.parametrize("ending", [*FORMATS, "saved", "hub"])
def test_the_windows_do_not_depend_on_the_format(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: tuple[Any, Any]
    if ending == "hub":
        rows = datasets.load_dataset(
            "parquet", data_files=[*_write(tmp_path / "a", "parquet")], split="train", streaming=True
        )
        replace_hub(monkeypatch, lambda path, **options: rows)
        sources = "some/rows", _write(tmp_path / "txt", "txt")
    elif ending == "saved":
        # A saved dataset is one shard.
        Dataset.from_dict({"text": FILES[2]}).save_to_disk(tmp_path / "saved")
        sources = str(tmp_path / "saved"), _write(tmp_path / "txt", "txt")[2]
    else:
        sources = _write(tmp_path / "a", ending), _write(tmp_path / "txt", "txt")
    ours, theirs = (_open(Data(source=source), tokenizer, seed=5) for source in sources)
    for number in range(7):
        assert _texts(ours, number) == _texts(theirs, number)
        assert ours.start_of(number + 1).step == theirs.start_of(number + 1).step


def test_a_window_is_read_from_its_beginning_without_the_windows_before(
    windows: StreamWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = [_texts(windows, number) for number in range(6)]
    starts = [windows.start_of(number).pools[0] for number in range(7)]
    for path in get_cache_folder().glob(f"window-{windows.key}-*"):
        shutil.rmtree(path)
    read, places = TextShard.read, list[tuple[object, tuple[int, int]]]()

    def watch(self: TextShard, start: tuple[int, int]) -> Iterator[Any]:
        places.append((self, start))
        return read(self, start)

    monkeypatch.setattr(TextShard, "read", watch)
    resumed = replace(windows, _starts=[])
    assert resumed.find(windows.start_of(5).step).number == 5
    assert resumed.find(windows.start_of(5).step - 1).number == 4
    assert _texts(resumed, 5) == right[5]
    shards = windows.pools[0].shards
    assert places[0] == (shards[windows._order(windows.pools[0], starts[5].passes)[starts[5].shard]], starts[5].place)
    assert starts[5].place[1] > 0


def test_a_machine_with_an_empty_cache_opens_a_window_by_the_index_of_a_checkpoint(
    windows: StreamWindows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, start = _texts(windows, 5), windows.start_of(5)
    exported = json.loads(json.dumps(windows.export_index()))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "new"))
    restore_index(exported)
    write, written = StreamWindows._write, list[Any]()

    def watch(self: StreamWindows, folder: Path, start: Any, *rest: Any) -> None:
        written.append(start.number)
        write(self, folder, start, *rest)

    monkeypatch.setattr(StreamWindows, "_write", watch)
    resumed = replace(windows, _starts=[])
    assert not resumed.is_one_window
    assert resumed.find(start.step) == start
    assert _texts(resumed, 5) == right
    assert written == [5]


@pytest.mark.parametrize("change", ["another stream", "changed", "cut", "not an index"])
def test_an_index_that_does_not_fit_is_not_believed(
    windows: StreamWindows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    right = [windows.start_of(number) for number in range(6)]
    exported = windows.export_index()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "new"))
    if change == "another stream":
        exported["key"] = exported["key"][::-1]
    elif change == "changed":
        exported["lines"][1] = exported["lines"][1].replace('"step": ', '"step": 1')
    elif change == "cut":
        exported["lines"] = ["", *exported["lines"]]
    else:
        exported["lines"] = [5, "[]", '"a"', None]
    restore_index(exported)
    assert not WindowIndex(windows.key[::-1]).path.exists()
    again = replace(windows, _starts=[])
    assert [again.start_of(number) for number in range(6)] == right


@pytest.mark.parametrize("key", ["../../stolen", "", "a key"])
def test_an_index_whose_key_is_not_a_hash_is_not_written(
    windows: StreamWindows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    starts = [windows.start_of(number) for number in range(1, 6)]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "new"))
    # The hashes of the lines fit the key, and the folder is there in which its index would be.
    (get_cache_folder() / "windows-..").mkdir()
    before = [*(tmp_path / "new").rglob("*")]
    restore_index(WindowIndex(key).export(starts))
    assert [*(tmp_path / "new").rglob("*")] == before


def test_an_index_that_is_lost_during_a_run_is_written_again_and_no_window_is_encoded_twice(
    windows: StreamWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [windows.start_of(number) for number in range(5)]
    exported = windows.export_index()
    windows.index.path.unlink()
    assert windows.export_index() == exported
    write, written = StreamWindows._write, list[Any]()

    def watch(self: StreamWindows, folder: Path, start: Any, *rest: Any) -> None:
        written.append(start.number)
        write(self, folder, start, *rest)

    monkeypatch.setattr(StreamWindows, "_write", watch)
    windows.start_of(6)
    assert min(written, default=5) >= 4
    assert [replace(windows, _starts=[]).start_of(number) for number in range(5)] == known


def test_the_windows_depend_on_the_number_of_shards(windows: StreamWindows) -> None:
    (pool,) = windows.pools
    other = replace(windows, pools=(replace(pool, shards=pool.shards[:-1]),), _starts=[])
    assert other.key != windows.key


def test_an_index_that_knows_fewer_windows_does_not_replace_one_that_knows_more(windows: StreamWindows) -> None:
    windows.start_of(2)
    short = windows.export_index()
    windows.start_of(5)
    long = windows.export_index()
    restore_index(short)
    assert windows.export_index() == long != short
    restore_index({})
    assert windows.export_index() == long


@pytest.mark.parametrize("damage", ["lost", "cut", "changed"])
def test_an_index_that_is_lost_or_damaged_is_made_again(windows: StreamWindows, damage: str) -> None:
    right = [windows.start_of(number) for number in range(6)]
    index = windows.index.path
    lines = index.read_text().splitlines(keepends=True)
    if damage == "lost":
        index.unlink()
    elif damage == "cut":
        index.write_text("".join(lines[:2]) + lines[2][:20])
    else:
        index.write_text("".join([lines[0], lines[1].replace('"step": ', '"step": 1'), *lines[2:]]))
    again = replace(windows, _starts=[])
    assert [again.start_of(number) for number in range(6)] == right


def test_the_cache_never_holds_more_than_three_windows(windows: StreamWindows) -> None:
    for number in range(7):
        windows.open(number)
        assert len([*get_cache_folder().glob(f"*window-{windows.key}-*")]) <= 3
    # An earlier window is encoded again, for a process that still needs it.
    assert len(windows.open(1)) > 0


def _weighted(folder: Path, tokenizer: PreTrainedTokenizerBase) -> StreamWindows:
    source = _write(folder / "weighted", "jsonl")
    return _open(Data(source=(source[1], source[2]), weights=(1, 3)), tokenizer, seed=next(_seeds))


def _blocks(folder: Path, tokenizer: PreTrainedTokenizerBase) -> StreamWindows:
    """Return windows of blocks. The tokenizer truncates by itself, until it encodes."""
    truncating = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), sep_token="[SEP]", cls_token="[CLS]"
    )
    truncating.backend_tokenizer.enable_truncation(8)
    form = ExampleForm.of(truncating, max_length=24, layout="blocks", overflow="split", causal=False)
    return _open(Data(source=_write(folder, "parquet")), truncating, form=form, words=False)


@pytest.mark.parametrize("make", [_weighted, _blocks])
def test_a_stream_is_opened_anew_from_its_description(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, make: Callable[..., StreamWindows]
) -> None:
    windows = make(tmp_path, tokenizer)
    right = _texts(windows, 1)
    shutil.rmtree(windows._entry(1))
    again = open_windows(json.loads(json.dumps(describe_windows(windows))))
    with again.locked_to_encode(1):
        again.encode_locked(1, lambda: False)
    assert windows.is_encoded(1)
    assert _texts(windows, 1) == right


@pytest.mark.usefixtures("_small_windows_ahead")
def test_a_window_can_be_encoded_by_another_process(windows: StreamWindows) -> None:
    windows.start_of(1)
    encode_ahead(windows, 1)
    assert _encoders[-1].wait(120) == 0
    assert windows.is_encoded(1)


@pytest.mark.usefixtures("_small_windows_ahead")
def test_one_process_of_a_host_encodes_ahead_and_the_others_wait_for_it(windows: StreamWindows) -> None:
    windows.start_of(1)
    encode_ahead(windows, 1)
    encoder = _encoders[-1]
    encoder.send_signal(signal.SIGSTOP)
    try:
        # Other processes of the run, in which the window is needed, or needed next.
        other = replace(windows, _starts=[])
        encode_ahead(other, 1)
        assert _encoders[-1] is encoder
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(other.open, 1)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
            assert not windows.is_encoded(1)
            # A killed encoder releases the lock.
            encoder.kill()
            assert len(waiting.result(timeout=60)) > 0
    finally:
        encoder.kill()


@pytest.mark.usefixtures("_small_windows_ahead")
def test_the_run_does_not_wait_for_a_process_that_encodes_ahead(
    windows: StreamWindows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = replace(windows, identity="long" * 10**5)
    windows.start_of(1)
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 20\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(encode_ahead, windows, 1).result(timeout=10)
    assert _encoders[-1].poll() is None
    _encoders[-1].kill()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has processes that run where a processor is idle")
def test_an_encoder_leaves_the_processors_to_the_run_and_gets_none_of_its_signals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux may compare the priorities of processes of one session only (`sched_autogroup_enabled`)."""
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    code = "import os; from minilm.data import window_encoder; window_encoder._run_when_idle()\n"
    code += (
        "print(os.sched_getscheduler(0), os.nice(0), os.getsid(0), os.getpgid(0), file=open(os.environ['TOLD'], 'w'))"
    )
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c {shlex.quote(code)}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    encoder = minilm.data.window_encoder._start_encoder({}, 1, 0)
    assert encoder.wait(60) == 0
    told = (tmp_path / "told").read_text().split()
    assert [int(number) for number in told] == [os.SCHED_IDLE, 19, os.getsid(0), encoder.pid]


@pytest.mark.usefixtures("_small_windows_ahead")
def test_a_run_encodes_a_window_itself_if_its_encoder_hardly_runs(
    windows: StreamWindows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(minilm.data.window_encoder, "_WATCH_SECONDS", 0.2)
    reader = WindowReader(
        windows,
        lambda examples, number: Plan(examples.lengths, examples=8, micro_tokens=40),
        lambda number, examples: None,
        steps=10**6,
    )
    reader.at_step(0)
    encoder = _encoders[-1]
    encoder.send_signal(signal.SIGSTOP)
    assert reader.at_step(windows.start_of(1).step)[0] == 1
    assert encoder.returncode == -signal.SIGKILL
    assert caplog.messages[-1] == "other programs take all processors: the run itself encodes window 2"
    _encoders[-1].kill()  # that of the window after


def test_a_run_waits_for_an_encoder_that_is_slow(windows: StreamWindows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm.data.window_encoder, "_WATCH_SECONDS", 0.2)
    slow = subprocess.Popen([sys.executable, "-c", "import time\nwhile time.process_time() < 1: pass"])
    monkeypatch.setattr(minilm.data.window_encoder, "_encoders", [slow])
    end_starved_encoders(windows, 1)
    assert slow.returncode == 0


@pytest.mark.parametrize("change", ["a file", "a setting"])
def test_a_process_that_finds_another_stream_encodes_nothing(windows: StreamWindows, change: str) -> None:
    windows.start_of(1)
    description = describe_windows(windows)
    assert open_windows(description).key == windows.key
    if change == "a file":
        assert isinstance(windows.data.source, tuple)
        os.utime(windows.data.source[0], (1, 1))
    else:
        description["words"] = not description["words"]
    with pytest.raises(ValueError, match="have changed"):
        open_windows(description)


def test_no_process_is_started_for_a_small_window(windows: StreamWindows, monkeypatch: pytest.MonkeyPatch) -> None:
    windows.start_of(1)
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *args, **settings: started.append(args))
    encode_ahead(windows, 1)
    assert started == []


def test_an_encoder_stops_when_the_run_is_gone_and_the_next_process_encodes(windows: StreamWindows) -> None:
    windows.start_of(1)
    with windows.locked_to_encode(1) as lock:
        assert lock is not None
        with pytest.raises(EncodingCancelledError):
            windows.encode_locked(1, lambda: True)
    assert not windows.is_encoded(1)
    assert len(windows.open(1)) > 0


def test_an_encoder_that_finds_no_index_encodes_no_earlier_window(windows: StreamWindows) -> None:
    windows.open(1)
    windows.index.path.unlink()
    for number in (0, 1):
        shutil.rmtree(windows._entry(number))
    with windows.locked_to_encode(2):
        windows.encode_locked(2, lambda: False)
    assert not [*get_cache_folder().glob(f"window-{windows.key}-*")]


def test_each_window_has_the_share_of_each_source_and_a_source_that_ends_is_taken_anew(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = _write(tmp_path, "txt")
    windows = _open(Data(source=(source[1], source[2]), weights=(1, 3)), tokenizer, tokens=1000)
    small = _training_texts(tokenizer)[1]
    for number in range(4):
        texts = _texts(windows, number)
        tokens = [
            sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts if (text in small) == inside)
            for inside in (True, False)
        ]
        # A window takes whole documents.
        assert 250 <= tokens[0] < 250 + 60
        assert 750 <= tokens[1] < 750 + 60
    assert windows.start_of(4).pools[0].passes > 4


def test_documents_without_tokens_at_the_end_of_a_pass_belong_to_the_next_window(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace("¤", "")
    special = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("cls", "sep", "pad", "mask")}
    emptying = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    path = tmp_path / "a.txt"
    texts = [f"document {number}" for number in range(5)]
    path.write_text("\n".join(["¤", *texts, "¤", "¤¤"]))
    # Each document with a token is a window.
    windows = _open(Data(source=str(path)), emptying, tokens=1, held_out=0.0)
    found = [[text for text in _texts(windows, number) if text] for number in range(10)]
    assert found == [[text] for text in texts] * 2
    assert [windows.start_of(number).pools[0].passes for number in (4, 5, 6)] == [0, 0, 1]


def test_a_stream_without_any_token_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace("¤", "")
    (tmp_path / "a.txt").write_text("¤\n¤")
    windows = _open(Data(source=str(tmp_path / "a.txt")), PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(ValueError, match="the training documents hold no token to predict"):
        windows.start_of(1)


@pytest.mark.parametrize("name", ["lock", "jsonl"])
def test_an_error_of_the_cache_says_what_to_do(
    windows: StreamWindows, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open if name == "lock" else Path.open

    def fill_disk(path: Any, *args: Any, **settings: Any) -> Any:
        if f".{name}" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return opened(path, *args, **settings)

    monkeypatch.setattr(*((os, "open") if name == "lock" else (Path, "open")), fill_disk)
    with pytest.raises(CacheError, match=r"the disk is full while the cache .*: free some space, or set HF_HOME"):
        windows.open(0)


def test_samples_of_other_sizes_are_other_entries(windows: StreamWindows, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = list[int]()
    for tokens in (100, 400, 100):
        monkeypatch.setattr(minilm.data.stream_windows, "_SAMPLE_TOKENS", tokens)
        sizes.append(len(windows.sample().ids))
    assert sizes[0] == sizes[2]
    assert sizes[0] < 150
    assert sizes[1] >= 400


def test_a_file_that_changes_during_the_run_is_refused(windows: StreamWindows) -> None:
    windows.start_of(1)
    for shard in windows.pools[0].shards:
        assert isinstance(shard, TextShard)
        with open(shard.table.files[shard.number], "ab") as file:  # type: ignore[union-attr]
            file.write(b"\nmore")
    with pytest.raises(ValueError, match=r"\d\.txt: the file changed during the run; put the old file back"):
        windows.open(1)


def test_an_error_names_the_line_also_behind_the_beginning_of_a_window(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    good = [f"line {number} with some words in it" for number in range(200)]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(_jsonl(good) + b'{"text": 3}\n')
    windows = _open(Data(source=str(path)), tokenizer)
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 201: column 'text' holds int"):
        windows.start_of(100)
