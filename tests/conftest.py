"""What several test files share: tiny tokenizers, documents and models, and a cache of their own."""

import atexit
import gc
import io
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache

# Before any import of the Hugging Face libraries: no test reaches the network or the user's caches.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="minilm-tests-")

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

import minilm.runs.session
from minilm.commands.main import main
from minilm.data.tokenizer_training import train_tokenizer
from minilm.utils.signals import STOP_SIGNALS
from tests.jobs import forget_other_tests
from tests.scorecard import Scorecard

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Return a list of the names in the directory.",
    "If the file does not exist, an exception is raised.",
    "A short one.",
    "Training on two processes gives the same update as training on one process with twice the batch.",
]


torch.set_num_threads(1)  # at these sizes a second one only waits; and bitwise comparisons need the same number


def _skip_sync(descriptor: int) -> None:
    """Take the place of `os.fsync`, and refuse what is not an open file.

    No test cuts the power, so none has to wait for the disk. Tests of what is synced wrap this function.
    """
    os.fstat(descriptor)


os.fsync = _skip_sync
# Runs of one process, and those that it forks, share one measurement of the processor's peak. It takes half a second.
minilm.runs.session.device_peak = cache(minilm.runs.session.device_peak)


@pytest.fixture(scope="module", autouse=True)
def _fresh_process() -> None:
    """The tests of a file begin without the state of accelerate that those of another have left."""
    forget_other_tests()


@pytest.fixture(scope="session")
def documents() -> Dataset:
    """Sixty documents of very different lengths."""
    texts = [" ".join(SENTENCES[(i + j) % 5] for j in range(1 + i * i % 7)) + f" Number {i}." for i in range(60)]
    return Dataset.from_dict({"text": texts})


@pytest.fixture(scope="session")
def tokenizer(documents: Dataset) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on the documents."""
    return train_tokenizer(documents, "bpe", 400)


@pytest.fixture(scope="session")
def unigram(documents: Dataset) -> PreTrainedTokenizerBase:
    """A Unigram tokenizer trained on the documents."""
    return train_tokenizer(documents, "unigram", 320)


Run = Callable[..., tuple[object, list[str], list[str]]]


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """Give minilm's logger its handlers back: a command gives it one that writes to the captured stderr of the test."""
    logger = logging.getLogger("minilm")
    before = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate, logger.level = before


SIGNAL_HANDLERS = {number: signal.getsignal(number) for number in STOP_SIGNALS}


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """Restore the handlers of signals. A command leaves SIGTERM ignored, and processes of later tests inherit that."""
    for number, handler in SIGNAL_HANDLERS.items():
        signal.signal(number, handler)
    yield
    for number, handler in SIGNAL_HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `minilm` on these words and return its status and the lines of its standard output and error."""

    def run(*words: str, stdin: str = "") -> tuple[object, list[str], list[str]]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = None
        try:
            main(words)
        except SystemExit as end:
            status = end.code
        output, error = capfd.readouterr()
        return status, output.splitlines(), error.splitlines()

    return run


def pytest_collection_finish() -> None:
    """Measure the peak before the first fork, and keep what was imported out of the garbage collections of runs."""
    minilm.runs.session.device_peak(torch.device("cpu"), "fp32")
    gc.collect()
    gc.freeze()
    # Otherwise libraries report the frozen objects as leaks when the process ends.
    atexit.register(gc.unfreeze)


SCORECARD = Scorecard()


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Say what this test found, for the scorecard."""
    return lambda text: request.node.user_properties.append(("figure", text))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("scorecard"):
        item.user_properties.append(("row", marker.args[0]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.failed:
        for name, row in report.user_properties:
            if name == "row":
                found = [str(value) for kind, value in report.user_properties if kind == "figure"]
                SCORECARD.add(int(str(row)), report.passed, found)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.option.markexpr == "scorecard":
        terminalreporter.section("scorecard")
        for line in SCORECARD.lines():
            terminalreporter.line(line)
