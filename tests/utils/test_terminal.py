"""What a user sees at a terminal: the progress of a run, and a clean line after ctrl-C."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from tests.conftest import SENTENCES
from tests.launch import ROOT, TINY


class Terminal(contextlib.AbstractContextManager["Terminal"]):
    """A program on its own terminal, and the text that it has written there."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.keyboard, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # rows and columns
        self.written = ""
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", **environment},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that it gets the signals of the keyboard
        )
        os.close(theirs)

    def read(self, until: str | None = None, seconds: float = 60) -> None:
        """Wait until the program has written text that matches `until`, or until it ends."""
        end = time.monotonic() + seconds
        while until is None or not re.search(until, self.written):
            assert time.monotonic() < end, self.written[-3000:]
            if select.select([self.keyboard], [], [], 0.1)[0]:
                try:
                    self.written += os.read(self.keyboard, 65536).decode()
                except OSError:  # the last process has closed its side
                    assert until is None, self.written[-3000:]
                    break
        if until is None:
            self.process.wait(timeout=30)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *args: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.keyboard)

    def press(self, key: str) -> None:
        os.write(self.keyboard, key.encode())

    def lines(self) -> list[str]:
        """Return the lines that the terminal shows at the end. A carriage return goes back to the start of a line."""
        shown = []
        for line in re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", self.written).replace("\r\n", "\n").split("\n"):
            text = ""
            for part in line.split("\r"):
                text = part + text[len(part) :]
            shown.append(text.rstrip())
        return shown


@pytest.fixture
def flags(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> tuple[str, ...]:
    """Flags for a run of a tiny model on so much text that encoding it takes many seconds."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("".join(f"{' '.join(SENTENCES)} Number {i}.\n" for i in range(60_000)))
    return (
        *("--data.source", str(tmp_path / "text.txt"), "--tokens.name", str(tmp_path / "tokenizer")),
        *(*TINY, "--run.output-dir", str(tmp_path / "out"), "--run.samples"),
    )


@pytest.mark.scorecard(29)
def test_ctrl_c_while_documents_are_encoded_leaves_a_clean_terminal_and_nothing_half_written(
    flags: tuple[str, ...], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    cache = tmp_path / "cache"
    recipe = str(ROOT / "recipes" / "mlm_pydocs.py")
    with Terminal(sys.executable, recipe, *flags, HF_HOME=str(cache)) as terminal:
        terminal.read(until=r"encoding training documents:\s+[1-9]")
        assert {path.name[:5] for path in (cache / "minilm").iterdir()} == {".corp", "finge", "rows-"}
        terminal.press("\x03")
        pressed = time.monotonic()
        terminal.read()
        took = time.monotonic() - pressed
    *_, last, cursor = terminal.lines()
    assert "Traceback" not in terminal.written
    assert (last.replace("^C", "").strip(), cursor) == ("interrupted", "")
    assert terminal.process.returncode == 130
    entries = [*(cache / "minilm").iterdir()]
    assert {entry.name[:5] for entry in entries} == {"finge", "rows-"}
    assert all((entry / "manifest.json").exists() for entry in entries)
    assert not (tmp_path / "out").exists()
    figure(f"a clean terminal {took:.1f} s after ctrl-C")


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_the_line_after_the_training_of_a_tokenizer_begins_on_the_left(kind: str) -> None:
    program = (
        "from datasets import Dataset; from minilm.data.tokenizer_training import train_tokenizer; "
        f"train_tokenizer(Dataset.from_dict({{'text': {list(SENTENCES)!r}}}), {kind!r}, 300); print('the next line')"
    )
    with Terminal(sys.executable, "-c", program) as terminal:
        terminal.read()
    assert "Compute merges" in terminal.written
    assert re.search(r"(\n|\r\x1b\[2K)the next line", terminal.written), terminal.written[-300:]
